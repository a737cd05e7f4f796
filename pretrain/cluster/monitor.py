"""The monitor process beside each rank: detects what the rank itself cannot, that it is stopped, blocked or gone.

`watchdog.py` starts it as a script, before the heavy imports: it needs only the standard library, 10 MB. The rank's
heartbeat is in shared memory. The monitor ends with its rank.
"""

import mmap
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SECTIONS = ("start", "data", "step", "evaluate", "save", "end")
LOOK_EVERY_S = 0.5
STOPPED_S = 45.0  # a stopped process does not resume by itself: reported within a minute; Ctrl-Z stops both
BLOCKED_S = 10.0  # beyond a section's limit: the rank's own watchdog thread, which reports more, comes first
STACKS_S = 2.0  # for the rank to write its stacks
DUMP_SIGNAL = signal.SIGUSR2  # faulthandler's own handler answers it, even when no Python code can run

_BEAT = struct.Struct("<QQdI?32s")
HEARTBEAT_BYTES = mmap.PAGESIZE
MAX_LINE = 1000  # characters of a report's first line
START = "start "  # precedes a start's name, in the second line of a report


class Beat(NamedTuple):
    """A heartbeat: what a rank last reported of itself."""

    count: int  # of beats: as long as it changes, the rank makes progress
    step: int  # the last finished one
    limit_s: float  # of the section, between two beats
    section: int  # an index in SECTIONS
    ended: bool  # in order: nobody needs to watch any more
    start: bytes = bytes(32)  # which start of the run: the token in its lock; zeros before it is known


def write_beat(memory: mmap.mmap, beat: Beat) -> None:
    """Writes a heartbeat to shared memory."""
    _BEAT.pack_into(memory, 0, *beat)


def read_beat(memory: mmap.mmap) -> Beat:
    """Returns the last heartbeat."""
    return Beat(*_BEAT.unpack_from(memory, 0))


class Age:
    """How long a count has not changed, in seconds while this process ran: time on a suspended machine is left out."""

    def __init__(self) -> None:
        self.seconds, self._count, self._looked = 0.0, -1, time.monotonic()

    def look(self, count: int) -> float:
        """Returns the age; called every LOOK_EVERY_S."""
        now = time.monotonic()
        self.seconds = 0.0 if count != self._count else self.seconds + min(now - self._looked, 4 * LOOK_EVERY_S)
        self._count, self._looked = count, now
        return self.seconds


class Stat(NamedTuple):
    """What /proc says of a process."""

    state: str  # R, S, D (waits for a disk), T (stopped), Z (ended, but not yet reaped by its parent)
    parent: int
    group: int
    started: str  # in clock ticks since boot


def stat_of(number: int) -> Stat | None:
    """Returns what /proc says of a process; None when it is gone, or where there is no /proc."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(errors="replace")  # its name may be of any bytes
        fields = text.rpartition(")")[2].split()
        return Stat(fields[0], int(fields[1]), int(fields[2]), fields[19])
    except (OSError, IndexError):
        return None


def processes() -> dict[int, Stat]:
    """Returns what /proc says of every process, by process id."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {number: stat for number in numbers if (stat := stat_of(number))}


def state_of(number: int) -> str:
    """Returns a process's state; "" when it is gone."""
    stat = stat_of(number)
    return stat.state if stat else ""


def stopped_children(parent: int) -> list[int]:
    """Returns the ids of the children of `parent` that somebody has stopped."""
    return [number for number, stat in processes().items() if stat.state == "T" and stat.parent == parent]


def report(folder: Path, rank: int, line: str, start: bytes, stacks: str = "", *, waiting: bool = False) -> None:
    """Reports in the run's folder how a rank was lost: a line, its start, then the stacks of its threads.

    The report is complete, or absent if the disk refuses it. start: the heartbeat's; starts that do not get the lock
    report in the same folder. waiting: the rank waited for others, whose loss is the cause.
    """
    path = folder / f"{'waiting' if waiting else 'lost'}-rank-{rank:05d}.txt"
    temporary = path.with_name(f".{path.name}")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "w", errors="backslashreplace") as file:
            file.write(f"{line[:MAX_LINE]}\n{START}{name_of(start)}\n{stacks}")
        os.replace(temporary, path)


def tell(folder: Path, rank: int, line: str, start: bytes, stacks: str, *, waiting: bool = False) -> None:
    """Reports on stderr, and by `report`, how a rank was lost."""
    with suppress(OSError):  # before the report: what hangs may be the disk
        os.write(2, f"{stacks}error: {line}\n".encode(errors="backslashreplace"))
    report(folder, rank, line, start, stacks, waiting=waiting)


def name_of(start: bytes) -> str:
    """Returns a start's name, "" before it has one."""
    return start.rstrip(b"\0").decode()


def place(rank: int, process: int, beat: Beat) -> tuple[str, str]:
    """Returns who and where, for the first line of a report."""
    where = f"in section {SECTIONS[beat.section]} after step {beat.step}"
    return f"rank {rank} on {socket.gethostname()} (process {process})", where


def read_stacks(descriptor: int) -> str:
    """Returns what faulthandler has written into a file so far."""
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")


def _watch(memory: mmap.mmap, stacks: int, rank: int, process: int, folder: Path, stopped_s: float) -> None:
    age, stopped_for = Age(), 0.0
    while True:
        time.sleep(LOOK_EVERY_S)
        beat = read_beat(memory)
        if beat.ended:
            return
        who, where = place(rank, process, beat)
        if os.getppid() != process:
            line = f"{who} is gone, {where}: killed, or out of memory"
            return tell(folder, rank, line, beat.start, "")
        silent_s = age.look(beat.count)
        stopped_for = stopped_for + LOOK_EVERY_S if state_of(process) == "T" else 0.0
        if stopped_for >= stopped_s:
            line = f"{who} is stopped, {where}: for {stopped_for:.0f} s, the limit is {stopped_s:g} s; it was ended"
        elif silent_s >= beat.limit_s + BLOCKED_S:
            line = (
                f"{who} is blocked, {where}: {silent_s:.0f} s without a sign of life, the limit is {beat.limit_s:.0f} s"
            )
            with suppress(OSError):
                os.kill(process, DUMP_SIGNAL)
            time.sleep(STACKS_S)
        else:
            continue
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
        return tell(folder, rank, line, beat.start, read_stacks(stacks))


def main() -> None:
    """Watches the process that has started this one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # at these the rank saves, which takes a while
    heartbeat, stacks, rank, process, folder, stopped_s = sys.argv[1:]
    memory = mmap.mmap(int(heartbeat), HEARTBEAT_BYTES)
    _watch(memory, int(stacks), int(rank), int(process), Path(folder), float(stopped_s))


if __name__ == "__main__":
    main()
