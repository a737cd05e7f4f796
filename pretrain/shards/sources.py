"""Where samples come from: image folders, .npz of pixels or encoded images. A source is a sequence of `Item`s."""

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from pretrain.config import MAX_CLASSES
from pretrain.data.manifest import IMAGE_ENDINGS
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import brief, is_text
from pretrain.shards.arrays import array_names, names_of, read_arrays, whole_numbers
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.listing import files_below, is_of_the_system, leads_up, num_files, refuse_broken_link
from pretrain.shards.pictures import PICTURE_ENDINGS, REFUSED_ENDINGS, ending_of, png_of, read_picture, stored_ending


@dataclass
class Told:
    """What is reported of a source besides its images: counts of skipped files, notes on pictures, what is left out."""

    passed_over: Counter[str] = field(default_factory=Counter)  # files that are no data
    classes: str = ""  # how its classes were recognised in a list of names
    notes: Counter[str] = field(default_factory=Counter)  # pictures that were converted, or look unlike in viewers
    num_dropped: int = 0  # images that cannot be read or decoded
    first_dropped: str = ""  # with the reason


def folder_items(
    root: Path, told: Told | None = None, *, apply_orientation: bool = False
) -> tuple[PackedItems, list[str]]:
    """Returns the images of root/CLASS/**/*, and the class names: the folders' names in sorted order.

    Hidden and system folders are no classes, their files no images. Other formats are converted when they are read.
    Raises UserError for a picture that would be left out: one beside the class folders, one of a format that nothing
    here reads, one that lies in two classes by links.
    """
    told = told or Told()
    refused: list[Path] = []
    classes = _class_folders(root, told, refused)
    items = PackedItems(partial(file_item, root, apply_orientation))
    words = array("q")
    for label, name in enumerate(classes):
        for path in files_below(root / name, told.passed_over):
            if stored_ending(path.name) is None:
                _pass_over(path, told, refused)
                continue
            append_file(items, root, path, label)
            words.append(place_word(path))
    _refuse(refused)
    if not items:
        raise UserError(
            f"{root}: no images found; expected {root}/CLASS/NAME.jpg (endings: {', '.join(IMAGE_ENDINGS)})"
        )
    again = same_files(root, items, words)
    for index, first in again.items():
        if items.labels[index] != items.labels[first]:
            path, other = root / items.reference(index), classes[items.labels[first]]
            raise UserError(f"{path}: is in class {other!r} too, by a link; remove one of them")
    if again:
        told.passed_over["files reached again by links"] += len(again)
        items = items.without(again.keys())
    return items, classes


