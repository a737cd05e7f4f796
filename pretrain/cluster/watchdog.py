"""The watchdog: ends a rank that hangs, and reports which one, where, and the stacks of its threads.

It uses no collectives, because they are what hangs. A rank reports its section and its progress (`section`, `beat`). A
thread compares the time since the last beat with the section's limit, learned from the run. The monitor process
(monitor.py) covers a rank that is stopped, blocked or gone. A rank that waits learns from the run's folder which other
ranks were lost. Imports no torch.
"""

import faulthandler
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from pretrain.cluster import monitor, peers
from pretrain.cluster.monitor import SECTIONS, Age, Beat
from pretrain.cluster.slurm import rank_so_far
from pretrain.errors import DeviceMemoryError, LostProcessError
from pretrain.escape import shown

FACTOR = 5  # a section's limit is so many times its longest recent time without a beat
FIRST_FACTOR = 10  # of the floor, until a section has been entered FIRST times: compilation, cold disks
FIRST, REMEMBERED = 3, 16  # visits of a section
WAITING_S = 20.0  # a rank that waits for others lets them report first
LOOK_AROUND_S = 10.0  # without a beat, after which others' reports are looked for
_MONITOR_ENDS_S = 10.0  # it looks every half second
_TOLD = 3  # nodes that a line names
_MAX_HEAD = 20_000  # characters of a report that are read: its first two lines
_WAITS_IN = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))
# Functions, most of DeepSpeed, in which a rank waits for its GPU, and the GPU for other ranks: the gradient norm; under
# ZeRO 3 also the end of each backward pass, the all-gather of small weights, and outstanding gradients and weights.
_WAITS_FOR_DEVICE = {
    "is_invalid_grad_norm",
    "independent_gradient_partition_epilogue",
    "_allgather_params_coalesced",
    "__reduce_and_partition_ipg_grads",
    "fetch_sub_module",
    "has_overflow",  # of fp16
    "from_device",
}

_watch: "_Watch | None" = None


def from_device(read: Callable[[], Any]) -> Any:
    """Returns read(), a host sync. The GPU may be waiting for another rank: then it is not this rank that hangs."""
    return read()


@contextmanager
def watching(folder: Path, floor_s: int, timeout_s: int) -> Iterator[None]:
    """Watches this rank within the block; does nothing if it is watched already, or if floor_s is 0.

    folder: the run's, for reports of lost ranks. floor_s: no limit is shorter. timeout_s: after which the others give
    up on a collective; a longer floor is cut to it.
    """
    global _watch
    if _watch is not None or not floor_s:
        yield
        return
    _watch = _Watch(folder, min(floor_s, timeout_s))
    try:
        yield
    except Exception as error:
        _watch.ended_by(error)
        raise
    finally:
        _watch.close()
        _watch = None


def section(name: str, step: int | None = None) -> None:
    """Reports that this rank enters a section of the run, one of SECTIONS. step: the last finished one."""
    if _watch is not None:
        _watch.enter(name, step)


def beat() -> None:
    """Reports that this rank makes progress."""
    if _watch is not None:
        _watch.beat()


def asked(answered: Callable[[], bool]) -> None:
    """Reports a pending collective: until `answered()`, this rank waits for others, whatever it does meanwhile."""
    if _watch is not None:
        _watch.answered = answered


def belongs_to(start: str) -> None:
    """Sets the start of the run that this rank belongs to, 32 letters: from now on only reports of that start count.

    A start that does not get the run's lock reports its lost ranks in the same folder.
    """
    if _watch is not None:
        _watch.name_start(start.encode())


def tell_also(function: Callable[[LostProcessError], None]) -> None:
    """Makes the watchdog call a function with its message, before it ends the process."""
    if _watch is not None:
        _watch.also = function


def forget_reports(folder: Path) -> None:
    """Deletes an earlier start's reports of lost ranks."""
    for path in [*folder.glob("lost-rank-*.txt"), *folder.glob("waiting-rank-*.txt")]:
        with suppress(OSError):
            path.unlink()


