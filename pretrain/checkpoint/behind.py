"""Saves in the background of training: a copy in host memory, laid out as the file's bytes, written by a thread.

The thread calls no collective: on each rank it could come in another order among those of training.
"""

import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from pretrain.cluster import agreement, ranks, watchdog
from pretrain.cluster.limits import free_memory_bytes
from pretrain.errors import StorageError

# safetensors' names of types, in the order of tensors in a file: larger elements first.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ORDER = list(_TYPES)
_ALIGNMENT = 8  # of the first tensor's bytes in the file
_WRITE_BYTES = 4 << 20  # per write: a single write of all bytes delays everything else that goes to that disk


class FileCopy:
    """The bytes of a safetensors file in host memory, the same that `safetensors.torch.save_file` would write.

    Made for tensors of given names, types and shapes; `take` copies the values of such tensors, any number of times.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, pinned: bool = True) -> None:
        self._header, places = _layout(tensors)
        size = _file_bytes(self._header, places)
        try:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and _on_gpu(tensors))
        except RuntimeError as error:
            raise StorageError(
                f"no room in host memory for a copy of {size:,} bytes; free some, or set checkpoint.behind=false "
                f"({str(error).splitlines()[0]})"
            ) from None
        self._bytes[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        self._views = {
            name: self._bytes[len(self._header) + start : len(self._header) + end].view(tensors[name].dtype)
            for name, (start, end) in places.items()
        }

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Returns whether `take` may be called with these."""
        return _layout(tensors)[0] == self._header

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the values; from a GPU asynchronously: they are complete after `wait_for_copies`."""
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor.detach().reshape(-1), non_blocking=True)

    def write(self, path: Path) -> None:
        """Writes the file, in pieces. Raises OSError."""
        left = self._bytes.numpy().data
        with path.open("wb", buffering=0) as file:
            while left:
                left = left[file.write(left[:_WRITE_BYTES]) :]


def _layout(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns a safetensors file's header with its length in front, and each tensor's first and last byte after it."""
    entries, places, end = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        places[name] = start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


def _file_bytes(header: bytes, places: Mapping[str, tuple[int, int]]) -> int:
    return len(header) + max((end for _, end in places.values()), default=0)


def _on_gpu(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a copy has to be pinned: otherwise the GPU's copy goes through another buffer."""
    return any(tensor.is_cuda for tensor in tensors.values())


def host_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Returns the host memory of a file's copy: if pinned, torch's allocator rounds it up to a power of two."""
    size = _file_bytes(*_layout(tensors))
    return 1 << (size - 1).bit_length() if _on_gpu(tensors) else size


def wait_for_copies() -> None:
    """Waits until all copies are complete: the next step changes the tensors."""
    if torch.cuda.is_initialized():
        watchdog.from_device(torch.cuda.current_stream().synchronize)


class NoRoomError(StorageError):
    """A node has too little host memory free for its ranks' copies; raised on all ranks."""


class HostCopies:
    """Copies of all files of a rank's checkpoint, in memory that is allocated at the first save and kept."""

    def __init__(self) -> None:
        self._kept: dict[str, FileCopy] = {}

    def take(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, FileCopy]:
        """Returns a copy of each file's tensors, good until the next call. Called by all ranks.

        Raises StorageError if memory cannot be allocated; NoRoomError, on all ranks, if a node has too little: then no
        rank keeps memory that the others on its node will need at the next save.
        """
        missing = [name for name, part in files.items() if name not in self._kept or not self._kept[name].fits(part)]
        agreement.together(lambda: _check_room(sum(host_bytes(files[name]) for name in missing)))
        try:
            self._kept |= {name: FileCopy(files[name]) for name in missing}
        except StorageError:
            self._kept.clear()
            raise
        for name, tensors in files.items():
            self._kept[name].take(tensors)
        wait_for_copies()
        return {name: self._kept[name] for name in files}


def _check_room(num_bytes: int) -> None:
    """Raises NoRoomError unless all ranks of this node can have so much: an allocation may fail only when used."""
    free = free_memory_bytes()
    if num_bytes and free is not None and free < (needed := num_bytes * ranks.ranks_here()):
        raise NoRoomError(
            f"{socket.gethostname()}: {free / 1e9:.1f} GB of host memory are free, {needed / 1e9:.1f} GB are needed "
            "for copies of its ranks; free some, or set checkpoint.behind=false"
        )


def in_background(work: Callable[[], Any], *, behind: bool) -> Future[Any]:
    """Calls `work`, in the background in a thread of its own or else at once; returns a future with its outcome.

    The thread is a daemon: a process that ends by an error does not wait for it.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="saving", daemon=True).start() if behind else run()
    return outcome
