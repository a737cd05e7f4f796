"""How a run ended, for whatever restarts it: `DONE` in its folder, or `STOP.json` {reason, retry, exit_code}.

Exit codes are not enough: launchers lose them, and SLURM replaces them by those of the ranks that it kills.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.cluster import peers, ranks, watchdog
from pretrain.errors import DeviceMemoryError, LostProcessError, StorageError, TakenOverError, UserError
from pretrain.json_files import Fields
from pretrain.storage import write_text

_FILE = "STOP.json"
_TOLD = 3  # nodes that a message names
_WAIT_FOR_REPORT_S = 5.0  # a rank's monitor looks twice a second; a shared disk may take longer
# What gloo, NCCL and PyTorch's loader say of a process that is gone or does not answer.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Socket closed",
    "remote process exited",
    "Broken pipe",
    "wait timeout after",  # at the store, where NCCL's ranks meet
    "Connection was likely closed",
    "Watchdog caught collective operation timeout",
    "DataLoader worker",
)


@contextmanager
def lost_processes(folder: Path) -> Iterator[None]:
    """Turns the error of a collective that ended because another process is gone, or hangs, into LostProcessError."""
    try:
        yield
    except Exception as error:
        if (lost := _lost_process(error, folder)) is not None:
            raise lost from None
        raise


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Writes the reason to STOP.json when the block ends with an error, which it raises as `lost_processes` does.

    If there is a checkpoint, the GPU's memory was enough once and may be again: exit code 75, as for storage.
    """
    if ranks.is_main():
        (folder / _FILE).unlink(missing_ok=True)  # of an earlier start
        watchdog.forget_reports(folder)
    watchdog.tell_also(lambda lost: note(folder, lost))
    try:
        with lost_processes(folder):
            yield
    except Exception as error:
        if isinstance(error, DeviceMemoryError) and any((folder / "checkpoints").glob("step-*")):
            error.exit_code = StorageError.exit_code  # another process uses the memory now
        note(folder, error)
        raise


def note(folder: Path, reason: Exception | str) -> None:
    """Writes STOP.json, on rank 0: the reason, and whether the same command, unchanged, may get further.

    A lack of GPU memory is written by whichever rank meets it; to the others, that rank is only lost.
    """
    if isinstance(reason, TakenOverError):  # the folder, and STOP.json in it, are another start's
        return
    lacks_memory = isinstance(reason, DeviceMemoryError)
    if not (ranks.is_main() or lacks_memory):
        return
    exit_code = 0 if isinstance(reason, str) else getattr(reason, "exit_code", 1)
    # What looks like a bug may be a fault of the machine: whatever restarts gives up when no start gets further.
    retry = exit_code in (0, 1, StorageError.exit_code, LostProcessError.exit_code)
    if retry and isinstance(reason, Exception) and refused(folder) is not None:
        return  # keeps the reason of another rank, of which this one has only seen the loss
    values = {"reason": str(reason) or type(reason).__name__, "retry": retry, "exit_code": exit_code}
    with suppress(OSError):  # the error itself reports a full disk
        write_text(folder / _FILE, json.dumps(values) + "\n", errors="backslashreplace", shared=lacks_memory)


def stamp(folder: Path) -> tuple[int, int] | None:
    """Returns what tells STOP.json from a later one (inode, time); None if there is none or stat fails."""
    with suppress(OSError):
        status = (folder / _FILE).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def refused(folder: Path, earlier: tuple[int, int] | None = None) -> int | None:
    """Returns the exit code of a run whose STOP.json forbids another try, whichever rank wrote it; else None.

    earlier: the stamp of one that does not count: a start deletes it once it has the lock, so this start had no lock.
    """
    if earlier is not None and stamp(folder) == earlier:
        return None
    try:
        fields = Fields.read(folder / _FILE)
        return None if fields.flag("retry", True) else fields.integer("exit_code", 1, 255, 1)
    except (OSError, UserError):
        return None


def _lost_process(error: Exception, folder: Path) -> LostProcessError | None:
    if not isinstance(error, RuntimeError) or isinstance(error, LostProcessError):  # the latter has its message already
        return None
    first = next((line.strip() for line in str(error).splitlines() if any(words in line for words in _LOST)), None)
    if first is None:
        return None
    watchdog.beat()  # it is not this rank that hangs
    silent = peers.silent()
    # A node that does not answer is named without a report: one would come over the same network, too late.
    known = watchdog.lost_others(folder, 0.0 if silent else _WAIT_FOR_REPORT_S) if ranks.world_size() > 1 else []
    who = f"rank {ranks.rank()} of {ranks.world_size()} lost another"
    first, again = first[:200], "the same command goes on from the newest checkpoint"
    if silent:
        more = f" and {len(silent) - _TOLD:,} more" if len(silent) > _TOLD else ""
        reason = f"; {known[0]}" if known else f" ({first})"
        return LostProcessError(f"{who} node of the run: {'; '.join(silent[:_TOLD])}{more}{reason}; {again}")
    if known:
        way = again if refused(folder) is None else "that has to be changed"
        return LostProcessError(f"{who} process of the run: {known[0]}; {way}")
    return LostProcessError(
        f"{who} process of the run, which is gone or hangs: its own message stands above, or in the log of its node "
        f"({first}); {again}"
    )