def file_item(root: Path, apply_orientation: bool, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns the item of a picture file, whose reference is its path below the root."""
    path = root / reference
    ending = stored_ending(path.name)
    assert ending is not None  # otherwise it is no picture, and was not taken
    return Item(partial(read_picture, path, notes, apply_orientation), ending, label, str(path), apply_orientation)


def append_file(items: PackedItems, root: Path, path: Path, label: int) -> None:
    """Adds a picture file to items of `file_item`, with its size and time, by which a later run recognises it."""
    status = path.stat()
    items.append(str(path.relative_to(root)), label, (status.st_size, status.st_mtime_ns))


def place_word(path: Path) -> int:
    """Returns 64 bits of a digest of a file's real path."""
    return int.from_bytes(blake2b(os.fsencode(os.path.realpath(path)), digest_size=8).digest(), "big", signed=True)


def same_files(root: Path, items: PackedItems, words: array) -> dict[int, int]:
    """Maps items of `file_item` whose file an earlier item has to the first such item. words: their `place_word`s."""
    found = np.asarray(words)
    order = np.argsort(found, kind="stable")
    equal = np.flatnonzero(found[order[1:]] == found[order[:-1]])
    first: dict[str, int] = {}  # item by real path, of the few with equal words
    again = {}
    for index in sorted({int(index) for place in equal for index in order[place : place + 2]}):
        earlier = first.setdefault(os.path.realpath(root / items.reference(index)), index)
        if earlier != index:
            again[index] = earlier
    return again


# Common names of a data set's splits, in lower case; of several the first is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_ALL_SPLIT_NAMES = {name for names in SPLIT_NAMES.values() for name in names}


def is_split_name(name: str) -> bool:
    """Returns whether a folder of this name may be a split of a data set."""
    return name.lower() in _ALL_SPLIT_NAMES


def holds_classes(folder: Path) -> bool:
    """Returns whether a folder has folders and no pictures of its own: otherwise it is a class itself."""
    entries = [path for path in folder.iterdir() if not is_of_the_system(path.name)]
    own = any(path.is_file() and stored_ending(path.name) for path in entries)
    return not own and any(path.is_dir() for path in entries)


def _holds_pictures(folder: Path) -> bool:
    return any(stored_ending(path.name) for path in files_below(folder))


def _refuse_splits(root: Path, names: Sequence[str]) -> None:
    """Raises UserError where folders are splits of a data set, whose classes lie inside them."""
    parts = [name for name in names if is_split_name(name) and holds_classes(root / name)]
    others = (name for name in names if not is_split_name(name))  # annotations; or classes, beside one called "train"
    if len(parts) > 1 or (parts and not any(_holds_pictures(root / name) for name in others)):
        first = min(parts, key=lambda name: (name.lower() not in SPLIT_NAMES["train"], name))
        raise UserError(
            f"{root}: its folders {', '.join(parts)} are parts of a set, which hold the classes; give one of them, "
            f"{root / first}, and make each a data set of its own"
        )


def _class_folders(root: Path, told: Told, refused: list[Path]) -> list[str]:
    """The names of the class folders, sorted; other files beside them are counted, pictures refused."""
    names, beside = [], []
    for path in sorted(root.iterdir()):
        refuse_broken_link(path)
        if path.is_dir():
            if is_of_the_system(path.name):
                told.passed_over["files in hidden and system folders"] += num_files(path)
            elif path.is_symlink() and leads_up(path):
                told.passed_over["links that lead back up"] += 1
            else:
                names.append(path.name)
        elif is_of_the_system(path.name):
            told.passed_over["hidden and system files"] += 1
        elif stored_ending(path.name):
            beside.append(path)
        else:
            _pass_over(path, told, refused)
    if beside and not names:
        raise UserError(f"{root}: its {len(beside):,} photos lie in no class folder; expected {root}/CLASS/NAME.jpg")
    if names and beside:
        raise UserError(f"{beside[0]}: is a picture beside the class folders; move it into one, or out of {root}")
    unreadable = next((name for name in names if not is_text(name)), None)
    if unreadable is not None:
        raise UserError(f"{root}/{shown(unreadable)}: the folder's name is not UTF-8, and it names a class; rename it")
    _refuse_splits(root, names)
    return names


def _pass_over(path: Path, told: Told, refused: list[Path]) -> None:
    """Counts a file that is no picture; a picture that cannot be read here is added to `refused`."""
    ending = ending_of(path.name)
    if ending in REFUSED_ENDINGS or ending in PICTURE_ENDINGS:
        return refused.append(path)
    told.passed_over[f".{ending} files" if ending else "files without an ending"] += 1


def _refuse(refused: Sequence[Path]) -> None:
    """Raises UserError for pictures that cannot be read here, with the number of each kind and the first of all."""
    if not refused:
        return
    numbers = Counter(ending_of(path.name) for path in refused)
    kinds = ", ".join(f"{number:,} .{ending}" for ending, number in numbers.most_common())
    rest = "convert it to JPEG or PNG, or move it away"
    if len(refused) > 1:
        rest = f"the first of {kinds}: convert them to JPEG or PNG, or move them away"
    raise UserError(f"{refused[0]}: .{ending_of(refused[0].name)} pictures cannot be read here; {rest}")


# Arrays of pixels and of labels under common names; the last is MedMNIST's, which has all splits.
_PIXELS = (("images", "labels"), ("x", "y"), ("x_train", "y_train"), ("train_images", "train_labels"))
_MAX_ARRAY_IMAGES = 1_000_000  # of an .npz: each is an object, and a small file may claim any number


def npz_items(path: Path, told: Told) -> tuple[list[Item], list[str]]:
    """Returns the images of an .npz, and the names of its classes where it has them: `encoded_items`, or pixels."""
    names = array_names(path)
    return (_pixel_items(path, names, told), []) if names and "blob" not in names else encoded_items(path)


def encoded_items(path: Path) -> tuple[list[Item], list[str]]:
    """Returns the images of a CIFAR-style archive: arrays blob (encoded images end to end), offset, label, classes."""
    arrays = read_arrays(path, ("blob", "offset", "label"), optional=("classes",))
    blob, offset = arrays["blob"], arrays["offset"]
    labels = whole_numbers(arrays["label"], f"{path}: label", 0, MAX_CLASSES - 1)
    classes = names_of(arrays["classes"], f"{path}: classes") if "classes" in arrays else []
    if blob.dtype != np.uint8:
        raise UserError(f"{path}: blob is {blob.dtype}, expected uint8: encoded images end to end")
    _check_number(path, len(labels))
    offsets = whole_numbers(offset, f"{path}: offset", 0, len(blob))
    if len(offsets) != len(labels) + 1 or offsets[-1] != len(blob) or sorted(offsets) != offsets:
        raise UserError(
            f"{path}: {len(offsets)} offsets up to {offsets[-1] if offsets else 0} for {len(labels)} labels and "
            f"{len(blob)} bytes, expected one more than labels, rising to the last byte"
        )

    images = [blob[start:end] for start, end in zip(offsets, offsets[1:])]  # views, sent one by one to processes
    return [
        Item(image.tobytes, sniffed_ending(image[:12].tobytes()), label, f"{path}[{i}]")
        for i, (image, label) in enumerate(zip(images, labels))
    ], classes


def _pixel_items(path: Path, names: set[str], told: Told) -> list[Item]:
    """The images of arrays of pixels, as PNG; other arrays are reported."""
    pair = next((pair for pair in _PIXELS if names.issuperset(pair)), None)
    if pair is None:
        pairs = ", ".join("/".join(pair) for pair in _PIXELS)
        raise UserError(
            f"{path}: not an archive of images: its arrays are {brief(sorted(names))}, expected pixels with their "
            f"labels ({pairs}), or encoded images (blob, offset, label); numpy.savez writes them by these names"
        )
    arrays = read_arrays(path, pair, most_dimensions=4)
    images, labels = (arrays[name] for name in pair)
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
        raise UserError(
            f"{path}: {pair[0]} is {images.dtype} of shape {images.shape}, expected uint8 of [images, height, width] "
            "or [images, height, width, 3]"
        )
    _check_number(path, len(images) if images.size else 0)
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels  # as MedMNIST has them
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: {pair[1]} has shape {labels.shape}, expected a class for each image of {images.shape}"
        )
    if others := sorted(names.difference(pair)):
        told.passed_over[f"arrays of {path.name} beside {pair[0]} and {pair[1]} ({brief(others)})"] = len(others)
    numbers = whole_numbers(labels, f"{path}: {pair[1]}", 0, MAX_CLASSES - 1)
    return [
        Item(partial(png_of, image), "png", label, f"{path}[{i}]")
        for i, (image, label) in enumerate(zip(images, numbers))
    ]


def _check_number(path: Path, num_images: int) -> None:
    if not num_images:
        raise UserError(f"{path}: has no samples")
    if num_images > _MAX_ARRAY_IMAGES:
        raise UserError(f"{path}: has {num_images:,} images, at most {_MAX_ARRAY_IMAGES:,}; make a folder of files")


def sniffed_ending(data: bytes) -> str:
    """Returns the ending of an encoded image's name by its first bytes: webp, png or jpg."""
    return "webp" if data[8:12] == b"WEBP" else "png" if data[:4] == b"\x89PNG" else "jpg"
