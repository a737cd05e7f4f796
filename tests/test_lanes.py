"""The order `lanes`: each sample once per epoch for any number of ranks, few blocks read, blocks and places mixed."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from pretrain.config import MAX_STEP
from pretrain.data.lanes import Lanes, choose_lanes, fits, read_amplification
from pretrain.data.manifest import Manifest, block_samples
from pretrain.data.order import Order, share
from pretrain.data.permutation import scatter
from pretrain.errors import ConfigError, UserError
from pretrain.train import resuming
from pretrain.train.datasets import open_data
from pretrain.train.resuming import fingerprint, resumed_order

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 504)
LARGE = Order(300_000_000, 0, 4096, 7, choose_lanes(81, 300_000_000, 4096))

# Written down when the order was fixed. They never change: a change means that a run cannot be resumed.
GOLDEN_STEP = [
    [0, 1, 0, 1, 1, 0, 0, 1],
    [12, 20, 0, 17, 18, 8, 10, 1],
]
GOLDEN_LARGE = [236081461, 236081423, 56550948, 213646713]
GOLDEN_SCATTER = [1, 1, 16, 37]


def orders() -> list[Order]:
    """Settings at the edges, and random ones: samples, held out, global batch, lanes, blocks, windows."""
    edges = [
        (1, 0, 1, 1, 1, 1),
        (1, 0, 5, 1, 1, 1),
        (2, 0, 7, 1, 1, 1),
        (10, 1, 4, 4, 2, 1),
        (103, 0, 250, 1, 8, 1),
        (103, 10, 250, 60, 8, 1),
        (1000, 0, 64, 64, 100, 1),
        (1000, 999, 16, 1, 1, 1),
        (5000, 500, 504, 63, 100, 2),
        (20_000, 0, 512, 512, 8, 1),
    ]
    random = np.random.default_rng(0)
    while len(edges) < 60:
        samples, batch = int(random.integers(10, 4000)), int(random.integers(1, 600))
        held_out = int(random.choice([0, 0, 1, samples // 10]))
        block, window = int(random.integers(1, max(2, (samples - held_out) // 4))), int(random.integers(1, 4))
        lanes = Lanes(block, int(random.integers(1, batch + 1)), window)
        if fits(lanes, samples - held_out, batch, 1000):
            edges.append((samples, held_out, batch, lanes.num_lanes, block, window))
    return [
        Order(samples, held_out, batch, seed, Lanes(block, count, window))
        for seed, (samples, held_out, batch, count, block, window) in enumerate(edges)
    ]


@pytest.mark.parametrize("order", orders(), ids=lambda order: f"{order.num_samples}-{order.global_batch}-{order.lanes}")
def test_every_sample_comes_once_per_epoch(order: Order) -> None:
    """Three epochs, none beyond the held-out samples; the parts of any ranks at any steps make up the global step."""
    assert order.lanes and fits(order.lanes, order.num_train, order.global_batch, 1000)
    num_steps = -(-3 * order.num_train // order.global_batch) + 2
    epochs, indices = order.samples(range(num_steps))
    trained = np.setdiff1d(np.arange(order.num_samples), order.held_out_indices())
    for epoch in range(3):
        assert np.array_equal(np.sort(indices[epochs == epoch]), trained), epoch
    assert np.array_equal(np.unique(epochs[0]), np.arange(epochs[0].max() + 1))  # the first step begins at the start
    again = replace(order)  # without what the first one has cached
    for step in np.random.default_rng(1).integers(0, num_steps, 3).tolist():
        for world_size in WORLD_SIZES:
            for rank in {0, world_size // 2, world_size - 1}:
                slots = share(order.global_batch, rank, world_size)
                steps = range(step, min(step + 3, num_steps))
                for part, whole in zip(again.samples(steps, slots), (epochs, indices)):
                    assert np.array_equal(part, whole[steps.start : steps.stop, slots.start : slots.stop])


def test_the_order_never_changes_between_versions() -> None:
    """Fixed numbers: a checkpoint of today must continue with the same samples after an update."""
    small = Order(num_samples=23, held_out=3, global_batch=8, seed=5, lanes=Lanes(block_samples=4, num_lanes=3))
    assert [part.tolist() for part in small.samples(2)] == GOLDEN_STEP
    assert LARGE.samples(1_000_000, [0, 1, 2047, 4095])[1].tolist() == GOLDEN_LARGE
    places, sizes = np.array([0, 1, 63, 80]), np.array([2, 5, 64, 81])
    assert scatter(places, sizes, np.array([0, 81, 162, 300_000_000]), "test").tolist() == GOLDEN_SCATTER


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65, 81])
def test_scatter_is_a_bijection_for_each_tweak(size: int) -> None:
    """Permutations of other sizes and tweaks beside it change nothing."""
    places, tweaks = np.tile(np.arange(size), 20), np.repeat(np.arange(20) * 81, size)
    together = scatter(places, np.full(20 * size, size), tweaks, "test")
    assert (np.sort(together.reshape(20, size)) == np.arange(size)).all()
    alone = scatter(places[:size], np.full(size, size), tweaks[:size], "test")
    assert (alone == together[:size]).all()
    assert size < 5 or len({tuple(row) for row in together.reshape(20, size)}) > 10


@pytest.mark.parametrize("size", [64, 81])
def test_scatter_sends_every_place_everywhere_equally_often(size: int) -> None:
    """Chi-square over the cells (place, result) of 1,000 tweaks: as uniform as a perfect shuffle, no more."""
    from scipy.stats import chi2

    tries = 1000
    places, tweaks = np.tile(np.arange(size), tries), np.repeat(np.arange(tries) * size, size)
    results = scatter(places, np.full(tries * size, size), tweaks, "window", 0, 0)
    counts = np.bincount(places * size + results, minlength=size**2)
    statistic = ((counts - tries / size) ** 2 / (tries / size)).sum()
    assert 1e-4 < chi2.sf(statistic * (size - 1) / size, (size - 1) ** 2) < 1 - 1e-4


@pytest.mark.parametrize("size", [3, 4])
def test_scatter_gives_every_permutation_of_few_samples(size: int) -> None:
    """Each of the 6, or 24, equally often, by chi-square."""
    from scipy.stats import chisquare

    tries = 6000
    places, tweaks = np.tile(np.arange(size), tries), np.repeat(np.arange(tries) * size, size)
    rows = scatter(places, np.full(tries * size, size), tweaks, "window", 0, 0).reshape(tries, size)
    counts = [int((rows == row).all(axis=1).sum()) for row in permutations(range(size))]
    assert sum(counts) == tries and chisquare(counts).pvalue > 1e-4


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Neither blocks nor the places in them repeat."""
    orders = [Order(4000, 0, 40, seed, Lanes(5, 5)) for seed in (0, 1)]
    rows = [order.samples(range(100 * epoch, 100 * epoch + 100))[1].ravel() for order in orders for epoch in range(3)]
    for number, row in enumerate(rows):
        for other in rows[:number]:
            assert (row == other).mean() < 0.005
            assert abs(np.corrcoef(row, other)[0, 1]) < 5 / np.sqrt(800)  # of 800 blocks


