"""Forward passes, timed without waiting for the device."""

import time
from collections.abc import Callable
from typing import Any

import torch


class ForwardClock:
    """Context manager around a forward pass: gives its duration in seconds to `note`, on a GPU some steps later."""

    def __init__(self, note: Callable[[float], None], device: torch.device) -> None:
        self._note, self._gpu, self._began = note, device.type == "cuda", 0.0
        self._pending: list[tuple[Any, Any]] = []  # events of passes that the device may not have finished

    def __enter__(self) -> None:
        if self._gpu:
            self._pending.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._pending[-1][0].record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if not self._gpu:
            return self._note(time.perf_counter() - self._began)
        self._pending[-1][1].record()
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.pop(0)
            self._note(first.elapsed_time(last) / 1000)
