"""Copies each batch to the device during the previous step, on a separate CUDA stream.

On the compute stream, a copy would start only after the step's last kernel, and the next step would wait for it.
"""

import torch

from pretrain.data.loader import Batch


class CopyAhead:
    """Returns batches on the device, with the copy of the next one already under way.

    Two batches are on the device at a time (plan/memory.py). torch does not reuse pinned host memory before its copy
    has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: tuple[Batch, Batch] | None = None  # on the host, on the device

    def take(self, batch: Batch, following: Batch | None) -> Batch:
        """Returns `batch` on the device, and starts to copy `following`, the batch of the next call."""
        if self._under_way is None or self._under_way[0] is not batch:  # the first batch
            self._under_way = batch, self._copied(batch)
        on_device = self._under_way[1]
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)  # for this copy only: the next one is not queued yet
            for tensor in on_device[:4]:
                tensor.record_stream(computing)  # allocated on the copy stream; not reused before this one is done
        self._under_way = None if following is None else (following, self._copied(following))
        return on_device

    def _copied(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._stream):  # None: does nothing
            return batch.to(self._device)
