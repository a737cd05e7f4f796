"""Where samples come from: image folders, CIFAR-style archives. A source is a list of `Item`s."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data.manifest import (
    IMAGE_ENDINGS,
)
from pretrain.errors import UserError


class Item(NamedTuple):
    """A sample to be written."""

    read: Callable[[], bytes]  # the encoded image
    ending: str  # jpg, png, webp
    label: int | list[int]  # a class, or all classes of the image; one kind for a whole data set
    source: str  # where it came from, for error messages


def folder_items(root: Path) -> tuple[list[Item], list[str]]:
    """Returns the images of root/CLASS/**/*, and the class names: the folders' names in sorted order."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    items = [
        Item(path.read_bytes, _ending(path.name), label, str(path))
        for label, name in enumerate(classes)
        for path in files_below(root / name)
        if _ending(path.name) in IMAGE_ENDINGS
    ]
    if not items:
        raise UserError(
            f"{root}: no images found; expected {root}/CLASS/NAME.jpg (endings: {', '.join(IMAGE_ENDINGS)})"
        )
    return items, classes


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted; links to folders are followed, but for one that leads back up.

    Raises UserError on a link to nothing or a folder that cannot be read: images would be missing without a word.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        here = Path(place)
        folders[:] = [n for n in folders if not ((here / n).is_symlink() and _leads_up(here / n))]
        for path in (here / name for name in names):
            if path.is_file():
                found.append(path)
            elif path.is_symlink():
                raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there; mend or remove it")
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def _leads_up(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())


def npz_items(path: Path) -> tuple[list[Item], list[str]]:
    """Returns the images of a CIFAR-style archive: arrays blob (encoded images end to end), offset, label, classes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            blob, offset, label = arrays["blob"], arrays["offset"], arrays["label"]
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not an archive of images (arrays blob, offset, label): {error}") from None
    if len(offset) != len(label) + 1 or int(offset[-1]) != len(blob):
        raise UserError(
            f"{path}: {len(offset)} offsets up to {offset[-1]} for {len(label)} labels and {len(blob)} bytes"
        )

    def image(number: int) -> bytes:
        return blob[offset[number] : offset[number + 1]].tobytes()

    return [
        Item(partial(image, i), sniffed_ending(image(i)), int(label[i]), f"{path}[{i}]") for i in range(len(label))
    ], classes


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def sniffed_ending(data: bytes) -> str:
    """Returns the ending of an encoded image's name by its first bytes: webp, png or jpg."""
    return "webp" if data[8:12] == b"WEBP" else "png" if data[:4] == b"\x89PNG" else "jpg"
