"""The order `lanes`, for storage where one sample costs a request: steps read few blocks of consecutive samples each.

A block is `block_samples` consecutive samples. In each epoch all blocks form a permuted sequence, the axis. K lanes cut
it into K pieces; each lane owns some slots of every step and walks along its piece, so that a step has samples from K
blocks of the whole set, and each block is used up within a few steps. Samples are shuffled within windows of the axis.
A pure function of seed, step and slot: no memory, no state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.permutation import permute, scatter, unpermute, unscatter
from pretrain.json_files import Fields

_SLOTS_OF_A_LANE = 8  # fewer: more open blocks over all nodes, and slower to the first batch; more: less well mixed
MAX_BLOCK_SAMPLES, MAX_WINDOW_BLOCKS = 1 << 24, 1 << 10  # that a checkpoint may claim


@dataclass(frozen=True)
class Lanes:
    """The order's parameters, fixed when a run starts: changing one changes the samples of every step."""

    block_samples: int
    num_lanes: int  # need not divide the global batch
    window_blocks: int = 1  # blocks shuffled together: more mix sorted shards better, but keep more blocks open


def choose_lanes(block_samples: int, num_samples: int, global_batch: int) -> Lanes:
    """Returns the parameters for `num_samples` training samples that are read in blocks of `block_samples`."""
    most = num_samples // (4 * block_samples)
    return Lanes(block_samples, max(1, min(-(-global_batch // _SLOTS_OF_A_LANE), most)))


def fits(lanes: Lanes, num_samples: int, global_batch: int, steps: int) -> bool:
    """Returns whether these lanes suit a run of `steps` steps: each has a slot and a sample, and 64 bits suffice."""
    narrowest = global_batch // lanes.num_lanes
    return num_samples * narrowest >= global_batch and (steps * global_batch + num_samples) * global_batch < 1 << 62


def lanes_in(said: Fields, num_samples: int, global_batch: int, steps: int) -> Lanes:
    """Reads the lanes that a checkpoint has for a run of `steps` steps. Raises UserError when they are impossible."""
    most = {"block_samples": MAX_BLOCK_SAMPLES, "num_lanes": global_batch, "window_blocks": MAX_WINDOW_BLOCKS}
    lanes = Lanes(**{name: said.integer(name, 1, limit) for name, limit in most.items()})
    if not fits(lanes, num_samples, global_batch, steps):
        said.wrong("num_lanes", f"what {num_samples} samples and {steps} steps allow")
    return lanes


def place(
    lanes: Lanes, num_samples: int, global_batch: int, seed: int | str, steps: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch and the place in the data set, 0..num_samples-1, of each (step, slot): all int64 of one shape.

    About 3 ms for 4,096 slots, 1 ms for a few: ask for many steps at once.
    """
    N, G, K = num_samples, global_batch, lanes.num_lanes
    lane = ((slots + 1) * K - 1) // G
    first, end = lane * G // K, (lane + 1) * G // K  # slots of the lane

    def cut(epoch: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Where, on an epoch's axis, the piece of the lane whose first slot is `slot` begins."""
        return (epoch + 1) * N * slot // G - epoch * N * slot // G

    def used(epoch: np.ndarray) -> np.ndarray:
        """Samples that the lane has supplied before an epoch."""
        return epoch * N * end // G - epoch * N * first // G

    given = steps * (end - first) + slots - first  # samples that the lane has supplied before this one
    epoch = given * G // (N * (end - first))  # exact or off by one, since `used` is rounded; corrected below
    epoch = epoch - (given < used(epoch))
    epoch = epoch + (given >= used(epoch + 1))
    low, high = cut(epoch, first), cut(epoch, end)
    at = low + given - used(epoch)

    window = lanes.window_blocks * lanes.block_samples
    low, high = np.maximum(at // window * window, low), np.minimum((at // window + 1) * window, high)
    places = np.empty_like(at)
    for value in np.unique(epoch):  # one, or a few where steps cross epoch boundaries
        these = epoch == value
        start, key = low[these], (seed, int(value))
        within = scatter(at[these] - start, high[these] - start, start, "window", *key)
        places[these] = row_of_blocks(start + within, lanes.block_samples, N, "block", *key)
    return epoch, places


def row_of_blocks(at: np.ndarray, block_samples: int, num_samples: int, *key: object) -> np.ndarray:
    """Maps places in the sequence of blocks, permuted by `key`, to places in the data set.

    Samples that fill no block stay at the end of both.
    """
    return _by_blocks(permute, at, block_samples, num_samples, *key)


def place_in_row(places: np.ndarray, block_samples: int, num_samples: int, *key: object) -> np.ndarray:
    """Returns the inverse of `row_of_blocks`."""
    return _by_blocks(unpermute, places, block_samples, num_samples, *key)


def _by_blocks(
    send: Callable[..., np.ndarray], at: np.ndarray, block_samples: int, num_samples: int, *key: object
) -> np.ndarray:
    full = at < num_samples // block_samples * block_samples
    result = at.copy()
    blocks = send(at[full] // block_samples, num_samples // block_samples, *key)
    result[full] = blocks * block_samples + at[full] % block_samples
    return result


def position_of(
    lanes: Lanes, num_samples: int, global_batch: int, seed: int | str, epoch: int, places: np.ndarray
) -> np.ndarray:
    """Returns the positions, step * global_batch + slot, that hold `places` of the data set in an epoch.

    The inverse of `place`; int64 of one shape.
    """
    N, G, K = num_samples, global_batch, lanes.num_lanes
    borders = np.arange(K + 1) * G // K
    cuts = (epoch + 1) * N * borders // G - epoch * N * borders // G
    at = place_in_row(places, lanes.block_samples, N, "block", seed, epoch)
    lane = np.searchsorted(cuts, at, side="right") - 1
    first, end, window = borders[lane], borders[lane + 1], lanes.window_blocks * lanes.block_samples
    low, high = cuts[lane], cuts[lane + 1]
    start, stop = np.maximum(at // window * window, low), np.minimum((at // window + 1) * window, high)
    at = start + unscatter(at - start, stop - start, start, "window", seed, epoch)
    given = at - low + epoch * N * end // G - epoch * N * first // G
    steps, slots = np.divmod(given, end - first)
    return steps * G + first + slots


def seen(lanes: Lanes, num_samples: int, global_batch: int, epoch: int, positions: int) -> int:
    """Returns how many samples of an epoch the first `positions` slots hold."""
    borders = np.arange(lanes.num_lanes + 1) * global_batch // lanes.num_lanes
    before, after = (np.diff(number * num_samples * borders // global_batch) for number in (epoch, epoch + 1))
    steps, slots = divmod(positions, global_batch)
    given = steps * np.diff(borders) + np.diff(np.minimum(borders, slots))
    return int(np.clip(given - before, 0, after - before).sum())


def read_amplification(lanes: Lanes, global_batch: int, readers: Sequence[range]) -> float:
    """Returns how many samples are read for each sample used, if each reader reads whole blocks for itself.

    readers: the slots of each; together they cover the global batch. Computed from the borders of slots alone; a block
    that two lanes share counts once.
    """
    read = 0
    for slots in readers:
        if not slots:
            continue
        first, last = (((slot + 1) * lanes.num_lanes - 1) // global_batch for slot in (slots[0], slots[-1]))
        for lane in range(first, last + 1):
            low, high = (number * global_batch // lanes.num_lanes for number in (lane, lane + 1))
            mine = min(high, slots[-1] + 1) - max(low, slots[0])
            # A window fills consecutive slots of the lane. One shorter than the lane is wide may miss this reader's.
            read += min(high - low, mine + lanes.window_blocks * lanes.block_samples - 1)
    return read / global_batch
