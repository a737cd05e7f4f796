"""Processes that tests start: who of a session lives, an end of them all, however a test ends, and whether others are
busy beside them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def processes_of(session: int) -> list[int]:
    """Those that live: zombies do not, and the first process of a container may leave them for ever."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def whole_session(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Around what a test does with a command that leads a session: behind it neither that nor what it started lives."""
    with process:
        try:
            yield process
        finally:
            end_session(process.pid)


def end_session(session: int) -> None:
    """Ends whoever of it still lives."""
    for number in processes_of(session):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def is_quiet(*, own: int = 0) -> bool:
    """Whether a core was free for each process of the last minute, so that a time measured in it tells of the program.

    own: busy processes of the test, which do not count.
    """
    return os.getloadavg()[0] < len(os.sched_getaffinity(0)) + own
