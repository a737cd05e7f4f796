"""Restarts on one machine, without a scheduler: starts the ranks of a run, and starts them again when one is lost.

The ranks are forks of this process (forks.py), or processes as a launcher would start them; this one waits for them.
Imports no torch, though its caller may.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pretrain.cluster import monitor, slurm
from pretrain.cluster.forks import Fork
from pretrain.cluster.jobs import PART_OF
from pretrain.cluster.local import free_port, rank_variables
from pretrain.cluster.signals import SUPERVISOR, StopRequest
from pretrain.errors import LostProcessError, StorageError, UserError

COUNT = "PRETRAIN_RESTARTS"  # environment variable of the ranks: how often they were started before
# Exit codes to restart after, besides death by a signal; others need a person. 1, a defect, may be the machine's (a GPU
# that has failed), as for STOP.json and launch/pretrain.sbatch; if it is ours, restarts end as no start gets further.
DEFECT = 1
RETRY = (0, DEFECT, StorageError.exit_code, LostProcessError.exit_code)
LOST_S = 2.0  # from the loss of a rank to the end of the others, which can only report that loss
AGREED_S = 10.0  # likewise, after the error of a rank: if all ranks have met it, they wait for rank 0 to report it
TOLD_S = 1.0  # from rank 0's report of a user's error to SIGTERM, at which the others, waiting for it, end silently
MOST_PAUSE_S = 60.0  # before a restart, when earlier ones have made no progress
_LOOK_EVERY_S = 0.05
_MONITORS_END_S = 5.0  # they look twice a second; for one that writes to a disk that hangs, no longer than this
_OTHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun has --max-restarts",
    "SLURM_STEP_ID": "under SLURM launch/pretrain.sbatch requeues the job",
}


Process = subprocess.Popen[bytes] | Fork
Start = Callable[[Mapping[str, str]], Process]  # starts a rank with these variables added to this process's own


def by_command(words: Sequence[str]) -> Start:
    """Returns a function that starts a rank by a command."""
    return lambda variables: subprocess.Popen(words, env={**os.environ, **variables})


def is_supervised(environment: Mapping[str, str]) -> bool:
    """Returns whether this process is a rank that `run_with_restarts` has started.

    Raises UserError when a launcher has, unless through a command of ours (`jobs.start`), which may be a task of srun.
    """
    if SUPERVISOR in environment:
        return True
    if PART_OF in environment:
        return False
    if "RANK" in environment or slurm.is_task(environment):
        instead = next((told for name, told in _OTHERS.items() if name in environment), "start it by plain python")
        raise UserError(f"--restarts starts the ranks itself, but a launcher has started this one: {instead}")
    return False


def run_with_restarts(
    start: Start,
    num_ranks: int,
    most: int,
    stop: StopRequest,
    *,
    newest: Callable[[], str],
    refused: Callable[[], int | None],
) -> int:
    """Runs so many ranks on this machine to their end; returns the run's exit code, 128 + N for signal N.

    A lost rank ends the others, and all start again: the first time at once, then after a pause; at most `most` times
    in a row without a new checkpoint, never if that is 0. newest: returns the name of the newest checkpoint, "" if
    there is none; later names are greater, so that one that is set aside, or whose disk is away, is no progress.
    refused: returns the exit code of a run that forbids another start (STOP.json), else None. Requests to stop this
    process (signals.py) are passed on to the ranks.
    """
    idle = count = 0
    before = ""
    while True:
        before = newest() or before
        codes = _run_once(start, num_ranks, count, stop)
        code = _decisive(codes)
        idle = 0 if newest() > before else idle + 1
        if code == 0 or stop.signal_name is not None:
            return _as_exit_code(code)
        told = f"{_told(codes)}; newest checkpoint: {newest() or 'none'}"
        if (own := refused()) is not None:
            code = own
        if own is not None or most == 0 or not _may_retry(codes):
            _tell(f"not restarted: {told}")
        elif idle > most:
            _tell(f"not restarted: {idle} starts in a row without a new checkpoint; {told}")
        elif _pause(idle, stop):
            count += 1
            _tell(f"restart {count}: {told}")
            continue
        return _as_exit_code(code)


def _run_once(start: Start, num_ranks: int, count: int, stop: StopRequest) -> list[int]:
    """Starts every rank, waits until all have ended, and returns their exit codes; -N: ended by signal N.

    The code is 0 for ranks killed here because others were lost: their own says nothing.
    """
    port = free_port()
    own = {SUPERVISOR: str(os.getpid()), COUNT: str(count), "LOCAL_WORLD_SIZE": str(num_ranks)}
    processes: list[Process] = []
    try:
        for rank in range(num_ranks):
            processes.append(start({**own, **rank_variables(rank, num_ranks, port)}))
        return _wait(processes, stop)
    finally:  # also after a second Ctrl-C
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        until = time.monotonic() + _MONITORS_END_S
        while _monitors_of(processes) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)


def _monitors_of(processes: Sequence[Process]) -> bool:
    """Whether a rank's monitor process is still there: it may yet report that rank's end."""
    ranks = {str(process.pid) for process in processes}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            words = path.read_text(errors="replace").split("\0")
            if monitor.__file__ in words and not ranks.isdisjoint(words):
                return True
    return False


def _wait(processes: Sequence[Process], stop: StopRequest) -> list[int]:
    asked, told, lost_at, given_s = False, False, None, 0.0
    ended_here: list[bool] = [False] * len(processes)
    while None in (codes := [process.poll() for process in processes]):
        if stop.signal_name is not None and not asked:
            asked = True
            _send(processes, signal.SIGTERM)  # whatever the signal here: a terminal's SIGINT has reached them already
        if lost_at is None and any(codes):  # one has ended, and not with 0
            lost_at = time.monotonic()
            given_s = LOST_S if any(code is not None and _is_lost(code) for code in codes) else AGREED_S
        since_s = 0.0 if lost_at is None else time.monotonic() - lost_at
        if codes[0] == UserError.exit_code and since_s >= TOLD_S and not told:
            told = True
            _send(processes, signal.SIGTERM)
        if lost_at is not None and since_s >= given_s and not any(ended_here):
            ended_here = [code is None for code in codes]
            _send(processes, signal.SIGKILL)
        time.sleep(_LOOK_EVERY_S)
    return [0 if ended else process.wait() for process, ended in zip(processes, ended_here)]


def _is_lost(code: int) -> bool:
    return code < 0 or code in (DEFECT, LostProcessError.exit_code)


def _send(processes: Sequence[Process], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # to none that has ended


def _decisive(codes: Sequence[int]) -> int:
    """The code that says most, in this order: one that needs a person, a defect, another error, a signal, 0."""
    return max(codes, key=lambda code: (code not in RETRY and code > 0, code == DEFECT, code > 0, code != 0))


def _may_retry(codes: Sequence[int]) -> bool:
    return all(code < 0 or code in RETRY for code in codes)


def _as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _told(codes: Sequence[int]) -> str:
    ends = (f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}" for code in codes)
    return ", ".join(f"rank {rank} {end}" for rank, end in enumerate(ends) if codes[rank])


def _pause(idle: int, stop: StopRequest) -> bool:
    """Waits before a restart; returns False if a stop is requested meanwhile."""
    until = time.monotonic() + (min(MOST_PAUSE_S, 2.0 ** (idle - 1)) if idle > 1 else 0.0)
    while stop.signal_name is None and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    return stop.signal_name is None


def _tell(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr, flush=True)
