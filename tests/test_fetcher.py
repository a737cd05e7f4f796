"""The fetcher: it fills the store ahead of the training, and nothing depends on it."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data import fetcher
from pretrain.data.fetcher import blocks_of, start
from pretrain.data.loader import train_batches
from pretrain.data.manifest import Manifest
from pretrain.data.order import Order, plan_batch
from pretrain.data.reader import block_of
from tests.test_loader import config
from tests.test_store import far, hasty, remote_set, site, stored  # noqa: F401
from tests.web import Site, at_random


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Waits until something holds; returns whether it does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # asked again, a listing may miss a block that is being renamed
            return True
        time.sleep(0.01)
    return False


def order_of(manifest: Manifest, global_batch: int = 10) -> Order:
    """The order of a run over it."""
    return Order(manifest.num_samples, 0, global_batch, 0)


def test_the_blocks_of_a_step_are_those_of_its_slots(far: Manifest) -> None:  # noqa: F811
    """Each once, in the order of their first use; of a node's own slots."""
    order = order_of(far)
    for step in range(12):
        for slots in (range(10), range(3, 7)):
            indices = order.samples(step)[1][slots.start : slots.stop]
            wanted = list(dict.fromkeys(block_of(far, int(index)) for index in indices))
            assert list(blocks_of(far, order, slots, step)) == wanted


def test_it_stays_a_little_ahead(far: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Four blocks beyond the step that is being read, and on when that is told; a new start ends with its owner."""
    monkeypatch.setattr(fetcher, "DEPTH", 4)
    order = order_of(far, global_batch=1)
    running = start(far, order, range(40))
    assert running is not None
    ahead = list(dict.fromkeys(block.name for step in range(40) for block in blocks_of(far, order, range(1), step)))
    assert until(lambda: set(stored(far)) == set(ahead[:5])), (stored(far).keys(), ahead[:5])
    time.sleep(0.2)
    assert set(stored(far)) == set(ahead[:5])
    running.note(30)
    running.note(2)
    assert until(lambda: len(stored(far)) >= 9)
    pid = running.pid
    assert pid is not None and os.path.exists(f"/proc/{pid}") and start(far, order, range(0)) is None
    del running
    assert until(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("killed", [False, True])
def test_batches_are_the_local_ones(
    site: Site,  # noqa: F811
    far: Manifest,  # noqa: F811
    manifest: Manifest,
    workers: int,
    killed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the fetcher, and when it is killed at the first step: the same samples, labels and pixels as on a disk.

    A dead one is told, once.
    """
    site.fault = at_random(0.2, ("503", "half-way", "short"))
    settings = config(manifest.path, workers=workers)
    order = order_of(far, settings.data.global_batch)
    plan = plan_batch(settings.data.global_batch, 1, 64)
    near = train_batches(manifest, order, plan, settings, 0)
    count, fetchers = 0, []

    class Known(fetcher.Fetcher):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            fetchers.append(self)

    monkeypatch.setattr(fetcher, "Fetcher", Known)
    for ours, theirs in zip(train_batches(far, order, plan, settings, 0), near):
        if killed and not count:
            fetchers[0]._process.kill()
            fetchers[0]._process.join()
        count += 1
        assert ours.error is None and not ours.bad and ours.valid.any()
        assert all(torch.equal(a, b) for a, b in zip(ours[:6], theirs[:6]))
    assert count == settings.total_steps and len(fetchers) == 1
    died = fetchers[0]._process.exitcode == -signal.SIGKILL  # with loader processes it may have been through before
    assert died or not killed or workers
    assert capsys.readouterr().err.count("that downloads blocks ended with -9") == died


def test_one_that_heard_a_stop_is_not_told(far: Manifest, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Ctrl-C reaches all processes of a run; it ends the fetcher, and the training saves without a word of it."""
    running = start(far, order_of(far, 1), range(10**6))
    assert running is not None and running.pid is not None
    assert until(lambda: "SigIgn" in Path(f"/proc/{running.pid}/status").read_text())
    time.sleep(0.5)  # until it has set its handlers
    os.kill(running.pid, signal.SIGINT)
    running._process.join()
    assert running._process.exitcode == -signal.SIGINT
    running.tell_if_dead()
    assert not capsys.readouterr().err


def test_it_dies_with_the_training(far: Manifest, tmp_path: Path) -> None:  # noqa: F811
    """When the training is killed the fetcher goes too, and does not download for nobody."""
    told = tmp_path / "pid"
    pid = os.fork()
    if not pid:
        running = start(far, order_of(far, 1), range(10**6))
        told.write_text(str(running.pid if running else 0))
        time.sleep(60)
        os._exit(0)
    assert until(lambda: told.exists() and bool(told.read_text()))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    orphan = int(told.read_text())
    assert orphan and until(lambda: _is_gone(orphan))


def _is_gone(pid: int) -> bool:
    """Whether a process is no more; where nobody collects orphans, only its name is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
