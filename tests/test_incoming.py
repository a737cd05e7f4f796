"""The batches of a run as they come: a wish to stop is heard while none does."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pretrain.cluster import signals
from pretrain.data.loader import Batch
from pretrain.train import incoming
from pretrain.train.incoming import Incoming


def _never() -> Iterator[Batch]:
    time.sleep(10_000)
    yield from ()


@pytest.mark.timeout(60)
def test_a_signal_late_in_a_look_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler outlasts what is left of the look's time, with which CPython's SimpleQueue would wait for ever."""
    monkeypatch.setattr(incoming, "GIVEN_S", 0.2)
    stop = signals.StopRequest()

    def hear(*_: object) -> None:
        stop.signal_name = "SIGUSR1"
        time.sleep(2 * incoming._LOOK_EVERY_S)

    signal.signal(signal.SIGUSR1, hear)  # of `stop`, which puts back what was there
    try:
        batches = Incoming(_never(), stop)
        threading.Timer(incoming._LOOK_EVERY_S / 2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert next(batches, None) is None and batches.late
    finally:
        stop.close()
