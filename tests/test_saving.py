"""Bad luck while saving: at every system call of a save a kill, a full disk, a failing disk. strace injects it.

PRETRAIN_TEST_STRACE=all tries every call; without it a sample is drawn, fewer without the slow tests.
docs/reliability.md has the counts.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from injection import LOOKING, WRITING, Gate, Point, counted, points, traced, why_not
from ranks import run_ranks, start_ranks
from test_resume import expect_same_run, finish, steps_logged, wait_for_steps
from tiny import make_shards, tiny_config

from pretrain import log
from pretrain.checkpoint import write
from pretrain.checkpoint.find import newest_valid, validate
from pretrain.checkpoint.layout import Slice, step_folders, step_of
from pretrain.checkpoint.read import CheckpointReader
from pretrain.config import Config
from pretrain.data.order import Order
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.train.run import train
from pretrain.train.save import Saver
from pretrain.train.state import TrainState

ALL = os.environ.get("PRETRAIN_TEST_STRACE") == "all"
KILL, FULL, FAILING = "signal=KILL", "error=ENOSPC", "error=EIO"
# What is disturbed: a save that training waits for, or one of its two parts in a thread behind it. Each save has two
# jobs, which number its parts.
AT_ONCE, WRITER, PUBLISHER = None, 0, 1
PARTS = pytest.mark.parametrize("part", [AT_ONCE, WRITER, PUBLISHER], ids=["at_once", "writer", "publisher"])
WHY_NOT = why_not()
needs_strace = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def save_step(
    config: Config, step: int, *, must_succeed: bool = False, check: Callable[[], None] = lambda: None
) -> None:
    """What a run does at a save, its engine replaced by a tensor of which every element is the step."""
    weights = [Slice("weight", (100,), 0, torch.full((100,), float(step)))]
    engine: Any = SimpleNamespace(
        check=check,
        state=lambda: {"optimizer_step": float(step), "loss_scaler": None},
        weights=lambda: weights,
        moments=lambda: [Slice("exp_avg/weight", (100,), 0, weights[0].values)],
        averages=lambda: [],
        generators=lambda: {"cpu": torch.get_rng_state()},
    )
    train = SimpleNamespace(sha256="0" * 64, class_names=["a", "b"])
    order = Order(num_samples=101, held_out=0, global_batch=12, seed=0)
    data: Any = SimpleNamespace(train=train, order=order, num_classes=2)
    meter: Any = SimpleNamespace(window=lambda: [0.0, 0.0, 0.0])
    run_log: Any = SimpleNamespace(sync=lambda: log.sync(config.output / config.name))
    claimed: Any = SimpleNamespace(check=lambda: None)
    saver = Saver(config, data, engine, run_log, claimed)
    saver.save(TrainState(step=step), meter, must_succeed=must_succeed)
    weights[0].values.fill_(-1)  # the training goes on
    saver.finish()


def wait_in_jobs(gate: Gate, part: int, *, first_only: bool = False) -> None:
    """From now on the thread of one part of each save waits at the gate before and after its work."""
    real, jobs = write.in_background, [0]

    def begun(work: Callable[[], Any], *, behind: bool) -> Future[Any]:
        number, jobs[0] = jobs[0], jobs[0] + 1

        def waiting() -> Any:
            gate.enter()
            try:
                return work()
            finally:
                gate.leave()

        waits = number == part if first_only else number % 2 == part
        return real(waiting if waits else work, behind=behind)

    write.in_background = begun


def expect_sound(config: Config, at_least: int, valid: int) -> None:
    """The newest step is readable, none is lost, and so many are valid."""
    folder = config.output / config.name / "checkpoints"
    found = step_folders(folder)
    assert len(found) >= valid, f"only {found} are left"
    for path in found:
        validate(path)
        assert bool((CheckpointReader(path).tensor("weight") == step_of(path)).all()), path
    assert newest_valid(folder) == found[0] and step_of(found[0]) >= at_least, f"newest is {found[0]}"


def tried(config: Config, steps: list[int], part: int | None, calls: str, point: Point | None) -> Any:
    """Saves the steps in a child, the first one under strace; returns how it ended and its calls."""
    gate = Gate(config.output / "gate")
    if not (pid := os.fork()):
        code = 1
        try:
            os.dup2(os.open(config.output / "stderr", os.O_WRONLY | os.O_CREAT), 2)
            if part is None:  # at once
                gate.enter()
                save_step(config, steps[0])
                gate.leave()
            else:
                wait_in_jobs(gate, part, first_only=True)
                save_step(config, steps[0])
            for step in steps[1:]:
                save_step(config, step, must_succeed=True)
            code = 0
        finally:
            os._exit(code)
    status: list[int] = []

    def ended() -> bool:
        found, how = os.waitpid(pid, os.WNOHANG)
        status.extend([how] if found else [])
        return bool(found)

    try:
        assert gate.reached(ended=ended), (config.output / "stderr").read_text()
        with traced(gate.thread, calls, config.output / "trace", point):
            gate.open()
            alive = gate.reached(left=True, ended=ended)
        if alive:
            gate.open()
            status.append(os.waitpid(pid, 0)[1])
    finally:
        if not status:  # it would wait at the gate for ever
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status[0]), counted(config.output / "trace")


def check_point(config: Config, step: int, part: int | None, point: Point) -> str | None:
    """Tries one point at the save of `step` beside the steps 1 and 2; returns what is wrong after it."""
    run = config.output / config.name
    steps = [step] if point.effect == KILL else [step, step + 1]
    code, _ = tried(config, steps, part, WRITING, point)
    told = (config.output / "stderr").read_text()
    try:
        if point.effect == KILL:
            assert code == -9, f"ended with {code}: {told}"
            expect_sound(config, at_least=2, valid=2)
            save_step(config, step + 1, must_succeed=True)  # the next start's
        assert code in (0, -9), f"ended with {code}: {told}"
        expect_sound(config, at_least=step + 1, valid=2)
        left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not left, f"{left} is left"
    except Exception as error:  # all points are tried, and all failures told
        return f"{point}: {type(error).__name__}: {error}"
    return None


def sweep(
    folder: Path, step: int, part: int | None, effects: list[str], calls: str, sample: int | None
) -> tuple[int, list[str]]:
    """Saves `step` beside the steps 1 and 2, once for each point or for a sample; returns their number and failures.

    Step 2 is a step saved twice.
    """
    options: dict[str, Any] = {"checkpoint__keep_last": 2, "checkpoint__behind": part is not AT_ONCE}
    template = tiny_config(folder, folder / "template", **options)
    (template.output / "tiny").mkdir(parents=True)
    (template.output / "tiny" / "metrics.jsonl").write_text('{"step": 1}\n')
    for before in (1, 2):
        save_step(template, before)
    failures, tries = [], 0

    def fresh(name: str) -> Config:
        shutil.copytree(template.output, folder / name)
        return tiny_config(folder, folder / name, **options)

    code, counts = tried(fresh("counted"), [step], part, calls, None)
    assert code == 0 and counts["fsync"] >= {AT_ONCE: 7, WRITER: 3, PUBLISHER: 5}[part], (code, counts)
    todo = points(counts, effects)
    for point in todo if sample is None else random.Random(0).sample(todo, min(sample, len(todo))):
        tries += 1
        failure = check_point(fresh("try"), step, part, point)
        failures += [failure] if failure else []
        shutil.rmtree(folder / "try")
    return tries, failures


def expect_no_failure(
    tmp_path: Path, step: int, part: int | None, effects: list[str], calls: str, sample: int | None
) -> None:
    ((tries, failures),) = run_ranks(sweep, 1, tmp_path, step, part, effects, calls, sample, timeout_s=3000)
    print(f"{tries} points")
    assert not failures, "\n".join(failures)
    assert tries == sample or (sample is None and tries > 10)


AGAIN = pytest.mark.parametrize("step", [3, 2], ids=["next_step", "step_again"])


@needs_strace
@PARTS
@AGAIN
def test_a_kill_at_some_calls_of_a_save(step: int, part: int | None, tmp_path: Path) -> None:
    """SIGKILL: two valid checkpoints at every instant, the newest readable, and the next save leaves nothing over."""
    expect_no_failure(tmp_path, step, part, [KILL], WRITING, sample=10)


@needs_strace
@PARTS
@AGAIN
def test_an_error_at_some_calls_of_a_save(step: int, part: int | None, tmp_path: Path) -> None:
    """A full or failing disk: the process goes on, the next save succeeds, and nothing is left over."""
    expect_no_failure(tmp_path, step, part, [FULL, FAILING], f"{WRITING} {LOOKING}", sample=8)


@needs_strace
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@PARTS
@AGAIN
def test_a_kill_at_every_call_of_a_save(step: int, part: int | None, tmp_path: Path) -> None:
    """The same at all of them."""
    expect_no_failure(tmp_path, step, part, [KILL], WRITING, sample=None)


@needs_strace
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@PARTS
@AGAIN
def test_an_error_at_every_call_of_a_save(step: int, part: int | None, tmp_path: Path) -> None:
    """The same at all of them; those that only look at the disk when all is asked for."""
    calls = f"{WRITING} {LOOKING}" if ALL else WRITING
    expect_no_failure(tmp_path, step, part, [FULL, FAILING], calls, sample=None)


def test_logs_are_on_the_disk_before_the_checkpoint_that_covers_them(tmp_path: Path, synced: list[str]) -> None:
    """A resumed run looks at no line of the steps before: after a power cut they would be missing for ever."""
    config = tiny_config(tmp_path, tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text('{"step": 1}\n')
    save_step(config, 1, must_succeed=True)
    assert "metrics.jsonl" in synced[: synced.index("now step-0000000001")]


def test_what_the_model_does_not_hold_is_not_saved(tmp_path: Path) -> None:
    """The guard of the slices is asked before anything is written."""

    def wrong() -> None:
        raise AssertionError("the owned float32 slice is not what the model holds")

    (tmp_path / "tiny").mkdir()
    with pytest.raises(AssertionError, match="owned float32 slice"):
        save_step(tiny_config(tmp_path, tmp_path), 1, check=wrong)
    assert not (tmp_path / "tiny" / "checkpoints").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"step": True},
        {"step": -1},
        {"step": 1.0},
        {"validation_due": 1},
        {"bad_samples": []},
        {"bad_samples": {"tar": "3"}},
        {"metrics": {"val/top1": "good"}},
        {"window": [0, 0]},
        {"recent_bad": [[1]]},
        {"recent_bad": [[1, 2.0]]},
        {"window": 3},
    ],
)
def test_a_state_of_other_types_is_refused(change: dict[str, Any]) -> None:
    """The key is named; a NaN that a validation gave is a number, and a key that is missing has its default."""
    good = json.loads(json.dumps(asdict(TrainState(step=3, metrics={"val/loss": float("nan")}))))
    assert str(TrainState.of(Fields.of(good, "x"))) == str(TrainState(step=3, metrics={"val/loss": float("nan")}))
    others = {"step": 1, "skipped_steps": 2, "skipped_in_a_row": 3, "damaged_samples": 4, "window": [1.0, 2.0, 3.0]}
    others |= {"recent_bad": [[3, 4], [5, 6]]}
    others |= {"validation_due": True, "features_due": True, "bad_samples": dict.fromkeys(good["bad_samples"], 5)}
    full = {**good, **others, "metrics": {"val/top1": 0.5}}
    assert asdict(TrainState.of(Fields.of(full, "x"))) == full  # no field is forgotten
    assert {*others, "metrics"} == good.keys()
    del good["features_due"]
    assert TrainState.of(Fields.of(good, "x")).features_due is False
    with pytest.raises(UserError, match=f"^x.*{next(iter(change))}"):
        TrainState.of(Fields.of({**good, **change}, "x"))


# --- real trainings --------------------------------------------------------------------------------------------------


def gated_training(config: Config, victim: int, part: int, gate_file: Path) -> None:
    """Trains; one part of each save waits at a gate, before and after its work, on rank `victim`."""
    if int(os.environ["RANK"]) == victim:
        wait_in_jobs(Gate(gate_file), part)
    train(config)


class Training:
    """A training on some ranks, one of which waits in a thread before and after a part of each of its saves."""

    def __init__(self, config: Config, num_ranks: int, victim: int, part: int) -> None:
        config.output.mkdir(exist_ok=True)
        self._trace, file = config.output / "trace", config.output / "gate"
        file.unlink(missing_ok=True)
        self._gate = Gate(file)
        self._processes = start_ranks(gated_training, num_ranks, config, victim, part, file)
        self._victim = self._processes[victim]

    def save(self, point: Point | None = None, look: Callable[[], None] = lambda: None) -> Counter[str] | None:
        """Lets the next save's part happen, under strace; returns its calls, None when the rank did not live on.

        look: called when the part has been done and the training cannot save further. What it raises ends the training,
        which would wait at the gate for ever.
        """
        try:
            assert self._gate.reached(ended=self._ended), self.outcomes()
            with traced(self._gate.thread, WRITING, self._trace, point):
                self._gate.open()
                alive = self._gate.reached(left=True, ended=self._ended)
            if not alive:
                return None
            look()
        except BaseException:
            self.kill()
            raise
        self._gate.open()
        return counted(self._trace)

    def outcomes(self) -> list[str | None]:
        """Waits for the end; returns what went wrong on each rank."""
        try:
            return [process.results.recv()[0] if process.results.poll(60) else "timeout" for process in self._processes]
        except EOFError:
            return ["died"]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends all ranks, as a launcher does when one has died."""
        for process in self._processes:
            process.kill()
            process.join()

    def _ended(self) -> bool:
        return not self._victim.is_alive() or self._victim.results.poll()


