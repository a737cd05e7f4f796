"""Items -> shuffled shards, their indexes, and the manifest, which is written last."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torchvision
from webdataset.writer import TarWriter

from pretrain.config import MAX_CLASSES
from pretrain.data.classes import check_names
from pretrain.data.images import decode
from pretrain.data.manifest import LABEL_ENDING, MAX_SAMPLES, Shard, write_manifest
from pretrain.data.permutation import words
from pretrain.data.reader import MAX_IMAGE_BYTES, MAX_LABELS, BadSample
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import Fields, is_text
from pretrain.log import warn
from pretrain.shards import unfinished
from pretrain.shards.counts import write_counts
from pretrain.shards.items import Item, PackedItems, digest_of, read_item, taken
from pretrain.shards.pool import Engine, Progress, results
from pretrain.shards.resizing import NOTE, Resizing, resized
from pretrain.shards.sources import Told, sniffed_ending
from pretrain.shards.tars import index_tar
from pretrain.shards.unfinished import Done, Plan
from pretrain.storage import remove_left_over, replacing, write_text


class DataSet(NamedTuple):
    """What a data set holds, before its manifest is written."""

    shards: list[Shard]
    num_classes: int
    classes: Sequence[str]
    counts: Counter[int] | None  # images of each class, where they were counted
    dropped: list[tuple[int, str]]  # what was left out: which item, and the reason
    multi_label: bool = False
    provenance: Mapping[str, Any] = {}  # what was done to the images, besides leaving some out
    told: Mapping[str, Mapping[str, int]] = {}  # for counts.json: counts of what was skipped and noted


class How(NamedTuple):
    """How shards are written."""

    workers: int = 1  # processes; 1: this one; 0: as many as the engine has
    resizing: Resizing | None = None
    source: Plan = {}  # what the bytes depend on beside items, classes, seed and size: the source's options
    engine: Engine = results  # runs the tasks


ALONE = How()


def set_name(out: Path) -> str:
    """Returns the name of a data set and its shards: its folder's, even where that is given as `.`."""
    return out.resolve().name or "data"


def build(
    items: Sequence[Item],
    classes: Sequence[str],
    out: Path,
    *,
    samples_per_shard: int,
    seed: int | None,
    progress: Progress = lambda _: None,
    how: How = ALONE,
    told: Told | None = None,
) -> Path:
    """Writes the items, shuffled over all shards, and returns the manifest's path.

    The same items give the same bytes with any number of processes, however often the build is killed and resumed.
    Without a seed they keep their order. Each image is decoded once: one that cannot be is left out and named in
    provenance.json, but `progress` counts it. told: its `passed_over` goes into counts.json; notes on pictures are
    added to it. Raises UserError when nothing is left, or the folder holds another data set, complete or unfinished.
    """
    plan = _plan(items, classes, samples_per_shard, seed, how)
    if (out / "manifest.json").exists():
        found = unfinished.plan_of(out)
        if found in (plan, None):  # killed at its last step
            unfinished.clear(out, set_name(out))
        if found == plan:
            return out / "manifest.json"
    shards = _Shards(items, classes, out, samples_per_shard, seed, plan)
    complete = shards.write(range(shards.number), how, progress)
    notes = told.notes if told else Counter[str]()
    for done in complete:
        notes.update(done.notes)
    dropped = shards.dropped(complete)
    if told and dropped:
        told.num_dropped, told.first_dropped = len(dropped), dropped[0][1]
    written = [done.shard for done in complete if done.shard.num_samples]
    if not written:
        unfinished.clear(out, set_name(out))
        raise UserError(f"{out}: none of the {len(items)} images can be decoded, the first: {dropped[0][1]}")
    made = DataSet(
        written,
        len(classes) or 1 + _largest_label(items),
        classes,
        shards.counts,
        dropped,
        shards.multi_label,
        {"resized": how.resizing._asdict() | {"num_images": notes[NOTE]}} if how.resizing else {},
        {"passed_over": told.passed_over, "notes": notes} if told else {},
    )
    # Whether samples lie in random order over all shards, or in the order they came.
    shuffle = {"scope": "none"} if seed is None else {"scope": "global", "seed": seed, "method": "permutation"}
    path = finish(out, made, shuffle)
    unfinished.clear(out, set_name(out))
    return path


def build_part(
    items: Sequence[Item],
    classes: Sequence[str],
    out: Path,
    part: tuple[int, int],
    *,
    samples_per_shard: int,
    seed: int | None,
    progress: Progress = lambda _: None,
    how: How = ALONE,
) -> tuple[int, int]:
    """Writes every n-th shard of what `build` would write, from the i-th on; part: (i, n), 0 <= i < n.

    Parts may be written at the same time, on several machines. `build` then writes what is missing, and the manifest.
    Returns the numbers of complete shards, including other parts', and of all. Raises UserError as `build`.
    """
    plan = _plan(items, classes, samples_per_shard, seed, how)
    shards = _Shards(items, classes, out, samples_per_shard, seed, plan)
    shards.write(range(part[0], shards.number, part[1]), how, progress)
    return unfinished.num_complete(shards.folder), shards.number


