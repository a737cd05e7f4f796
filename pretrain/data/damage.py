"""What libjpeg complains of, heard: it writes to stderr, without a name, that a file is damaged, and goes on."""

import mmap
import os
import re
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# libjpeg's warnings (jerror.h, JWRN_*). Whatever else comes meanwhile, from other threads, goes on to stderr.
_COMPLAINT = re.compile(
    rb"(?:Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence|Invalid SOS parameters"
    rb"|Unknown Adobe color transform|Warning: unknown JFIF revision|Application transferred too many)[^\r\n]*\r?\n?"
)

# stderr belongs to the whole process: one image at a time, and no os.fork while it points elsewhere. Python's
# subprocess does not call these hooks: a program that it starts meanwhile keeps the file in memory as its stderr.
_lock = threading.RLock()
_memory: list[tuple[int, mmap.mmap]] = []  # the process's file in memory, and its first page; made when first needed


def _forked() -> None:
    _memory.clear()  # the child shares its parent's, and makes its own
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)


def listen(call: Callable[[], T]) -> tuple[T, list[str]]:
    """Returns what `call` returns, and what libjpeg wrote to stderr meanwhile; other text goes on to stderr.

    Where stderr is closed, or there is no descriptor or memory left for it, nothing is heard. Takes four system calls.
    """
    with _lock:
        try:
            memory, page = _memory_file()
            real = os.dup(2)
        except OSError:
            return call(), []
        heard: list[str] = []
        try:
            os.dup2(memory, 2)
            try:
                result = call()
            finally:
                os.dup2(real, 2)
                if page[0]:
                    heard = _sorted_out(memory, page)
        finally:
            os.close(real)
        return result, heard


def _memory_file() -> tuple[int, mmap.mmap]:
    if not _memory:  # mapped: a byte tells without a system call whether anything was written
        number = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            os.ftruncate(number, mmap.PAGESIZE)
            _memory.append((number, mmap.mmap(number, mmap.PAGESIZE)))
        except OSError:
            os.close(number)
            raise
    return _memory[0]


def _sorted_out(memory: int, page: mmap.mmap) -> list[str]:
    """Empties the file in memory, writes what is not libjpeg's to stderr, and returns what is."""
    text = os.pread(memory, os.lseek(memory, 0, os.SEEK_CUR), 0)
    page[:] = bytes(mmap.PAGESIZE)
    os.lseek(memory, 0, os.SEEK_SET)
    if others := _COMPLAINT.sub(b"", text):
        try:
            os.write(2, others)
        except OSError:
            pass  # nobody could have read it either
    return [match.decode("ascii", "replace").strip() for match in _COMPLAINT.findall(text)]
