"""The errors for a GPU that runs out of memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.errors import DeviceMemoryError, StorageError

LAYERS = "log.layers_every_steps"
# What libraries that do not take their memory from torch's allocator say: CUDA itself, cuBLAS, cuDNN, NCCL.
_LACKS_MEMORY = re.compile("CUDA error: out of memory|_STATUS_ALLOC_FAILED|Failed to CUDA [mc]alloc")


@contextmanager
def raised_as_out_of_memory() -> Iterator[None]:
    """Context manager: other libraries' lack of a GPU's memory is raised as torch's own, OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not (found := _LACKS_MEMORY.search(str(error))):
            raise
        raise torch.OutOfMemoryError(found[0]) from error


def never_fits(num_images: int, error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """Returns the error for a training step that is too large."""
    ways = "engine.checkpoint_activations=true, engine.zero_stage=2 or 3"
    return DeviceMemoryError(
        f"engine.max_micro_batch_size: {num_images} images at a time are too many for this GPU "
        f"({first_sentence(error)}); try {max(1, num_images // 2)}, or {ways}; tools/plan.py says what fits"
    )


def no_longer_fits(num_images: int, error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """Returns the error for a training step that has fitted before, so that another try may succeed."""
    lack = DeviceMemoryError(
        f"this GPU's memory does not hold a step, as it did before ({first_sentence(error)}); another process may have "
        f"it now: start again, and if it happens again, with engine.max_micro_batch_size={max(1, num_images // 2)}"
    )
    lack.exit_code = StorageError.exit_code
    return lack


@contextmanager
def fitting(key: str, num_images: int) -> Iterator[None]:
    """Context manager: if a pass over `num_images` runs out of memory, the error names `key`, the setting to lower."""
    try:
        with raised_as_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        less = f"try {num_images // 2}" if key != LAYERS and num_images > 1 else "0 switches it off"
        raise DeviceMemoryError(
            f"{key}: {num_images} images at a time, without gradients, are too many for this GPU "
            f"({first_sentence(error)}); {less}"
        ) from error


def first_sentence(error: torch.OutOfMemoryError) -> str:
    """Returns an error's first sentence, without the advice and the allocator's state that follow."""
    return str(error).partition(". ")[0]
