"""Files inside folders and tars, without unpacking: what the readers of original downloads read.

Members of plain tars are read where they lie, compressed ones are held in memory (4 GiB at most: the large sets are
plain tars or folders).
"""

import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.manifest import IMAGE_ENDINGS
from pretrain.errors import UserError
from pretrain.shards.listing import files_below
from pretrain.shards.sources import Item

MAX_UNPACKED_BYTES = 4 << 30  # of a compressed archive, held in memory: Oxford Pets has 0.8 GB


class Original(NamedTuple):
    """An image of an original set."""

    id: str  # its name there: ILSVRC2012_val_00000001.JPEG, or where it lies
    item: Item
    class_name: str = ""  # as its authors call it, where the files tell


Splits = dict[str, list[Original]]  # by the name of the split


class File(NamedTuple):
    """A file of a folder or an archive."""

    name: str  # path below the folder or in the archive
    read: Callable[[], bytes]
    source: str  # for error messages; one of its own for each


def files_of(path: Path) -> list[File]:
    """Returns the files of a folder, a .tar, or a .tar.gz or .tgz, sorted by name. Links to folders are followed."""
    if path.is_dir():
        return [File(str(file.relative_to(path)), file.read_bytes, str(file)) for file in files_below(path)]
    if path.suffix == ".zip":
        raise UserError(f"{path}: zip archives are not read; unpack it and give the folder")
    if not path.is_file():
        raise UserError(f"{path}: not found")
    try:
        return sorted(members_of(path), key=lambda file: file.name)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None


def members_of(path: Path) -> Iterable[File]:
    packed = path.name.endswith((".gz", ".tgz"))
    with tarfile.open(path, "r:gz" if packed else "r:") as tar:
        total = 0
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            name, source = member.name.removeprefix("./"), f"{path}[{member.name}]"
            if not packed:
                yield File(name, partial(read_at, path, member.offset_data, member.size), source)
                continue
            total += member.size
            if total > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES >> 30} GiB unpacked; unpack it to a folder")
            content = tar.extractfile(member)
            assert content is not None  # a regular file has content
            yield File(name, partial(bytes, content.read()), source)


def read_at(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), num_bytes, offset)
    if len(data) < num_bytes:
        raise UserError(f"{path}: ends at byte {offset + len(data)}, within a file of {num_bytes} bytes at {offset}")
    return data


def original_of(file: File, label: int, class_name: str = "") -> Original:
    ending = file.name.rpartition(".")[2].lower()
    return Original(Path(file.name).name, Item(file.read, ending, label, file.source), class_name)


def is_image(file: File) -> bool:
    return file.name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not Path(file.name).name.startswith(".")


def found_in(source: Path, *names: str) -> Path | None:
    """Returns the first of these files or folders that is there; `source` may be the folder or the thing itself."""
    if source.name in names:
        return source if source.exists() else None
    return next((source / name for name in names if (source / name).exists()), None)


def one_of(source: Path, *names: str) -> Path:
    found = found_in(source, *names)
    if found is None:
        raise UserError(f"{source}: holds none of {', '.join(names)}")
    return found
