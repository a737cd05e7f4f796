"""Reads a tar for each class in place, from a folder or one tar, as ImageNet-21k comes: n01440764.tar ..."""

import gzip
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.manifest import IMAGE_ENDINGS, LABEL_ENDING
from pretrain.data.reader import MAX_IMAGE_BYTES
from pretrain.data.tar_headers import BadHeader, end_of, members
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards.archives import read_member
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.listing import is_of_the_system
from pretrain.shards.passes import Piece, Work, outcome_of, run_pass
from pretrain.shards.pictures import JPEG_ENDINGS, ending_of, stored_ending
from pretrain.shards.pool import Progress
from pretrain.shards.records import key_of
from pretrain.shards.sources import Told, is_split_name
from pretrain.shards.tars import check_end, unreadable
from pretrain.shards.unpacking import copy_unpacked
from pretrain.storage import replacing

_HEAD_BYTES = 8 << 10  # of a tar: enough to hold its first file's header, after those of some folders
_KEPT = (*IMAGE_ENDINGS, *JPEG_ENDINGS)  # what is stored as it is
_TEXTS = {"json", "txt"}  # of an image, as img2dataset writes them into its shards


def is_of_class_tars(folder: Path) -> bool:
    """Returns whether a folder holds tars, and no folders but hidden ones."""
    entries = [entry for entry in os.scandir(folder) if not is_of_the_system(entry.name)]
    return any(entry.name.endswith(".tar") for entry in entries) and not any(entry.is_dir() for entry in entries)


def class_tar_items(folder: Path, told: Told) -> tuple[PackedItems, list[str]]:
    """Returns the images of folder/CLASS.tar, and the class names, sorted as the tars' names.

    Only headers are read: 14 million in some minutes where the disk seeks fast. Members that are no JPEG, PNG or WebP,
    and files that are no tar, are passed over and counted. Raises UserError for a tar that cannot be read to its end,
    for tars that are no classes (see `_Seen`), and for a single tar; StorageError when the disk fails for now.
    """
    items = PackedItems(partial(tar_item, folder))
    names = []
    for path in sorted(folder.iterdir()):
        if is_of_the_system(path.name) or path.suffix != ".tar":
            told.passed_over["files beside the tars"] += 1
            continue
        if not is_text(path.stem):
            raise UserError(f"{shown(path)}: the tar's name is not UTF-8, and it names a class; rename it")
        status = path.stat()
        _add_members(path, len(names), items, told, (status.st_size, status.st_mtime_ns))
        names.append(path.stem)
    if len(names) == 1:
        raise UserError(
            f"{folder}: holds a single tar, which makes a single class; add the tars of the other classes, or unpack "
            f"{names[0]}.tar if it holds folders of classes"
        )
    _refuse_splits(folder, names)
    if not items:
        raise UserError(f"{folder}: no images found in its {len(names)} tars; expected {folder}/CLASS.tar with JPEGs")
    return items, names


def is_tar_of_tars(path: Path) -> bool:
    """Returns whether a tar's first file is a tar: ImageNet-21k as distributed."""
    if path.is_dir() or not path.name.endswith((".tar", ".tar.gz")):
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = io.BytesIO(file.read(_HEAD_BYTES))
        first = next(member for member in members(head, 0, 1 << 62) if not member.isdir())
        return first.isreg() and first.name.endswith(".tar")
    except (BadHeader, OSError, EOFError, zlib.error, StopIteration):
        return False  # reported when it is indexed


def tar_of_tars_items(path: Path, told: Told, work: Work) -> tuple[PackedItems, list[str]]:
    """Returns the images of a tar that holds CLASS.tar for each class, and the class names, sorted as the tars' names.

    They are those of the unpacked folder, in the same order. A .tar.gz has no random access: it is decompressed once,
    to OUT/.passes. Raises UserError and StorageError as `class_tar_items` does, and UserError for a .tar.gz that each
    of several calls would decompress.
    """
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    if path.suffix == ".gz":
        piece = Piece(key_of("gzip 1", 0, path), partial(Path, path))
        if work.is_part and not outcome_of(piece, work).exists():
            raise UserError(
                f"{path}: with --part each element would decompress it; do it before (gunzip -k), and give the .tar"
            )
        (listing,) = run_pass(_decompress, [piece], work, "decompressing", "files")
        path = _decompressed(listing)
    try:
        with path.open("rb") as file:
            outer = list(members(file, 0, path.stat().st_size))
        check_end(path, end_of(outer[-1]) if outer else 0)
    except (BadHeader, OSError) as error:
        raise unreadable(path, error, what="tar of tars", way_out="; get it again") from None
    spans = [_Span(m.offset_data, m.size, m.name) for m in outer if m.isreg() and _is_class(m.name)]
    if beside := sum(member.isreg() for member in outer) - len(spans):
        told.passed_over["files beside the tars"] += beside
    spans.sort(key=lambda span: Path(span.name).name)  # with the ending, as a folder's files: dog-house.tar, dog.tar
    names = [Path(span.name).stem for span in spans]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: holds {Counter(names).most_common(1)[0][0]}.tar more than once")
    _refuse_splits(path, names)
    items = PackedItems(partial(tar_item, path.parent))
    for label, span in enumerate(spans):
        _add_members(path, label, items, told, stamp, span)
    if not items:
        raise UserError(f"{path}: no images found in its {len(names)} tars; expected CLASS.tar with JPEGs")
    return items, names


