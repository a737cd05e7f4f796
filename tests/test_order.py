"""The order of samples: a bijection per epoch, the same for every machine and version, well shuffled."""

import numpy as np
import pytest

from pretrain.data.lanes import Lanes, choose_lanes
from pretrain.data.order import BatchPlan, Order, plan_batch, share
from pretrain.data.permutation import permute, scatter, uniform, unpermute, unscatter, words

SIZES = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 4097, 65535, 65536, 65537, 100_003]


# Written down when the order was fixed. They never change: a change means that a run cannot be resumed.
GOLDEN_WORDS = [14131616734988694812, 15533871161142869708, 12499720174018835623]
GOLDEN_PERMUTATION = [3, 7, 10, 8, 6, 9, 2, 4, 5, 0, 1]
GOLDEN_LARGE = [249606191, 296450875, 107993984, 21927882]
GOLDEN_STEP = [11, 7, 2, 3, 4, 6, 7, 11]
GOLDEN_HELD_OUT = [5, 0, 8]


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_bijection(size: int) -> None:
    """Every number of 0..size-1 comes exactly once, for sizes 1, 2, 3 and on both sides of the powers of two."""
    for seed in range(3):
        assert sorted(permute(np.arange(size), size, "test", seed).tolist()) == list(range(size))


def test_permute_works_position_by_position_and_in_any_shape() -> None:
    """The result of a position does not depend on what else is asked, and the input is left as it was."""
    positions = np.arange(1000)
    together = permute(positions, 1000, "test")
    assert (positions == np.arange(1000)).all()
    assert [int(permute(np.array([i]), 1000, "test")[0]) for i in range(0, 1000, 37)] == together[::37].tolist()
    assert (permute(positions.reshape(10, 100), 1000, "test") == together.reshape(10, 100)).all()


def test_permute_reaches_sizes_of_hundreds_of_millions() -> None:
    """Distinct positions of 300 million samples stay distinct and in range: nothing overflows."""
    size = 300_000_001
    random = np.random.default_rng(0)
    positions = np.unique(np.concatenate([random.integers(0, size, 100_000), [0, size - 1]]))
    result = permute(positions, size, "test")
    assert len(np.unique(result)) == len(positions)
    assert result.min() >= 0 and result.max() < size


def test_the_order_never_changes_between_versions() -> None:
    """Fixed numbers: a checkpoint of today must continue with the same samples after an update."""
    assert words(3, "v1", "aug", 0, "trees", 1, 2).tolist() == GOLDEN_WORDS
    assert permute(np.arange(11), 11, "epoch", 0, 0).tolist() == GOLDEN_PERMUTATION
    assert permute(np.array([0, 1, 2, 299_999_999]), 300_000_000, "epoch", 7, 3).tolist() == GOLDEN_LARGE
    epochs, indices = Order(num_samples=13, held_out=3, global_batch=8, seed=5).samples(1)
    assert epochs.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert indices.tolist() == GOLDEN_STEP
    assert Order(num_samples=13, held_out=3, global_batch=8, seed=5).held_out_indices().tolist() == GOLDEN_HELD_OUT


def test_uniform_takes_the_upper_53_bits() -> None:
    """0 gives 0, the largest word stays below 1, and the mean of many is a half."""
    assert uniform(np.array([0, 1 << 11, (1 << 64) - 1], dtype=np.uint64)).tolist() == [0, 2.0**-53, 1 - 2.0**-53]
    draws = uniform(words(100_000, "test"))
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.var() - 1 / 12) < 0.002


def test_words_depend_on_every_part_of_the_key() -> None:
    """No two keys share their draws, also where the parts read alike when joined."""
    keys = [("a", 1, 2), ("a", 2, 1), ("a", 12), ("b", 1, 2), ("a", 1, 3), ("a", 1), ("a1", 2)]
    assert len({tuple(words(2, *key).tolist()) for key in keys}) == len(keys)
    assert words(5, "a").tolist()[:3] == words(3, "a").tolist()


