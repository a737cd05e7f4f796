"""The C library's memory, of a training on a CPU."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_AS_WISHED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for the next step to use, instead of giving it back to the kernel.

    Else tensors above some megabytes are mapped anew in each step and the kernel fills every page with zeros: 7 % of
    the processor time of a step of ViT-S/16 in float32 (docs/performance.md). No more is held than was in use at a
    time, by this process or by one that is forked from it, as loaders are. Other C libraries have no mallopt and stay
    as they are, and so does glibc where the environment sets it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _AS_WISHED):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that glibc before 2.35 takes
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
