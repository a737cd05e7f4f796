"""Reads arrays of a data set's .npz; its headers' claims are compared with limits before an array is read."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.models.npz_file import array_header
from pretrain.shards.unpacking import max_unpacked_bytes, too_large

_MAX_HELD_BYTES = 4 << 30  # of the arrays together


def array_names(path: Path) -> set[str]:
    """Returns the names of a .npz's arrays; empty for any other file, which `read_arrays` then reports."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # as below
        return set()


def read_arrays(
    path: Path, names: Sequence[str], optional: Sequence[str] = (), *, most_dimensions: int = 1
) -> dict[str, np.ndarray]:
    """Returns arrays of numbers or text of a .npz, by name; most_dimensions: the limit for each.

    Raises UserError when the file is damaged, one of `names` is missing, or the arrays exceed the memory limit.
    """
    try:
        limit = min(_MAX_HELD_BYTES, max_unpacked_bytes(path))
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            wanted = [*names, *(name for name in optional if name in entries)]
            total = sum(entries[name].file_size for name in wanted)
            if total > limit:
                raise ValueError(too_large(total, limit))
            return {name: _read_array(archive, entries[name], most_dimensions) for name in wanted}
    except KeyError as error:
        reason = f"no array {error}"
    except Exception as error:  # zipfile, zlib and numpy's parser raise many types on damaged files
        reason = f"{type(error).__name__}: {error!s:.200}"
    expected = ", ".join(names)
    raise UserError(f"{path}: not an archive of images (arrays {expected}): {' '.join(reason.split())}") from None


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most_dimensions: int) -> np.ndarray:
    with archive.open(entry) as file:
        try:
            shape, is_fortran, dtype = array_header(file)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.filename} {error}") from None
        if not 1 <= len(shape) <= most_dimensions or dtype.kind not in "iufUS":
            wanted = "one row" if most_dimensions == 1 else f"an array of 1 to {most_dimensions} dimensions"
            raise ValueError(f"{entry.filename} is {dtype} of shape {shape}, expected {wanted} of numbers or text")
        data = file.read()
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{entry.filename} has {len(data):,} bytes for {dtype} of shape {shape}")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def whole_numbers(array: np.ndarray, source: str, least: int, most: int) -> list[int]:
    """Returns an array of integers as a list. Raises UserError unless they are integers from `least` to `most`."""
    if array.dtype.kind not in "iu":
        raise UserError(f"{source} is {array.dtype}, expected whole numbers")
    wrong = np.flatnonzero((array < least) | (array > most))
    if len(wrong):
        raise UserError(f"{source} {array[wrong[0]]} is not one of {least}..{most} (number {wrong[0]})")
    return array.tolist()


def names_of(array: np.ndarray, source: str) -> list[str]:
    """Returns an array of text or whole numbers as names. Raises UserError when one is no UTF-8."""
    if array.dtype.kind == "f":
        raise UserError(f"{source} is {array.dtype}, expected text")
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array]
    except (ValueError, SystemError) as error:  # bytes that are not UTF-8; numbers that are no letter
        raise UserError(f"{source} cannot be read as text ({error!s:.200})") from None
    for number, name in enumerate(names):
        if not is_text(name):
            raise UserError(f"{source} {shown(name)} (number {number}) has half of a letter, which no file can hold")
    return names
