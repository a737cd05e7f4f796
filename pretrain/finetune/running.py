"""Runs sweeps: all unfinished runs, or one run of a job array; then collects the lines of the table.

After any interruption, the same command continues: finished runs are not repeated, unfinished ones resume.
"""

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.cli import tell
from pretrain.cluster.jobs import PASSED_ON, STOPPED, is_held, run_job
from pretrain.cluster.local import default_num_ranks, environment, launcher_or_python, options_of_ranks
from pretrain.config import Config, config_to_yaml
from pretrain.errors import LostProcessError, NonFiniteError, UserError
from pretrain.escape import shown
from pretrain.finetune.results import real_results, results, vtab_results, write_results, write_vtab
from pretrain.finetune.scores import DIVERGED, chosen_lr, claim_sweep, real_score, score
from pretrain.finetune.sweep import Options, Sweep, final_runs, plan_sweep, selecting_runs
from pretrain.storage import write_text
from pretrain.tasks.table import Task, check_any_there, missing

ROOT = Path(__file__).resolve().parents[2]


class SweepRun(NamedTuple):
    """One element of a job array: a run of a task."""

    task: Task
    lr: float | None  # of a selecting run; None: a final run, whose rate is chosen
    seed: int


def plan(tasks: Sequence[Task], options: Options) -> list[Sweep]:
    """Returns the sweeps whose data exists, each folder claimed by its sweep.json.

    Prints, for tasks without data, the command that prepares it. Raises UserError when no task has data, or a folder
    belongs to other weights or data.
    """
    for line in check_any_there((missing(task, options.data) for task in tasks), options.data):
        print(shown(f"missing: {line}"), file=sys.stderr)
    sweeps = [plan_sweep(task, options) for task in tasks if not missing(task, options.data)]
    for sweep in sweeps:
        final_runs(sweep, sweep.protocol.lr_grid[0])  # raises for a wrong key before anything is written
        claim_sweep(sweep)
    return sweeps


def jobs(tasks: Sequence[Task], options: Options) -> list[SweepRun]:
    """Returns all runs in order, whether or not their data exists: an index always means the same run."""
    selecting, final = [], []
    for task in tasks:
        grid = sorted(set(options.lr_grid or (task.finetuning.lr_grid if task.finetuning else ())))
        selecting += [SweepRun(task, lr, 0) for lr in grid if len(grid) > 1]
        final += [SweepRun(task, None, seed) for seed in range(options.num_seeds)]
    return selecting + final


def run_one(tasks: Sequence[Task], index: int, options: Options) -> int:
    """Runs one of the `jobs` unless it is done; returns 0, or the code to exit with.

    Raises UserError when there is no such job, or a final run's rate is not chosen yet.
    """
    listed = jobs(tasks, options)
    if not 0 <= index < len(listed):
        raise UserError(f"--run is {index}, expected 0 to {len(listed) - 1}; --list prints the runs")
    job = listed[index]
    (sweep,) = plan([job.task], options)
    if job.lr is not None:
        config = next(config for config in selecting_runs(sweep) if config.optim.lr == job.lr)
        return _run(config, sweep, options, selecting=True)
    if (lr := chosen_lr(sweep)) is None:
        raise UserError(f"{sweep.folder}: selecting runs are not done yet; run them first (--list prints them)")
    return _run(final_runs(sweep, lr)[job.seed], sweep, options, selecting=False)


def run_sweeps(sweeps: Sequence[Sweep], options: Options) -> int:
    """Runs all unfinished runs; returns 0, or the code to exit with; begins no further run after STOPPED."""
    code = 0
    for sweep in sweeps:
        ended = _run_sweep(sweep, options)
        if ended == STOPPED:
            return ended
        code = code or ended  # tasks are independent: go on with the others
    return code


def _run_sweep(sweep: Sweep, options: Options) -> int:
    selecting, name = selecting_runs(sweep), sweep.task.name
    total = len(selecting) + sweep.num_seeds
    if not all(map(score, selecting)):
        tell(f"{name}: {total} trainings: {len(selecting)} to choose the rate, {sweep.num_seeds} final")
    for number, config in enumerate(selecting, 1):
        title = f"{name}: training {number} of {total}: learning rate {config.optim.lr:g}, to choose it"
        if code := _run(config, sweep, options, selecting=True, title=title):
            return code
    lr = chosen_lr(sweep)
    assert lr is not None
    for number, config in enumerate(final_runs(sweep, lr), len(selecting) + 1):
        title = f"{name}: training {number} of {total}: final, learning rate {lr:g}, seed {config.seed}"
        if code := _run(config, sweep, options, selecting=False, title=title):
            return code
    return 0


