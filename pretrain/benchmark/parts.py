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
# What DeepSpeed and this package call in a step. What C++ starts on its own is not seen: DDP's all-reduce counts as
# backward.
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter_tensor", "broadcast")


class PartClock:
    """Adds up the time of each part; a part inside another counts for itself alone.

    On a GPU by events, which are read when the sums are: nothing waits in between.
    """

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # from here on this part runs; None: none of them

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`."""
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
    """Counts torch's collectives, in the whole process. Before the engine is built: it remembers some of them."""
    for name in _COLLECTIVES:
        clock.wrap(dist, name, "collectives")


def watch_engine(clock: PartClock, engine: Engine) -> None:
    """Counts the parts of the engine's own step, whose names are those of PARTS; the loss is part of "forward"."""
    engine.mark = clock.part
