"""Batches copied ahead: each arrives once, and computing waits for its own copy alone. On a GPU: tests/test_gpu.py."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.data.loader import Batch, single_labels
from pretrain.engine.ahead import CopyAhead

CUDA = torch.device("cuda", 0)


def batch_of(number: int) -> Batch:
    slots = torch.full((2,), number)
    images = torch.full((2, 3, 4, 4), number, dtype=torch.uint8)
    return Batch(images, *single_labels(slots), slots >= 0, slots, slots, [])


def test_every_batch_arrives_once() -> None:
    """On a CPU as it is, to the last one, which nothing follows; also one that was not announced."""
    ahead, batches = CopyAhead(torch.device("cpu")), [batch_of(n) for n in range(3)]
    for batch, following in zip(batches, [*batches[1:], None]):
        arrived = ahead.take(batch, following)
        assert all(ours is theirs for ours, theirs in zip(arrived[:6], batch[:6]))
    ahead.take(batches[0], batches[1])
    assert ahead.take(batches[2], None).images is batches[2].images


def test_a_step_waits_for_its_own_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on the streams: a batch's copy, the wait for it, only then the next one's copy."""
    told: list[str] = []
    inside: list[Any] = []

    @contextmanager
    def stream(chosen: Any) -> Any:
        inside.append(chosen)
        yield
        inside.pop()

    def copied(batch: Batch, device: torch.device) -> Batch:
        assert inside == ["side"] and device == CUDA
        number = int(batch.index[0])
        told.append(f"copy {number}")
        held = [SimpleNamespace(record_stream=lambda by, n=number: told.append(f"{by} holds {n}"))] * 4
        return batch._replace(**dict(zip(Batch._fields, held)))

    class Computing:
        def wait_stream(self, other: Any) -> None:
            told.append(f"wait for {other}")

        def __str__(self) -> str:
            return "step"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computing())
    monkeypatch.setattr(Batch, "to", copied)
    ahead, batches = CopyAhead(CUDA), [batch_of(n) for n in range(3)]
    for batch, following in zip(batches, [*batches[1:], None]):
        ahead.take(batch, following)
    waited = [[f"copy {n}", "wait for side", *[f"step holds {n}"] * 4] for n in range(3)]
    first, second, third = waited
    assert told == [*first, "copy 1", *second[1:], "copy 2", *third[1:]]
