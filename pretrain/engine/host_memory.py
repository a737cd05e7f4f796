"""Settings of the C library's allocator for training on a CPU."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_AS_WISHED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step, instead of returning it to the kernel.

    Otherwise tensors above some megabytes are mapped anew in each step and the kernel zeroes every page: 7 % of the
    processor time of a step of ViT-S/16 in float32 (docs/performance.md). A process, or one forked from it such as a
    loader, never holds more than its peak use. Other C libraries have no mallopt and are left alone, as is glibc where
    the environment configures it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _AS_WISHED):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that glibc before 2.35 takes
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
