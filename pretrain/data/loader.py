"""Batches of the training steps and of the validation set, prepared in the background by worker processes.

Each item is a rank's whole share of a step. Worker processes have no state: item `step` depends on the step alone.
"""

import atexit
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, _utils, get_worker_info

from pretrain.cluster import agreement, ranks, signals
from pretrain.cluster.limits import check_memory, check_open_files
from pretrain.config import Config, DataConfig
from pretrain.data import fetcher
from pretrain.data.images import decode, eval_image, train_image
from pretrain.data.manifest import Manifest
from pretrain.data.mix import Mix, draw_mix, mixed, partner
from pretrain.data.mixture import shard_name, source_of
from pretrain.data.order import BatchPlan, Order, share
from pretrain.data.reader import BadSample, parse_labels, read_sample
from pretrain.errors import BadSamplesError, StorageError, UserError


class BadRecord(NamedTuple):
    """A sample that was replaced by a masked slot, or a damaged one that is used."""

    epoch: int
    index: int
    shard: str
    reason: str  # of REASONS
    detail: str


class Batch(NamedTuple):
    """A rank's share of a step, or a micro-batch of it. Masked slots (valid is False) hold zeros and no label.

    L: the most labels of any image in the batch, 1 unless a set is multi-label; twice that where images are mixed.
    """

    images: torch.Tensor  # uint8 [slots, 3, height, width]
    labels: torch.Tensor  # int64 [slots, L], padded with -1
    label_weights: torch.Tensor  # float32 [slots, L]: 1, or the shares of mixed images; 0 where there is no label
    valid: torch.Tensor  # bool [slots]
    epoch: torch.Tensor  # int64 [slots]
    index: torch.Tensor  # int64 [slots]; -1 for slots that only pad the micro-batch
    bad: list[BadRecord]
    damaged: list[BadRecord] = []  # samples that are used nevertheless
    error: UserError | StorageError | None = None  # ends the run; carried here so that all ranks raise it together

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with images, labels and mask on the device; epochs and indices stay on the host."""
        images, labels, weights, valid = (t.to(device, non_blocking=True) for t in self[:4])
        return self._replace(images=images, labels=labels, label_weights=weights, valid=valid)

    def split(self, micro_batch: int) -> Iterator["Batch"]:
        """Yields its micro-batches, each of exactly `micro_batch` slots."""
        for parts in zip(*(tensor.split(micro_batch) for tensor in self[:6])):
            yield Batch(*parts, bad=[])


def single_labels(classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch's labels and label_weights, both [slots, 1], for one class per slot, int64 [slots]."""
    return classes[:, None], torch.ones(len(classes), 1)


_SLOTS_AHEAD = 4096  # of future steps, computed in one call of at most 10 ms: even a call for a few slots takes 1 ms