@pytest.mark.parametrize("held_out", [0, 1, 37, 64, 990, 1001])
def test_blocks_are_runs_of_the_manifest(held_out: int) -> None:
    """An epoch needs each block once. Of the held-out samples too: all of whole blocks, and a part of one."""
    order = Order(1003, held_out, 8, 3, Lanes(16, 1))
    epochs, indices = order.samples(range(1003 // 8 + 1))
    blocks = (indices[epochs == 0] // 16).tolist()
    visits = sum(len(set(blocks[at : at + 16])) for at in range(0, len(blocks), 16))
    assert visits <= len(set(blocks)) + 3  # what fills no block is read with others
    counts = np.bincount(order.held_out_indices() // 16, minlength=63)
    assert counts.sum() == held_out and ((counts > 0) & (counts < 16)).sum() <= 2


def test_held_out_blocks_do_not_depend_on_the_seed() -> None:
    """Nor on the batch and the lanes; they are spread over the set."""
    orders = [Order(100_000, 10_000, 8 * count, count, Lanes(50, count)) for count in (1, 2, 9)]
    assert len({tuple(order.held_out_indices().tolist()) for order in orders}) == 1
    counts = np.histogram(orders[0].held_out_indices(), bins=5, range=(0, 100_000))[0]
    assert counts.min() > 1000 and counts.max() < 3000  # 40 blocks each: five standard deviations are 1,400 samples


def readers(global_batch: int, world_size: int, ranks_per_node: int) -> list[range]:
    """The slots of each node."""
    nodes = range(0, world_size, ranks_per_node)
    ends = [(share(global_batch, at, world_size).start, min(at + ranks_per_node, world_size) - 1) for at in nodes]
    return [range(start, share(global_batch, last, world_size).stop) for start, last in ends]


@pytest.mark.parametrize(
    ("world_size", "per_rank", "per_node"), [(1, 1, 1), (8, 1, 1), (64, 1, 1), (504, 1.86, 1.11), (512, 1, 1)]
)
def test_amplification_of_a_large_run(world_size: int, per_rank: float, per_node: float) -> None:
    """300M samples, 512 lanes: nodes share the lanes that their borders cut."""
    assert LARGE.lanes and LARGE.lanes.num_lanes == 512
    for ranks_per_node, expected in ((1, per_rank), (8, per_node)):
        found = read_amplification(LARGE.lanes, 4096, readers(4096, world_size, ranks_per_node))
        assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("world_size", "num_lanes", "block"), [(1, 7, 81), (3, 7, 81), (8, 20, 81), (12, 2, 9)])
def test_amplification_is_what_is_counted(world_size: int, num_lanes: int, block: int) -> None:
    """Block by block over an epoch of 40,000 samples, also where a block is shorter than a lane is wide."""
    order = Order(40_000, 0, 160, 1, Lanes(block, num_lanes))
    nodes = readers(160, world_size, 1)
    read = sum(len(np.unique(order.samples(range(250), slots)[1] // block)) for slots in nodes) * block / 40_000
    assert order.lanes and read_amplification(order.lanes, 160, nodes) == pytest.approx(read, rel=0.05)


@pytest.mark.parametrize("lane", [0, 511])
def test_a_lane_of_300_million_samples(lane: int) -> None:
    """All that a lane gives in epoch 1 is distinct, and whole blocks but for those that its two ends cut.

    The pieces of the lanes tile the axis, so this holds for the set: 300,000,000 samples, once each.
    """
    assert LARGE.lanes
    slots, per_lane = range(lane * 8, lane * 8 + 8), -(-LARGE.num_samples // 512)
    steps = range(per_lane // 8 - 2, 2 * (-(-per_lane // 8)) + 2)
    epochs, indices = LARGE.samples(steps, slots)
    assert epochs[0].max() == 0 and epochs[-1].min() == 2
    mine = indices[epochs == 1]
    assert len(np.unique(mine)) == len(mine) and abs(len(mine) - LARGE.num_samples / 512) < 2
    block = LARGE.lanes.block_samples
    used = np.unique(mine // block, return_counts=True)[1]
    assert (used != block).sum() <= 3


@pytest.mark.parametrize("world_size", [504, 512])
def test_ranks_of_a_large_run_see_equal_batches(world_size: int) -> None:
    """Step 1,000,000 of 300M samples put together from all ranks is the global step; 32 steps of one rank at once."""
    epochs, indices = LARGE.samples(1_000_000)
    parts = [LARGE.samples(1_000_000, share(4096, rank, world_size)) for rank in range(world_size)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), epochs)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), indices)
    assert len(np.unique(indices)) == 4096 and (epochs >= 13).all()
    ahead = LARGE.samples(range(1_000_000, 1_000_032), share(4096, 500, world_size))[1]
    assert np.array_equal(ahead[0], parts[500][1])


@pytest.mark.parametrize(
    ("num_samples", "sample_bytes", "global_batch", "expected"),
    [
        (300_000_000, 100_000, 4096, Lanes(83, 512)),
        (1_281_167, 110_000, 1024, Lanes(76, 128)),
        (25_000, 103_000, 4096, Lanes(81, 77)),
        (60_000, 500, 128, Lanes(4096, 3)),
        (1_000_000, 5_000_000, 4096, Lanes(64, 512)),
        (101, 2000, 12, Lanes(25, 1)),
        (3, 2000, 12, Lanes(1, 1)),
    ],
)
def test_numbers_follow_from_the_set(num_samples: int, sample_bytes: int, global_batch: int, expected: Lanes) -> None:
    """Blocks of 8 MiB within 64 to 4,096 samples, a lane for 8 slots, fewer in small sets; they always fit."""
    block = block_samples(num_samples, num_samples * sample_bytes)
    assert choose_lanes(block, num_samples, global_batch) == expected
    assert fits(expected, num_samples, global_batch, 1_000_000)
    assert not fits(expected, num_samples, global_batch, 1 << 62)


def test_which_order_a_run_has(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    """auto: lanes where shards are remote; what the setting says elsewhere; too many steps are refused in one line."""

    def chosen(**changes: Any) -> str:
        return open_data(tiny_config(shard_folder, tmp_path, **changes)).order.name

    assert (chosen(), chosen(data__order="lanes")) == ("permuted", "lanes")
    with pytest.raises(ConfigError, match="data.order: total_steps .* or set data.order=permuted"):
        chosen(data__order="lanes", total_steps=MAX_STEP, data__global_batch=1 << 20)
    monkeypatch.setattr(type(manifest), "is_remote", True)
    assert (chosen(), chosen(data__order="permuted")) == ("lanes", "permuted")


def test_a_resumed_run_keeps_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    """Those of the checkpoint, whatever would be chosen today; what no run can have is refused by name."""
    begun = Order(103, 0, 12, 0, Lanes(block_samples=9, num_lanes=5))
    today = replace(begun, lanes=Lanes(25, 1))
    state = {"data": fingerprint(manifest, begun)}
    monkeypatch.setattr(resuming, "read_state", lambda _: state)
    assert resumed_order(tmp_path, today, 20) == begun == resumed_order(tmp_path, replace(today, lanes=None), 20)
    for key, value in (("block_samples", 0), ("num_lanes", 13), ("window_blocks", None), ("name", "sorted")):
        state["data"] = fingerprint(manifest, begun)
        state["data"]["order"][key] = value
        with pytest.raises(UserError, match=f"state.json: data: order: {key} is "):
            resumed_order(tmp_path, today, 20)
    data = open_data(tiny_config(manifest.path, tmp_path, data__order="lanes", data__held_out=20))
    data.follow(replace(begun, held_out=20))
    assert sorted(data.val_indices) == sorted(data.order.held_out_indices()) and data.order.lanes == begun.lanes
    state["data"] = fingerprint(manifest, replace(begun, lanes=None))
    assert resumed_order(tmp_path, today, 20).lanes is None