@pytest.mark.parametrize("global_batch", [1, 7, 64, 103, 250])
@pytest.mark.parametrize("held_out", [0, 10])
def test_every_sample_comes_once_per_epoch(global_batch: int, held_out: int) -> None:
    """Steps run across the borders of epochs and skip or repeat nothing, also when a step holds several epochs."""
    order = Order(num_samples=103, held_out=held_out, global_batch=global_batch, seed=3)
    steps = [order.samples(step) for step in range(-(-4 * order.num_train // global_batch))]
    epochs, indices = (np.concatenate(parts) for parts in zip(*steps))
    assert (epochs == np.arange(len(epochs)) // order.num_train).all()
    trained = sorted(set(range(103)) - set(order.held_out_indices().tolist()))
    assert len(trained) == 103 - held_out
    orders = []
    for epoch in range(4):
        assert sorted(indices[epochs == epoch].tolist()) == trained
        orders.append(tuple(indices[epochs == epoch].tolist()))
    assert len(set(orders)) == 4


def test_a_step_depends_on_the_step_alone() -> None:
    """Asking backwards, or asking a new object, gives the same samples: nothing is carried along."""
    steps = [Order(1000, 20, 96, seed=1).samples(step) for step in range(30)]
    order = Order(1000, 20, 96, seed=1)
    for step in reversed(range(30)):
        for once, again in zip(steps[step], order.samples(step)):
            assert once.tolist() == again.tolist()


def test_seeds_give_other_orders_but_the_same_held_out_samples() -> None:
    """Runs with several seeds train in other orders and are validated on the same images."""
    orders = [Order(1000, 50, 950, seed) for seed in range(20)]
    assert len({tuple(order.samples(0)[1].tolist()) for order in orders}) == 20
    assert len({tuple(order.held_out_indices().tolist()) for order in orders}) == 1
    assert len(set(orders[0].held_out_indices().tolist())) == 50
    for order in orders:
        assert set(order.samples(0)[1].tolist()).isdisjoint(order.held_out_indices().tolist())


def test_held_out_samples_are_spread_over_the_set() -> None:
    """Held-out samples are a random part, not the beginning of the first shard."""
    held_out = Order(10_000, 1000, 64, seed=0).held_out_indices()
    counts = np.histogram(held_out, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 60 and counts.max() < 140  # 100 +- 4 standard deviations


@pytest.mark.parametrize("size", [5, 16, 23])
def test_every_sample_reaches_every_position_equally_often(size: int) -> None:
    """Chi-square over the cells (position, sample) in 4,000 epochs: as uniform as a perfect shuffle, no more."""
    from scipy.stats import chi2

    num_epochs = 4000
    counts = np.zeros((size, size))
    for epoch in range(num_epochs):
        counts[np.arange(size), permute(np.arange(size), size, "epoch", 0, epoch)] += 1
    statistic = ((counts - num_epochs / size) ** 2 / (num_epochs / size)).sum()
    # Rows and columns have fixed sums: (size - 1)^2 degrees of freedom, scaled for sampling without replacement.
    p = chi2.sf(statistic * (size - 1) / size, (size - 1) ** 2)
    assert 1e-4 < p < 1 - 1e-4


def test_neighbours_are_independent() -> None:
    """Samples that lie side by side in a shard do not come side by side: correlation of position and index is noise."""
    size, correlations = 1000, []
    for epoch in range(200):
        order = permute(np.arange(size), size, "epoch", 0, epoch).astype(float)
        correlations += [np.corrcoef(order[:-1], order[1:])[0, 1], np.corrcoef(np.arange(size), order)[0, 1]]
    assert np.abs(correlations).max() < 5 / np.sqrt(size)
    assert abs(np.mean(correlations)) < 5 / np.sqrt(size * len(correlations))


def test_epochs_are_independent_of_each_other() -> None:
    """A sample's position in one epoch says nothing about the next, nor under the next seed."""
    size = 10_000
    first = permute(np.arange(size), size, "epoch", 0, 0)
    for key in (("epoch", 0, 1), ("epoch", 1, 0), ("held-out",)):
        other = permute(np.arange(size), size, *key)
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(size)
        assert (first == other).sum() < 10  # 1 is expected


def test_shares_cover_the_batch() -> None:
    """For every number of ranks the shares follow each other without gap, and their lengths differ by at most one."""
    for count in (1, 2, 7, 64, 103):
        for world_size in range(1, count + 3):
            shares = [share(count, rank, world_size) for rank in range(world_size)]
            assert [slot for part in shares for slot in part] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_world_size_and_ceiling_has_a_plan() -> None:
    """Any number of ranks up to the global batch works: enough slots for the largest share, never above the ceiling.

    One forward pass less would not do, and `masked` counts exactly the slots that are filled up.
    """
    for global_batch in (1, 2, 7, 24, 96):
        for world_size in range(1, global_batch + 1):
            for ceiling in (1, 2, 3, 5, 16, 1000):
                plan = plan_batch(global_batch, world_size, ceiling)
                largest = max(len(share(global_batch, rank, world_size)) for rank in range(world_size))
                slots = plan.micro_batch * plan.accumulation
                assert 1 <= plan.micro_batch <= ceiling
                assert slots >= largest > (plan.accumulation - 1) * ceiling
                assert slots - largest < plan.accumulation
                assert plan.masked == world_size * slots - global_batch


def test_examples_of_plans() -> None:
    """Even splits have no masked slots; three ranks of 64 have two; a ceiling of 5 cuts 12 into three times 4."""
    assert plan_batch(4096, 8, 256) == BatchPlan(256, 2, 0)
    assert plan_batch(64, 3, 256) == BatchPlan(22, 1, 2)
    assert plan_batch(24, 2, 5) == BatchPlan(4, 3, 0)


@pytest.mark.parametrize("size", SIZES)
def test_unpermute_is_the_inverse(size: int) -> None:
    """Every position comes back, in every size; in many small permutations too."""
    positions = np.arange(size)
    assert (unpermute(permute(positions, size, "test", 3), size, "test", 3) == positions).all()
    sizes = 1 + positions % 90
    many = positions % sizes, sizes, positions, "test", 3
    assert (unscatter(scatter(*many), *many[1:]) == many[0]).all()


LANES = (None, Lanes(4, 3), Lanes(2, 5, window_blocks=2))


@pytest.mark.parametrize("lanes", LANES, ids=str)
@pytest.mark.parametrize(
    ("size", "held_out", "batch", "subset", "repeats"),
    [
        (101, 0, 12, None, 1),
        (101, 7, 12, None, 1),
        (101, 7, 12, 37, 1),
        (50, 0, 7, None, 1),
        (50, 0, 7, 49, 1),
        (40, 4, 61, None, 1),
        (101, 7, 36, 37, 3),
        (40, 4, 122, None, 2),
    ],
)
def test_closed_forms_agree_with_the_steps(
    size: int, held_out: int, batch: int, subset: int | None, repeats: int, lanes: Lanes | None
) -> None:
    """`steps_of` finds the step of each sample, and of no other one; `seen_in` counts what the steps before hold."""
    order = Order(size, held_out, batch, 3, lanes, subset=subset, repeats=repeats)
    epochs = np.concatenate([order.samples(step)[0] for step in range(25)])
    for step in range(25):
        assert (order.steps_of(*order.samples(step)) == step).all()
        for epoch in range(80 * repeats):
            assert order.seen_in(step)(epoch) == [(epochs[: step * batch] == epoch).sum()]
    others = np.setdiff1d(np.arange(size), order.samples(range(25))[1])
    assert len(others) == size - order.num_train and np.isin(order.held_out_indices(), others).all()
    assert (order.steps_of(np.zeros(len(others), np.int64), others) == -1).all()


@pytest.mark.parametrize("lanes", LANES, ids=str)
def test_copies_follow_each_other_as_epochs_side_by_side(lanes: Lanes | None) -> None:
    """Three copies: the images of the order with a third of the batch, and each (epoch, index) once."""
    copied, single = (Order(101, 7, batch, 3, lanes, repeats=repeats) for batch, repeats in ((36, 3), (12, 1)))
    epochs, indices = copied.samples(range(40))
    rounds, images = single.samples(range(40))
    assert (indices.reshape(40, 12, 3) == images[..., None]).all()
    assert (epochs.reshape(40, 12, 3) == rounds[..., None] * 3 + np.arange(3)).all()
    assert len(set(zip(epochs.ravel().tolist(), indices.ravel().tolist()))) == epochs.size
    assert copied.epochs(40) == 36 * 40 / 94 and (copied.held_out_indices() == single.held_out_indices()).all()
    shares = np.concatenate([copied.samples(5, share(36, rank, 5))[1] for rank in range(5)])
    assert (shares == indices[5]).all()


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("held_out", [0, 100])
def test_subsets_lie_in_each_other_and_are_the_same_for_every_seed(held_out: int, block: int) -> None:
    """A random choice from the whole set, of whole blocks in lanes, without what is held out; each once per epoch."""
    chosen: list[set[int]] = []
    for subset in (1, 500, 1000, 10_000 - held_out):
        lanes = choose_lanes(block, subset, 64) if block else None
        orders = [Order(10_000, held_out, 64, seed, lanes, subset=subset) for seed in (0, 7)]
        by_seed = []
        for order in orders:
            epochs, indices = order.samples(range(-(-subset // 64)))
            by_seed.append(sorted(indices[epochs == 0].tolist()))
        assert by_seed[0] == by_seed[1] and len(set(by_seed[0])) == subset
        chosen.append(set(by_seed[0]))
        assert chosen[-1].isdisjoint(orders[0].held_out_indices().tolist())
    assert all(small < large for small, large in zip(chosen, chosen[1:]))
    counts = np.histogram(sorted(chosen[2]), bins=10, range=(0, 10_000))[0]
    assert counts.min() > 0 and counts.max() < 250  # of 62 blocks, or of 1,000 samples
    if block:
        assert len({index // 16 for index in chosen[2]}) <= 1000 / 16 + 2
