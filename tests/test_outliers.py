"""Slow ranks and spikes of the loss, by medians; and that a run tells them."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data import loader
from pretrain.models import vit
from pretrain.train.outliers import SPIKE_MIN, LossSpikes, SlowRanks, slow_rank
from pretrain.train.run import train


@pytest.mark.parametrize(
    ("own_s", "slow"),
    [
        ([1.0], None),
        ([1.0, 1.0], None),
        ([1.0, 1.4, 1.0, 1.0], None),
        ([1.0, 1.6, 1.0, 1.0], 1),
        ([1.0, 1.1, 0.9, 8.0], 3),
        ([0.0, 0.04, 0.0, 0.0], None),  # many times nothing
        ([2.0, 1.0], 0),
    ],
)
def test_the_slow_rank(own_s: list[float], slow: int | None) -> None:
    """More than 1.5 times the others' median, and worth a look."""
    assert slow_rank(own_s, elapsed_s=2.0, num_steps=10) == slow


def test_milliseconds_of_small_steps_are_no_news() -> None:
    """100 steps of 30 ms on two ranks that share a CPU: 6 ms more in one of them are told of neither."""
    assert slow_rank([1.51, 0.91], elapsed_s=3.0, num_steps=100) is None
    assert slow_rank([2.51, 0.91], elapsed_s=3.0, num_steps=100) == 0


def test_a_rank_is_slow_in_two_log_lines() -> None:
    """Now the one, then the other, or one once: noise. The second line in a row names it, and each after that."""
    ranks_of_lines = [0, 1, None, 1, 0, 0, 0, None, 0]
    own_s = {None: [1.0, 1.0], 0: [2.0, 1.0], 1: [1.0, 2.0]}
    slow = SlowRanks()
    found = [slow.find(own_s[rank], elapsed_s=2.0, num_steps=10) for rank in ranks_of_lines]
    assert found == [None, None, None, None, None, 0, 0, None, None]


def test_spikes_stand_out_of_the_losses_before_them() -> None:
    """A falling, noisy curve has none; three injected ones are counted, also side by side, not an early one."""
    random = np.random.default_rng(0)
    curve = 5 - np.arange(1000) / 400 + 0.05 * random.standard_normal(1000)
    assert LossSpikes().count(curve.tolist()) == 0
    for place, factor in ((500, 10.0), (501, 10.0), (700, 1.5), (3, 100.0)):
        curve[place] *= factor
    spikes = LossSpikes()
    assert [spikes.count(curve[i : i + 50].tolist()) for i in range(0, 1000, 50)] == [0] * 10 + [2, 0, 0, 0, 1] + [
        0
    ] * 5
    assert LossSpikes().count([1.0] * SPIKE_MIN + [1.0, 2.0, 1.0]) == 1


def test_a_lasting_rise_and_mixed_steps_are_no_spikes() -> None:
    """Of a loss that stays higher the first few steps are counted, of steps that are mixed strongly less than 1 %."""
    random = np.random.default_rng(1)
    level = 3 + 0.02 * random.standard_normal(2000)
    level[1000:] += 0.4
    assert 0 < LossSpikes().count(level.tolist()) <= 8
    for share in (0.1, 0.25, 0.4):
        mixed = 3 + 0.02 * random.standard_normal(4000) + 0.8 * (random.random(4000) < share) * random.random(4000)
        assert LossSpikes().count(mixed.tolist()) <= 40
    mixed[2000] = 9.0
    assert LossSpikes().count(mixed[1900:2010].tolist()) == 1


def test_spikes_that_come_again_and_again_are_counted() -> None:
    """One in thirty steps, from the first steps on: each of them, but for those before there is a window."""
    losses = 3 + 0.02 * np.random.default_rng(2).standard_normal(3000)
    losses[10::30] *= 3
    assert LossSpikes().count(losses.tolist()) >= 100 - 3


def slowed(config: Config, where: str) -> None:
    """Trains; rank 1 sleeps in each step, in its data or in its forward pass."""
    if ranks.rank() == 1:
        owner, name = (loader._TrainSteps, "__getitem__") if where == "data" else (vit.VisionTransformer, "forward")
        inner = getattr(owner, name)

        def slow(*arguments: Any) -> Any:
            time.sleep(0.2)
            return inner(*arguments)

        setattr(owner, name, slow)
    train(config)


@pytest.mark.parametrize("where", ["data", pytest.param("forward", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named(where: str, tmp_path: Path) -> None:
    """From the second log line on, with what it takes its time for; the losses of steps are looked at."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=15)
    run_ranks(slowed, 2, config, where)
    rows = [json.loads(line) for line in (config.output / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/slow_rank") for row in rows] == [None, 1, 1]
    assert all(row["train/own_s_max"] > 0.15 and row["train/loss_spikes"] == 0 for row in rows)
