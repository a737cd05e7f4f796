"""Runs tasks in worker processes, one at a time in each: yields results as they come, and reports overall progress.

A task is made when a process is free for it, so that only as many are in memory as there are processes. When this
process is killed, its workers end at their next message; when a worker is killed, the error is one line.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from pretrain.errors import LostProcessError

Task = TypeVar("Task")
Result = TypeVar("Result")
Progress = Callable[[int], None]  # called with the number of samples just done
Engine = Callable[[Callable[[Any, Progress], Any], Iterable[Any], int, Progress], Iterator[Any]]  # `results`, or Ray's

_EVERY_S = 0.2  # between a worker's messages: one for each image from 64 workers would overload the parent


def num_cores() -> int:
    """Returns how many processes may run at a time here."""
    return len(os.sched_getaffinity(0))


def results(
    function: Callable[[Task, Progress], Result], tasks: Iterable[Task], workers: int, progress: Progress
) -> Iterator[Result]:
    """Yields the result of `function` for each task, in any order, from `workers` processes; 1: from this one.

    function: of a module, or a `partial` of one; what it raises is raised here. With several processes it has to be
    called from the main thread, the only one that receives interrupts. Raises LostProcessError when a worker ends by
    itself.
    """
    if workers == 1:
        for task in tasks:
            yield function(task, progress)
        return
    # spawn: a forked process would share the threads' locks of the libraries that decode.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            with _deaf_to_interrupts():
                process.start()
            theirs.close()  # otherwise its end would not be noticed
            processes[ours] = process
        yield from _share_out(iter(tasks), dict(processes), progress)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ignores SIGINT, also in processes started meanwhile: a terminal sends it to all, and they import for seconds."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _share_out(tasks: Iterator[Any], processes: dict[Connection, Any], progress: Progress) -> Iterator[Any]:
    def hand_on(connection: Connection) -> None:
        try:
            connection.send(next(tasks))
        except StopIteration:
            del processes[connection]

    try:
        for connection in list(processes):
            hand_on(connection)
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                kind, value = connection.recv()
                if kind == "done":
                    progress(value)
                    continue
                if kind == "error":
                    raise value
                hand_on(connection)
                yield value
    except (EOFError, ConnectionError):
        time.sleep(0.1)  # until the operating system knows its exit code
        codes = {process.exitcode for process in processes.values()} - {None, 0}
        raise LostProcessError(
            f"a worker process has ended (exit code {', '.join(map(str, codes)) or 'unknown'}; -9 is often "
            "too little memory: give fewer --workers); the same command again keeps the shards that it has completed"
        ) from None


def _work(function: Callable[[Any, Progress], Any], connection: Connection) -> None:
    """A worker's loop: receives a task, sends its result, until the other end is closed."""
    words = _Words(connection)
    try:
        while True:
            task = connection.recv()
            signal.signal(signal.SIGTERM, _leave)
            try:
                result = function(task, words.add)
            except (BrokenPipeError, ConnectionError):
                return
            except Exception as error:
                if not hasattr(error, "exit_code"):  # a bug, whose traceback would be lost on the way
                    error.add_note("".join(traceback.format_exception(error)))
                connection.send(("error", error))
                return
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            words.send()
            connection.send(("result", result))
    except (EOFError, ConnectionError):
        return


def _leave(*_: object) -> NoReturn:
    sys.exit(143)  # unwinds the task, which removes its temporary file


class _Words:
    """A worker's messages: how many samples it has done, sent at intervals."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._count, self._sent_at = connection, 0, time.monotonic()

    def add(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent_at > _EVERY_S:
            self.send()

    def send(self) -> None:
        self._connection.send(("done", self._count))
        self._count, self._sent_at = 0, time.monotonic()
