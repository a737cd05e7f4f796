"""Which samples form step t: a pure function of the seed and the step, whatever the number of ranks and workers.

Slot s of step t is position q = t * global_batch + s of an endless sequence of epochs; epoch q // N visits its N
samples in the order of a keyed permutation. No memory, no state: the step number alone says where in the data a run is.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

_ROUNDS = 8  # of the Feistel network; even, so that its two halves end with the sizes they began with


def words(count: int, *parts: object) -> np.ndarray:
    """Returns `count` random uint64, keyed by `parts`: BLAKE2b names the key, Philox4x64 gives raw words.

    Raw words only: library shuffles may change between releases, and a resumed run must not.
    """
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)


def uniform(random_words: np.ndarray) -> np.ndarray:
    """Returns float64 in [0, 1) from uint64 words."""
    return (random_words >> np.uint64(11)) * 2.0**-53


def permute(positions: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns where a permutation of 0..size-1, keyed by `key`, sends each position; int64, any shape.

    A Feistel network over the next power of two; results outside are sent through it again (cycle walking), at most
    twice on average. 8 rounds of a 64-bit mixer: no memory for 300M samples, about 1 us per sample.
    """
    bits = max(2, (size - 1).bit_length())
    round_keys = words(_ROUNDS, "v1", "permute", *key)
    result = _feistel(positions.astype(np.uint64), bits, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], bits, round_keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    left_bits, right_bits = bits - bits // 2, bits // 2  # swap sizes each round where bits is odd
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(right_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit changes every output bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


@dataclass(frozen=True)
class Order:
    """The `permuted` order of a training set, and its held-out samples."""

    num_samples: int  # in the manifest, held-out ones included
    held_out: int  # of these are never trained on
    global_batch: int  # slots of a step
    seed: int

    @property
    def num_train(self) -> int:
        """Samples of an epoch."""
        return self.num_samples - self.held_out

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epoch, index) of each slot of a step: two int64 [global_batch]."""
        positions = step * self.global_batch + np.arange(self.global_batch)
        epochs = positions // self.num_train
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):  # one, or a few where a step crosses the border of epochs
            slots = epochs == epoch
            key = ("epoch", self.seed, int(epoch))
            indices[slots] = permute(positions[slots] % self.num_train, self.num_train, *key)
        return epochs, self._beyond_held_out(indices)

    def held_out_indices(self) -> np.ndarray:
        """Returns the indices that validation uses, int64 [held_out]."""
        return permute(np.arange(self.held_out), self.num_samples, "held-out")

    def _beyond_held_out(self, indices: np.ndarray) -> np.ndarray:
        # The split does not depend on the seed, so that runs with several seeds are validated on the same images.
        return permute(indices + self.held_out, self.num_samples, "held-out") if self.held_out else indices


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
