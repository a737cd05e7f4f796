"""Starts processes as forks of this one, which have its imports already.

Importing torch and DeepSpeed takes seconds at each start. A fork lacks this process's other threads, and cannot use a
GPU that this process has used: `can_fork` says whether that matters. Imports no torch.
"""

import ctypes
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED of the driver's API
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch then counts GPUs without initialising CUDA


class Fork:
    """A child process, with those methods of subprocess.Popen that are needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, -N for signal N; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Waits for its end, and returns the exit code."""
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def by_fork(call: Callable[[], object]) -> Callable[[Mapping[str, str]], Fork]:
    """Returns a function that forks a process to do `call`, which ends it or raises SystemExit, as cli.run does."""
    gc.freeze()  # garbage collections in the forks then do not touch, and so copy, the objects of this process

    def start(variables: Mapping[str, str]) -> Fork:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # the reader is gone, or the stream is closed
                stream.flush()  # the fork would write what is left in the buffer again
        code, pid = 1, -1
        try:
            if pid := os.fork():
                return Fork(pid)
            os.environ.update(variables)
            call()
        except SystemExit as end:
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.main_thread():
                    thread.join()
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            if pid:
                raise
            traceback.print_exc()
        finally:
            if not pid:
                os._exit(code)  # the exit handlers of this process are not the fork's
        raise AssertionError

    return start


def count_gpus_without_the_driver() -> None:
    """Keeps imports of torch and DeepSpeed from initialising CUDA here, so that forks can use the GPUs."""
    os.environ.setdefault(_NVML_CHECK, "1")


def can_fork() -> bool:
    """Returns whether a fork of this process can do all that a new one could: one thread, no GPU in use."""
    if threading.active_count() > 1:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) == _NOT_INITIALIZED
