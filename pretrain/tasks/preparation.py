"""Makes a task's shards from downloads: OUT/SPLIT/manifest.json with its list of examples, and task.json.

Three kinds of source: records that TFDS prepared, the authors' own files, and packs that are divided into splits.
Samples keep the order of their source. Finished splits are kept when a preparation is repeated.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.inside import file_inside
from pretrain.data.manifest import check_shards, load_manifest
from pretrain.data.reader import BadSample
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief
from pretrain.shards.archives import Original, Splits
from pretrain.shards.build import build, check_labels, read_dropped_items
from pretrain.shards.examples import Example, content_sha256, examples_sha256, write_examples
from pretrain.shards.imagenet import TRAIN_TAR, VAL_TAR, wnids
from pretrain.shards.items import Item
from pretrain.shards.packs import pack_originals, split_of
from pretrain.shards.pool import Progress
from pretrain.shards.sources import sniffed_ending
from pretrain.shards.tfrecord import Record, read_features, split_records, tfds_folder
from pretrain.shards.tfrecord_items import label_names
from pretrain.storage import write_text
from pretrain.tasks.readers import IMAGES, LABELS, READERS
from pretrain.tasks.table import Task

FORMAT, VERSION = "pretrain-task", 2
FILE = "task.json"
RECORDS, ORIGINALS, PACKS = "TFDS records", "original files", "packs"

_MOST = 1 << 48  # samples of a split that a task.json may claim
_UNFINISHED = ".unfinished"  # below OUT: a split is written there, and moved to its place when it is complete
_NAME_FEATURES = ("file_name", "image/file_name", "filename", "image/filename", "name", "id")  # as TFDS's sets have it


class Source(NamedTuple):
    """The images of a task, before they are written."""

    kind: str  # RECORDS, ORIGINALS or PACKS
    splits: Splits
    class_names: list[str]


class Prepared(NamedTuple):
    """A finished split, as task.json lists it."""

    split: str
    source: str  # RECORDS, ORIGINALS or PACKS
    source_sha256: str  # of the names and labels in their order, see `_source_sha256`
    num_samples: int
    num_expected: int  # of the official split
    left_out: int  # could not be decoded
    examples_sha256: str


def prepare(
    task: Task, source: Source, out: Path, *, samples_per_shard: int = 10_000, progress: Progress = lambda _: None
) -> tuple[list[Prepared], list[str]]:
    """Writes the splits to OUT/SPLIT and OUT/task.json; returns all finished splits, and the names of the new ones.

    A split that was made from the same names and labels is kept, so that a killed preparation can be repeated, and one
    without some splits completed. Raises UserError before anything is written when a folder holds something else or a
    label is no class of the task, and later when nothing can be decoded.
    """
    there = _finished(task, out)
    for split, originals in source.splits.items():
        _check_place(out / split, there.get(split), source, originals)
    for split in there:
        _check_names(out / split, source.class_names)
    new = [split for split in source.splits if split not in there]
    for split in new:
        check_labels((original.item for original in source.splits[split]), source.class_names)
    progress(sum(len(originals) for split, originals in source.splits.items() if split in there))
    for split in new:
        there[split] = _write_split(task, split, source, out / _UNFINISHED / split, samples_per_shard, progress)
        _write_task(task, out, there)  # first: an entry of task.json counts only if its folder exists
        (out / _UNFINISHED / split).replace(out / split)
        (out / _UNFINISHED).rmdir()
    return _in_order(task, there), new


def differences(task: Task, prepared: Iterable[Prepared]) -> list[str]:
    """Returns why scores on these splits must not be compared with published ones; nothing when they may be."""
    prepared = list(prepared)
    reasons = [
        f"{split.split} has {split.num_samples:,} of {split.num_expected:,} samples"
        for split in prepared
        if split.num_samples != split.num_expected
    ]
    kinds = {split.source for split in prepared} if task.group else set()
    if PACKS in kinds:
        reasons.append("its packs need not hold the images that TFDS's order gives")
    if ORIGINALS in kinds:
        reasons.append("its images are a seeded choice from the original files, not the ones that TFDS's order gives")
    return reasons


def set_differences(task_root: Path) -> list[str]:
    """Returns why scores on a prepared set must not be compared with published ones; nothing when they may be.

    task_root: the folder of the set's splits. A missing task.json is a reason: nobody can vouch for such a set.
    Raises UserError when task.json cannot be read.
    """
    values = _read_task(task_root)
    if values is None:
        return [f"no {FILE}: the set was not prepared by tools/make_shards.py --task"]
    if (version := _version(values)) != VERSION:
        return [f"{FILE} is of version {version}, not {VERSION}: prepare the set again"]
    return list(values.texts("differs"))


# --- task.json -------------------------------------------------------------------------------------------------------


def _read_task(out: Path) -> Fields | None:
    path = out / FILE
    try:
        file_inside(out, path)
        values = Fields.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if values.text("format") != FORMAT:
        values.wrong("format", f"{FORMAT}, the list of a prepared task")
    return values


def _version(values: Fields) -> int:
    return values.integer("version", 0, 1 << 16)


def _write_task(task: Task, out: Path, there: Mapping[str, Prepared]) -> None:
    prepared = _in_order(task, there)
    values = {
        "format": FORMAT,
        "version": VERSION,
        "task": task.name,
        "tfds": task.tfds,
        "differs": differences(task, prepared),
        "splits": {p.split: {"tfds_slice": task.splits[p.split]} | p._asdict() for p in prepared},
    }
    write_text(out / FILE, json.dumps(values, indent=1) + "\n")


def _in_order(task: Task, there: Mapping[str, Prepared]) -> list[Prepared]:
    return [there[split] for split in task.splits if split in there]


# --- what is there already -------------------------------------------------------------------------------------------


def _finished(task: Task, out: Path) -> dict[str, Prepared]:
    """Returns the splits that task.json lists and whose manifests are there. Raises UserError for another task's."""
    values = _read_task(out)
    if values is None:
        return {}
    found = values.text("task"), _version(values)
    if found != (task.name, VERSION):
        raise UserError(
            f"{out / FILE}: is of {brief(found[0])}, version {found[1]}, not of {task.name}, version "
            f"{VERSION}; remove {out} or choose another folder"
        )
    splits = values.part("splits")
    if unknown := [split for split in splits.values if split not in task.splits]:
        raise UserError(f"{splits.source}: has {brief(unknown[0])}, {task.name} has {', '.join(task.splits)}")
    entries = {split: _prepared(split, splits.part(split)) for split in splits.values}
    return {split: entry for split, entry in entries.items() if (out / split / "manifest.json").exists()}


