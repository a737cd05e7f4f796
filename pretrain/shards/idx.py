"""Archives of MNIST and similar sets (Fashion-MNIST, KMNIST, EMNIST): idx files of images and of labels."""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.items import Item
from pretrain.shards.pictures import png_of
from pretrain.shards.tars import unreadable
from pretrain.shards.unpacking import max_unpacked_bytes, too_large

IMAGES, LABELS = b"\0\0\x08\3", b"\0\0\x08\1"  # unsigned bytes in three dimensions, and in one
MAX_BYTES = 2 << 30  # of a file, held in memory: the largest, of EMNIST, has 550 MB
_GZIP = b"\x1f\x8b"


def idx_files(paths: Sequence[Path]) -> tuple[Path, Path] | None:
    """Returns the files of images and of labels, None for other sources.

    The labels need not be given if they lie beside the images under MNIST's name: train-images-idx3-ubyte and
    train-labels-idx1-ubyte, also with .gz.
    """
    kinds = {_magic(path): path for path in paths} if len(paths) <= 2 else {}
    images = kinds.pop(IMAGES, None)
    if images is None or set(kinds) - {LABELS} or len(paths) != 1 + len(kinds):
        return None
    return images, kinds.get(LABELS) or _beside(images)


def _beside(images: Path) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    found = [path for path in (images.with_name(name), images.with_name(f"{name}.gz")) if path.exists()]
    if not found or name == images.name.removesuffix(".gz"):
        raise UserError(f"{images}: its labels are not beside it; give their file too")
    return found[0]


def _magic(path: Path) -> bytes:
    """A file's first four bytes, decompressed; empty if it cannot be read. Raises if it is an idx file by its name."""
    try:
        if not path.is_file():
            return b""
        with _opened(path) as file:
            return file.read(4)
    except (OSError, EOFError, zlib.error) as error:
        if "-ubyte" in path.name:
            raise unreadable(path, error, what="idx file") from None
        return b""


def _opened(path: Path) -> io.BufferedIOBase:
    with path.open("rb") as file:
        is_packed = file.read(2) == _GZIP
    return gzip.open(path) if is_packed else path.open("rb")


def idx_items(paths: Sequence[Path]) -> tuple[list[Item], list[str]]:
    """Returns the images of a source that `idx_files` recognises, as grey PNG, and no names of classes.

    Raises UserError unless each file is as long as its first bytes say, and there is a label for each image;
    StorageError when the disk fails for now.
    """
    files = idx_files(paths)
    assert files is not None
    images, labels = _array(files[0], IMAGES), _array(files[1], LABELS)
    if len(images) != len(labels):
        raise UserError(f"{files[1]}: has {len(labels):,} labels, {files[0]} has {len(images):,} images")
    if not images.size:
        raise UserError(f"{files[0]}: has no samples")
    return [
        Item(partial(png_of, image), "png", label, f"{files[0]}[{number}]")
        for number, (image, label) in enumerate(zip(images, labels.tolist()))
    ], []


def _array(path: Path, magic: bytes) -> np.ndarray:
    """A file's array, uint8: [images, height, width] or [labels]."""
    dimensions = magic[3]
    try:
        limit = min(MAX_BYTES, max_unpacked_bytes(path))
        with _opened(path) as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != magic or len(head) < 4 + 4 * dimensions:
                raise UserError(
                    f"{path}: begins with {head.hex(' ')}, expected {magic.hex(' ')} and {dimensions} sizes"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            if (size := math.prod(shape)) > limit:
                raise UserError(f"{path}: {too_large(size, limit)}")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error, what="idx file") from None
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data):,}"
        raise UserError(f"{path}: {' x '.join(map(str, shape))} are {size:,} bytes, it has {found}; get it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
