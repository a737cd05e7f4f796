"""Items -> shuffled shards, their indexes, and the manifest, which is written last."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from pretrain.config import MAX_CLASSES
from pretrain.data.classes import check_names
from pretrain.data.images import decode
from pretrain.data.manifest import (
    LABEL_ENDING,
    Shard,
    write_manifest,
)
from pretrain.data.permutation import words
from pretrain.data.reader import MAX_IMAGE_BYTES, MAX_LABELS, BadSample
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import Fields, is_text, read_json
from pretrain.log import warn
from pretrain.shards.counts import write_counts
from pretrain.shards.sources import Item
from pretrain.shards.tars import index_tar
from pretrain.storage import replacing, write_text

Progress = Callable[[int], None]  # told the number of samples just done


class DataSet(NamedTuple):
    """What a data set holds, before its manifest is written."""

    shards: list[Shard]
    num_classes: int
    classes: Sequence[str]
    counts: Counter[int] | None  # images of each class, where they were counted
    dropped: list[str]  # what was left out, with the reason
    multi_label: bool = False


def set_name(out: Path) -> str:
    """Returns what a data set and its shards are called: its folder's name, also where that is given as `.`."""
    return out.resolve().name or "data"


def build(
    items: Sequence[Item],
    classes: Sequence[str],
    out: Path,
    *,
    samples_per_shard: int,
    seed: int | None,
    progress: Progress = lambda _: None,
) -> Path:
    """Writes the items, shuffled over all shards, and returns the manifest's path. The same items give the same bytes.

    Without a seed they keep their order. Each image is decoded once: one that cannot be is left out and named in
    provenance.json; `progress` counts it all the same. Raises UserError when nothing is left or the folder holds
    another data set.
    """
    start_folder(out, classes)
    multi_label = _has_lists(items)
    check_labels(items, classes)
    plan = np.arange(len(items)) if seed is None else np.argsort(words(len(items), "v1", "plan", seed), kind="stable")
    shards, dropped, counts = [], [], Counter[int]()
    for number in range(-(-len(items) // samples_per_shard)):
        chosen = plan[number * samples_per_shard : (number + 1) * samples_per_shard]
        path = out / f"{set_name(out)}-{number:06d}.tar"
        shard, left_out = _write_shard(path, number, [items[i] for i in chosen], progress, counts)
        dropped += left_out
        if shard.num_samples:
            shards.append(shard)
    if not shards:
        raise UserError(f"{out}: none of the {len(items)} images can be decoded, the first: {dropped[0]}")
    num_classes = len(classes) or 1 + max(label for item in items for label in _labels(item))
    made = DataSet(shards, num_classes, classes, counts, dropped, multi_label)
    return finish(out, made, _shuffled(seed))


def check_labels(items: Iterable[Item], classes: Sequence[str]) -> None:
    """Raises UserError when a label is no class; without names any number below MAX_CLASSES is one."""
    most = len(classes) or MAX_CLASSES
    for item in items:
        for label in _labels(item):
            if not 0 <= label < most:
                raise UserError(f"{item.source}: label {label} is not one of the {most} classes")


def _labels(item: Item) -> list[int]:
    return item.label if isinstance(item.label, list) else [item.label]


def _has_lists(items: Sequence[Item]) -> bool:
    """Returns whether labels are lists. Raises UserError when only some are, or when one is empty or repeats itself."""
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
    shard, _ = _write_shard(path, number, items, lambda _: None, Counter(), check=False)
    return shard


def finish_manifest(out: Path, shards: list[Shard], classes: Sequence[str], seed: int) -> Path:
    """Writes classes.json and the manifest of shards written by `write_samples`, in shuffled order."""
    return finish(out, DataSet(shards, len(classes), classes, None, []), _shuffled(seed))


def _shuffled(seed: int | None) -> dict[str, Any]:
    """What the manifest says of samples that lie in random order over all shards, or in the order they came."""
    return {"scope": "none"} if seed is None else {"scope": "global", "seed": seed, "method": "permutation"}


def _write_shard(
    path: Path, number: int, items: Iterable[Item], progress: Progress, counts: Counter[int], check: bool = True
) -> tuple[Shard, list[str]]:
    """Writes a tar and its index, and returns the shard and what was left out, with the reason."""
    with replacing(path) as temporary:
        dropped = _write_tar(temporary, number, items, progress, counts, check)
    return index_tar(path), dropped


def _write_tar(
    path: Path, number: int, items: Iterable[Item], progress: Progress, counts: Counter[int], check: bool
) -> list[str]:
    """Writes a tar, counts the images of each class, and returns what was left out, with the reason."""
    dropped = []
    with path.open("wb") as stream:
        writer = TarWriter(stream, mtime=0, encoder=False)
        written = 0
        for item in items:
            try:
                data = _read(item)
                if check:
                    decode(data, partial(_warn_of_damage, item))
            except BadSample as bad:
                dropped.append(shown(f"{item.source}: {bad}"))
                continue
            finally:
                progress(1)
            label = json.dumps([int(k) for k in item.label]) if isinstance(item.label, list) else str(item.label)
            writer.write({"__key__": f"{number:06d}{written:06d}", item.ending: data, LABEL_ENDING: label.encode()})
            counts.update(_labels(item))
            written += 1
        writer.close()
    return dropped


def _warn_of_damage(item: Item, complaint: str) -> None:
    warn(shown(f"{item.source}: is damaged, and kept: {complaint}"))


def _read(item: Item) -> bytes:
    """Reads an image by the rule of those who will read the shard. Raises BadSample."""
    try:
        data = item.read()
    except OSError as error:  # of this file; the disk that is written to has errors of its own
        raise BadSample("missing", f"cannot be read ({error.strerror})") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample("tar", f"{len(data)} bytes, at most {MAX_IMAGE_BYTES}")
    return data


def start_folder(out: Path, classes: Sequence[str] = ()) -> None:
    """Makes the folder of a new data set. Raises UserError when that cannot be, or its names cannot be kept."""
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
    classes = list(made.classes)
    if classes:
        write_text(out / "classes.json", json.dumps(classes, ensure_ascii=False, indent=0) + "\n")
    if made.dropped:
        write_text(out / "provenance.json", json.dumps({"dropped": made.dropped}, indent=1) + "\n")
    if made.counts is not None:
        write_counts(out, [made.counts[label] for label in range(made.num_classes)], classes)
    options = {"has_names": bool(classes), "shuffle": shuffle, "multi_label": made.multi_label}
    return write_manifest(out, set_name(out), made.shards, made.num_classes, **options)


def read_dropped(folder: Path) -> list[str]:
    """Returns what was left out of a data set, with the reasons. Raises UserError when the list cannot be read."""
    path = folder / "provenance.json"
    return list(Fields.of(read_json(path), str(path)).texts("dropped")) if path.exists() else []
