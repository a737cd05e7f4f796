"""Agreement between ranks: flags, counts, small objects, and errors raised on all ranks.

Over a CPU group, so that the exchange never waits for the device. Every function works in a world of one rank too, and
counts as progress for the watchdog.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.cluster.ranks import all_gather, cpu_group, is_main, world_size
from pretrain.cluster.watchdog import asked, beat, from_device
from pretrain.errors import StorageError, UserError

T = TypeVar("T")


def gather(value: Any) -> list[Any]:
    """Returns every rank's (small, picklable) value, in rank order, on every rank."""
    values = all_gather(value)
    beat()
    return values


def to_main(value: Any) -> list[Any]:
    """Returns every rank's (picklable) value, in rank order, on rank 0; an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, values or None, dst=0, group=cpu_group())
    beat()
    return values


def from_main(make: Callable[[], Any]) -> Any:
    """Calls `make` on rank 0 and returns its result on every rank; its error is raised on every rank."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=cpu_group())
    beat()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_together(error: Exception | None) -> None:
    """Raises, on all ranks alike, the error that any rank met; does nothing when none did. Called by all ranks.

    An error raised on one rank alone leaves the others waiting in a collective, and the exit code to chance.
    """
    if any_rank(error is not None):
        raise next(found for found in gather(error) if found is not None)


def together(make: Callable[[], T]) -> T:
    """Returns what `make` returns on this rank; a UserError or StorageError of any rank is raised on all."""
    try:
        result = make()
    except (UserError, StorageError) as error:
        raise_together(error)
        raise  # never reached: raise_together has raised
    raise_together(None)
    return result


def add_up(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks of a small tensor, as float64 on the CPU."""
    return begin_add_up(numbers)()


def begin_add_up(numbers: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begins `add_up`, and returns a function that waits for the sum: the all-reduce overlaps what comes in between.

    All ranks must begin the same exchanges in the same order.
    """
    total: torch.Tensor = from_device(lambda: numbers.detach().to("cpu", torch.float64, copy=True))
    work = dist.all_reduce(total, group=cpu_group(), async_op=True) if dist.is_initialized() else None
    if work is not None:
        asked(work.is_completed)

    def answer() -> torch.Tensor:
        if work is not None:
            work.wait()
        beat()
        return total

    return answer


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on at least one rank; the same answer on all."""
    value = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX, group=cpu_group())
    beat()
    return bool(value)