def lost_others(folder: Path, wait_s: float = 0.0) -> list[str]:
    """Returns the reports of other ranks that were lost, a line each; waits for the first, at most `wait_s`."""
    own, until = f"lost-rank-{rank_so_far(os.environ):05d}.txt", time.monotonic() + wait_s
    passed_over = _watch.earlier if _watch is not None else set()
    own_start = _watch.start if _watch is not None else ""
    while True:
        found = []
        with suppress(OSError):
            # Over NFS a listing may be a minute old, until this node creates a file there, as this does.
            tempfile.TemporaryFile(dir=folder).close()
        with suppress(OSError):
            for path in sorted(folder.glob("lost-rank-*.txt"), key=lambda path: path.stat().st_mtime):
                if path.name != own and _identity(path) not in passed_over:
                    with open(path, errors="replace", opener=_not_a_link) as file:
                        told, start = [*file.read(_MAX_HEAD).splitlines(), "", ""][:2]
                    if start.partition(monitor.START)[2] == own_start:
                        found.append(shown(told[: monitor.MAX_LINE].strip()))
        if found or time.monotonic() >= until:
            return found
        time.sleep(0.2)


def _identity(path: Path) -> tuple[str, int]:
    return path.name, path.stat().st_mtime_ns


def _not_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


class _Watch:
    """A rank's heartbeat, the thread that watches it, and its monitor process."""

    def __init__(self, folder: Path, floor_s: float) -> None:
        self._folder, self._floor_s, self._rank = folder.absolute(), floor_s, rank_so_far(os.environ)
        self._stopped_s = min(monitor.STOPPED_S, floor_s)
        # Reports of an earlier start: rank 0 deletes them, but this rank looks before it has met rank 0.
        self.earlier: set[tuple[str, int]] = set()
        with suppress(OSError):
            self.earlier = {_identity(path) for path in folder.glob("lost-rank-*.txt")}
        self._longest: dict[str, deque[float]] = {name: deque(maxlen=REMEMBERED) for name in SECTIONS}
        self._section, self._silence_s, self._last = "start", 0.0, time.monotonic()
        self.also: Callable[[LostProcessError], None] = lambda error: None
        self.answered: Callable[[], bool] = lambda: True
        self._heartbeat, self._stacks = _shared_file(), _shared_file()
        os.ftruncate(self._heartbeat, monitor.HEARTBEAT_BYTES)
        self._memory = mmap.mmap(self._heartbeat, monitor.HEARTBEAT_BYTES)
        self._beat = Beat(0, 0, self._limit_s(), SECTIONS.index("start"), False)
        monitor.write_beat(self._memory, self._beat)
        faulthandler.register(monitor.DUMP_SIGNAL, file=self._stacks, all_threads=True)
        passed = (self._heartbeat, self._stacks)
        words = [sys.executable, "-I", "-S", monitor.__file__, *map(str, passed), str(self._rank), str(os.getpid())]
        self._monitor = subprocess.Popen(
            [*words, str(self._folder), str(self._stopped_s)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=passed,
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, name: str, step: int | None) -> None:
        self._note_silence()
        self._longest[self._section].append(self._silence_s)
        self._section, self._silence_s = name, 0.0
        step = self._beat.step if step is None else step
        self._beat = self._beat._replace(step=step, limit_s=self._limit_s(), section=SECTIONS.index(name))
        self.beat()

    @property
    def start(self) -> str:
        return monitor.name_of(self._beat.start)

    def name_start(self, name: bytes) -> None:
        self._beat = self._beat._replace(start=name)
        self.beat()

    def beat(self) -> None:
        self._note_silence()
        self._beat = self._beat._replace(count=self._beat.count + 1)
        monitor.write_beat(self._memory, self._beat)

    def ended_by(self, error: Exception) -> None:
        """Reports an error that other ranks may not have met: a defect of ours, or a lack of this GPU's memory."""
        if not hasattr(error, "exit_code") or isinstance(error, DeviceMemoryError):
            who, where = monitor.place(self._rank, os.getpid(), self._beat)
            line = f"{who} ended, {where}: {type(error).__name__}: {error}".splitlines()[0]
            monitor.report(self._folder, self._rank, line, self._beat.start)

    def close(self) -> None:
        """Ends the watching, in order."""
        self._closing.set()
        self._thread.join()
        monitor.write_beat(self._memory, self._beat._replace(ended=True))
        faulthandler.unregister(monitor.DUMP_SIGNAL)
        try:
            self._monitor.wait(_MONITOR_ENDS_S)
        except subprocess.TimeoutExpired:  # stopped, or writing a report to a disk that hangs
            self._monitor.kill()
            self._monitor.wait()
        os.close(self._heartbeat)
        os.close(self._stacks)

    def _note_silence(self) -> None:
        now = time.monotonic()
        self._silence_s, self._last = max(self._silence_s, now - self._last), now

    def _limit_s(self) -> float:
        seen = self._longest[self._section]
        first = FIRST_FACTOR * self._floor_s if len(seen) < FIRST else 0.0
        return max(self._floor_s, first, FACTOR * max(seen, default=0.0))

    def _look(self) -> None:
        age, looked_around = Age(), 0.0
        while not self._closing.wait(monitor.LOOK_EVERY_S):
            silent_s, beat = age.look(self._beat.count), self._beat
            if silent_s < min(self._stopped_s, LOOK_AROUND_S):
                looked_around = silent_s
                continue
            if SECTIONS[beat.section] in ("data", "evaluate") and silent_s >= self._stopped_s:
                if stopped := monitor.stopped_children(os.getpid()):
                    self._end(beat, f"waits for loader process {stopped[0]}, stopped", silent_s, self._stopped_s)
            waiting = self._waits_for_others()
            # Also if no frame shows that it waits, as for its GPU. Not if it hangs, perhaps because of this very disk.
            if (waiting or silent_s < beat.limit_s) and silent_s - looked_around >= LOOK_AROUND_S / 2:
                looked_around = silent_s
                if others := lost_others(self._folder):
                    self._end(beat, f"lost another: {others[0]}", silent_s, beat.limit_s, waiting=True)
            if silent_s >= beat.limit_s + (WAITING_S if waiting else 0):
                silent: list[str] = []
                with suppress(OSError):  # no file left to open
                    silent = peers.silent()
                waiting = waiting or bool(silent)
                told = ["waits for other ranks" if waiting else "hangs", *silent[:_TOLD]]
                self._end(beat, "; ".join(told), silent_s, beat.limit_s, waiting=waiting)
            elif silent_s >= beat.limit_s and self._beat is beat:  # the monitor must not take it for blocked
                monitor.write_beat(self._memory, beat._replace(limit_s=beat.limit_s + WAITING_S))

    def _waits_for_others(self) -> bool:
        """Whether a collective is pending, or the main thread is in one, judging by its innermost frames.

        Or any thread waits for the GPU: autograd runs the backward pass in a thread of its own.
        """
        if not self.answered():
            return True
        for thread, frame in sys._current_frames().items():
            codes = _innermost(frame)
            if any(code.co_name in _WAITS_FOR_DEVICE for code in codes):
                return True
            if thread == threading.main_thread().ident:
                if any(part in code.co_filename for code in codes for part in _WAITS_IN):
                    return True
        return False

    def _end(self, beat: Beat, what: str, silent_s: float, limit_s: float, *, waiting: bool = False) -> None:
        """Reports what happened, and ends the process. waiting: for others, which must not blame this rank."""
        who, where = monitor.place(self._rank, os.getpid(), beat)
        line = f"{who} {what}, {where}: {silent_s:.0f} s without a sign of life, the limit is {limit_s:.0f} s"
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        monitor.tell(self._folder, self._rank, line, beat.start, monitor.read_stacks(self._stacks), waiting=waiting)
        with suppress(Exception):
            self.also(LostProcessError(line))
        monitor.write_beat(self._memory, beat._replace(ended=True))
        os._exit(LostProcessError.exit_code)


def _innermost(frame: FrameType | None) -> list[CodeType]:
    """Returns the code of a thread's last few calls."""
    codes = []
    while frame is not None and len(codes) < 12:
        codes.append(frame.f_code)
        frame = frame.f_back
    return codes


def _shared_file() -> int:
    """Returns the descriptor of a file in memory, or of a temporary file where the system has no such thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pretrain-watchdog")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _not_in_children() -> None:
    global _watch
    _watch = None  # a loader process must not beat for its rank


os.register_at_fork(after_in_child=_not_in_children)
