"""Images named by a list: CSV or JSON lines with a path and a label each.

A list may come from a stranger: its paths must stay below its own folder, links resolved.
"""

import csv
import io
import os
import re
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.config import MAX_CLASSES
from pretrain.data.reader import MAX_LABELS
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import Fields, brief, is_text
from pretrain.shards.items import PackedItems
from pretrain.shards.pictures import stored_ending
from pretrain.shards.sources import append_file, file_item, place_word, same_files

ENDINGS = (".csv", ".jsonl")
MAX_LINE_BYTES = 1 << 16  # of a list; a path and a label have some hundred
_PATH, _LABEL = ("path", "file", "file_name", "filename", "image"), ("label", "class", "class_name")
_MAX_COLUMNS = 1000
_LIST = re.compile(r"""\[(\d+|.*[,'"].*)\]""")  # of labels in a .csv; "[other]" is a name


def listed_items(path: Path, *, apply_orientation: bool = False) -> tuple[PackedItems, list[str]]:
    """Returns the images of a list, in its order, and the names of classes, or nothing where labels are numbers.

    A list is a CSV whose first line names the columns, or JSON lines; of both the columns path and label are read. In
    JSON lines the labels may be lists, of one or more classes each. Names of classes get their numbers in sorted order.
    Raises UserError, naming the line, for a path that leads out of the list's folder, is not there, or comes twice, and
    for a label that is neither a class's number nor a name.
    """
    root = path.parent
    real_root = os.path.join(os.path.realpath(root), "")
    items = PackedItems(partial(file_item, root, apply_orientation))
    numbers: dict[str, int] = {}  # of labels, in the order they came
    words = array("q")
    lists: dict[int, list[int]] | None = None  # of the items that have several
    for place, row in _rows(path):
        if not items and row.has_list:
            lists = {}
        if row.has_list != (lists is not None):
            raise UserError(f"{place}: single labels and lists of labels are mixed; write [label] for a single one")
        file = _checked(root, real_root, row.name, place)
        own = [numbers.setdefault(label, len(numbers)) for label in row.labels]
        if lists is not None and len(own) > 1:
            lists[len(items)] = own
        append_file(items, root, file, own[0])
        words.append(place_word(file))
        if len(numbers) > MAX_CLASSES:
            raise UserError(f"{place}: more than {MAX_CLASSES} classes")
    for index, first in same_files(root, items, words).items():
        twice = brief(items.reference(index)), brief(items.reference(first))
        raise UserError(f"{path}: {twice[0]} is listed already, as {twice[1]}; list each image once")
    if not items:
        raise UserError(f"{path}: lists no images; expected a line with a path and a label for each")
    items.lists = lists
    if all(label.isascii() and label.isdigit() and len(label) <= len(str(MAX_CLASSES)) for label in numbers):
        return items.relabelled([int(label) for label in numbers]), []
    names = sorted(numbers)
    places = {name: place for place, name in enumerate(names)}
    return items.relabelled([places[label] for label in numbers]), names


def _checked(root: Path, real_root: str, name: str, place: str) -> Path:
    file = root / name
    if Path(name).is_absolute() or ".." in file.parts[len(root.parts) :]:
        raise UserError(
            f"{place}: {brief(name)} is absolute, or has .. in it; paths lie below the list's folder {root}"
        )
    try:
        real = os.path.realpath(file, strict=True)
    except (OSError, ValueError):
        raise UserError(f"{place}: {brief(name)} is not there; paths are relative to the list's folder") from None
    if not real.startswith(real_root):
        raise UserError(f"{place}: {brief(name)} leads out of the list's folder {root}; move the list above its images")
    if not os.path.isfile(real):
        raise UserError(f"{place}: {brief(name)} is no file")
    if stored_ending(file.name) is None:
        raise UserError(f"{place}: {brief(name)} is no picture that can be read here; convert it to JPEG or PNG")
    return file


class _Row(NamedTuple):
    name: str
    labels: list[str]
    has_list: bool


def _rows(path: Path) -> Iterator[tuple[str, _Row]]:
    """Yields a line's place, for messages, and its image and labels."""
    with path.open("rb") as file:
        lines = _lines(path, file)
        yield from _of_csv(path, lines) if path.suffix == ".csv" else _of_json(lines)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{path}: line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{place}: more than {MAX_LINE_BYTES} bytes, which is the limit of a line")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{place}: {shown(line.decode(errors='replace').strip())} is not UTF-8") from None
        if text.strip():
            yield place, text


def _of_csv(path: Path, lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, _Row]]:
    columns: tuple[int, int] | None = None
    for place, text in lines:
        try:
            (row,) = csv.reader(io.StringIO(text), strict=True)  # a quoted name does not go on in the next line
        except (ValueError, csv.Error) as error:
            raise UserError(f"{place}: is no line of CSV ({error})") from None
        if len(row) > _MAX_COLUMNS:
            raise UserError(f"{place}: has {len(row)} columns, at most {_MAX_COLUMNS}")
        if columns is None:
            columns = _column(row, _PATH, place), _column(row, _LABEL, place)
            continue
        if max(columns) >= len(row):
            raise UserError(f"{place}: has {len(row)} columns, the first line names more")
        name, label = row[columns[0]], row[columns[1]]
        if _LIST.fullmatch(label):
            raise UserError(f"{place}: {brief(label)}: a .csv has one label for an image; write a .jsonl for several")
        yield place, _row(name, [label], place, has_list=False)


def _column(names: list[str], wanted: tuple[str, ...], place: str) -> int:
    found = [number for number, name in enumerate(names) if name.strip().lower() in wanted]
    if len(found) != 1:
        raise UserError(f"{place}: {brief(names)}, expected one column {wanted[0]} (or {', '.join(wanted[1:])})")
    return found[0]


def _of_json(lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, _Row]]:
    for place, text in lines:
        fields = Fields.parse(text, place)
        keys = [_column(list(fields.values), wanted, place) for wanted in (_PATH, _LABEL)]
        name, label = (list(fields.values)[key] for key in keys)
        value = fields.values[label]
        has_list = isinstance(value, list)
        each = fields.items(label) if has_list else Fields({label: value}, place)
        labels = [_label(each, key) for key in each.values]
        yield place, _row(fields.text(name), labels, place, has_list=has_list)


def _label(fields: Fields, key: str) -> str:
    """A class's number, as text, or its name."""
    value = fields.values[key]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(fields.integer(key, 0, MAX_CLASSES - 1)) if is_number else fields.text(key)


def _row(name: str, labels: list[str], place: str, *, has_list: bool) -> _Row:
    if not name or "\0" in name or not is_text(name):
        raise UserError(f"{place}: {brief(name)} is no path")
    if not labels:
        raise UserError(
            f"{place}: an image without a label cannot be kept; leave it out, or give it a class of its own"
        )
    if len(labels) > MAX_LABELS:
        raise UserError(f"{place}: has {len(labels)} labels, at most {MAX_LABELS} of an image are read")
    for label in labels:
        if not label.strip() or not is_text(label):
            raise UserError(f"{place}: {brief(label)} is no label")
    stripped = [label.strip() for label in labels]
    different = {label.lstrip("0") if label.isdigit() else label for label in stripped}  # "01" is 1
    if len(different) < len(stripped):
        raise UserError(f"{place}: {brief(labels)} names a class twice")
    return _Row(name, stripped, has_list)
