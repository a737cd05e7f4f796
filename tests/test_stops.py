"""Every way to ask a run to stop: four signals, to three targets, in seven phases, with an output that somebody reads
and one that nobody does. 168 stops; each is saved at the latest after the step that follows the one under way, tells
so, and leaves nobody behind.

pytest tests/test_stops.py

Ranks are forked from a process that has imported all, but those that are stopped in their imports.
"""

import faulthandler
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import end_session, is_quiet, processes_of
from ranks import start_ranks
from tiny import make_shards, tiny_config

from pretrain import cli
from pretrain.checkpoint import write
from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_of
from pretrain.cluster import ranks, signals
from pretrain.cluster.local import free_port, on_cpu, rank_variables
from pretrain.config import Config, config_to_dict
from pretrain.data import loader
from pretrain.engine.step import Engine
from pretrain.errors import UserError
from pretrain.train import journal
from pretrain.train import run as training

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ("TERM", "USR1", "INT", "HUP")
TARGETS = ("rank", "group", "parent")
PHASES = ("imports", "start", "compile", "training", "evaluation", "data", "saving")
OUTPUTS = ("read", "closed")
HELD_AT = 4  # the step of the evaluation or save that is held, and after which data is waited for
TARGET_S, SLOWER = 25, 5  # until nobody is left; how much slower a machine may be that others keep busy
PATIENT_S = 120
pytestmark = pytest.mark.timeout(300)

