"""Which samples form step t: a pure function of the seed and the step, whatever the number of ranks and workers.

Two orders. `permuted`: slot s of step t is position q = t * global_batch + s of an endless sequence of epochs; epoch
q // N visits its N samples in the order of a keyed permutation. `lanes` (lanes.py): blocks of consecutive samples, for
storage where one sample costs a request. No memory, no state: the step number alone says where in the data a run is.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pretrain.data.lanes import Lanes, place
from pretrain.data.permutation import permute

Steps = int | range | np.ndarray
Slots = range | list[int] | np.ndarray


@dataclass(frozen=True)
class Order:
    """The order of a training set, and its held-out samples."""

    num_samples: int  # in the manifest, held-out ones included
    held_out: int  # of these are never trained on
    global_batch: int  # slots of a step
    seed: int
    lanes: Lanes | None = None  # None: `permuted`

    @property
    def name(self) -> Literal["permuted", "lanes"]:
        """Which of the two it is."""
        return "lanes" if self.lanes else "permuted"

    @property
    def num_train(self) -> int:
        """Samples of an epoch."""
        return self.num_samples - self.held_out

    @property
    def block_samples(self) -> int | None:
        """Samples of a block, which are read together; None where samples are read one by one."""
        return self.lanes.block_samples if self.lanes else None

    @property
    def num_blocks(self) -> int:
        """Blocks of the data set; the last one may be shorter."""
        assert self.block_samples is not None
        return -(-self.num_train // self.block_samples)

    def samples(self, steps: Steps, slots: Slots | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epoch, index) of the slots of steps: two int64 [slots], or [steps, slots] of several steps.

        slots: None for all of a step.
        """
        wanted = np.arange(self.global_batch) if slots is None else np.asarray(slots, np.int64)
        of_step = np.asarray(steps, np.int64)[..., None]
        if self.lanes:
            at = (part.copy() for part in np.broadcast_arrays(of_step, wanted))
            epochs, places = place(self.lanes, self.num_train, self.global_batch, self.seed, *at)
            return epochs, places + np.searchsorted(self._trained_before_held_out, places, side="right")
        positions = of_step * self.global_batch + wanted
        epochs = positions // self.num_train
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):  # one, or a few where a step crosses the border of epochs
            these = epochs == epoch
            key = ("epoch", self.seed, int(epoch))
            indices[these] = permute(positions[these] % self.num_train, self.num_train, *key)
        return epochs, self._beyond_held_out(indices)

    def blocks(self, steps: Steps, slots: Slots | None = None) -> np.ndarray:
        """Returns the numbers of the blocks that hold the slots of steps, int64, in the order of their first use."""
        numbers, first = np.unique(self.block_of(self.samples(steps, slots)[1]), return_index=True)
        return numbers[np.argsort(first)]

    def block_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the number of the block that holds each sample, int64 of the same shape, in the manifest's order."""
        assert self.block_samples is not None
        trained_before = indices - np.searchsorted(self._sorted_held_out, indices)
        return np.minimum(trained_before // self.block_samples, self.num_blocks - 1)

    def block_bounds(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first index of each block and the one behind its last; held-out samples lie in blocks too."""
        assert self.block_samples is not None
        edges = self.block_samples * numbers, self.block_samples * (numbers + 1)
        first, end = (at + np.searchsorted(self._trained_before_held_out, at) for at in edges)
        return first, np.where(numbers == self.num_blocks - 1, self.num_samples, end)

    def held_out_indices(self) -> np.ndarray:
        """Returns the indices that validation uses, int64 [held_out]."""
        return permute(np.arange(self.held_out), self.num_samples, "held-out")

    def _beyond_held_out(self, indices: np.ndarray) -> np.ndarray:
        # The split does not depend on the seed, so that runs with several seeds are validated on the same images.
        return permute(indices + self.held_out, self.num_samples, "held-out") if self.held_out else indices

    @cached_property
    def _sorted_held_out(self) -> np.ndarray:
        return np.sort(self.held_out_indices())  # 8 B each

    @cached_property
    def _trained_before_held_out(self) -> np.ndarray:
        """How many samples that are trained on lie before each held-out one."""
        return self._sorted_held_out - np.arange(self.held_out)


def share(count: int, rank: int, world_size: int) -> range:
    """Returns the run of 0..count-1 that a rank takes; lengths differ by at most one."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


@dataclass(frozen=True)
class BatchPlan:
    """How a rank computes its share of the global batch, the same on every rank."""

    micro_batch: int  # slots of a forward pass
    accumulation: int  # forward passes of a step
    masked: int  # slots of a step, over all ranks, that are filled up and count for nothing


def plan_batch(global_batch: int, world_size: int, max_micro_batch_size: int) -> BatchPlan:
    """Returns the fewest equal micro-batches that hold the largest rank's share. Any world_size up to global_batch."""
    largest_share = -(-global_batch // world_size)
    accumulation = -(-largest_share // max_micro_batch_size)
    micro_batch = -(-largest_share // accumulation)
    return BatchPlan(micro_batch, accumulation, world_size * accumulation * micro_batch - global_batch)