def _plan(items: Sequence[Item], classes: Sequence[str], samples_per_shard: int, seed: int | None, how: How) -> Plan:
    """Everything that the bytes of the set depend on."""
    return {
        "seed": seed,
        "samples per shard": samples_per_shard,
        "shorter side": how.resizing and how.resizing.shorter_side,
        "quality": how.resizing and how.resizing.quality,
        "number of images": len(items),
        "list of images (names, labels, sizes, times)": digest_of(items),
        "list of classes": hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest(),
        "Pillow": PIL.__version__,  # it writes converted pictures
        "torchvision": torchvision.__version__,  # it decodes: decides what is left out, and gives the pixels to resize
        **how.source,
    }


class _Shards:
    """The shards of an unfinished set: which items each has, and which are complete."""

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        out: Path,
        samples_per_shard: int,
        seed: int | None,
        plan: Plan,
    ) -> None:
        start_folder(out, classes)
        self.multi_label = _has_lists(items)
        check_labels(items, classes)
        self._items, self._out, self._size = items, out, samples_per_shard
        size = len(items)
        self._order = np.arange(size) if seed is None else np.argsort(words(size, "v1", "plan", seed), kind="stable")
        self.number = -(-size // samples_per_shard)
        self.counts = Counter[int]()  # images of each class
        self.folder = unfinished.begin(out, plan)  # of their records

    def write(self, numbers: range, how: How, progress: Progress) -> list[Done]:
        """Writes those of the shards `numbers` that are not complete yet, and returns all of them in order.

        Their counts are only kept as a sum, in `counts`: those of 1,400 shards of 21,843 classes would take 0.7 GB.
        """
        unfinished.remove_torn(self._out, set_name(self._out), numbers)
        there: dict[int, Done] = {}

        def add(number: int, done: Done) -> None:
            self.counts.update(done.counts)
            there[number] = done._replace(counts=Counter())

        for number in numbers:
            if found := unfinished.read(self.folder, number, self._path(number)):
                add(number, found)
        progress(sum(done.shard.num_samples + len(done.dropped) for done in there.values()))
        missing = [number for number in numbers if number not in there]
        tasks = (self._task(number, how.resizing) for number in missing)
        for number, done in how.engine(_write_shard, tasks, min(how.workers, max(1, len(missing))), progress):
            unfinished.keep(self.folder, number, done)
            add(number, done)
        return [there[number] for number in numbers]

    def dropped(self, complete: Sequence[Done]) -> list[tuple[int, str]]:
        """Returns what all shards have left out: which item, and the reason."""
        return [
            (int(self._order[number * self._size + place]), line)
            for number, done in enumerate(complete)
            for place, line in done.dropped.items()
        ]

    def _path(self, number: int) -> Path:
        return self._out / f"{set_name(self._out)}-{number:06d}.tar"

    def _task(self, number: int, resizing: Resizing | None) -> "_Task":
        chosen = self._order[number * self._size : (number + 1) * self._size]
        notes = Counter[str]()
        return _Task(self._path(number), number, taken(self._items, chosen.tolist(), notes), notes, resizing)


def _largest_label(items: Sequence[Item]) -> int:
    if isinstance(items, PackedItems):
        return max(max(items.labels), *(labels[-1] for labels in (items.lists or {}).values()), 0)
    return max(label for item in items for label in _labels(item))


def check_labels(items: Iterable[Item], classes: Sequence[str]) -> None:
    """Raises UserError when a label is no class; without names any number below MAX_CLASSES is one."""
    most = len(classes) or MAX_CLASSES
    if isinstance(items, PackedItems):  # without an object for each
        labels = np.asarray(items.labels)
        wrong = np.flatnonzero((labels < 0) | (labels >= most))[:1].tolist()
        wrong += [index for index, own in (items.lists or {}).items() if own[0] < 0 or own[-1] >= most][:1]
        items = items.take(wrong, Counter())
    for item in items:
        for label in _labels(item):
            if not 0 <= label < most:
                raise UserError(f"{item.source}: label {label} is not one of the {most} classes")


def _labels(item: Item) -> list[int]:
    return item.label if isinstance(item.label, list) else [item.label]


def _has_lists(items: Sequence[Item]) -> bool:
    """Returns whether labels are lists. Raises UserError when only some are, or when one is empty or repeats itself."""
    if isinstance(items, PackedItems):
        return items.lists is not None
    kinds = {isinstance(item.label, list) for item in items}
    for item in items:
        labels = _labels(item)
        if len(kinds) > 1:
            raise UserError(f"{item.source}: label {item.label}: single classes and lists are mixed in this data set")
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{item.source}: label {item.label} is empty or names a class twice")
        if len(labels) > MAX_LABELS:
            raise UserError(f"{item.source}: {len(labels)} labels, at most {MAX_LABELS} of an image are read")
    return kinds == {True}


def write_samples(samples: Iterable[tuple[bytes, int]], ending: str, path: Path, number: int) -> Shard:
    """Writes encoded images and labels as shard `number`, in the given order, and returns it with its index written."""
    items = (Item(partial(bytes, image), ending, label, "") for image, label in samples)
    _, done = _write_shard(_Task(path, number, items, Counter(), None, check=False), lambda _: None)
    return done.shard


class _Task(NamedTuple):
    """A shard to be written; sent to another process where there are several."""

    path: Path
    number: int
    items: Iterable[Item]
    notes: Counter[str]  # what items add to when they are read
    resizing: Resizing | None
    check: bool = True  # whether images are decoded


def _write_shard(task: _Task, progress: Progress) -> tuple[int, Done]:
    """Writes a tar and its index, and returns the shard's number and record."""
    counts, dropped, written = Counter[int](), dict[int, str](), 0
    with (
        replacing(task.path, shared=True) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, mtime=0, encoder=False) as writer,
    ):
        for place, item in enumerate(task.items):
            try:
                data, ending = _as_stored(item, task)
            except BadSample as bad:
                dropped[place] = shown(f"{item.source}: {bad}")
                continue
            finally:
                progress(1)
            label = json.dumps([int(k) for k in item.label]) if isinstance(item.label, list) else str(item.label)
            writer.write({"__key__": f"{task.number:06d}{written:06d}", ending: data, LABEL_ENDING: label.encode()})
            counts.update(_labels(item))
            written += 1
    return task.number, Done(index_tar(task.path), dropped, counts, task.notes)