def _prepared(split: str, entry: Fields) -> Prepared:
    return Prepared(
        split=split,
        source=entry.text("source"),
        source_sha256=entry.text("source_sha256"),
        num_samples=entry.integer("num_samples", 0, _MOST),
        num_expected=entry.integer("num_expected", 0, _MOST),
        left_out=entry.integer("left_out", 0, _MOST),
        examples_sha256=entry.text("examples_sha256"),
    )


def _check_place(folder: Path, there: Prepared | None, source: Source, originals: Sequence[Original]) -> None:
    """Raises UserError unless a split's folder is free, or holds these very images in full."""
    if there is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: is not empty, but no finished split of {FILE}; remove it or choose another folder"
            )
    elif there.source_sha256 != _source_sha256(source.kind, originals):
        raise UserError(
            f"{folder}: was made from other images ({there.num_samples:,} from {there.source}, here {len(originals):,} "
            f"from {source.kind}); remove it to have it made anew, or choose another folder"
        )


def _check_names(folder: Path, class_names: list[str]) -> None:
    """Raises UserError when the shards of a kept split are not whole, or its classes have other names."""
    manifest = load_manifest(folder)
    check_shards(manifest)
    for number, (kept, name) in enumerate(zip(manifest.class_names, class_names)):
        if kept != name:
            raise UserError(
                f"{folder}: class {number} is called {kept!r} there and {name!r} in the source, but all splits of a "
                f"set need the same names; remove it and give a source of all splits, or choose another folder"
            )


