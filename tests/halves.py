"""A task for processes of their own, in a module that loads at once."""

import os
import signal
from collections.abc import Callable

from pretrain.errors import UserError


def half(task: int, progress: Callable[[int], None]) -> float:
    """Returns half of a number. Raises UserError for odd ones, ends its process for negative ones."""
    progress(1)
    if task < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if task % 2:
        raise UserError(f"{task} is odd")
    return task / 2


class Asked:
    """Becomes, where it is unpickled, what SIGINT does there."""

    def __reduce__(self) -> tuple:
        return signal.getsignal, (signal.SIGINT,)


def interrupt_at_start(heard: object, task: int, progress: Callable[[int], None]) -> bool:
    """Returns whether SIGINT was heard when `heard`, once an `Asked`, came here: before the worker's own first line."""
    return heard is not signal.SIG_IGN
