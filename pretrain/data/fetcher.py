"""The node's fetcher: a process that walks the order ahead of the training and fills the store of remote blocks.

Downloading in the loader processes would cost a tenth of their decoding rate. Nothing depends on the fetcher: a loader
process that finds a block missing waits for the process that is downloading it, or downloads it itself.
"""

import mmap
import multiprocessing
import os
import signal
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess

import numpy as np

from pretrain.cluster import ranks
from pretrain.cluster.signals import STOP_SIGNALS
from pretrain.data.manifest import Manifest
from pretrain.data.order import Order, share
from pretrain.data.reader import block_of
from pretrain.data.store import Block, store_at
from pretrain.errors import StorageError, UserError
from pretrain.log import warn

DEPTH = 32  # blocks ahead of the training: 5 s at 500 images/s, longer than the time-out of a stalled connection
THREADS = 8
_STEPS_AHEAD = 1024  # ahead of the training; once the store holds everything, nothing else limits the walk
_REMEMBERED = 4096  # blocks, so that one that many steps use is looked up once
_PAUSE_S = 0.02


class Fetcher:
    """The training's handle of a running fetcher."""

    def __init__(self, manifest: Manifest, order: Order, slots: range, steps: range) -> None:
        self._reached = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared with processes forked from now on
        self.note(steps.start)
        # Forked, like the loader processes: it opens its own connections, and never touches the GPU.
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(manifest, order, slots, steps, self._reached, os.getpid()), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid
        self._told = False
        self._end = weakref.finalize(self, _end, self._process, os.getpid())

    def tell_if_dead(self) -> None:
        """Warns, once, when it has died of something other than a stop signal, which all processes of a run may get."""
        code = self._process.exitcode
        if code and -code not in STOP_SIGNALS and not self._told:
            self._told = True
            warn(
                f"the process that downloads blocks ended with {code}: loader processes download in its place, slower, "
                "until the next start"
            )

    def note(self, step: int) -> None:
        """Tells the fetcher which step is being read; an earlier one than before is ignored."""
        self._reached[0] = max(self._reached[0], step)


def start(manifest: Manifest, order: Order, steps: range) -> Fetcher | None:
    """Starts the node's fetcher for a run's steps on its first rank; None on other ranks, and for local shards."""
    if not manifest.is_remote or ranks.local_rank() or not steps:
        return None
    first, last = ranks.rank(), min(ranks.rank() + ranks.ranks_here(), ranks.world_size()) - 1
    shares = [share(order.global_batch, rank, ranks.world_size()) for rank in (first, last)]
    return Fetcher(manifest, order, range(shares[0].start, shares[1].stop), steps)


def _end(process: BaseProcess, owner: int) -> None:
    if os.getpid() == owner:  # not in a loader process, which has a copy
        process.kill()
        process.join()


def blocks_of(manifest: Manifest, order: Order, slots: range, step: int) -> Iterator[Block]:
    """Yields the blocks that some slots of a step need, in the order of their first use."""
    indices = order.samples(step, slots)[1]
    wanted: list[tuple[int, Manifest, int]] = []  # slot, set, and the index there
    first_index = 0
    for source in manifest.sources or (manifest,):
        of_source = np.flatnonzero((indices >= first_index) & (indices < first_index + source.num_samples))
        own = indices[of_source] - first_index
        shards = np.searchsorted(source.first_indices, own, side="right")
        places = own // source.block_samples * (len(source.shards) + 1) + shards
        for first in np.unique(places, return_index=True)[1].tolist():
            wanted.append((int(of_source[first]), source, int(own[first])))
        first_index += source.num_samples
    for _, source, index in sorted(wanted, key=lambda one: one[0]):
        if block := block_of(source, index):
            yield block


def _run(manifest: Manifest, order: Order, slots: range, steps: range, reached: memoryview, parent: int) -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL)  # the inherited handlers save checkpoints
    store = manifest.store or store_at(None)
    mean_block_bytes = manifest.num_bytes / manifest.num_samples * manifest.block_samples
    blocks_kept = int(store.max_bytes / mean_block_bytes)
    remembered = min(_REMEMBERED, blocks_kept // 4)  # a remembered block must not have been evicted
    known: OrderedDict[str, None] = OrderedDict()
    under_way: deque[tuple[int, Future[None]]] = deque()

    def fetch(block: Block) -> None:
        with suppress(StorageError, UserError):  # a loader process meets the same error and reports it
            store.ensure(block)

    def wait(depth: int, step: int) -> None:
        """Waits until fewer than `depth` blocks are ahead of the training, and `step` is within _STEPS_AHEAD."""
        while True:
            while under_way and under_way[0][0] <= reached[0] and under_way[0][1].done():
                under_way.popleft()
            if os.getppid() != parent:
                os._exit(0)
            if len(under_way) < depth and step < reached[0] + _STEPS_AHEAD:
                return
            time.sleep(_PAUSE_S)

    with ThreadPoolExecutor(THREADS) as pool:
        for step in steps:
            if step < reached[0]:  # overtaken
                continue
            wait(DEPTH, step)
            try:
                blocks = list(blocks_of(manifest, order, slots, step))
            except (StorageError, UserError):  # as above
                continue
            for block in blocks:
                new = block.name not in known
                known[block.name] = None
                known.move_to_end(block.name)
                if new:
                    wait(DEPTH, step)
                    under_way.append((step, pool.submit(fetch, block)))
                if len(known) > remembered:
                    known.popitem(last=False)
        wait(1, steps.start)
