"""Waits for the next batch in short intervals, so that a stop request is noticed while no batch arrives."""

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from pretrain.cluster import signals
from pretrain.data.loader import Batch

GIVEN_S = 2.0  # after a stop request is noticed: a batch being prepared may still arrive
_LOOK_EVERY_S = 0.1


class Incoming(Iterator[Batch]):
    """Iterates over batches. Ends early, and is `late`, if no batch arrives and this rank is asked to stop.

    A loader process may be stuck in a read for minutes, but launchers kill a run 30 seconds after asking it to stop.
    The run already holds one batch: it takes that step and saves. A thread waits for the next one, forever if need be.
    """

    def __init__(self, batches: Iterator[Batch], stop: signals.StopRequest) -> None:
        self._batches, self._stop, self.late = batches, stop, False
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # Not a SimpleQueue: a signal late in its timeout makes CPython 3.11 and 3.12 wait forever.
        self._found: queue.Queue[Batch | Exception] = queue.Queue()
        self._thread = threading.Thread(target=self._fetch, name="next-batch", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the thread, and with it the iterator; does not join a thread that may be waiting for a batch."""
        self._wanted.put(False)
        if not self.late and kind is None:
            self._thread.join()

    def __next__(self) -> Batch:
        if self.late:
            raise StopIteration
        self._wanted.put(True)
        heard: float | None = None
        while True:
            try:
                found = self._found.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if self._stop.signal_name is None:
                    continue
                heard = heard or time.monotonic()
                if time.monotonic() < heard + GIVEN_S:
                    continue
                self.late = True
                raise StopIteration from None
            if isinstance(found, Exception):
                raise found
            return found

    def _fetch(self) -> None:
        while self._wanted.get():
            try:
                self._found.put(next(self._batches))
            except Exception as error:  # StopIteration too
                self._found.put(error)
        del self._batches