def _refuse_splits(place: Path, names: Sequence[str]) -> None:
    """Raises UserError where the tars are named like the splits of a data set."""
    if names and all(map(is_split_name, names)):
        raise UserError(
            f"{place}: its tars {', '.join(names)} are parts of a set, and would become its classes; unpack them to "
            "folders of classes, and make each a data set of its own"
        )


def _is_class(name: str) -> bool:
    return name.endswith(".tar") and is_text(name) and not is_of_the_system(Path(name).name)


def _decompress(path: Path, listing: Path, progress: Progress) -> bytes:
    try:
        with replacing(_decompressed(listing), shared=True) as temporary:
            copy_unpacked(path, temporary)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a readable .tar.gz ({error}); get it again") from None
    return b""


def _decompressed(listing: Path) -> Path:
    return listing.with_name(f"{listing.name}.tar")


class _Span(NamedTuple):
    """A class's tar inside another tar."""

    start: int  # its first byte
    num_bytes: int
    name: str


class _Seen:
    """What was seen in a class's tar so far: recognises tars of something else, each of which would become a class."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._folder: Path | None = None  # of its images
        self._name = ""  # of the last member

    def check(self, member: tarfile.TarInfo) -> None:
        """Raises UserError for a tar or labels inside, images of several folders, and images with texts beside them."""
        before, self._name = self._name, member.name
        ending, kinds = ending_of(member.name), {ending_of(member.name), ending_of(before)}
        if ending == LABEL_ENDING:
            raise UserError(
                f"{self._named}: {shown(member.name)} holds labels (.cls): these are WebDataset shards; give the "
                "tars themselves, not their folder"
            )
        if ending == "tar":
            raise UserError(
                f"{self._named}: holds a tar, {shown(member.name)}, so it is not of one class; give it alone if it has "
                "a tar for each class, or unpack it"
            )
        if kinds & _TEXTS and not kinds.isdisjoint(_KEPT) and _stem(before) == _stem(member.name):
            raise UserError(
                f"{self._named}: {shown(before)} and {shown(member.name)} are a sample, as in WebDataset shards, where "
                "a tar is no class; give a list of paths and labels (.csv), or tars of classes that hold images alone"
            )
        folder = Path(member.name).parent if ending in _KEPT else self._folder
        if self._folder not in (None, folder):
            raise UserError(
                f"{self._named}: has images in several folders, {shown(self._folder)} and {shown(folder)}, and would "
                "become one class; unpack it, and give the folder that holds the folders of classes"
            )
        self._folder = folder


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _add_members(
    path: Path, label: int, items: PackedItems, told: Told, stamp: tuple[int, int], span: _Span | None = None
) -> None:
    """Adds the images of a class's tar; span: where it lies inside `path`, None: that is the tar.

    stamp: size and time of the user's file, since a decompressed copy has a new time whenever it is made.
    """
    start, size = (span.start, span.num_bytes) if span else (0, stamp[0])
    named, end = f"{path}[{span.name}]" if span else str(path), start
    seen = _Seen(named)
    try:
        with path.open("rb") as file:
            for member in members(file, start, start + size):
                end = end_of(member)
                if member.isdir():
                    continue
                if not member.isreg() or is_of_the_system(Path(member.name).name):
                    told.passed_over["links, devices and hidden files in tars"] += 1
                    continue
                seen.check(member)
                if (ending := ending_of(member.name)) not in _KEPT:
                    told.passed_over[f".{ending} files" if ending else "files without an ending"] += 1
                else:
                    reference = f"{path.name}\0{member.offset_data}\0{member.size}\0{member.name}"
                    items.append(reference, label, stamp)
        check_end(path, end, start + size, named)
    except (BadHeader, OSError) as error:
        raise unreadable(Path(named), error, way_out="; get it again, or move it away") from None


def tar_item(folder: Path, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns the item of a tar's member. reference: the tar's name, first byte, size, the member's name."""
    tar, offset, num_bytes, name = reference.split("\0", 3)
    ending = stored_ending(name)
    assert ending is not None  # otherwise it was not taken
    read = partial(read_member, folder / tar, int(offset), int(num_bytes), MAX_IMAGE_BYTES)
    return Item(read, ending, label, f"{folder / tar}[{name}]")