RANKS = pytest.mark.parametrize(
    ("num_ranks", "victim", "part"), [(1, 0, WRITER), (2, 0, PUBLISHER), (2, 1, WRITER)], ids=["1-0w", "2-0p", "2-1w"]
)
MORE = 8  # saves beyond those that are disturbed


def prepared(tmp_path: Path, num_ranks: int, victim: int, part: int, effects: list[str], sample: int) -> Any:
    """Returns an undisturbed run that has ended, another one that has saved four times, and what to do to its saves.

    They have dropout, so that random states count, and save at each step.
    """
    shards = make_shards(tmp_path / "squares")
    options: dict[str, Any] = {"model__dropout": 0.1, "checkpoint__every_steps": 1, "checkpoint__keep_last": 2}

    def config(name: str, steps: int) -> Config:
        return tiny_config(shards, tmp_path / name, total_steps=steps, **options)

    training = Training(config("counted", 1000), num_ranks, victim, part)
    counts = [training.save() for _ in range(5)][-1]
    training.kill()
    todo = points(counts or Counter(), effects)
    todo = todo if ALL else random.Random(victim).sample(todo, min(sample, len(todo)))
    undisturbed, disturbed = config("undisturbed", len(todo) + MORE), config("disturbed", len(todo) + MORE)
    run_ranks(finish, num_ranks, undisturbed)
    training = Training(disturbed, num_ranks, victim, part)
    for _ in range(4):
        training.save()
    return undisturbed, disturbed, training, todo


