"""Processes that begin where this one is: forks, which have its imports already.

The imports of torch and DeepSpeed take seconds of each start. A fork has none of this process's other threads, and a
GPU that has been used before cannot be used in it: `can_fork` says whether that matters. Imports no torch.
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
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch counts GPUs without entering the driver


class Fork:
    """A child process, with what subprocess.Popen has for one."""

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
    """Starts processes that do `call`, which ends them, or raises SystemExit: pretrain.cli.run does."""
    gc.freeze()  # collections in the forks do not touch, and so copy, what is here

    def start(variables: Mapping[str, str]) -> Fork:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # nobody reads; or closed
                stream.flush()  # what waits in it would be written by the fork too
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
                os._exit(code)  # what this process would do at its end is not the fork's to do
        raise AssertionError

    return start


def count_gpus_without_the_driver() -> None:
    """Keeps torch from using a GPU while it and DeepSpeed are imported, so that forks can."""
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
