"""Captures libjpeg's warnings: it reports a damaged file on stderr only, without its name, and decodes on."""

import mmap
import os
import re
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# libjpeg's warnings (jerror.h, JWRN_*). Text that other threads write meanwhile is passed on to stderr.
_COMPLAINT = re.compile(
    rb"(?:Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence|Invalid SOS parameters"
    rb"|Unknown Adobe color transform|Warning: unknown JFIF revision|Application transferred too many)[^\r\n]*\r?\n?"
)

# stderr belongs to the whole process: one image is decoded at a time, and os.fork waits while stderr is redirected.
# Python's subprocess does not call these hooks: a program started meanwhile keeps the in-memory file as its stderr.
_lock = threading.RLock()
_memory: list[tuple[int, mmap.mmap]] = []  # the process's in-memory file and its first page, created at first use


def _forked() -> None:
    _memory.clear()  # the child inherits its parent's file and must create its own
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)


def listen(call: Callable[[], T]) -> tuple[T, list[str]]:
    """Returns the result of `call`, and the warnings that libjpeg wrote to stderr; other text still reaches stderr.

    If stderr is closed, or no descriptor or memory is left, nothing is captured. Takes four system calls.
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
    if not _memory:  # mapped, so that a byte shows without a system call whether anything was written
        number = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            os.ftruncate(number, mmap.PAGESIZE)
            _memory.append((number, mmap.mmap(number, mmap.PAGESIZE)))
        except OSError:
            os.close(number)
            raise
    return _memory[0]


def _sorted_out(memory: int, page: mmap.mmap) -> list[str]:
    """Empties the in-memory file, passes other text on to stderr, and returns libjpeg's warnings."""
    text = os.pread(memory, os.lseek(memory, 0, os.SEEK_CUR), 0)
    page[:] = bytes(mmap.PAGESIZE)
    os.lseek(memory, 0, os.SEEK_SET)
    if others := _COMPLAINT.sub(b"", text):
        try:
            os.write(2, others)
        except OSError:
            pass  # nobody could have read it either
    return [match.decode("ascii", "replace").strip() for match in _COMPLAINT.findall(text)]