def expect_two_valid(config: Config) -> None:
    folder = config.output / config.name / "checkpoints"
    found = step_folders(folder)
    for path in found:
        validate(path)
    assert len(found) >= 2 and newest_valid(folder) == found[0]


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(7200)
@RANKS
def test_trainings_killed_in_their_saves_end_alike(num_ranks: int, victim: int, part: int, tmp_path: Path) -> None:
    """A training killed in its first save after each start, at another call each time: the same bits at the end."""
    undisturbed, killed, training, todo = prepared(tmp_path, num_ranks, victim, part, [KILL], sample=4)
    training.kill()
    missed = []
    for point in todo:
        training = Training(killed, num_ranks, victim, part)
        missed += [point] if training.save(point) is not None else []
        training.kill()
        expect_two_valid(killed)
    run_ranks(finish, num_ranks, killed)
    expect_same_run(killed, undisturbed)
    print(f"{len(todo) - len(missed)} kills; not reached: {missed}")
    assert len(missed) <= len(todo) // 4


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(7200)
@RANKS
def test_a_training_on_a_failing_disk_ends_alike(num_ranks: int, victim: int, part: int, tmp_path: Path) -> None:
    """ENOSPC or EIO in save after save, at another call each time: it trains to its end, with the same bits."""
    undisturbed, failing, training, todo = prepared(tmp_path, num_ranks, victim, part, [FULL, FAILING], sample=20)
    for point in todo:
        calls = training.save(point, look=lambda: expect_two_valid(failing))
        assert calls is not None, f"{point}: {training.outcomes()}"
    for _ in range(MORE - 4):
        training.save()
    assert training.outcomes() == [None] * num_ranks
    expect_same_run(failing, undisturbed)
    print(f"{len(todo)} errors")


