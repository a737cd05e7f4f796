"""The wish to stop: SIGTERM, SIGINT and SIGUSR1, and the launcher's death."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from pretrain.cluster.agreement import any_rank
from pretrain.cluster.ranks import rank


def end_with_launcher() -> None:
    """Has this process asked to stop (SIGTERM) when DeepSpeed's launch.py dies, which otherwise leaves orphans.

    Only under that launcher: a plain shell may be closed while its jobs go on.
    """
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return  # not Linux
    if b"deepspeed.launcher.launch" in parent:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


class StopRequest:
    """Hears SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) and remembers; the loop decides when to stop.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        print(f"rank {rank()}: {self.signal_name}: saving and stopping after this step", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Returns, on every rank alike, whether any rank was asked to stop."""
        return any_rank(self.signal_name is not None)

    def close(self) -> None:
        """Restores the handlers found before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """For child processes: a signal to the whole group must not end them before the loop has saved."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