class _TrainSteps(Dataset):
    """Item `step` is this rank's share of that step."""

    def __init__(self, manifest: Manifest, order: Order, plan: BatchPlan, config: Config) -> None:
        self._manifest, self._order, self._plan, self._config = manifest, order, plan, config
        self._mine = share(order.global_batch, ranks.rank(), ranks.world_size())
        # Partners on other ranks, of copies of the first and the last image. Their own ranks report them if bad.
        mixes = config.data.mixup or config.data.cutmix
        wanted = {partner(slot, order.repeats) for slot in self._mine} if mixes else set()
        self._others = sorted(slot for slot in wanted.difference(self._mine) if slot < order.global_batch)
        self.fetcher: fetcher.Fetcher | None = None
        self._ahead: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, step: int) -> Batch:
        if self.fetcher:
            self.fetcher.note(step)
        data, image_size, count = self._config.data, self._config.model.image_size, len(self._mine)
        epochs, indices = self._samples(step)
        read = partial(_read, self._manifest, self._crop, strict=data.strict_images, image_size=image_size)
        batch = read(epochs[:count], indices[:count], slots=self._plan.micro_batch * self._plan.accumulation)
        mix = draw_mix(data, image_size, self._config.seed, step)
        if mix is None or batch.error is not None:
            return batch
        others = read(epochs[count:], indices[count:], slots=len(self._others))
        if others.error is not None:
            return batch._replace(error=others.error)
        return _mixed(batch, self._mine, others, self._others, mix, self._order.repeats)

    def _samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index) of this rank's slots and of `_others`, computed for many steps at once."""
        if step not in self._ahead:
            worker = get_worker_info()
            stride = worker.num_workers if worker else 1  # workers take turns
            slots = [*self._mine, *self._others]
            steps = range(step, step + max(1, _SLOTS_AHEAD // len(slots)) * stride, stride)
            self._ahead = dict(zip(steps, zip(*self._order.samples(steps, slots))))
        return self._ahead[step]

    def _crop(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        source, own = source_of(self._manifest, index)
        key = (self._config.seed, source.name, epoch, own)
        return train_image(image, self._config.model.image_size, self._config.data, *key)


class _EvalBatches(Dataset):
    """Item `number` is the number-th batch of this rank's samples of a fixed set."""

    def __init__(
        self, manifest: Manifest, indices: np.ndarray, batch_size: int, image_size: int, config: DataConfig
    ) -> None:

        def crop(image: torch.Tensor, _epoch: int, _index: int) -> torch.Tensor:
            return eval_image(image, image_size, config)

        strict = config.strict_images
        self._read = partial(_read, manifest, crop, slots=batch_size, image_size=image_size, strict=strict)
        mine = indices[ranks.rank() :: ranks.world_size()]
        # Equal numbers of batches on all ranks: each forward pass is a collective under ZeRO-3.
        num_batches = -(-len(indices) // (ranks.world_size() * batch_size))
        self._parts = [mine[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Batch:
        return self._read(np.zeros_like(self._parts[number]), self._parts[number])


def _read(
    manifest: Manifest,
    crop: Callable[[torch.Tensor, int, int], torch.Tensor],
    epochs: np.ndarray,
    indices: np.ndarray,
    *,
    slots: int,
    image_size: int,
    strict: bool,
) -> Batch:
    """Reads samples into the first slots of a batch; `crop` gets an image, its epoch and its index.

    A bad sample leaves a masked slot and a record; with `strict`, damaged images count as bad. An error that ends the
    run is returned in the batch. Consecutive copies of an image are decoded once.
    """
    images = torch.zeros(slots, 3, image_size, image_size, dtype=torch.uint8)
    no_labels = torch.full((slots, 1), -1), torch.zeros(slots, 1)
    epoch_of, index_of = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), -1)
    epoch_of[: len(epochs)], index_of[: len(indices)] = torch.from_numpy(epochs), torch.from_numpy(indices)
    batch = Batch(images, *no_labels, torch.zeros(slots, dtype=torch.bool), epoch_of, index_of, [])
    labels: list[list[int]] = [[] for _ in range(slots)]
    damaged: list[BadRecord] = []
    sample: _Sample | None = None
    for slot, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist())):
        try:
            if sample is None or sample.index != index:
                sample = _decoded(manifest, index)
            if sample.damage and strict:
                raise BadSample("damaged", sample.damage)
        except BadSample as bad:
            batch.bad.append(BadRecord(epoch, index, shard_name(manifest, index), bad.reason, str(bad)))
        except (UserError, StorageError) as error:
            return batch._replace(error=error)
        else:
            batch.images[slot] = crop(sample.image, epoch, index)
            if sample.damage:
                damaged.append(BadRecord(epoch, index, shard_name(manifest, index), "damaged", sample.damage))
            labels[slot], batch.valid[slot] = sample.classes, True
    width = max([1, *map(len, labels)])
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in labels], dtype=torch.int64)
    padded = padded.reshape(slots, width)  # [slots, L], also for no slots
    return batch._replace(labels=padded, label_weights=(padded >= 0).float(), damaged=damaged)


class _Sample(NamedTuple):
    """A decoded sample that can be used."""

    index: int
    image: torch.Tensor  # uint8 [3, height, width]
    classes: list[int]
    damage: str  # the sample's key and libjpeg's first warning; empty: none


def _decoded(manifest: Manifest, index: int) -> _Sample:
    """Reads and decodes a sample. Raises BadSample, UserError, StorageError."""
    source, own = source_of(manifest, index)
    raw = read_sample(source, own)
    damage: list[str] = []
    image = decode(raw.image, damage.append)
    classes = source.meant(parse_labels(raw.label, source.num_classes, source.multi_label))
    return _Sample(index, image, classes, f"{raw.key}: {damage[0]}" if damage else "")