def _as_stored(item: Item, task: _Task) -> tuple[bytes, str]:
    """An image as the shard stores it, and its ending.

    Raises BadSample when it cannot be read or decoded, or is too large for readers; StorageError for passing errors.
    """
    data = read_item(item)
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample("tar", f"{len(data)} bytes, at most {MAX_IMAGE_BYTES}")
    ending = "png" if item.may_turn and sniffed_ending(data[:12]) == "png" else item.ending
    if not task.check:
        return data, ending
    image = decode(data, lambda complaint: warn(shown(f"{item.source}: is damaged, and kept: {complaint}")))
    smaller = resized(image, task.resizing) if task.resizing else None
    if smaller is None:
        return data, ending
    task.notes[NOTE] += 1
    return smaller, "jpg"


def start_folder(out: Path, classes: Sequence[str]) -> None:
    """Makes the folder of a new data set. Raises UserError when that is impossible, or its names cannot be stored."""
    if not is_text(set_name(out)):
        raise UserError(f"{shown(out)}: the folder's name is not UTF-8, and it names the data set; choose another one")
    if classes:
        check_names(classes, len(classes), f"{out}: classes")
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{out}: {len(classes)} classes, at most {MAX_CLASSES}")
    if (out / "manifest.json").exists():
        raise UserError(f"{out}: holds a data set already; remove it or choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another one") from None


def finish(out: Path, made: DataSet, shuffle: dict[str, Any]) -> Path:
    """Writes classes.json, provenance.json, counts.json and, last, the manifest, whose path it returns."""
    remove_left_over(out)  # also of indexes that a killed call was writing
    classes = list(made.classes)
    if classes:
        write_text(out / "classes.json", json.dumps(classes, ensure_ascii=False, indent=0) + "\n")
    if made.dropped or made.provenance:
        left_out = {"dropped": [line for _, line in made.dropped], "dropped_items": [item for item, _ in made.dropped]}
        write_text(out / "provenance.json", json.dumps({**left_out, **made.provenance}, indent=1) + "\n")
    if made.counts is not None:
        write_counts(out, [made.counts[label] for label in range(made.num_classes)], classes, made.told)
    options = {"has_names": bool(classes), "shuffle": shuffle, "multi_label": made.multi_label}
    return write_manifest(out, set_name(out), made.shards, made.num_classes, **options)


def read_dropped(folder: Path) -> list[str]:
    """Returns what was left out of a data set, with the reasons. Raises UserError when the list cannot be read."""
    path = folder / "provenance.json"
    return list(Fields.read(path).texts("dropped")) if path.exists() else []


def read_dropped_items(folder: Path) -> set[int]:
    """Returns which of a data set's items were left out. Raises UserError when the list cannot be read."""
    path = folder / "provenance.json"
    if not path.exists():
        return set()
    fields = Fields.read(path)
    each = fields.items("dropped_items")
    return {each.integer(place, 0, MAX_SAMPLES) for place in each.values}
