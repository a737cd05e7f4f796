"""Ranks that hang, are stopped, blocked or killed: told in one line that names them, and nothing is left running."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import processes_of
from ranks import start_ranks
from tiny import make_shards, tiny_config

from pretrain import cli
from pretrain.cluster import monitor, peers, signals, watchdog
from pretrain.config import Config
from pretrain.errors import DeviceMemoryError, LostProcessError, UserError
from pretrain.train import ending, journal
from pretrain.train import run as training
from pretrain.train.run import train

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(280)
LIMIT_S = 4  # of these runs; a stopped process is ended after it, anything else after ten times as long at first


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def command(config: Config, hangs_on: int | None, how: str) -> None:
    """What the command line does, in a session of its own and with its own log; one rank hangs after step 6."""
    os.setsid()
    rank = os.environ["RANK"]
    log = os.open(config.output / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if rank == str(hangs_on) and how.startswith("dies in "):
        where = {"peers.meet": peers, "check_machine": training, "claim": training}[
            place := how.removeprefix("dies in ")
        ]
        setattr(where, place.rpartition(".")[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    elif rank == str(hangs_on):
        inner = journal.Journal.note

        def note(self: Any, state: Any, *rest: Any) -> Any:
            if state.step == 6:
                {"sleeps": time.sleep, "blocks": ctypes.PyDLL(None).sleep}[how](1000)
            return inner(self, state, *rest)

        journal.Journal.note = note
    cli.run(lambda: train(config, stop=signals.StopRequest()))


class Run:
    """A run's ranks, and what is left of them."""

    def __init__(self, config: Config, num_ranks: int, hangs_on: int | None = None, how: str = "") -> None:
        self.folder = config.output / config.name
        self.logs = [config.output / f"rank{rank}.log" for rank in range(num_ranks)]
        self.ranks = start_ranks(command, num_ranks, config, hangs_on, how)

    def wait_for_steps(self, steps: int) -> None:
        log = self.folder / "samples-00000.jsonl"
        until = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= steps):
            assert time.monotonic() < until and all(rank.is_alive() for rank in self.ranks), self.told()
            time.sleep(0.05)

    def codes(self) -> list[int]:
        """The exit codes of all ranks, once no process of theirs is left."""
        for rank in self.ranks:
            rank.join(timeout=120)
        until = time.monotonic() + 60
        while left := [number for rank in self.ranks for number in processes_of(rank.pid)]:
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(0.1)
        return [rank.exitcode for rank in self.ranks]

    def told(self) -> list[str]:
        """The errors that each rank told, or all of its log where there is none."""
        logs = [log.read_text(errors="replace") if log.exists() else "" for log in self.logs]
        return ["\n".join(line for line in log.splitlines() if "error: " in line) or log for log in logs]

    def close(self) -> None:
        for rank in self.ranks:
            for number in processes_of(rank.pid):
                os.kill(number, signal.SIGKILL)
            rank.kill()
            rank.join()


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run that goes on until something happens to it."""
    started: list[Run] = []

    def begin(num_ranks: int, hangs_on: int | None = None, how: str = "", **changes: Any) -> Run:
        changes = {"engine__watchdog_s": LIMIT_S, "total_steps": 100_000, "checkpoint__every_steps": 100_000, **changes}
        started.append(Run(tiny_config(shards, tmp_path, **changes), num_ranks, hangs_on, how))
        return started[-1]

    yield begin
    for run in started:
        run.close()


@pytest.mark.parametrize(
    ("lost", "number", "what"),
    [
        pytest.param(0, signal.SIGSTOP, "is stopped", marks=pytest.mark.slow),
        (1, signal.SIGSTOP, "is stopped"),
        (1, signal.SIGKILL, "is gone"),
    ],
)
def test_a_lost_rank_is_named_by_the_others(lost: int, number: int, what: str, start: Callable[..., Run]) -> None:
    """One of two ranks is stopped, or killed: the process beside it tells and ends it, the other names it and ends."""
    run = start(2)
    run.wait_for_steps(5)
    os.kill(run.ranks[lost].pid, number)
    codes, told, other = run.codes(), run.told(), 1 - lost
    assert codes[lost] == -signal.SIGKILL and codes[other] == 76, told
    assert f"(process {run.ranks[lost].pid}) {what}, in section " in told[lost]
    assert f"rank {other} of 2 lost another process of the run: rank {lost} on" in told[other], told
    assert f"{what}, in section" in told[other] and "\n" not in told[other]
    assert "Traceback" not in run.logs[other].read_text()
    if other == 0:
        stop = json.loads((run.folder / "STOP.json").read_text())
        assert stop["exit_code"] == 76 and stop["retry"] and f"rank {lost} on" in stop["reason"]


@pytest.mark.parametrize(
    "place",
    [
        "peers.meet",
        pytest.param("check_machine", marks=pytest.mark.slow),
        pytest.param("claim", marks=pytest.mark.slow),
    ],
)
def test_a_rank_lost_at_the_start_is_tried_again(place: str, start: Callable[..., Run]) -> None:
    """Before the run has come to its folder, where nothing can be written yet: exit code 76, without STOP.json."""
    run = start(2, 1, f"dies in {place}")
    assert run.codes() == [76, -signal.SIGKILL], run.told()
    assert "rank 0 of 2 lost another process of the run" in run.told()[0], run.told()
    assert not (run.folder / "STOP.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "blocks"])
def test_a_hanging_rank_is_ended_with_its_stacks(how: str, start: Callable[..., Run]) -> None:
    """A rank that does not come back, with the interpreter free or held: stacks in the log and in the run's folder."""
    run = start(2, hangs_on=1, how=how)
    codes, told = run.codes(), run.told()
    assert codes == [76, 76 if how == "sleeps" else -signal.SIGKILL], told
    what = "hangs" if how == "sleeps" else "is blocked"
    assert f"(process {run.ranks[1].pid}) {what}, in section step after step" in told[1]
    assert "rank 0 of 2 lost another process of the run: rank 1 on" in told[0], told
    report = (run.folder / "lost-rank-00001.txt").read_text()
    for text in (report, run.logs[1].read_text()):
        assert "in note" in text and "test_watchdog.py" in text


