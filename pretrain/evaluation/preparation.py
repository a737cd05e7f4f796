"""From what one can download to the shards of a task: OUT/SPLIT/manifest.json with its list of examples, and task.json.

Three kinds of source: records that TFDS prepared, the authors' own files, and packs that are cut into splits already.
Samples keep the order of their source.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.archives import TRAIN_TAR, VAL_TAR, Original, Splits, pack_originals, split_of
from pretrain.data.build import Item, Progress, build, sniffed_ending
from pretrain.data.examples import Example, content_sha256, examples_sha256, write_examples
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import BadSample
from pretrain.data.tfrecord import Record, read_features, split_records, tfds_folder
from pretrain.errors import UserError
from pretrain.evaluation.tasks import Task

FORMAT, VERSION = "pretrain-task", 1
RECORDS, ORIGINALS, PACKS = "TFDS records", "original files", "packs"

_NAME_FEATURES = ("file_name", "image/file_name", "filename", "image/filename", "name", "id")  # as TFDS's sets have it


class Source(NamedTuple):
    """The images of a task, before they are written."""

    kind: str  # RECORDS, ORIGINALS or PACKS
    splits: Splits
    class_names: list[str]


class Prepared(NamedTuple):
    """A split that was written."""

    split: str
    manifest: Path
    num_samples: int
    num_expected: int  # of the official split
    left_out: int  # could not be decoded
    examples_sha256: str


def prepare(
    task: Task, source: Source, out: Path, *, samples_per_shard: int = 10_000, progress: Progress = lambda _: None
) -> list[Prepared]:
    """Writes each split to OUT/SPLIT, then OUT/task.json, and returns what was written.

    Raises UserError when a split is there already, a label is no class of the task, or nothing can be decoded.
    """
    prepared = [_write_split(task, split, source, out / split, samples_per_shard, progress) for split in source.splits]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "task": task.name,
        "tfds": task.tfds,
        "source": source.kind,
        "comparable": not reasons_against(task, source.kind, prepared),
        "splits": {
            p.split: {
                "tfds_slice": task.splits[p.split],
                "num_samples": p.num_samples,
                "num_expected": p.num_expected,
                "left_out": p.left_out,
                "examples_sha256": p.examples_sha256,
            }
            for p in prepared
        },
    }
    (out / "task.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return prepared


def reasons_against(task: Task, kind: str, prepared: Iterable[Prepared]) -> list[str]:
    """Returns why scores on these splits must not be compared with published ones; nothing when they may be."""
    reasons = [
        f"{split.split} has {split.num_samples} of {split.num_expected} samples"
        for split in prepared
        if split.num_samples != split.num_expected
    ]
    if kind == PACKS and task.group:
        reasons.append("packs need not hold the images that TFDS's order gives")
    return reasons


def _write_split(
    task: Task, split: str, source: Source, out: Path, samples_per_shard: int, progress: Progress
) -> Prepared:
    originals = source.splits[split]
    digests = [""] * len(originals)
    items = [
        original.item._replace(read=partial(_read_noting, original, digests, number))
        for number, original in enumerate(originals)
    ]
    options = {"samples_per_shard": samples_per_shard, "seed": None, "progress": progress}
    path = build(items, source.class_names, out, **options)
    dropped = _dropped(out)
    kept = [
        (original, digest)
        for original, digest in zip(originals, digests)
        if not dropped or not any(line.startswith(f"{original.item.source}: ") for line in dropped)
    ]
    assert len(kept) == load_manifest(path).num_samples
    examples = [
        Example(index, original.id, original.item.label, digest) for index, (original, digest) in enumerate(kept)
    ]
    write_examples(out, examples)
    return Prepared(
        split, path, len(examples), task.num_samples[split], len(originals) - len(kept), examples_sha256(examples)
    )


def _read_noting(original: Original, digests: list[str], number: int) -> bytes:
    """Reads an image and notes its digest: once, while the image passes by."""
    data = original.item.read()
    try:
        digests[number] = content_sha256(data)
    except BadSample:
        pass  # left out by `build`, which tells it
    return data


def _dropped(folder: Path) -> list[str]:
    path = folder / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8"))["dropped"] if path.exists() else []


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
        return Source(PACKS, _packed_splits(task, paths), _numbers(task))
    if len(paths) > 1:
        raise UserError(f"{task.name}: give one folder, or packs whose names tell train, val or test")
    if paths[0].is_dir() and _has_records(paths[0]):
        folder = tfds_folder(paths[0], task.tfds)
        splits = {split: _from_records(task, folder, spec) for split, spec in task.splits.items()}
        return Source(RECORDS, splits, _label_names(folder, task))
    if task.originals is None:
        raise UserError(
            f"{paths[0]}: {task.name} is made from TFDS records ({task.tfds}), whose order defines its images, or from "
            f"packs named for train, val and test; neither is here"
        )
    return Source(ORIGINALS, task.originals(paths[0]), _numbers(task))


def _has_records(folder: Path) -> bool:
    return any(next(folder.rglob(pattern), None) for pattern in ("*.tfrecord-*-of-*", "*.array_record-*-of-*"))


def _numbers(task: Task) -> list[str]:
    return [str(number) for number in range(task.num_classes)]


def _label_names(folder: Path, task: Task) -> list[str]:
    """TFDS's names of the classes, where its stored label is the task's label."""
    path = folder / "label.labels.txt"
    names = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return names if len(names) == task.num_classes else _numbers(task)


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
    dataset = task.tfds.partition(":")[0].partition("/")[0]
    return [_from_record(task, record) for record in split_records(folder, dataset, spec)]


def _from_record(task: Task, record: Record) -> Original:
    """Parses a record for its name and its label; its image is read again when it is written."""
    features = read_features(record)
    try:
        label = task.label(features)
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
        return task.image(data)
    except (ValueError, OSError) as error:
        raise UserError(f"{record.path}: image of record {record.number}: {error}") from None
