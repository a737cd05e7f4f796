"""Where a step's time goes: forward, backward, optimizer, collectives, waiting for data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.step import Engine

PARTS = ("data", "copy", "forward", "backward", "optimizer", "collectives")
# Those that DeepSpeed and this package call in a step. Collectives started in C++ are not seen: DDP's all-reduce counts
# as backward.
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter_tensor", "broadcast")


class PartClock:
    """Adds up the time of each part; time in a nested part counts only for that part.

    On a GPU, by events that are read together with the sums: no host sync in between.
    """

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # the part that runs from this time on; None: none

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        now: Any = time.perf_counter()
        if self._gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._open[-1] if self._open else None, now))

    def read_ms(self) -> dict[str, float]:
        """Returns the milliseconds of each part since the last reading. Waits for the device."""
        if self._gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {name: 0.0 for name in PARTS}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if name is not None:
                sums[name] += begin.elapsed_time(end) if self._gpu else 1000 * (end - begin)
        self._marks = self._marks[-1:] if self._open else []
        return sums

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Makes each call of `owner.name` count as `part`."""
        plain: Callable[..., Any] = getattr(owner, name)

        @wraps(plain)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, name, counted)


def watch_collectives(clock: PartClock) -> None:
    """Times torch's collectives in the whole process. Call it before building the engine, which keeps some of them."""
    for name in _COLLECTIVES:
        clock.wrap(dist, name, "collectives")


def watch_engine(clock: PartClock, engine: Engine) -> None:
    """Times the parts of the engine's step, named as in PARTS; the loss is part of "forward"."""
    engine.mark = clock.part
