"""System calls that fail, or that kill their process: strace's injection into a process that waits for it."""

import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# What a save does to a disk, and how it looks at it. A question mark: not on every machine.
WRITING = (
    "?write ?pwrite64 ?writev ?fsync ?fdatasync ?rename ?renameat ?renameat2 ?openat ?open ?unlink ?unlinkat ?mkdir "
    "?mkdirat ?rmdir ?ftruncate ?fallocate ?chmod ?fchmod ?fchmodat ?getdents64"
)
LOOKING = "?read ?pread64 ?close ?lseek ?stat ?lstat ?fstat ?newfstatat ?statx ?mmap"
_PR_SET_PTRACER, _ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)  # of Linux's prctl


class Point(NamedTuple):
    """The n-th call of a kind, and what happens there: "signal=KILL", "error=EIO"."""

    call: str
    n: int
    effect: str


def why_not() -> str | None:
    """Says why strace cannot be used here, None when it can: it is tried on a process that is none of its own."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE) as traceable:
        assert traceable.stdout is not None
        traceable.stdout.readline()
        try:
            with traced(traceable.pid, "", Path(os.devnull), Point("getppid", 1, "error=EIO")):
                return None
        except AssertionError as error:
            return f"strace cannot trace here ({str(error).strip()[:100]})"
        finally:
            traceable.kill()


def let_be_traced() -> None:
    """In the process: lets strace attach to it. A kernel with Yama leaves that to what has started the process."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)  # without Yama an error, and nothing is needed


class Gate:
    """Where a thread waits before and after what strace is to look at: four numbers in memory that both sides map.

    Nothing of WRITING or LOOKING is called between `enter` and `leave` but by what is between them.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 16)).cast("I")  # entered, left, waits ended, thread

    @property
    def thread(self) -> int:
        """The number of the thread that waits or waited last, as strace knows it."""
        return self._counts[3]

    def enter(self) -> None:
        """In the process: waits until the other side lets it in."""
        let_be_traced()
        self._counts[3] = threading.get_native_id()
        self._counts[0] += 1
        self._wait()

    def leave(self) -> None:
        """In the process: waits until the other side lets it go."""
        self._counts[1] += 1
        self._wait()

    def _wait(self) -> None:
        while self._counts[2] < self._counts[0] + self._counts[1]:
            time.sleep(0.001)

    def reached(self, *, left: bool = False, ended: Callable[[], bool] = lambda: False) -> bool:
        """Waits until the process waits, before or after; returns False when it has `ended` instead."""
        while self._counts[2] >= self._counts[0] + self._counts[1]:
            if ended():
                return False
            time.sleep(0.001)
        assert (self._counts[0] == self._counts[1]) == left
        return True

    def open(self) -> None:
        """Lets the process go on."""
        self._counts[2] += 1


@contextmanager
def traced(thread: int, calls: str, log: Path, point: Point | None = None) -> Iterator[None]:
    """strace looks at one thread while the block runs."""
    inject = [] if point is None else ["-e", f"inject={point.call}:{point.effect}:when={point.n}"]
    names = calls.replace(" ", ",") if point is None else point.call
    command = ["strace", "-p", str(thread), "-o", str(log), "-e", f"trace={names}", *inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        try:
            line = strace.stderr.readline()
            assert "attached" in line, line
            yield
            strace.send_signal(signal.SIGINT)  # it lets go of the process
            strace.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            pass  # it may wait for ever for a thread of a process that was killed
        finally:
            strace.kill()


def counted(log: Path) -> Counter[str]:
    """How often each call was made, as `traced` wrote it down."""
    return Counter(re.findall(r"^(\w+)\(", log.read_text(errors="replace"), flags=re.MULTILINE))


def points(counts: Counter[str], effects: list[str]) -> list[Point]:
    """Every call of every kind, with each effect."""
    return [Point(call, n, effect) for effect in effects for call in sorted(counts) for n in range(1, counts[call] + 1)]


if __name__ == "__main__":  # what why_not tries it on
    let_be_traced()
    print(flush=True)
    time.sleep(60)