def slow_training(config: Config, slow: int, go: Path) -> None:
    """Trains; on rank `slow` what is written behind the training waits until the file `go` exists."""
    import pretrain.checkpoint.write

    real = pretrain.checkpoint.write._written

    def written(*arguments: Any) -> Any:
        deadline = time.monotonic() + 100
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return real(*arguments)

    if int(os.environ["RANK"]) == slow:
        pretrain.checkpoint.write._written = written
    train(config)


def noted(folder: Path) -> list[int]:
    """The steps at which all ranks know that a save is done, by rank 0 at step 1 and by rank 1 at step 3."""
    from pretrain.cluster import ranks
    from pretrain.data.loader import Batch
    from pretrain.engine.step import StepResult
    from pretrain.train.journal import Journal

    ranks.start(60)
    config = tiny_config(folder, folder, log__samples=False)
    ones, step, taken = torch.ones(6, dtype=torch.long), 0, []
    batch = Batch(ones, ones[:, None], ones[:, None], ones.bool(), ones, ones, [])
    saver: Any = SimpleNamespace()
    journal, stop = Journal(folder, config), cast(Any, SimpleNamespace(signal_name=None))
    for step in range(6):
        saver.done = not taken and step >= (3 if ranks.rank() else 1)
        answer = journal.ask(batch, None, stop, saver)
        stopping, saver_done = journal.note(TrainState(step=step), batch, StepResult(torch.ones(3), 1.0, True), answer)
        assert not stopping
        taken += [step] * saver_done
    return taken