def _mixed(batch: Batch, mine: range, others: Batch, other_slots: list[int], mix: Mix, repeats: int) -> Batch:
    """Mixes each slot with its partner, from the batch itself, or from `others` if the partner is another rank's.

    mine: the global batch's slots that the batch begins with. A slot whose partner is bad or absent is not mixed.
    """
    width, slots = max(batch.labels.shape[1], others.labels.shape[1]), len(batch.valid)
    labels, weights = torch.full((slots, 2 * width), -1), torch.zeros(slots, 2 * width)
    labels[:, : batch.labels.shape[1]], weights[:, : batch.labels.shape[1]] = batch.labels, batch.label_weights
    images = batch.images.clone()
    for place, slot in enumerate(mine):
        wanted = partner(slot, repeats)
        if wanted in mine:
            source, at = batch, wanted - mine[0]
        elif wanted in other_slots:
            source, at = others, other_slots.index(wanted)
        else:  # the last slot of an odd batch has none
            continue
        if not batch.valid[place] or not source.valid[at]:
            continue
        images[place] = mixed(batch.images[place], source.images[at], mix)
        weights[place] *= mix.own_share
        end = width + source.labels.shape[1]
        labels[place, width:end] = source.labels[at]
        weights[place, width:end] = source.label_weights[at] * (1 - mix.own_share)
    return batch._replace(images=images, labels=labels, label_weights=weights)


def train_batches(
    manifest: Manifest, order: Order, plan: BatchPlan, config: Config, start_step: int
) -> Iterator[Batch]:
    """Yields this rank's share, accumulation * micro_batch slots, of the steps start_step .. total_steps - 1."""
    steps = _TrainSteps(manifest, order, plan, config)
    slots = plan.micro_batch * plan.accumulation
    numbers = range(start_step, config.total_steps)
    _check_room(slots, len(numbers), config.model.image_size, config.data)
    steps.fetcher = fetcher.start(manifest, order, numbers)
    batches = _prepared(steps, numbers, config.data)
    return _beside(steps.fetcher, batches) if steps.fetcher else batches


def _beside(running: fetcher.Fetcher, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        running.tell_if_dead()


def eval_batches(
    manifest: Manifest, indices: np.ndarray, *, batch_size: int, image_size: int, config: DataConfig
) -> Iterator[Batch]:
    """Yields this rank's samples of `indices` under the evaluation transform, equally many batches on every rank.

    The last batch, and ranks with fewer samples, are padded with masked slots: each sample is seen exactly once.
    """
    batches = _EvalBatches(manifest, indices, batch_size, image_size, config)
    _check_room(batch_size, len(batches), image_size, config)
    return _prepared(batches, range(len(batches)), config)


SHARED_MEMORY = Path("/dev/shm")
_FILES_PER_BATCH = 6  # its tensors, each a piece of shared memory
_FILES_PER_WORKER = 8  # pipes and semaphores, and what its start needs briefly
_FILES_BESIDE = 32  # logs, checkpoints, shards that this process reads itself
_WORKER_BYTES = 64 << 20  # of a loader process: what it does not share with its rank
_BESIDE_IMAGES = 256 << 10  # bytes of a batch's labels, mask and semaphores, each of which fills whole pages


class Room(NamedTuple):
    """Resources that loader processes take."""

    open_files: int  # of one rank
    memory_bytes: int  # of all ranks here, shared memory included
    shared_bytes: int  # of all ranks here


def room_needed(slots: int, num_batches: int, image_size: int, config: DataConfig) -> Room:
    """Returns what the loader processes of this node's ranks need to hand over batches of `slots` images each."""
    if not (workers := _num_workers(num_batches, config)):
        return Room(0, 0, 0)
    batches = min(num_batches, workers * config.prefetch) + 2  # the current step's, and the next one's
    shared = ranks.ranks_here() * batches * (slots * 3 * image_size**2 + _BESIDE_IMAGES)
    files = batches * _FILES_PER_BATCH + workers * _FILES_PER_WORKER + _FILES_BESIDE
    return Room(files, shared + ranks.ranks_here() * workers * _WORKER_BYTES, shared)


def _num_workers(num_batches: int, config: DataConfig) -> int:
    return min(config.workers, num_batches)  # an evaluation may have a batch or two


def _check_room(slots: int, num_batches: int, image_size: int, config: DataConfig) -> None:
    """Raises StorageError, on all ranks, when a node's memory is too small for its loader processes' batches.

    Raises UserError when too few files may be open. Checked before the processes start: with shared memory full, torch
    hangs or dies of a bus error.
    """
    room = room_needed(slots, num_batches, image_size, config)
    needed = room.shared_bytes
    why = f"{_num_workers(num_batches, config)} loader processes with {config.prefetch} batches each"

    def check() -> None:
        check_open_files(room.open_files, why)
        check_memory(room.memory_bytes, f"{why}, of all ranks here")
        if not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free >= needed:
            return
        raise StorageError(
            f"{SHARED_MEMORY}: the shared memory has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:.1f} MB free; "
            f"{why}, of all ranks here, need {needed / 1e6:.1f} MB. Make it "
            "larger (docker run --shm-size, mount -o remount,size=), or lower data.workers or data.prefetch; "
            "data.workers=0 needs none"
        )

    agreement.together(check)


def _prepared(dataset: Dataset, items: range, config: DataConfig) -> Iterator[Batch]:
    """Returns an iterator over the dataset's items; worker processes start preparing them at once."""
    workers = _num_workers(len(items), config)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        collate_fn=lambda batch: batch,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        pin_memory=ranks.has_gpu(),
        # Otherwise SIGTERM to the process group ends the workers, and the final save is lost.
        worker_init_fn=lambda _: signals.live_as_long_as_parent(),
        generator=torch.Generator(),  # the loader draws a seed: the global generator's would shift dropout
        # Not the default from Python 3.14 on, which imports torch anew for each iterator; workers never touch the GPU.
        multiprocessing_context="fork" if workers else None,
    )
    iterator = iter(loader)
    if workers:
        _running.add(iterator)
    return iterator


