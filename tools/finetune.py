"""Fine-tunes weights on tasks of the paper's table, by its protocol, and scores the test images.

python tools/finetune.py WEIGHTS --task cifar10 [--data ROOT] [--out DIR] [--seeds 3] [key=value ...]
"""

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table

from pretrain import cli, finetune
from pretrain.cluster.local import free_port
from pretrain.config import Config, config_to_yaml
from pretrain.errors import NonFiniteError, UserError
from pretrain.finetune import Sweep
from pretrain.report.figures import paper_table, summary
from pretrain.report.runs import read_runs
from pretrain.storage import write_text
from pretrain.tasks import table as tasks

STOPPED = 130  # exit code when a run was asked to stop, and has saved


class Job(NamedTuple):
    """An element of a job array: which run of which task."""

    task: tasks.Task
    lr: float | None  # of a selecting run; None: a final run, whose rate is chosen
    seed: int


def main() -> int:
    parser = cli.parser(
        "Fine-tunes weights by the paper's protocol: SGD, a learning rate chosen on images held out of train, then\n"
        "all of train for each seed, and every test image scored once. Each run is a restartable pretraining run; the\n"
        "same command again goes on, and what is done is not repeated. Writes results.json and results.md.",
        "python tools/finetune.py runs/NAME --task cifar10 --data data engine.max_micro_batch_size=32",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, converted folder or .npz")
    parser.add_argument("--task", required=True, metavar="NAME", help="cifar10, vtab/eurosat ..., or vtab: all 19")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all tasks' shards (default data)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for runs and results (default: WEIGHTS/finetune)")
    parser.add_argument("--from-scratch", action="store_true", help="random weights of the same architecture instead")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="final runs per task (default 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="per run, warm-up in proportion (default: the paper's)")
    parser.add_argument("--lr", type=_rates, metavar="LR[,LR...]", help="rates to choose from (default: the paper's)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the paper's 384")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="ranks (default: all GPUs, or one CPU rank)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print the runs with their numbers and stop")
    only.add_argument("--run", type=int, metavar="INDEX", help="do one run of the list: for job arrays")
    only.add_argument("--collect", action="store_true", help="train nothing: make the table from what is there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config of every run")
    arguments = parser.parse_intermixed_args()

    chosen = [tasks.task(name) for name in (tasks.VTAB if arguments.task == "vtab" else [arguments.task])]
    start = finetune.read_start(arguments.weights, from_scratch=arguments.from_scratch)
    out = arguments.out or finetune.default_folder(arguments.weights, from_scratch=arguments.from_scratch)
    jobs = _jobs(chosen, arguments)
    if arguments.list:
        return _list(jobs)
    if arguments.run is not None:
        return _run_one(jobs, arguments, start, out)
    sweeps = _plan(chosen, arguments, start, out)
    code = 0
    if not arguments.collect:
        for sweep in sweeps:
            ended = _run_sweep(sweep, arguments)
            if ended == STOPPED:
                return ended
            code = code or ended  # the tasks are independent: the others go on
    found = _collect(sweeps, out, vtab=arguments.task == "vtab")
    if not found and not code:
        raise UserError(f"{out}: no final run is done; the same command without --collect does them")
    if found:
        _show(found, out, vtab=arguments.task == "vtab")
    return code or (0 if len(sweeps) == len(chosen) else UserError.exit_code)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected rates, as 0.003,0.01") from None


def _ranks(arguments: argparse.Namespace) -> int:
    if arguments.num_gpus is not None and arguments.num_gpus < 1:
        raise UserError(f"--num-gpus is {arguments.num_gpus}, expected at least 1")
    return arguments.num_gpus or torch.cuda.device_count() or 1


def _plan(
    chosen: list[tasks.Task], arguments: argparse.Namespace, start: finetune.Start, out: Path
) -> list[finetune.Sweep]:
    """The sweeps whose data is there; the others are named with the command that prepares them."""
    absent = [line for task in chosen if (line := tasks.missing(task, arguments.data))]
    if len(absent) == len(chosen):
        raise UserError(
            f"no data: {'; '.join(absent)}"
            if len(absent) == 1
            else f"none of {len(absent)} sets is in {arguments.data}; the first: {absent[0]}"
        )
    for line in absent:
        print(f"missing: {line}", file=sys.stderr)
    return [_plan_one(task, arguments, start, out) for task in chosen if not tasks.missing(task, arguments.data)]


def _plan_one(task: tasks.Task, arguments: argparse.Namespace, start: finetune.Start, out: Path) -> Sweep:
    sweep = finetune.plan_sweep(
        task,
        start,
        data=arguments.data,
        out=out,
        num_seeds=arguments.seeds,
        steps=arguments.steps,
        lr_grid=arguments.lr,
        image_size=arguments.image_size,
        overrides=arguments.overrides,
    )
    finetune.final_runs(sweep, sweep.protocol.lr_grid[0])  # a wrong key is told before anything is written
    finetune.claim_sweep(sweep)
    return sweep


# --- the runs --------------------------------------------------------------------------------------------------------


def _jobs(chosen: list[tasks.Task], arguments: argparse.Namespace) -> list[Job]:
    """All runs in their order, whether their data is there or not: a number always means the same run."""
    selecting, final = [], []
    for task in chosen:
        grid = sorted(set(arguments.lr or (task.finetuning.lr_grid if task.finetuning else ())))
        selecting += [Job(task, lr, 0) for lr in grid if len(grid) > 1]
        final += [Job(task, None, seed) for seed in range(arguments.seeds)]
    return selecting + final


def _list(jobs: list[Job]) -> int:
    for number, job in enumerate(jobs):
        what = f"final, seed {job.seed}" if job.lr is None else f"select, learning rate {job.lr:g}"
        print(f"{number}\t{job.task.name}\t{what}")
    num_selecting = sum(job.lr is not None for job in jobs)
    ranges = [f"{first}-{last - 1}" for first, last in ((0, num_selecting), (num_selecting, len(jobs))) if first < last]
    print(f"job arrays, one after the other: {', then '.join(ranges)}", file=sys.stderr)
    return 0


def _run_one(jobs: list[Job], arguments: argparse.Namespace, start: finetune.Start, out: Path) -> int:
    if not 0 <= arguments.run < len(jobs):
        raise UserError(f"--run is {arguments.run}, expected 0 to {len(jobs) - 1}; --list prints the runs")
    job = jobs[arguments.run]
    (sweep,) = _plan([job.task], arguments, start, out)
    if job.lr is not None:
        return _run(_of_rate(sweep, job.lr), sweep, arguments, selecting=True)
    if (lr := finetune.chosen_lr(sweep)) is None:
        raise UserError(f"{sweep.folder}: selecting runs are not done yet; run them first (--list prints them)")
    return _run(finetune.final_runs(sweep, lr)[job.seed], sweep, arguments, selecting=False)


def _of_rate(sweep: Sweep, lr: float) -> Config:
    return next(config for config in finetune.selecting_runs(sweep) if config.optim.lr == lr)


def _run_sweep(sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Does what is not done yet; returns 0, or the code to exit with."""
    for config in finetune.selecting_runs(sweep):
        if code := _run(config, sweep, arguments, selecting=True):
            return code
    lr = finetune.chosen_lr(sweep)
    assert lr is not None
    for config in finetune.final_runs(sweep, lr):
        if code := _run(config, sweep, arguments, selecting=False):
            return code
    return 0


def _run(config: Config, sweep: Sweep, arguments: argparse.Namespace, *, selecting: bool) -> int:
    """Trains unless that is done, and scores ImageNet's final runs by ReaL; returns 0, else the code to exit with."""
    folder = config.output / config.name
    if finetune.score(config) is None:
        code = _train(config, sweep, _ranks(arguments))
        if code == NonFiniteError.exit_code and selecting:
            print(f"{folder}: learning rate {config.optim.lr:g} is too high, it is not chosen", flush=True)
            (folder / finetune.DIVERGED).touch()
        elif code == STOPPED or (code <= 0 and finetune.score(config) is None):  # below 0: died of a signal
            print("stopped; the same command goes on", file=sys.stderr)
            return STOPPED
        elif finetune.score(config) is None:
            print(f"error: {folder} ended with exit code {code}; what went wrong stands above", file=sys.stderr)
            return code
    if selecting:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only its score is needed
    elif sweep.task.name == "imagenet" and finetune.real_score(config) is None:
        evaluate = [ROOT / "tools" / "evaluate.py", folder, "--tasks", "real", "--data", arguments.data]
        code = _start([*_launcher(_ranks(arguments)), *map(str, evaluate)])
        if code:
            print(f"warning: {folder}: not scored by ReaL labels, see above; the table goes without", file=sys.stderr)
    return 0


def _train(config: Config, sweep: Sweep, ranks: int) -> int:
    """Runs launch/pretrain.py; returns its exit code, or STOPPED when asked to stop, once no rank writes any more."""
    file = sweep.folder / "configs" / f"{config.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, config_to_yaml(config), shared=True)
    words = [*_launcher(ranks), str(ROOT / "launch" / "pretrain.py"), "--config", str(file)]
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # a terminal tells the ranks itself
            _pass_on(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = _start(words)
        _wait_for_ranks(config.output / config.name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if asked else code


def _launcher(ranks: int) -> list[str]:
    # DeepSpeed's imports DeepSpeed twice more, seconds per run: for one rank there is no need of it.
    if ranks == 1:
        return [sys.executable]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "-q", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def _start(words: list[str]) -> int:
    """Runs a command, which it prints, to its end; returns its exit code."""
    cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    print(f"$ {Path(words[0]).name} {' '.join(words[1:])}", flush=True)
    with subprocess.Popen(words, env={**os.environ, **cpu}) as process:
        return process.wait()


def _pass_on(number: int) -> None:
    """Passes a signal on to the ranks, which save and stop; not to the launcher, which would kill them."""
    for pid in _descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            is_launcher = any(word == b"deepspeed.launcher.launch" or word.endswith(b"/deepspeed") for word in command)
            if not is_launcher:
                os.kill(pid, number)
        except OSError:
            continue  # it has ended


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def _wait_for_ranks(folder: Path) -> None:
    """Waits until rank 0, which may still save when its launcher has died of a signal, lets go of the run's lock."""
    if (folder / "lock").is_file():
        with (folder / "lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)


# --- the table -------------------------------------------------------------------------------------------------------


def _collect(sweeps: list[Sweep], out: Path, *, vtab: bool) -> list[dict[str, Any]]:
    """Writes the line of each task that has one, and returns them; VTAB's mean is the last."""
    found = []
    for sweep in sweeps:
        if (line := finetune.results(sweep)) is None:
            print(f"{sweep.task.name}: no final run is done", file=sys.stderr)
            continue
        finetune.write_results(sweep.folder, line)
        found.append(line)
        if sweep.task.name == "imagenet" and (real := finetune.real_results(sweep, line)):
            finetune.write_results(out / "real", real)
            found.append(real)
    if vtab and found:
        found.append(finetune.vtab_results(found))
        finetune.write_vtab(out, found[-1])
    return found


def _show(found: list[dict[str, Any]], out: Path, *, vtab: bool) -> None:
    table = Table(title=str(out))
    for name in ("task", "metric", "mean", "seeds", "lr", "images"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for line in found:
        lr = "" if line["lr"] is None else f"{line['lr']:g}"
        seeds = str(len(line["values"])) + ("" if line["complete"] else ", incomplete")
        table.add_row(line["task"], line["metric"], finetune.percent(line), seeds, lr, f"{line['n']:,}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for line in found[-1:] if vtab else found:
        if line["differs"]:
            print(f"{line['task']}: not the paper's protocol: {'; '.join(line['differs'])}")
    beside = paper_table([summary(run) for run in read_runs([out])])
    table = Table(*beside.header, title="top-1 beside the paper's")
    for row in beside.rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    cli.run(main)
