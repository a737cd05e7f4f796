"""Batches on their way to the device: each is copied beside the step before it, on a stream of its own.

On the stream that computes, a copy would begin when the step's last kernel has ended, and the next one wait for it.
"""

import torch

from pretrain.data.loader import Batch


class CopyAhead:
    """Hands batches over on the device; the next one's copy is under way by then.

    Two batches lie there at a time (plan/memory.py). Host memory that is pinned is not used again before its copy has
    ended: torch sees to that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: tuple[Batch, Batch] | None = None  # on the host, on the device

    def take(self, batch: Batch, following: Batch | None) -> Batch:
        """Returns `batch` on the device, and begins to copy `following`, which is asked for next."""
        if self._under_way is None or self._under_way[0] is not batch:  # the first one
            self._under_way = batch, self._copied(batch)
        on_device = self._under_way[1]
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)  # for this copy: the next one is not in the queue yet
            for tensor in on_device[:4]:
                tensor.record_stream(computing)  # its memory is the other stream's, and free when this one is done
        self._under_way = None if following is None else (following, self._copied(following))
        return on_device

    def _copied(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._stream):  # None: does nothing
            return batch.to(self._device)