# Iterators that may still be reading when the program ends. Workers ignore SIGTERM, by which multiprocessing ends its
# processes at exit, so it would wait for them for ever.
_running: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    _utils.MP_STATUS_CHECK_INTERVAL = 0.5  # type: ignore[misc]  # seconds for each to end: all may be stuck in a read
    for iterator in list(_running):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # one that hangs; multiprocessing would wait for it


REASONS = ("tar", "missing", "decode", "label", "damaged")
_MIN_SEEN, _MIN_BAD = 10_000, 100  # before that, a fraction says little
_RECENT = 100_000  # samples in a stretch of the run; the last two stretches are judged by themselves too


def count_reasons(records: list[BadRecord]) -> torch.Tensor:
    """Returns how many records have each of REASONS, float64 [5]."""
    return torch.tensor([float(sum(r.reason == reason for r in records)) for reason in REASONS], dtype=torch.float64)


def check_bad_fraction(
    bad: dict[str, int], recent: list[list[int]], seen: int, global_batch: int, max_fraction: float
) -> None:
    """Raises BadSamplesError when more than `max_fraction` of the samples over all ranks could not be used.

    bad: counts by reason, of the `seen` samples since the start. recent: the result of `count_recent`, judged apart,
    since after weeks of good data the fraction of all would not show that shards went bad. global_batch: the samples
    of a step, which all count in the stretch in which the step ends.
    """
    first = max(0, _stretch(seen) - 1)
    of_late = sum(count for stretch, count in recent if stretch >= first)
    seen_of_late = min(seen, seen - first * _RECENT + global_batch)
    for count, of, which in ((sum(bad.values()), seen, ""), (of_late, seen_of_late, "last ")):
        if of >= _MIN_SEEN and count >= _MIN_BAD and count > max_fraction * of:
            reasons = ", ".join(f"{number} {reason}" for reason, number in bad.items() if number)
            raise BadSamplesError(
                f"{count} of the {which}{of:,} samples could not be used (since the start {reasons}), more than "
                f"data.max_bad_fraction ({max_fraction}); bad_samples.jsonl in the run's folder names them"
            )


def count_recent(recent: list[list[int]], seen: int, count: int) -> list[list[int]]:
    """Adds `count` bad samples to the stretch that `seen` samples reach; returns [number, bad samples] of stretches.

    These are the last two, at most, that have any.
    """
    counts = {stretch: bad for stretch, bad in recent}
    counts[_stretch(seen)] = counts.get(_stretch(seen), 0) + count
    return [[stretch, counts[stretch]] for stretch in sorted(counts)[-2:]]


def _stretch(seen: int) -> int:
    """The number of the stretch that holds the last of `seen` samples."""
    return max(0, seen - 1) // _RECENT
