"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP, and the death of the launcher. Imports no torch.

`StopRequest` is made in the first lines of a command, before imports that take seconds: until then SIGUSR1 kills it.
"""

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pretrain.cluster.jobs import PART_OF
from pretrain.cluster.monitor import stat_of
from pretrain.cluster.slurm import rank_so_far

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Programs whose death ends the ranks that they started. Not a plain shell, which may be closed while its jobs go on.
_LAUNCHERS = (
    "deepspeed",
    "ds",  # another name of `deepspeed`
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
)
SUPERVISOR = "PRETRAIN_SUPERVISOR"  # environment variable: the process that has started the ranks (restarts.py)
_LOOK_EVERY_S = 1.0
_ON_ONE_MACHINE = "deepspeed.launcher.launch"  # if it has no --node_rank, `deepspeed` itself has started it
_INITS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit")  # they adopt orphans
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class StopRequest:
    """Records SIGTERM, SIGINT, SIGUSR1 (SLURM's warning) and SIGHUP; the loop decides when to stop.

    A second SIGINT interrupts at once. SIGHUP stays ignored if it was, as under nohup.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._interrupted = False
        self.launchers = _launchers_above()  # now: one may die during the imports
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        first, self.signal_name = self.signal_name is None, signal.Signals(number).name
        if not first:  # as when the process that started the ranks passes on what a terminal has sent them already
            return
        launched = {"RANK", "SLURM_PROCID"} & os.environ.keys()
        who = f"rank {rank_so_far(os.environ)}: " if launched else ""
        told = f"{who}{self.signal_name}: saving and stopping after this step or the next\n"
        with suppress(OSError):  # the terminal may be gone, and a handler that raises ends the training unsaved
            os.write(2, told.encode())  # print may be what the signal interrupted, and then raises

    def close(self) -> None:
        """Restores the handlers found before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def end_at_sigterm(code: int) -> None:
    """Makes SIGTERM end this process silently with exit code `code`: it has met an error, and has nothing to save.

    Launchers send SIGTERM when rank 0 has reported the error and exited. srun returns the highest exit code of its
    tasks, which would be that of a signal.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))


def live_as_long_as_parent() -> None:
    """For child processes: a signal to the whole group must not end them before the loop has saved.

    They are killed when their parent ends, however that happens, even if they are stopped.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_GONE = "gone"  # a start time that no process has


class _Process(NamedTuple):
    number: int
    started: str  # process ids are reused


def end_with_launcher(stop: StopRequest | None = None) -> None:
    """Asks this process to stop (SIGTERM) when a launcher among its ancestors dies, which would otherwise orphan it.

    All of them are watched, also those that were there when `stop` was made, because one may leave the next one alive:
    `deepspeed` its launch.py, and that its ranks; also a command of ours that has started this one (jobs.py).
    """
    supervisor, command = os.environ.get(SUPERVISOR), os.environ.get(PART_OF)
    is_orphan = supervisor is not None and supervisor != str(os.getppid())
    if command is not None and command.isdecimal() and stat_of(os.getpid()):  # there is a /proc
        is_orphan |= not _started(int(command))
    if is_orphan:  # the parent died before this process looked
        os.kill(os.getpid(), signal.SIGTERM)
    watched = {*(stop.launchers if stop else ()), *_launchers_above()}
    if not watched:
        return

    def watch() -> None:
        while all(_started(process.number) == process.started for process in watched):
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _launchers_above() -> list[_Process]:
    found: list[_Process] = []
    number, orphan = os.getppid(), None
    ours = os.environ.get(SUPERVISOR), os.environ.get(PART_OF)
    while number > 1 and (stat := stat_of(number)):  # None: not Linux, or gone, and its own parent's death is seen
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            break
        script = Path(words[1]).name if len(words) > 1 else ""
        module = words[words.index("-m") + 1 :][:1] if "-m" in words[:4] else []
        if str(number) in ours or any(word in _LAUNCHERS for word in (Path(words[0]).name, script, *module)):
            found.append(_Process(number, _started(number)))
            orphan = None
            if module == [_ON_ONE_MACHINE] and not any(word.startswith("--node_rank") for word in words):
                if not _started(stat.group) or (stat.parent == 1 and _name(1) in _INITS):
                    orphan = _Process(stat.parent, _GONE)
        number = stat.parent
    return found if orphan is None else [*found, orphan]


def _name(number: int) -> str:
    try:
        return Path(f"/proc/{number}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _started(number: int) -> str:
    """The start time of a process; "" if there is no such process, or only a zombie."""
    stat = stat_of(number)
    return "" if stat is None or stat.state == "Z" else stat.started
