"""A folder with a tar for each class, as ImageNet-21k comes: n01440764.tar and so on, read where they lie."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

from pretrain.data.manifest import IMAGE_ENDINGS, LABEL_ENDING
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.data.tar_headers import BadHeader, end_of, members
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.listing import is_of_the_system
from pretrain.shards.pictures import ending_of, stored_ending
from pretrain.shards.sources import Told
from pretrain.shards.tars import check_end, unreadable


def is_of_class_tars(folder: Path) -> bool:
    """Returns whether a folder holds tars, and no folders beside hidden ones."""
    entries = [entry for entry in os.scandir(folder) if not is_of_the_system(entry.name)]
    return any(entry.name.endswith(".tar") for entry in entries) and not any(entry.is_dir() for entry in entries)


def class_tar_items(folder: Path, told: Told) -> tuple[PackedItems, list[str]]:
    """Returns the images of folder/CLASS.tar, and the class names in sorted order.

    Only headers are read: 14 million in some minutes where the disk seeks fast. Members that are no JPEG, PNG or WebP,
    and files that are no tar, are passed over and counted. Raises UserError for a tar that cannot be read to its end,
    for WebDataset shards, whose labels are in them, and for a single tar; StorageError when the disk fails for now.
    """
    items = PackedItems(partial(tar_item, folder))
    names = []
    for path in sorted(folder.iterdir()):
        if is_of_the_system(path.name) or path.suffix != ".tar":
            told.passed_over["files beside the tars"] += 1
            continue
        if not is_text(path.stem):
            raise UserError(f"{shown(path)}: the tar's name is not UTF-8, and it names a class; rename it")
        _add_members(path, len(names), items, told)
        names.append(path.stem)
    if len(names) == 1:
        raise UserError(
            f"{folder}: holds a single tar, which makes a single class; add the tars of the other classes, or unpack "
            f"{names[0]}.tar if it holds folders of classes"
        )
    if not items:
        raise UserError(f"{folder}: no images found in its {len(names)} tars; expected {folder}/CLASS.tar with JPEGs")
    return items, names


def _add_members(path: Path, label: int, items: PackedItems, told: Told) -> None:
    status = path.stat()
    stamp, end = (status.st_size, status.st_mtime_ns), 0
    try:
        with path.open("rb") as file:
            for member in members(file, 0, status.st_size):
                end = end_of(member)
                if member.isdir():
                    continue
                if ending_of(member.name) == LABEL_ENDING:
                    raise UserError(
                        f"{path}: {shown(member.name)} holds labels (.cls): these are WebDataset shards; give the tars "
                        "themselves, not their folder"
                    )
                if not member.isreg() or is_of_the_system(Path(member.name).name):
                    told.passed_over["links, devices and hidden files in tars"] += 1
                elif stored_ending(member.name) is None or ending_of(member.name) not in _KEPT:
                    ending = ending_of(member.name)
                    told.passed_over[f".{ending} files" if ending else "files without an ending"] += 1
                else:
                    reference = f"{path.name}\0{member.offset_data}\0{member.size}\0{member.name}"
                    items.append(reference, label, stamp)
        check_end(path, end)
    except (BadHeader, OSError) as error:
        raise unreadable(path, error, way_out="; get it again, or move it away") from None


_KEPT = (*IMAGE_ENDINGS, "jfif", "jpe", "jif", "jfi")  # what is stored as it is


def tar_item(folder: Path, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns the item of a member of a tar: its file's name, first byte, size and own name."""
    tar, offset, num_bytes, name = reference.split("\0", 3)
    ending = stored_ending(name)
    assert ending is not None  # else it was not taken
    read = partial(_read, folder / tar, int(offset), int(num_bytes))
    return Item(read, ending, label, f"{folder / tar}[{name}]")


def _read(path: Path, offset: int, num_bytes: int) -> bytes:
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadSample("tar", f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES}")
    with path.open("rb") as file:
        data = os.pread(file.fileno(), num_bytes, offset)
    if len(data) < num_bytes:
        raise UserError(f"{path}: ends at byte {offset + len(data)}, within an image; it was cut meanwhile")
    return data