def _source_sha256(kind: str, originals: Iterable[Original]) -> str:
    """The digest of a source's names and labels, in order; reading the images too would take hours."""
    digest = hashlib.sha256(f"{kind}\n".encode())
    for original in originals:
        digest.update(f"{original.item.label} {original.id}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- writing a split -------------------------------------------------------------------------------------------------


def _write_split(
    task: Task, split: str, source: Source, folder: Path, samples_per_shard: int, progress: Progress
) -> Prepared:
    if folder.parent.exists():
        shutil.rmtree(folder.parent)  # what a killed preparation has left
    originals = source.splits[split]
    digests = [""] * len(originals)
    items = [
        original.item._replace(read=partial(_read_noting, original, digests, number))
        for number, original in enumerate(originals)
    ]
    options = {"samples_per_shard": samples_per_shard, "seed": None, "progress": progress}
    path = build(items, source.class_names, folder, **options)
    dropped = read_dropped_items(folder)
    kept = [
        (original, digest) for index, (original, digest) in enumerate(zip(originals, digests)) if index not in dropped
    ]
    assert len(kept) == load_manifest(path).num_samples
    examples = [
        Example(index, original.id, _one_class(original.item), digest) for index, (original, digest) in enumerate(kept)
    ]
    write_examples(folder, examples)
    return Prepared(
        split=split,
        source=source.kind,
        source_sha256=_source_sha256(source.kind, originals),
        num_samples=len(examples),
        num_expected=task.num_samples[split],
        left_out=len(originals) - len(kept),
        examples_sha256=examples_sha256(examples),
    )


def _one_class(item: Item) -> int:
    assert isinstance(item.label, int)  # no task has several labels to an image; ReaL's come from their own file
    return item.label


def _read_noting(original: Original, digests: list[str], number: int) -> bytes:
    """Reads an image and notes its digest, so that it need not be read a second time."""
    data = original.item.read()
    try:
        digests[number] = content_sha256(data)
    except BadSample:
        pass  # left out by `build`, which reports it
    return data


# --- sources ---------------------------------------------------------------------------------------------------------


def open_source(task: Task, paths: Sequence[Path]) -> Source:
    """Returns a task's images from a TFDS folder, the authors' files, or packs named for their splits.

    Raises UserError when none of the three is there, naming what the task can be made from.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found; {task.name} is at {task.url} ({task.licence})")
    if task.data_of:
        raise UserError(f"{task.name} is scored on the data of {task.data_of}: prepare --task {task.data_of}")
    if all(_is_pack(path) for path in paths):
        splits = _packed_splits(task, paths)
        return Source(PACKS, splits, _class_names(task, _names_in(splits)))
    if len(paths) > 1:
        raise UserError(f"{task.name}: give one folder, or packs whose names tell train, val or test")
    if paths[0].is_dir() and _has_records(paths[0], task):
        folder = tfds_folder(paths[0], task.tfds)
        splits = {split: _from_records(task, folder, spec) for split, spec in task.splits.items()}
        return Source(RECORDS, splits, _class_names(task, label_names(folder, "label")))
    if task.originals is None:
        raise UserError(
            f"{paths[0]}: {task.name} is made from TFDS records ({task.tfds}), whose order defines its images, or from "
            f"packs named for train, val and test; neither is here"
        )
    splits = READERS[task.originals](paths[0])
    return Source(ORIGINALS, splits, _class_names(task, _names_in(splits)))


def _has_records(folder: Path, task: Task) -> bool:
    return any(next(folder.rglob(f"{_dataset(task)}-*.{form}-*"), None) for form in ("tfrecord", "array_record"))


def _dataset(task: Task) -> str:
    """TFDS's name of the set, with which its files begin: without config and version."""
    return task.tfds.partition(":")[0].partition("/")[0]


def _class_names(task: Task, found: Sequence[str]) -> list[str]:
    """The names of the classes: the task's own, those of the source if it names all, or mere numbers."""
    names = list(wnids() if task.is_imagenet else found)
    return names if len(names) == task.num_classes else [str(number) for number in range(task.num_classes)]


def _names_in(splits: Splits) -> list[str]:
    """What the images' classes are called, by number; nothing when one has no name, or several."""
    everything = [original for originals in splits.values() for original in originals]
    found = {(_one_class(original.item), original.class_name) for original in everything}
    names = dict(found)
    known = len(names) == len(found) and all(names.values()) and set(names) == set(range(len(names)))
    return [names[number] for number in range(len(names))] if known else []


def _is_pack(path: Path) -> bool:
    own = path.name not in (TRAIN_TAR, VAL_TAR) and split_of(path) is not None
    return path.is_file() and own and path.name.endswith((".npz", ".tar", ".tar.gz"))


def _packed_splits(task: Task, paths: Sequence[Path]) -> Splits:
    """Reads packs into the splits of the task; trainval is train and then val."""
    splits: Splits = {}
    for path in paths:
        split = str(split_of(path))
        if split not in task.splits:
            raise UserError(f"{path}: is a pack of {split}; {task.name} has {', '.join(task.splits)}")
        splits.setdefault(split, []).extend(pack_originals(path))
    if "trainval" in task.splits and "trainval" not in splits and {"train", "val"} <= set(splits):
        splits["trainval"] = splits["train"] + splits["val"]
    return {split: splits[split] for split in task.splits if split in splits}


# --- TFDS records ----------------------------------------------------------------------------------------------------


def _from_records(task: Task, folder: Path, spec: str) -> list[Original]:
    return [_from_record(task, record) for record in split_records(folder, _dataset(task), spec)]


def _from_record(task: Task, record: Record) -> Original:
    """Parses a record for its name and its label; its image is read again when it is written."""
    features = read_features(record)
    try:
        label = LABELS[task.label](features)
        name = next((features[key][0].decode() for key in _NAME_FEATURES if features.get(key)), record.id)
        ending = sniffed_ending(features["image"][0])
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{record.path}: record {record.number} is not as {task.name} needs it ({type(error).__name__}: {error}); "
            f"it has {', '.join(sorted(features))}"
        ) from None
    source = f"{record.path}[{record.number}]"
    return Original(name, Item(partial(_read_image, task, record), ending, label, source))


def _read_image(task: Task, record: Record) -> bytes:
    data = read_features(record)["image"][0]
    if task.image is None:
        return data
    try:
        return IMAGES[task.image](data)
    except (ValueError, OSError) as error:
        raise UserError(f"{record.path}: image of record {record.number}: {error}") from None