ALL = list(itertools.product(PHASES, SIGNALS, TARGETS, OUTPUTS))
# One stop of most phases (tests/test_launch.py has one there), each signal, target and output.
FEW = {
    ("start", "HUP", "group", "closed"),
    ("compile", "USR1", "parent", "read"),
    ("training", "TERM", "parent", "closed"),
    ("evaluation", "INT", "rank", "read"),
    ("saving", "HUP", "rank", "read"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


@pytest.fixture(scope="module")
def measured() -> Iterator[list[tuple[float, int]]]:
    """Of each stop, told at the end: seconds until nobody was left, steps from the last finished one to the save."""
    stops: list[tuple[float, int]] = []
    yield stops
    seconds = sorted(seconds for seconds, _ in stops) or [0.0]
    in_time = sum(value <= TARGET_S for value in seconds)
    print(
        f"\n{len(stops)} stops, at most {max((steps for _, steps in stops), default=0)} steps later; nobody left after "
        f"{seconds[len(seconds) // 2]:.1f} s (median), {seconds[-1]:.1f} s (longest); {in_time} within {TARGET_S} s"
    )


class Held:
    """Where a rank waits, in the phase of the test, until the signal has been sent and it has heard of it."""

    def __init__(self, place: Path, hears: bool) -> None:
        self.place, self.hears = place, hears
        self.rank, self.step, self.used = os.environ["RANK"], 0, False

    def __call__(self) -> None:
        if self.used:
            return
        self.used = True
        (self.place / f"ready-{self.rank}").touch()
        while not (self.place / "sent").exists() or (self.hears and not (self.place / f"heard-{self.rank}").exists()):
            time.sleep(0.01)


class Hearing(signals.StopRequest):
    """Notes which step was the last finished one when it has heard of the stop."""

    def __init__(self, held: Held) -> None:
        self._held = held
        super().__init__()

    def _note(self, number: int, frame: object) -> None:
        super()._note(number, frame)
        path = self._held.place / f"heard-{self._held.rank}"
        path.write_text(str(min(self._held.step, int(path.read_text()) if path.exists() else self._held.step)))


def hold(phase: str, held: Held) -> None:
    """Has the rank call `held` in the phase."""

    def before(owner: Any, name: str, due: Any = lambda *_: True) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            if due(*args):
                held()
            return inner(*args, **named)

        setattr(owner, name, wrapped)

    inner = journal.Journal.note

    def note(self: Any, state: Any, *rest: Any) -> Any:
        held.step = state.step
        return inner(self, state, *rest)

    journal.Journal.note = note
    if phase == "start":
        before(training, "build_engine")
    elif phase == "compile":
        before(Engine, "train_step")
    elif phase == "evaluation":
        before(Engine, "predict")
    elif phase == "data":  # in the loader process
        before(loader._TrainSteps, "__getitem__", lambda _, step: step == HELD_AT)
    elif phase == "saving":
        before(write, "_written")


def rank(config: Config, number: int, port: int, place: Path, phase: str, target: str) -> None:
    """What the command line does, from the end of its imports on."""
    os.environ.update(rank_variables(number, 2, port) | on_cpu(1))
    stacks = open(place / f"stacks-{number}", "w")  # of a rank that hangs: its own output may be closed
    faulthandler.dump_traceback_later(PATIENT_S - 20, file=stacks)
    held = Held(place, hears=number == 1 or target != "rank")
    stop = Hearing(held)
    signals._LAUNCHERS = (Path(sys.executable).name,)  # as those above are called here
    signals._LOOK_EVERY_S = 0.05
    signals.end_with_launcher()
    hold(phase, held)
    cli.run(lambda: training.train(config, stop=stop))


def launcher(config: Config, place: Path, phase: str, target: str, output: str) -> None:
    """The launcher's parent, below it the launcher, below that two ranks; ends when they have, or by a signal."""
    os.setsid()
    for name in SIGNALS:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_DFL)
    if output == "closed":
        reads, out = os.pipe()
        os.close(reads)
    else:
        out = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # those here may be pytest's files
    if (own := os.fork()) == 0:
        port, ranks = free_port(), []
        for number in range(2):
            if (child := os.fork()) == 0:
                try:
                    rank(config, number, port, place, phase, target)
                except SystemExit as ended:
                    os._exit(int(ended.code or 0))
                finally:
                    os._exit(99)
            ranks.append(child)
        for name in SIGNALS:  # as launchers do, it outlives what it hands on to its ranks
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
        (place / "ranks").write_text(" ".join(map(str, ranks)))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
        (place / "codes.new").write_text(json.dumps(codes))
        os.replace(place / "codes.new", place / "codes")
        os._exit(0)
    os.waitpid(own, 0)


@pytest.mark.parametrize(
    ("phase", "name", "target", "output"),
    [pytest.param(*one, marks=[pytest.mark.slow if one in FEW else pytest.mark.long], id="-".join(one)) for one in ALL],
)
def test_a_stop(
    phase: str,
    name: str,
    target: str,
    output: str,
    shards: Path,
    tmp_path: Path,
    measured: list[tuple[float, int]],
    request: pytest.FixtureRequest,
) -> None:
    """Exit code 0, a checkpoint of the step under way when it was heard or of the next, STOP.json, no process left."""
    number, folder, quiet_before = getattr(signal, f"SIG{name}"), tmp_path / "tiny", is_quiet()
    if phase == "imports":
        session, sent = stop_in_imports(number, target, output, shards, tmp_path)
        saved, heard = 0, [0]
    else:
        changes = {
            "total_steps": 100_000,
            "checkpoint__every_steps": HELD_AT if phase == "saving" else 100_000,
            "checkpoint__behind": output == "read",
            "log__every_steps": 1,
            **({"data__held_out": 23, "evaluation__every_steps": HELD_AT} if phase == "evaluation" else {}),
            **({"data__workers": 1} if phase == "data" else {}),
        }
        config = tiny_config(shards, tmp_path, **changes)
        (above,) = start_ranks(launcher, 1, config, tmp_path, phase, target, output)
        session = above.pid
        request.addfinalizer(lambda: end_session(session))

        def ready() -> bool:
            held = phase == "training" or len(list(tmp_path.glob("ready-*"))) == 2
            return held and steps(folder) >= {"training": 5, "data": HELD_AT - 1}.get(phase, 0)

        wait_for(lambda: ready() or (tmp_path / "codes").exists(), tmp_path)
        assert ready(), told(tmp_path)
        first, second = map(int, (tmp_path / "ranks").read_text().split())
        if target == "group":
            os.killpg(session, number)
        else:
            os.kill(session if target == "parent" else second, number)
        sent = time.monotonic()
        (tmp_path / "sent").touch()
        wait_for(lambda: (tmp_path / "codes").exists(), tmp_path)
        assert json.loads((tmp_path / "codes").read_text()) == [0, 0], told(tmp_path)
        newest = newest_valid(folder / "checkpoints")
        assert newest is not None, told(tmp_path)
        saved, heard = step_of(newest), [int(path.read_text()) for path in tmp_path.glob("heard-*")]
    wait_for(lambda: not processes_of(session), tmp_path)
    seconds = time.monotonic() - sent
    measured.append((seconds, saved - min(heard)))
    assert max(heard) <= saved <= min(heard) + 2
    assert seconds < (TARGET_S if quiet_before and is_quiet(own=2) else SLOWER * TARGET_S)
    stop = json.loads((folder / "STOP.json").read_text())
    reason = f"asked to stop; saved at step {saved}" if saved else "asked to stop before the first step"
    assert stop == {"reason": reason, "retry": True, "exit_code": 0} and not (folder / "DONE").exists()


# Named as the launchers are: a process whose death is a stop.
PARENT = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
print(subprocess.Popen(sys.argv[2:], stdout=1, stderr=1).wait())
"""


def stop_in_imports(number: int, target: str, output: str, shards: Path, place: Path) -> tuple[int, float]:
    """A real command line, stopped when it has said that it loads torch; returns its session, and when it was told."""
    (place / "tiny.yaml").write_text(yaml.safe_dump(config_to_dict(tiny_config(shards, place))))
    words = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(place / "tiny.yaml")]
    above = subprocess.Popen(
        ["deepspeed", "-S", "-c", PARENT, "deepspeed", *words],
        executable=sys.executable,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **on_cpu(1)},
    )
    assert above.stdout is not None and "loading torch" in above.stdout.readline()
    if output == "closed":
        above.stdout.close()
    (child,) = Path(f"/proc/{above.pid}/task/{above.pid}/children").read_text().split()
    if target == "group":
        os.killpg(above.pid, number)
    else:
        os.kill(above.pid if target == "parent" else int(child), number)
    sent = time.monotonic()
    output_of = "" if output == "closed" else above.stdout.read()
    if target == "rank":
        above.wait(PATIENT_S)
        assert output == "closed" or output_of.splitlines()[-1] == "0", output_of
    wait_for(lambda: not processes_of(above.pid), place)
    above.stdout.close()
    above.wait(PATIENT_S)
    return above.pid, sent


def steps(folder: Path) -> int:
    log = folder / "samples-00000.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def told(place: Path) -> str:
    """Exit codes, why the run has ended, what was said where somebody reads, and where ranks are that hang."""
    files = [place / "codes", place / "tiny" / "STOP.json", place / "log", *sorted(place.glob("stacks-*"))]
    return "\n".join(f"{path.name}: {path.read_text()}" for path in files if path.exists()) or "nothing was told"


def wait_for(condition: Any, place: Path) -> None:
    until = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < until, told(place)
        time.sleep(0.01)


def stopped_when_refused(config: Config) -> str:
    """What a rank comes to that is asked to stop behind its error, as by the launcher of a rank 0 that is gone."""
    with pytest.raises(UserError, match="nowhere"):
        training.train(config, stop=signals.StopRequest())
    if ranks.rank():
        os.kill(os.getpid(), signal.SIGTERM)
    return "goes on"


def test_a_refusal_is_told_by_rank_0_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 ends with its code and no word, where it would say that it saves, and then the same error again."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, branch_from="nowhere")
    first, second = processes = start_ranks(stopped_when_refused, 2, config)
    for process in processes:
        process.join(240)
    assert first.results.recv() == (None, "goes on")
    assert second.exitcode == 2 and "saving and stopping" not in capfd.readouterr().err