def test_a_save_goes_on_in_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    """In the first one in which all have done their share, and not before."""
    assert run_ranks(noted, 2, tmp_path) == [[3], [3]]


def test_a_stop_while_a_save_is_under_way(tmp_path: Path) -> None:
    """Training goes on while rank 1 cannot write; asked to stop, it waits for that save, makes its own, and ends. What
    follows is the undisturbed run, bit for bit."""
    shards = make_shards(tmp_path / "squares")
    options: dict[str, Any] = {"model__dropout": 0.1, "checkpoint__every_steps": 6, "total_steps": 20}
    stopped, undisturbed = (tiny_config(shards, tmp_path / name, **options) for name in ("stopped", "undisturbed"))
    folder, go = stopped.output / stopped.name / "checkpoints", tmp_path / "go"
    processes = start_ranks(slow_training, 2, stopped, 1, go)
    try:
        wait_for_steps(stopped, processes, 9)
        assert step_folders(folder) == [] and (folder / ".tmp-step-0000000006").is_dir()
        os.kill(processes[1].pid, signal.SIGTERM)
        time.sleep(0.2)
        assert step_folders(folder) == []
        go.touch()
        assert [process.results.recv() for process in processes if process.results.poll(100)] == [(None, None)] * 2
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = [step_of(path) for path in step_folders(folder)]
    assert found[-1] == 6 and 9 <= found[0] == steps_logged(stopped) < 20  # and 12, where this test was slow to look
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    run_ranks(finish, 2, stopped)
    run_ranks(finish, 2, undisturbed)
    expect_same_run(stopped, undisturbed)
