"""How an order affects reading and mixing, computed for a data set of any size without its images."""

from collections.abc import Iterator
from dataclasses import asdict
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np

from pretrain.data.lanes import choose_lanes, fits, read_amplification
from pretrain.data.manifest import block_samples
from pretrain.data.order import Order, share
from pretrain.data.permutation import permute
from pretrain.errors import UserError

_TIMED_STEPS, _MIXED_STEPS = 32, 20


def order_rows(
    *, num_samples: int, sample_bytes: int, num_classes: int, global_batch: int, world_sizes: list[int], per_node: int
) -> Iterator[dict[str, Any]]:
    """Yields the numbers of `lanes`, then a row per world size, then one per order with shuffled and sorted shards.

    per_node: ranks per node. Raises UserError for a set or a batch that no run can have.
    """
    lanes = choose_lanes(block_samples(num_samples, num_samples * sample_bytes), num_samples, global_batch)
    order = Order(num_samples, 0, global_batch, 0, lanes)
    if not fits(lanes, num_samples, global_batch, 1 << 30):
        raise UserError(f"--batch {global_batch}, --samples {num_samples}: beyond 64 bits, with which lanes counts")
    yield {"what": "numbers", **asdict(lanes)}
    for world_size in world_sizes:
        if world_size > global_batch:
            raise UserError(f"--ranks: {world_size} is more than --batch ({global_batch})")
        yield _reading(order, world_size, per_node)
    for each in (order, Order(num_samples, 0, global_batch, 0)):
        for sorted_shards in (False, True):
            yield _mixing(each, num_classes, sorted_shards=sorted_shards)


def node_slots(global_batch: int, world_size: int, per_node: int) -> list[range]:
    """Returns each node's slots, those of all its ranks."""
    shares = [share(global_batch, rank, world_size) for rank in range(world_size)]
    nodes = (shares[at : at + per_node] for at in range(0, world_size, per_node))
    return [range(node[0].start, node[-1].stop) for node in nodes]


def _reading(order: Order, world_size: int, per_node: int) -> dict[str, Any]:
    """Returns read amplification, requests, and the time that a rank takes to compute the order of its next steps."""
    assert order.lanes
    per_rank, of_nodes = (
        read_amplification(order.lanes, order.global_batch, node_slots(order.global_batch, world_size, together))
        for together in (1, per_node)
    )
    slots = share(order.global_batch, world_size - 1, world_size)
    start = perf_counter()
    order.samples(range(1_000_000, 1_000_000 + _TIMED_STEPS), slots)
    return {
        "what": "reading",
        "ranks": world_size,
        "read_amplification_per_rank": round(per_rank, 3),
        "read_amplification_per_node": round(of_nodes, 3),
        "requests_per_1000_images": round(1000 * of_nodes / order.lanes.block_samples, 1),
        f"ms_for_{_TIMED_STEPS}_steps": round((perf_counter() - start) * 1e3, 1),
    }


def _mixing(order: Order, num_classes: int, *, sorted_shards: bool) -> dict[str, Any]:
    """Returns how many classes a step has, how uneven their counts are, and how correlated with the next step's."""
    per_epoch = max(1, order.num_train // order.global_batch)
    some = np.random.default_rng(0).integers(0, max(1, per_epoch - 1), min(_MIXED_STEPS, per_epoch))
    distinct, unequal, alike = [], [], []
    for step in some.tolist():
        _, indices = order.samples(range(step, step + 2))
        at = indices if sorted_shards else permute(indices, order.num_samples, "benchmark")
        counts = [np.bincount(row * num_classes // order.num_samples, minlength=num_classes) for row in at]
        distinct.append(int((counts[0] > 0).sum()))
        unequal.append(counts[0].var() / counts[0].mean())
        if counts[0].var() and counts[1].var():
            alike.append(np.corrcoef(counts[0], counts[1])[0, 1])
    ideal = num_classes * (1 - (1 - 1 / num_classes) ** order.global_batch)
    return {
        "what": "mixing",
        "order": order.name,
        "shards": "sorted" if sorted_shards else "shuffled",
        "classes_of_a_step": round(mean(distinct), 1),
        "ideal": round(ideal, 1),
        "variance_over_mean": round(mean(unequal), 2),
        "correlation_with_next_step": round(mean(alike), 2) if alike else None,
    }