def test_a_stopped_loader_process_is_named(start: Callable[..., Run]) -> None:
    """SIGSTOP of a worker: the rank that waits says so, ends, and takes the worker with it."""
    run = start(1, data__workers=1)
    run.wait_for_steps(3)
    (worker,) = [n for n in processes_of(run.ranks[0].pid) if n != run.ranks[0].pid and b"monitor.py" not in words(n)]
    os.kill(worker, signal.SIGSTOP)
    assert run.codes() == [76], run.told()
    assert f"waits for loader process {worker}, stopped, in section data after step" in run.told()[0]
    stop = json.loads((run.folder / "STOP.json").read_text())
    assert stop["exit_code"] == 76 and stop["retry"]


def words(number: int) -> bytes:
    return Path(f"/proc/{number}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_not_watched(start: Callable[..., Run]) -> None:
    """engine.watchdog_s=0: no process beside the rank; and a watched one that ends well leaves nothing behind."""
    run = start(1, total_steps=3, engine__watchdog_s=0)
    assert run.codes() == [0] and not list(run.folder.glob("*rank-*.txt"))
    run = start(1, total_steps=3, name="watched")
    assert run.codes() == [0] and not list(run.folder.glob("*rank-*.txt"))


def test_limits_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first generous, then a few times the longest silence of late, never below the floor; each section apart."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = watchdog._Watch.__new__(watchdog._Watch)
    watch._floor_s, watch._last, watch._silence_s, watch._section = 10.0, clock[0], 0.0, "start"
    watch._longest = {name: watchdog.deque(maxlen=watchdog.REMEMBERED) for name in monitor.SECTIONS}
    watch._memory = watchdog.mmap.mmap(-1, monitor.HEARTBEAT_BYTES)
    watch._beat = monitor.Beat(0, 0, 0.0, 0, False)
    limits = []
    for visit in range(30):
        watch.enter("step", visit)
        limits.append(monitor.read_beat(watch._memory).limit_s)
        clock[0] += 60 if visit == 0 else 4  # the first one compiles
        watch.enter("data", visit)
    assert limits[0] == 100 and limits[1:17] == [300] * 16 and limits[17:] == [20] * 13
    assert monitor.read_beat(watch._memory)[:5] == (60, 29, 10.0, 1, False)


def test_a_suspended_machine_ages_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Age counts this process's own waking time: a job that SLURM suspends, a laptop that is closed, is not ended."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    age = monitor.Age()
    assert age.look(1) == 0
    clock[0] += 0.5
    assert age.look(1) == 0.5
    clock[0] += 3600
    assert age.look(1) == 0.5 + 4 * monitor.LOOK_EVERY_S and age.look(2) == 0


def test_the_process_beside_a_rank_imports_little() -> None:
    """It is started for each rank, before the rank's imports."""
    code = f"import sys; sys.argv = ['m']; import runpy; runpy.run_path({monitor.__file__!r}); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120


def test_reports_of_an_earlier_start_end_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank looks before it has met rank 0, which deletes them; what is written from then on counts."""
    monkeypatch.setenv("RANK", "0")
    old = tmp_path / "lost-rank-00001.txt"
    old.write_text("rank 1 is gone\n")
    with watchdog.watching(tmp_path, 300, 600):
        assert watchdog.lost_others(tmp_path) == []
        (tmp_path / "lost-rank-00002.txt").write_text("rank 2 hangs\n")
        assert watchdog.lost_others(tmp_path) == ["rank 2 hangs"]
        time.sleep(0.01)
        old.write_text("rank 1 is gone again\n")
        assert watchdog.lost_others(tmp_path) == ["rank 2 hangs", "rank 1 is gone again"]
    assert watchdog.lost_others(tmp_path) == ["rank 2 hangs", "rank 1 is gone again"]


OF_A_START = """
import os, sys, time
from pathlib import Path
from pretrain.cluster import watchdog
with watchdog.watching(Path(sys.argv[1]), 300, 600):
    watchdog.belongs_to(sys.argv[2])
    print(flush=True)
    if sys.argv[3] == "fails":
        raise RuntimeError("CUDA error")
    time.sleep(100)
"""


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_reports_of_another_start_end_nobody(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never gets the run's lock tells of its ranks in the same folder; a rank that has it passes over them."""

    def lose_rank(rank: int, start: str) -> None:
        words = [sys.executable, "-c", OF_A_START, str(tmp_path), start, how]
        environment = os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(words, text=True, env=environment, **pipes) as process:
            assert process.stdout is not None and process.stdout.readline() == "\n"
            if how == "is killed":
                process.kill()
        until = time.monotonic() + 20
        while not (tmp_path / f"lost-rank-{rank:05d}.txt").exists() and time.monotonic() < until:
            time.sleep(0.05)

    ours, theirs = "a" * 32, "b" * 32
    monkeypatch.setenv("RANK", "0")
    with watchdog.watching(tmp_path, 300, 600):
        lose_rank(1, "")
        (told,) = watchdog.lost_others(tmp_path)  # before either has the lock: it may be the same start
        assert told.startswith("rank 1 on ")
        lose_rank(2, theirs)
        watchdog.belongs_to(ours)
        assert watchdog.lost_others(tmp_path) == []
        watchdog.section("step", 3)
        lose_rank(3, ours)
        (told,) = watchdog.lost_others(tmp_path)
        assert told.startswith("rank 3 on ") and told.endswith("CUDA error") == (how == "fails")


HANGING = """
import sys, threading, time
from pathlib import Path
from pretrain.cluster import watchdog
watchdog.LOOK_AROUND_S, watchdog.WAITING_S, watchdog.FIRST_FACTOR = 0.5, 0.5, 1
exec(f"def {sys.argv[3]}(): watchdog.beat() or time.sleep(100)")
place = globals()[sys.argv[3]]
with watchdog.watching(Path(sys.argv[1]), int(sys.argv[2]), 600):
    print(flush=True)
    watchdog.beat()
    if sys.argv[4] == "thread":
        threading.Thread(target=place).start()
        time.sleep(100)
    place()
"""


@pytest.mark.parametrize(
    ("place", "floor_s", "told", "report"),
    [
        ("is_invalid_grad_norm in main", 3, "waits for other ranks", "waiting"),
        ("independent_gradient_partition_epilogue in main", 3, "waits for other ranks", "waiting"),  # ZeRO 3
        ("__reduce_and_partition_ipg_grads in thread", 3, "waits for other ranks", "waiting"),  # autograd's, of ZeRO 3
        ("something in main", 3, "hangs", "lost"),
        ("something in thread", 3, "hangs", "lost"),
        ("something in main", 60, "lost another: rank 1 is gone", "waiting"),
    ],
)
def test_who_waits_for_a_gpu_waits_for_others(place: str, floor_s: int, told: str, report: str, tmp_path: Path) -> None:
    """In DeepSpeed's function of that name no frame of a collective shows it; and what is told of another rank is
    proof, whatever this one is doing. That DeepSpeed has them: tests/test_engine_patches.py.
    """
    name, _, thread = place.partition(" in ")
    line = [sys.executable, "-c", HANGING, str(tmp_path), str(floor_s), name, thread]
    environment = os.environ | {"RANK": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        if floor_s == 60:
            (tmp_path / "report").write_text("rank 1 is gone\n")
            (tmp_path / "report").rename(tmp_path / "lost-rank-00001.txt")
        error = process.communicate(timeout=50)[1]
    assert process.returncode == 76 and f" {told}, in section start" in error
    assert told in (tmp_path / f"{report}-rank-00000.txt").read_text()


def test_what_a_gpu_lacks_is_told_by_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others only lose it: it leaves the reason in the folder, and that another try is none."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lack = DeviceMemoryError("evaluation.batch_size: 8 images at a time are too many")
    with pytest.raises(DeviceMemoryError), watchdog.watching(tmp_path, 300, 600), ending.noted(tmp_path):
        raise lack
    assert "evaluation.batch_size: 8" in (tmp_path / "lost-rank-00001.txt").read_text()
    monkeypatch.setenv("RANK", "0")
    ending.note(tmp_path, LostProcessError("rank 0 of 2 lost another process of the run"))
    stop = json.loads((tmp_path / "STOP.json").read_text())
    assert stop == {"reason": str(lack), "retry": False, "exit_code": 2}
    with pytest.raises(LostProcessError, match="rank 1 on .*evaluation.batch_size: 8 .*; that has to be changed$"):
        with ending.lost_processes(tmp_path):
            raise RuntimeError("Connection closed by peer [::1]:1")
    (tmp_path / "checkpoints" / "step-0000000010").mkdir(parents=True)  # it was enough once
    with pytest.raises(DeviceMemoryError) as raised, ending.noted(tmp_path):
        raise lack
    assert raised.value.exit_code == 75  # which whoever starts ranks tries again, 2 never
    stop = json.loads((tmp_path / "STOP.json").read_text())
    assert stop == {"reason": str(lack), "retry": True, "exit_code": 75}
    ending.note(tmp_path, LostProcessError("rank 0 of 2 lost another process of the run"))
    assert json.loads((tmp_path / "STOP.json").read_text())["exit_code"] == 76


def test_an_earlier_start_says_no_for_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STOP.json stays until a start has the run's lock; who starts it tells the old one from the new."""
    monkeypatch.setenv("RANK", "0")
    assert ending.stamp(tmp_path) is None and ending.stamp(tmp_path / "none" / "STOP.json") is None
    ending.note(tmp_path, UserError("a wrong setting"))
    earlier = ending.stamp(tmp_path)
    assert ending.refused(tmp_path) == 2 and ending.refused(tmp_path, earlier) is None
    ending.note(tmp_path, UserError("a wrong setting"))
    assert ending.refused(tmp_path, earlier) == 2


def test_a_silent_node_does_not_hide_what_a_rank_has_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stand in the line: the node, and the report of the rank that is the cause."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(peers, "silent", lambda: ["n2 (rank 1) is there, its first rank is gone"])
    (tmp_path / "lost-rank-00001.txt").write_text("rank 1 on n2 is blocked\n")
    with pytest.raises(LostProcessError, match="its first rank is gone; rank 1 on n2 is blocked; the same command"):
        with ending.lost_processes(tmp_path):
            raise RuntimeError("Connection closed by peer [::1]:1")


def test_who_waits_speaks_itself_and_after_who_is_blocked(tmp_path: Path) -> None:
    """The process beside a rank that waits for others does not take it for blocked; one that is, is named before."""
    assert monitor.BLOCKED_S < watchdog.WAITING_S
    place = tmp_path / "torch" / "distributed" / "waits.py"  # as far as the frames tell
    place.parent.mkdir(parents=True)
    place.write_text("import time\ndef wait(): time.sleep(1000)\n")
    program = (
        "import sys; from pathlib import Path; from pretrain.cluster import watchdog; watchdog.WAITING_S = 14\n"
        "watchdog.FIRST_FACTOR = 1; sys.path.insert(0, sys.argv[1]); import waits\n"
        "with watchdog.watching(Path(sys.argv[2]), 1, 600): waits.wait()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place.parent), str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 76 and "waits for other ranks" in done.stderr, done.stderr
    assert (tmp_path / "waiting-rank-00000.txt").exists() and not (tmp_path / "lost-rank-00000.txt").exists()
