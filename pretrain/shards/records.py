"""Files of records, each with an image and a label: what the readers of parquet and TFRecord share.

A pass over the files (passes.py) finds where the images lie, their kind and their labels; items come from that.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.config import MAX_CLASSES
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief, is_text
from pretrain.shards.items import ItemOf, PackedItems
from pretrain.shards.sources import sniffed_ending

_ENDINGS = ("jpg", "png", "webp")
# train-00003-of-00016, maybe with a digest and an ending behind
_NUMBERED = re.compile(r"((?:.*-)?\d{5}-of-(\d{5}))(?!\d).*")
_MAX_LABEL_LETTERS = 300  # of a label that is a text, as of a class's name


class Rows(NamedTuple):
    """What a file holds."""

    places: np.ndarray  # int64 [rows, 3]: first byte, number of bytes, number of the ending
    labels: np.ndarray  # int64 [rows]: classes, or places in `names`
    names: list[str]  # of labels that are texts, in the order they came


def read_rows(path: Path) -> Rows:
    """Reads the rows that `RowsSoFar.to_bytes` has written."""
    with path.open("rb") as file:
        names = list(Fields.parse(file.readline(), str(path)).texts("names"))
        table = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return Rows(table[:, :3], table[:, 3], names)


class RowsSoFar:
    """Collects the rows of a file."""

    def __init__(self, source: str) -> None:
        self._source, self._rows, self._names = source, [], {}

    def add(self, start: int, image: bytes, label: object, num_bytes: int | None = None) -> None:
        """Adds a row; label: a class's number, or a name.

        Raises UserError, naming the row, when it is neither, or of another kind than those of the rows before.
        """
        if isinstance(label, bytes):
            label = label.decode(errors="surrogateescape")  # what is not UTF-8 is refused below
        is_name, others_are = isinstance(label, str), bool(self._names)
        if isinstance(label, str) and label and is_text(label) and len(label) <= _MAX_LABEL_LETTERS:
            label = self._names.setdefault(label, len(self._names))
        elif type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"{self._source}[{len(self._rows)}]: label {brief(label)} is no class, expected 0 to "
                f"{MAX_CLASSES - 1} or a name in UTF-8; -1 or none is how splits without labels are published"
            )
        if self._rows and is_name != others_are:
            raise UserError(
                f"{self._source}[{len(self._rows)}]: its label is a {'name' if is_name else 'number'}, in the rows "
                "before they are not; make all of one kind"
            )
        if len(self._names) > MAX_CLASSES:
            raise UserError(f"{self._source}: more than {MAX_CLASSES} classes")
        self._rows.append((start, len(image) if num_bytes is None else num_bytes, _kind(image), label))

    def to_bytes(self) -> bytes:
        """Returns all rows in the form in which a pass keeps them."""
        file = io.BytesIO()
        file.write(json.dumps({"names": list(self._names)}).encode() + b"\n")
        np.save(file, np.array(self._rows, dtype=np.int64).reshape(-1, 4))
        return file.getvalue()


def _kind(image: bytes) -> int:
    """The number of the ending that an image gets; what is none of the three is converted to PNG when it is read."""
    return 1 if not image.startswith((b"\xff\xd8", b"RIFF")) else _ENDINGS.index(sniffed_ending(image[:12]))


def ending_of_kind(kind: str) -> str:
    """Returns the ending by its number in a reference."""
    return _ENDINGS[int(kind)]


def items_of_rows(
    files: Sequence[Path], listings: Sequence[Path], names: list[str], item_of: ItemOf, prefixes: Sequence[str]
) -> tuple[PackedItems, list[str]]:
    """Returns the items of files, in their order, and the names of classes.

    listings: the files of `read_rows`. names: of labels that are numbers. prefixes: of each file's references.
    Names among the rows get their numbers in sorted order.
    """
    found = [read_rows(path) for path in listings]
    texts = sorted({name for rows in found for name in rows.names})
    places = {name: place for place, name in enumerate(texts)}
    items = PackedItems(item_of)
    for path, rows, prefix in zip(files, found, prefixes):
        status, labels = path.stat(), rows.labels
        if bool(rows.names) != bool(texts) and len(labels):
            raise UserError(f"{path}: labels are numbers, in other files names; make two sets of them")
        if texts:
            labels = np.array([places[name] for name in rows.names], dtype=np.int64)[labels]
        stamp = status.st_size, status.st_mtime_ns
        for row, (place, label) in enumerate(zip(rows.places.tolist(), labels.tolist())):
            items.append("\0".join([prefix, str(row), *map(str, place)]), label, stamp)
    if not items:
        raise UserError(f"{files[0]}: has no rows; expected images and labels")
    return items, texts or names


def key_of(what: str, number: int, path: Path) -> str:
    """Returns the key by which a pass recognises one of several files: place among them, name, size and time."""
    status = path.stat()
    return f"{what} {number} {path.name} {status.st_size} {status.st_mtime_ns}"


def unnumbered(path: Path) -> str:
    """Returns what files of one split share if their names follow no rule: folder, and name without digits."""
    return f"{path.parent.name}/{re.sub(r'[0-9]+', '', path.name)}"


def one_split(paths: Sequence[Path], split_of: Callable[[Path], str]) -> None:
    """Raises UserError when files are of several splits."""
    splits = Counter(map(split_of, paths))
    if len(splits) > 1:
        named = ", ".join(f"{count} of {split or 'no split'}" for split, count in sorted(splits.items()))
        raise UserError(f"{paths[0].parent}: holds files of several splits ({named}); give the files of one of them")


def check_complete(paths: Sequence[Path]) -> None:
    """Raises UserError for a file that is given twice, and for numbered files that are not complete.

    Files whose names give their number and count must all be there, each once.
    """
    if numbered := _NUMBERED.fullmatch(paths[0].name):
        start, count = numbered[1][: -len("00000-of-00000")], numbered[2]
        expected = Counter(f"{start}{number:05d}-of-{count}" for number in range(int(count)))
        given = Counter(_NUMBERED.sub(r"\1", path.name) for path in paths)
        for wrong, what in ((expected - given, "is missing"), (given - expected, "is too many")):
            if wrong:
                raise UserError(
                    f"{paths[0]}: is one of {int(count)}, {len(paths)} were given, of which {min(wrong)} {what}; give "
                    "each once, and parts of another set as a set of their own"
                )
    places: dict[str, Path] = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in places:
            raise UserError(f"{path}: is given twice, the other time as {places[place]}; give each file once")
        places[place] = path
