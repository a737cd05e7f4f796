"""Which samples form step t: a pure function of the seed and the step, whatever the number of ranks and workers.

Two orders. `permuted`: slot s of step t is position q = t * global_batch + s of an endless sequence of epochs; epoch
q // N visits its N samples in the order of a keyed permutation. `lanes` (lanes.py): blocks of consecutive samples, for
storage where each read costs a request. A mixture (mixture.py) interleaves several sets, each in the same order. With
`repeats` R an image fills R consecutive slots, as if R epochs ran side by side: its copies belong to epochs e R to
e R + R - 1, so that each (epoch, index) still occurs once. No memory, no state: the step number alone determines the
position in the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.config import Config
from pretrain.data.lanes import Lanes, place, place_in_row, position_of, row_of_blocks, seen
from pretrain.data.mixture import Mixture
from pretrain.data.permutation import permute, unpermute, unvisit, visit
from pretrain.errors import ConfigError

Steps = int | range | np.ndarray
Slots = range | list[int] | np.ndarray


@dataclass(frozen=True)
class Order:
    """The order of a training set, and its held-out samples."""

    num_samples: int  # in the manifest, held-out ones included
    held_out: int  # samples among these that are never trained on
    global_batch: int  # slots of a step
    seed: int
    lanes: Lanes | None = None  # of one set; None: `permuted`
    mixture: Mixture | None = None  # of several whole sets, with its own lanes; None: one set
    subset: int | None = None  # how many of the samples not held out are trained on; None: all
    repeats: int = 1  # consecutive slots that each image fills; divides global_batch; 1 in a mixture

    @property
    def images_per_step(self) -> int:
        """Distinct images of a step: its slots without the copies."""
        return self.global_batch // self.repeats

    @property
    def name(self) -> Literal["permuted", "lanes"]:
        """Which of the two orders it is."""
        return "lanes" if self.lanes or (self.mixture and self.mixture.lanes) else "permuted"

    @property
    def num_train(self) -> int:
        """Samples of an epoch."""
        return self.num_samples - self.held_out if self.subset is None else self.subset

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of an epoch of each source of a mixture; one number for one set."""
        return self.mixture.sizes if self.mixture else (self.num_train,)

    def epochs(self, steps: int) -> float:
        """Returns how many epochs `steps` steps are; for a mixture, passes of the slowest source that has begun."""
        return min((given / size for given, size in zip(self.given(steps).tolist(), self.sizes) if given), default=0.0)

    def samples(self, steps: Steps, slots: Slots | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epoch, index) of the slots of steps: two int64 [slots], or [steps, slots] of several steps.

        slots: None for all of a step.
        """
        wanted = np.arange(self.global_batch) if slots is None else np.asarray(slots, np.int64)
        images, copies = np.divmod(wanted, self.repeats)
        rounds, indices = self._images(np.asarray(steps, np.int64)[..., None], images)
        return rounds * self.repeats + copies, indices

    def _images(self, steps: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The round (passes through all images before) and index of the steps' `images`: two int64 [steps, images]."""
        if self.lanes:
            at = (part.copy() for part in np.broadcast_arrays(steps, images))
            rounds, places = place(self.lanes, self.num_train, self.images_per_step, self.seed, *at)
            return rounds, self._beyond_held_out(places)
        positions = steps * self.images_per_step + images
        if self.mixture:
            return self.mixture.samples(positions, self.seed)
        rounds, places = visit(positions, self.num_train, "epoch", self.seed)
        return rounds, self._beyond_held_out(places)

    def seen_in(self, steps: int) -> Callable[[int], list[int]]:
        """Returns a function of the epoch: how many of its samples the first `steps` steps hold.

        A number for each source of a mixture; one number for one set.
        """
        images, repeats = steps * self.images_per_step, self.repeats
        if lanes := self.lanes:
            return lambda epoch: [seen(lanes, self.num_train, self.images_per_step, epoch // repeats, images)]
        if (mixture := self.mixture) and mixture.lanes:
            return mixture.seen_in(images)
        given = [(slots // repeats, size) for slots, size in zip(self.given(steps).tolist(), self.sizes)]
        return lambda epoch: [min(max(0, n - epoch // repeats * size), size) for n, size in given]

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns which source of a mixture each index belongs to, int64; 0 for one set."""
        return self.mixture.sources_of(indices) if self.mixture else np.zeros_like(indices)

    def given(self, steps: int | np.ndarray) -> np.ndarray:
        """Returns how many samples of each source the first `steps` steps hold, all passes added up.

        int64, a row for each source of a mixture; one row for one set.
        """
        slots = np.asarray(steps, np.int64) * self.global_batch
        return self.mixture.given(slots) if self.mixture else slots[None]

    def steps_of(self, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Returns the step that holds each (epoch, index), -1 for one not trained on: `samples` inverted, int64."""
        if self.mixture:
            return self.mixture.positions(epochs, indices, self.seed) // self.global_batch
        places, rounds = self._places_of(indices), epochs // self.repeats
        steps = np.full(len(indices), -1, np.int64)
        order = np.argsort(rounds, kind="stable")
        order = order[(places[order] >= 0) & (places[order] < self.num_train)]
        for same in np.split(order, np.flatnonzero(np.diff(rounds[order])) + 1) if len(order) else ():
            if self.lanes:
                key = self.seed, int(rounds[same[0]])
                at = position_of(self.lanes, self.num_train, self.images_per_step, *key, places[same])
            else:
                at = unvisit(rounds[same], places[same], self.num_train, "epoch", self.seed)
            steps[same] = at // self.images_per_step
        return steps

    def held_out_indices(self) -> np.ndarray:
        """Returns the indices that validation uses, int64 [held_out]."""
        # The split does not depend on the seed, so that runs with several seeds are validated on the same images.
        places = np.arange(self.held_out)
        if self.lanes:
            return row_of_blocks(places, self.lanes.block_samples, self.num_samples, "held-out")
        return permute(places, self.num_samples, "held-out")

    def _beyond_held_out(self, places: np.ndarray) -> np.ndarray:
        """Maps places 0..num_train-1 among the training samples to indices.

        A subset is the beginning of the whole training set: the same for every seed, and a smaller subset is part of
        a larger one.
        """
        if self.num_train == self.num_samples:
            return places
        if not self.lanes:
            return permute(places + self.held_out, self.num_samples, "held-out")
        first, count = self._first_whole_block, self.num_samples
        at = np.where(places + first < count, places + first, places + first - count + self.held_out)
        return row_of_blocks(at, self.lanes.block_samples, count, "held-out")

    def _places_of(self, indices: np.ndarray) -> np.ndarray:
        """The inverse of `_beyond_held_out`; below 0 for held-out indices, num_train or more for others left out."""
        if self.num_train == self.num_samples:
            return indices
        if not self.lanes:
            return unpermute(indices, self.num_samples, "held-out") - self.held_out
        first, count = self._first_whole_block, self.num_samples
        at = place_in_row(indices, self.lanes.block_samples, count, "held-out")
        return np.where(at >= first, at - first, np.where(at < self.held_out, -1, at - self.held_out + count - first))

    @property
    def _first_whole_block(self) -> int:
        """Where, in the sequence of blocks whose beginning is held out, the first block with no held-out sample begins.

        Blocks of `lanes` begin where the manifest's blocks do, so the rest of the last held-out block comes after all
        others.
        """
        assert self.lanes is not None
        block = self.lanes.block_samples
        has_one = self.held_out < self.num_samples // block * block
        return -(-self.held_out // block) * block if has_one else self.held_out


def order_of(config: Config, num_samples: int) -> Order:
    """Returns the order `permuted` of a config for a set of `num_samples`.

    Raises ConfigError when these are too few for data.held_out or data.subset.
    """
    data = config.data
    if data.held_out >= num_samples:
        raise ConfigError(
            f"data.held_out ({data.held_out}) leaves nothing of {num_samples} samples to train on; "
            f"hold out fewer, as data.held_out={num_samples // 50}"
        )
    if data.subset is not None and data.subset > (most := num_samples - data.held_out):
        raise ConfigError(f"data.subset ({data.subset}) is more than the {most} images to train on; lower it")
    return Order(num_samples, data.held_out, data.global_batch, config.seed, subset=data.subset, repeats=data.repeats)


def share(count: int, rank: int, world_size: int) -> range:
    """Returns a rank's contiguous part of 0..count-1; the lengths of ranks' parts differ by at most one."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


@dataclass(frozen=True)
class BatchPlan:
    """How a rank computes its share of the global batch, the same on every rank."""

    micro_batch: int  # slots of a forward pass
    accumulation: int  # forward passes of a step
    masked: int  # padding slots of a step, over all ranks, that count for nothing


def plan_batch(global_batch: int, world_size: int, max_micro_batch_size: int | None) -> BatchPlan:
    """Returns the fewest equal micro-batches that hold the largest rank's share.

    max_micro_batch_size: None for a single micro-batch. world_size: any up to global_batch.
    """
    largest_share = -(-global_batch // world_size)
    accumulation = -(-largest_share // (max_micro_batch_size or largest_share))
    micro_batch = -(-largest_share // accumulation)
    return BatchPlan(micro_batch, accumulation, world_size * accumulation * micro_batch - global_batch)