def _run(config: Config, sweep: Sweep, options: Options, *, selecting: bool, title: str = "") -> int:
    """Trains unless that is done, and scores ImageNet's final runs by ReaL; returns 0, else the code to exit with.

    Raises UserError when another process trains in the run's folder: later runs may depend on its score.
    """
    folder = config.output / config.name
    if score(config) is None:
        if title:
            tell(title)
        code = train(config, sweep, _num_ranks(options))
        if code == NonFiniteError.exit_code and selecting:
            print(f"{shown(folder)}: learning rate {config.optim.lr:g} is too high, it is not chosen", flush=True)
            (folder / DIVERGED).touch()
        elif code == STOPPED or score(config) is None:
            return _tell_unfinished(folder, code)
    if selecting:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only its score is needed
    elif sweep.task.name == "imagenet" and real_score(config) is None:
        words = [*scoring(config), "--tasks", "real", "--data", str(options.data)]
        code = run_job([*launcher_or_python(_num_ranks(options)), *words], environment(), folder / "lock")
        if code == STOPPED:
            return tell_stopped()
        if code:
            print(
                f"warning: {shown(folder)}: not scored by ReaL labels, see above; the table goes without",
                file=sys.stderr,
            )
    return 0


def _tell_unfinished(folder: Path, code: int) -> int:
    """Prints why a run has ended before its last step; returns the code to exit with."""
    if code == STOPPED or -code in (0, *PASSED_ON):  # below 0: killed by a signal
        return tell_stopped()
    if code < 0:
        killer = " (the kernel's, for want of memory?)" if -code == signal.SIGKILL else ""
        print(f"error: {shown(folder)} died of signal {-code}{killer}; the same command goes on", file=sys.stderr)
        return LostProcessError.exit_code
    if is_held(folder / "lock"):
        raise UserError(
            f"{folder}: in use, perhaps by the same command elsewhere; wait for it, or end its training "
            "(pgrep -af launch/pretrain.py), and the same command goes on; --out gives another folder"
        )
    print(f"error: {shown(folder)} ended with exit code {code}; what went wrong stands above", file=sys.stderr)
    return code


def tell_stopped() -> int:
    """Prints that the command has stopped as requested; returns the code to exit with."""
    print("stopped; the same command goes on", file=sys.stderr)
    return STOPPED


def scoring(config: Config) -> list[str]:
    """Returns the command line that scores a run by tools/evaluate.py, in batches no larger than the run's own.

    The tool computes in float32: its default of 256 images may not fit on a GPU where a validation in bf16 does.
    """
    batch_size = min(filter(None, (config.evaluation.batch_size, config.engine.max_micro_batch_size)))
    words = [ROOT / "tools" / "evaluate.py", config.output / config.name, "--batch-size", batch_size]
    return list(map(str, words))


def _num_ranks(options: Options) -> int:
    return options.num_gpus or default_num_ranks()


def train(config: Config, sweep: Sweep, num_ranks: int) -> int:
    """Runs launch/pretrain.py until no rank writes any more; returns its exit code, or STOPPED when asked to stop."""
    file = sweep.folder / "configs" / f"{config.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, config_to_yaml(config), shared=True)
    words = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *options_of_ranks(num_ranks), "--config", str(file)]
    return run_job(words, environment(), config.output / config.name / "lock")


def collect(sweeps: Sequence[Sweep], out: Path, *, vtab: bool) -> list[dict[str, Any]]:
    """Writes and returns the lines of all tasks with a finished final run; VTAB's mean is the last."""
    found = []
    for sweep in sweeps:
        if (line := results(sweep)) is None:
            print(f"{sweep.task.name}: no final run is done", file=sys.stderr)
            continue
        write_results(sweep.folder, line)
        found.append(line)
        if sweep.task.name == "imagenet" and (real := real_results(sweep, line)):
            write_results(out / "real", real)
            found.append(real)
    if vtab and found:
        found.append(vtab_results(found))
        write_vtab(out, found[-1])
    return found
