"""Reads files inside folders and tars without unpacking, for the readers of original downloads.

Members of plain tars are read in place, compressed ones are held in memory (the large sets are plain tars or folders).
Sizes are compared with a limit before anything is read.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.data.index_rows import read_at
from pretrain.data.manifest import IMAGE_ENDINGS
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.data.tar_headers import BadHeader, end_of, members
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards.items import Item
from pretrain.shards.listing import files_below
from pretrain.shards.tars import unreadable
from pretrain.shards.unpacking import max_unpacked_bytes, too_large

MAX_UNPACKED_BYTES = 4 << 30  # of a compressed archive, held in memory: Oxford Pets has 0.8 GB
MAX_LIST_BYTES = 16 << 20  # of a list of files or labels; ImageNet's has 2 MB
UNREADABLE = (BadHeader, OSError, EOFError, zlib.error)  # what a damaged tar or .gz leads to


class Original(NamedTuple):
    """An image of an original set."""

    id: str  # its name there: ILSVRC2012_val_00000001.JPEG, or where it lies
    item: Item
    class_name: str = ""  # the authors' name for it, where the files give one


Splits = dict[str, list[Original]]  # by the name of the split


class File(NamedTuple):
    """A file of a folder or an archive."""

    name: str  # path below the folder or in the archive
    read: Callable[[int], bytes]  # returns its bytes; raises BadSample when there are more than the argument
    source: str  # for error messages; unique


def files_of(path: Path) -> list[File]:
    """Returns the files of a folder, a .tar, or a .tar.gz or .tgz, sorted by name. Links to folders are followed."""
    if path.is_dir():
        return [File(str(file.relative_to(path)), partial(read_file, file), str(file)) for file in files_below(path)]
    if path.suffix == ".zip":
        raise UserError(f"{path}: zip archives are not read; unpack it and give the folder")
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return sorted(members_of(path), key=lambda file: file.name)


def members_of(path: Path) -> list[File]:
    """Returns the files of a .tar, or a .tar.gz or .tgz, in its order. Raises UserError when it cannot be read."""
    try:
        if path.name.endswith((".gz", ".tgz")):
            return list(_packed_members(path))
        with path.open("rb") as file:
            return list(plain_members(path, file, 0, path.stat().st_size))
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def plain_members(path: Path, file: BinaryIO, start: int, end: int) -> Iterable[File]:
    """Yields the files of a tar that lies in `path`, opened as `file`, from byte `start` to `end`."""
    for member in members(file, start, end):
        if member.isreg():
            read = partial(read_member, path, member.offset_data, member.size)
            yield File(member.name.removeprefix("./"), read, f"{path}[{member.name}]")


def _packed_members(path: Path) -> Iterable[File]:
    limit = max_unpacked_bytes(path)
    with gzip.open(path) as unpacked:
        for member in members(unpacked, 0, 1 << 62):  # the unpacked size is not known
            if end_of(member) > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES >> 30} GiB unpacked; unpack it to a folder")
            if end_of(member) > limit:
                raise UserError(f"{path}: {too_large(end_of(member), limit)}")
            if not member.isreg():
                continue
            source = f"{path}[{member.name}]"
            unpacked.seek(member.offset_data)
            content = unpacked.read(member.size)
            if len(content) < member.size:
                raise EOFError(f"ends within {member.name}")
            yield File(member.name.removeprefix("./"), partial(_read_bytes, content), source)
        while unpacked.tell() < limit and unpacked.read(1 << 20):
            pass  # to its end, where gzip's checksum is


def read_member(path: Path, offset: int, num_bytes: int, limit: int) -> bytes:
    """Returns a file that lies in a tar. Raises BadSample when it is too large, UserError when the tar is truncated."""
    _check_size(num_bytes, limit)
    with path.open("rb") as file:
        data = read_at(file.fileno(), offset, offset + num_bytes)
    if len(data) < num_bytes:
        raise UserError(f"{path}: ends at byte {offset + len(data)}, within a file of {num_bytes} bytes at {offset}")
    return data


def read_file(path: Path, limit: int) -> bytes:
    _check_size(path.stat().st_size, limit)
    return path.read_bytes()


def _read_bytes(data: bytes, limit: int) -> bytes:
    _check_size(len(data), limit)
    return data


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise BadSample("tar", f"{num_bytes} bytes, at most {limit}")


def content_of(file: File, limit: int) -> bytes:
    """Returns the content of a file that is no image. Raises UserError when it is larger than the limit."""
    try:
        return file.read(limit)
    except BadSample as bad:
        raise UserError(f"{file.source}: {bad}") from None


def text_of(file: File) -> str:
    """Returns a list of files or labels. Bytes that are not UTF-8 are replaced, and so match no name and no label."""
    return content_of(file, MAX_LIST_BYTES).decode(errors="replace")


def read_text(path: Path) -> str:
    """Returns what `text_of` does, of a file on the disk."""
    return text_of(File(path.name, partial(read_file, path), str(path)))


def original_of(file: File, label: int, class_name: str = "") -> Original:
    if not is_text(file.name):
        raise UserError(f"{shown(file.source)}: the name is not UTF-8, and the list of examples holds it; rename it")
    ending = file.name.rpartition(".")[2].lower()
    return Original(
        Path(file.name).name, Item(partial(file.read, MAX_IMAGE_BYTES), ending, label, file.source), class_name
    )


def class_folders(path: Path, classes: dict[str, int]) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders are named after classes."""
    originals = []
    for file in files_of(path):
        if is_image(file):
            folder = _folder_of(file, path)
            original = original_of(file, class_of(folder, classes, path), folder)
            originals.append(original._replace(id=f"{folder}/{original.id}"))  # sketch_3.JPEG is in each folder
    if not originals:
        raise UserError(f"{path}: no images found; expected folders {next(iter(classes))} and so on")
    return originals


def sorted_class_folders(path: Path, num_classes: int) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders are classes, numbered in alphabetical order."""
    names = sorted({_folder_of(file, path) for file in files_of(path) if is_image(file)})
    if len(names) != num_classes:
        raise UserError(f"{path}: has images in {len(names)} folders, expected one for each of {num_classes} classes")
    return class_folders(path, {name: number for number, name in enumerate(names)})


def _folder_of(file: File, path: Path) -> str:
    return Path(file.source if path.is_dir() else file.name).parent.name


def class_of(name: str, classes: dict[str, int], path: Path) -> int:
    if name not in classes:
        raise UserError(f"{path}: {name!r} is not one of the {len(classes)} classes, as {next(iter(classes))!r} is")
    return classes[name]


def is_image(file: File) -> bool:
    return file.name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not Path(file.name).name.startswith(".")


def found_in(source: Path, *names: str) -> Path | None:
    """Returns the first of these files or folders that exists; `source` may be its folder, or already one of them."""
    if source.name in names:
        return source if source.exists() else None
    return next((source / name for name in names if (source / name).exists()), None)


def one_of(source: Path, *names: str) -> Path:
    found = found_in(source, *names)
    if found is None:
        raise UserError(f"{source}: holds none of {', '.join(names)}")
    return found
