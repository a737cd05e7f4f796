"""Jobs: runs that another process starts, tells to stop, and waits for; and their numbers in SLURM's job arrays."""

import contextlib
import errno
import fcntl
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pretrain.cluster import monitor
from pretrain.errors import UserError
from pretrain.escape import shown

# Environment variable: the process id of a command that has started this one, and that says what to do next.
PART_OF = "PRETRAIN_PART_OF"
# They ask a command to stop, and are passed on to the ranks. Not SIGHUP: a closing terminal sends that to the ranks.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 130  # exit code when a run was asked to stop, and has saved


def start(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Prints a command and runs it to its end; returns its exit code."""
    print(shown(f"$ {shlex.join([Path(words[0]).name, *words[1:]])}"), flush=True)
    with subprocess.Popen(words, env={**environment, PART_OF: str(os.getpid())}) as process:
        return process.wait()


def run_job(words: Sequence[str], environment: Mapping[str, str], lock: Path) -> int:
    """Runs a command until no rank writes any more; returns its exit code, or STOPPED when asked to stop.

    SIGINT, SIGTERM and SIGUSR1 ask for a stop, and reach the ranks. lock: the file that rank 0 locks while it writes;
    not waited for when the command refuses to begin (exit code 2), because another run may then hold it.
    """
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # a terminal sends that to the ranks itself
            _pass_on(number)

    before = {number: signal.signal(number, stop) for number in PASSED_ON}
    try:
        code = start(words, environment)
        if code != UserError.exit_code:
            _wait_until_free(lock)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if asked else code


def is_held(lock: Path) -> bool:
    """Returns whether another process holds a lock."""
    if not lock.is_file():
        return False
    with lock.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)  # others: a file system without locks
    return False


def array_ranges(counts: Sequence[int]) -> list[str]:
    """Returns the index ranges of successive job arrays of so many jobs each: "0-3", "4-6" for 4 and 3."""
    ends = list(accumulate(counts, initial=0))
    return [f"{first}-{last - 1}" for first, last in zip(ends, ends[1:]) if first < last]


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
    for number, stat in monitor.processes().items():
        children.setdefault(stat.parent, []).append(number)
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def _wait_until_free(lock: Path) -> None:
    """Waits until rank 0 releases the run's lock: it may still be saving when its launcher has died of a signal."""
    if lock.is_file():
        with lock.open("a") as file, contextlib.suppress(OSError):  # a file system without locks: nobody holds one
            fcntl.lockf(file, fcntl.LOCK_EX)
