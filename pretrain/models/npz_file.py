"""Reads and writes NumPy's .npz files of tensors, and opens the zip archive, which PyTorch's files are too.

A header of a few bytes can promise any shape, and a megabyte of zip unpack to a gigabyte: what a file claims is
compared with its size before anything is read, and a header is matched with a pattern: nothing in it is evaluated.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.models.tensors import MAX_TENSORS, LazyTensor, array_of, finite, readable

MAX_HEADER_BYTES = 10_000  # of one array: numpy's own limit; its usual ones have 118
MAX_DIRECTORY_BYTES = 16 << 20  # of the archive: MAX_TENSORS names of 200 letters
MAX_RATIO = 20  # unpacked by packed: trained weights have 1.1, heads and biases of zeros a thousand, and are few
FREE_BYTES = 64 << 20  # unpacked, whatever the ratio: a small model may be all zeros


class ArrayHeader(NamedTuple):
    """What the header of a numpy array says."""

    shape: tuple[int, ...]
    is_fortran: bool  # stored column by column
    dtype: np.dtype


def write_npz(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes float32 arrays, one at a time, uncompressed: what `numpy.savez` writes."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, tensor in tensors.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array_of(name, tensor), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def read_npz(path: Path) -> dict[str, LazyTensor]:
    """Returns the arrays of an .npz file. Executes nothing: pickled objects are refused.

    Floats of 2, 4 and 8 bytes, and bfloat16, which numpy stores as 2 bytes of no type. Other numbers, such as the steps
    that stand beside the weights in a training state, are refused when they are read.
    """
    with open_archive(path) as archive:
        return {
            info.filename.removesuffix(".npy"): _array_of(archive, info, path)
            for info in archive.infolist()
            if not info.is_dir()
        }


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip; an error inside is the file's fault, and becomes one UserError.

    Raises UserError too for a zip that would take far more memory than its size, or whose list of members is too long.
    """
    with readable(path), path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile, which reads the directory whole
        if end is not None and end[5] > MAX_DIRECTORY_BYTES:  # [5]: its size
            raise UserError(f"{path}: its directory has {end[5]:,} bytes, expected at most {MAX_DIRECTORY_BYTES:,}")
        with zipfile.ZipFile(file) as archive:
            _check_members(archive.infolist(), num_bytes, path)
            yield archive


def _check_members(members: list[zipfile.ZipInfo], num_bytes: int, path: Path) -> None:
    if len(members) > MAX_TENSORS:
        raise UserError(f"{path}: has {len(members):,} members, expected at most {MAX_TENSORS:,}")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            told = f"{info.filename[:100]} is compressed by method {info.compress_type}"
            raise UserError(f"{path}: damaged, or not what its name says ({told}, expected stored or deflated)")
    # By the size on the disk: members may share their bytes.
    if (unpacked := sum(info.file_size for info in members)) > max(FREE_BYTES, MAX_RATIO * num_bytes):
        raise UserError(
            f"{path}: unpacks {num_bytes:,} bytes to {unpacked:,}, expected at most {MAX_RATIO} times as many; "
            "save it uncompressed, with numpy.savez, if it is what it should be"
        )


def array_header(member: IO[bytes]) -> ArrayHeader:
    """Returns the header at the beginning of a .npy file, and leaves the file at its values.

    Raises ValueError when it is not that of an array of numbers, texts or objects.
    """
    magic = member.read(8)
    width = {b"\1": 2, b"\2": 4, b"\3": 4}.get(magic[6:7])  # bytes of the header's length, by version
    if magic[:6] != b"\x93NUMPY" or width is None:
        raise ValueError("is no array of numpy's, of version 1 to 3")
    length = int.from_bytes(member.read(width), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
    text = member.read(length)
    plain = "".join(text.decode("latin1").split()).replace('"', "'")
    values = dict(_ITEM.findall(plain)) if _HEADER.fullmatch(plain) else {}
    descr = _DESCR.fullmatch(values.get("descr", ""))
    if len(text) < length or values.keys() != {"descr", "fortran_order", "shape"} or descr is None:
        raise ValueError(f"has the header {text[:200]!r}, expected that of a plain array")
    shape = tuple(int(side) for side in re.findall(r"\d+", values["shape"]))
    dtype = np.dtype(descr[1])
    if len(shape) > _MAX_AXES or any(side >= 1 << 63 for side in shape):
        raise ValueError(f"has {len(shape)} axes, the longest of {max(shape)}")
    if dtype.itemsize == 0:
        raise ValueError(f"is of type {dtype}, whose values have no bytes")
    return ArrayHeader(shape, values["fortran_order"] == "True", dtype)


# {'descr':'<f4','fortran_order':False,'shape':(3,4),}, without its spaces
_ITEM = re.compile(r"'(\w+)':('[^']*'|True|False|\([\d,L]*\))")
_HEADER = re.compile(rf"\{{(?:{_ITEM.pattern},?){{3}}\}}")
_DESCR = re.compile(r"'([<>=|]?(?:[fiubcVO?]\d{0,2}|[SU]\d{1,6}))'")
_MAX_AXES = 32


def _array_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> LazyTensor:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        try:
            shape, _, dtype = array_header(member)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {name[:100]} {error}") from None
        start = member.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which would execute code; only numbers are read")
    if start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise UserError(f"{path}: {name} is said to have shape {shape}, but has {info.file_size - start} bytes")
    return LazyTensor(shape, partial(_read, path, info.filename))


def _read(path: Path, filename: str, row: int | None = None) -> torch.Tensor:
    """Returns one array, or one entry of its first axis."""
    name = filename.removesuffix(".npy")
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(filename) as member:
        shape, is_fortran, dtype = array_header(member)
        if not (dtype.kind == "f" or (dtype.kind, dtype.itemsize) == ("V", 2)):
            raise UserError(f"{path}: {name} is of type {dtype}, expected floating-point numbers")
        num_bytes = math.prod(shape) * dtype.itemsize
        if row is not None:  # all blocks together are too much to hold for the sake of one
            if is_fortran:
                raise UserError(f"{path}: {name} is stored column by column; save it in C order")
            shape, num_bytes = shape[1:], num_bytes // shape[0]
            member.seek(member.tell() + row * num_bytes)
        array = np.frombuffer(member.read(num_bytes), dtype).reshape(shape, order="F" if is_fortran else "C")
        if array.dtype.kind == "V":
            tensor = torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.array(array, order="C"))
        return finite(tensor.float(), name, path)


def rows_of(path: Path, name: str, stacked: LazyTensor) -> list[LazyTensor]:
    """Returns the entries of an .npz array's first axis, each of which is read alone."""
    read = (partial(_read, path, f"{name}.npy", row) for row in range(stacked.shape[0]))
    return [LazyTensor(stacked.shape[1:], entry) for entry in read]
