"""Walks through an existing shard; keeps the findings in a record for a later start; adds up those of all shards."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.config import MAX_CLASSES
from pretrain.data.manifest import Shard, load_index
from pretrain.data.reader import BadSample, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.shards.build import DataSet, finish
from pretrain.shards.pool import Progress
from pretrain.shards.tars import alone, index_tar
from pretrain.storage import remove_left_over, write_text

FOLDER = ".indexing"  # of OUT, for records, until the manifest is there

Origin = Mapping[str, int | str]  # what identifies an unchanged file: its place, its size, its time


def begin(out: Path) -> Path:
    """Returns the folder of OUT for records, made or found; what killed processes left in OUT is removed."""
    folder = out / FOLDER
    if folder.is_symlink():  # not ours, and writing would follow it
        folder.unlink()
    folder.mkdir(exist_ok=True)
    remove_left_over(out)
    return folder


def is_file_name(name: str) -> bool:
    """Returns whether the files beside a shard of this name can be made: their endings are longer than its own."""
    return "\0" not in name and len(name.encode()) <= 240


class Walk(NamedTuple):
    """What was found in one shard."""

    shard: Shard
    multi_label: bool
    counts: Counter[int]  # images of each class
    passed_over: Counter[str]


def walk(tar: Path, num_classes: int) -> Walk:
    """Writes a tar's index beside it and returns what it holds; num_classes=0: labels may be of any class.

    Raises UserError naming the tar, when it is damaged or empty, holds a sample twice or without image or label.
    """
    passed_over = Counter[str]()
    shard = index_tar(tar, passed_over)
    if not shard.num_samples:
        raise UserError(f"{tar}: has no samples")
    multi_label = _starts_with_list(shard)
    return Walk(shard, multi_label, Counter(_labels_in(shard, num_classes, multi_label)), passed_over)


def keep(record: Path, origin: Origin, found: Walk) -> None:
    """Records what was found, so that a later start need not read the shard again."""
    shard = found.shard
    values = {"origin": origin, "num_bytes": shard.num_bytes, "num_samples": shard.num_samples, "sha256": shard.sha256}
    values |= {"multi_label": found.multi_label, "counts": found.counts, "passed_over": found.passed_over}
    write_text(record, json.dumps(values))


def known(record: Path, origin: Origin, path: Path, num_classes: int, url: str = "") -> Walk | None:
    """Returns what an earlier start found in a shard, None unless record, index and origin still match."""
    try:
        values = Fields.read(record)
        num_samples, num_bytes = values.integer("num_samples", 1, 1 << 32), values.integer("num_bytes", 0, 1 << 63)
        shard = Shard(str(path), num_samples, num_bytes, values.text("sha256"), url)
        if values.values.get("origin") != origin or not (url or path.stat().st_size == num_bytes):
            return None
        load_index(shard)
        counts, kinds = values.part("counts"), values.part("passed_over")
        labels = Counter({int(label): counts.integer(label, 0, 1 << 48) for label in counts.values})
        if not labels or min(labels) < 0 or (num_classes and max(labels) >= num_classes):
            return None
        passed_over = Counter({kind: kinds.integer(kind, 0, 1 << 48) for kind in kinds.values})
        return Walk(shard, values.flag("multi_label"), labels, passed_over)
    except (OSError, ValueError):
        return None


def finish_walks(
    walks: Iterable[tuple[int, Walk]],
    classes: Sequence[str],
    out: Path,
    progress: Progress,
    passed_over: Counter[str] | None,
) -> Path:
    """Writes the manifest from walks that come in any order, numbered in the manifest's order; returns its path.

    Counts are added up at once: those of 30,000 shards of 20,000 classes would take 20 GB. Raises UserError when labels
    are lists in some shards only, or make too many classes.
    """
    shards: dict[int, Shard] = {}
    counts, skipped, first = Counter[int](), Counter[str](), None
    for number, found in walks:
        first = first or found
        if found.multi_label != first.multi_label:
            kinds = ["a class", "a list of classes"]
            raise UserError(
                f"{found.shard.url or found.shard.path}: its labels are {kinds[found.multi_label]} each, those of "
                f"{first.shard.url or first.shard.path} {kinds[first.multi_label]}"
            )
        shards[number] = found.shard
        counts.update(found.counts)
        skipped.update(found.passed_over)
        progress(1)
    assert first is not None  # there is at least one tar
    num_classes = len(classes) or max(counts) + 1
    if num_classes > MAX_CLASSES:
        raise UserError(f"{out}: label {max(counts)} makes more than {MAX_CLASSES} classes")
    if passed_over is not None:
        passed_over.update(skipped)
    in_order = [shards[number] for number in sorted(shards)]
    noted = {"passed_over": skipped, "notes": {}}
    made = DataSet(in_order, num_classes, classes, counts, [], first.multi_label, told=noted)
    return finish(out, made, {"scope": "none"})


def _starts_with_list(shard: Shard) -> bool:
    """Whether the first label of existing tars is a list: then all have to be."""
    try:
        return read_sample(alone(shard, 1), 0).label.lstrip().startswith(b"[")
    except BadSample:
        return False  # reported with its number by `_labels_in`


def _labels_in(shard: Shard, num_classes: int, multi_label: bool) -> list[int]:
    """All labels of a local tar, num_classes=0: of any class. Raises UserError for a bad one."""
    manifest = alone(shard, num_classes or 10**9)
    labels = []
    for number in range(shard.num_samples):
        try:
            raw = read_sample(manifest, number)
            labels += parse_labels(raw.label, manifest.num_classes, multi_label)
        except BadSample as bad:
            raise UserError(f"{shard.path}: sample {number}: {bad}") from None
    return labels
