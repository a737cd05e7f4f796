"""TFRecord files as a source, without TensorFlow: TFDS's, or ImageNet as TensorFlow's own scripts write it.

A pass finds where records lie and reads their labels; images are read in place, with their checksums compared.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pretrain.data.reader import BadSample
from pretrain.errors import UserError
from pretrain.json_files import brief
from pretrain.shards import records
from pretrain.shards.archives import read_text
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.passes import Piece, Work, run_pass
from pretrain.shards.pictures import picture_of
from pretrain.shards.pool import Progress
from pretrain.shards.tfrecord import FILE, Features, Record, file_records, read_features, shard_lengths

_IMAGES = ("image", "image/encoded")  # of TFDS; of TensorFlow's ImageNet
_LABELS = ("label", "image/class/label")
_IMAGENET = re.compile(r"[a-z]+-\d{5}-of-\d{5}")  # train-00000-of-01024, of TensorFlow's scripts for ImageNet


def tfrecord_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the TFRecord files among sources: these files, or those of a folder."""
    if len(paths) == 1 and paths[0].is_dir():
        return sorted(filter(_is_tfrecord, paths[0].iterdir()))
    return sorted(paths) if all(map(_is_tfrecord, paths)) else []


def _is_tfrecord(path: Path) -> bool:
    return (".tfrecord" in path.name or _IMAGENET.fullmatch(path.name) is not None) and path.is_file()


def tfrecord_items(
    files: Sequence[Path], work: Work, *, label_column: str | None = None, apply_orientation: bool = False
) -> tuple[PackedItems, list[str]]:
    """Returns the images of TFRecord files in storage order, and the names of classes, where `*.labels.txt` has them.

    Raises UserError for files of several splits, for a file or a record that is missing or damaged, and for a record
    without an image or a label.
    """
    records.one_split(files, _split_of)
    records.check_complete(files)
    expected = _num_records(files[0])
    label = label_column or next((name for name in _LABELS if name in _first(files[0])), _LABELS[0])
    keys = [records.key_of(f"tfrecord 1 {label}", number, path) for number, path in enumerate(files)]
    pieces = [Piece(key, partial(tuple, (path, label))) for key, path in zip(keys, files)]
    listings = run_pass(_list, pieces, work, "reading", "files")
    item_of = partial(_item, files[0].parent, apply_orientation)
    relative = [os.path.relpath(path, files[0].parent) for path in files]
    items, names = records.items_of_rows(files, listings, label_names(files[0].parent, label), item_of, relative)
    if expected not in (None, len(items)):
        raise UserError(f"{files[0].parent}: has {len(items)} records, dataset_info.json says {expected}; cut?")
    return items, names


def _split_of(path: Path) -> str:
    match = FILE.fullmatch(path.name)
    return f"{match['dataset']}-{match['split']}" if match else records.unnumbered(path)


def _first(path: Path) -> Features:
    record = next(file_records(path), None)
    return read_features(record) if record else {}


def label_names(folder: Path, label: str) -> list[str]:
    """Returns TFDS's names of the classes of a stored label; empty where it has none."""
    path = folder / f"{label.replace('/', '-')}.labels.txt"
    return read_text(path).splitlines() if path.exists() else []


def _num_records(first: Path) -> int | None:
    """The number of records in a split by dataset_info.json, None if it gives none. first: a file of the split."""
    match = FILE.fullmatch(first.name)
    return sum(shard_lengths(first.parent, match["split"])) or None if match else None


def _list(task: tuple[Path, str], listing: Path, progress: Progress) -> bytes:
    path, label = task
    rows = records.RowsSoFar(str(path))
    for record in file_records(path):
        features = read_features(record)
        values = features.get(label, ())
        if len(values) != 1:
            raise UserError(
                f"{path}: record {record.number} has {len(values)} of {label}, of {brief(sorted(features))}; give one "
                "of these that holds a label each by --label-column; for several labels write files and a .jsonl"
            )
        rows.add(record.offset, _image(features), values[0], record.num_bytes)
    return rows.to_bytes()


def _image(features: Features) -> bytes:
    """The image of a record, b"" where it has none."""
    found = next((features[name] for name in _IMAGES if features.get(name)), [b""])
    return found[0] if isinstance(found[0], bytes) else b""


def _item(folder: Path, apply_orientation: bool, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns the item of a record. reference: file, number, offset, number of bytes, ending."""
    name, number, offset, num_bytes, kind = reference.split("\0")
    record = Record(folder / name, int(number), int(offset), int(num_bytes))
    read = partial(_read, record, notes, apply_orientation)
    return Item(read, records.ending_of_kind(kind), label, f"{record.path}[{number}]", apply_orientation)


def _read(record: Record, notes: Counter[str], apply_orientation: bool) -> bytes:
    data = _image(read_features(record))
    if not data:
        raise BadSample("missing", f"the record has no {' or '.join(_IMAGES)}")
    return picture_of(data, "record.jpg", notes, apply_orientation)
