"""The C library's allocator on CPUs, told to keep what a step frees for the next one."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_MOST = (1 << 31) - 1  # its argument is an int


def keep_freed_memory() -> bool:
    """Keeps glibc from giving large freed blocks back to the system; returns False where there is no glibc.

    A step's activations and temporaries come and go at the same sizes. By default each is mapped anew, and every page
    of it faults and is filled with zeros, once per step. The price: the process's memory does not shrink. The numbers
    that are computed stay the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, _MOST) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
