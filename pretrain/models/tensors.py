"""Weights as a value: a model's config and its tensors, each read only when it is asked for.

Formats of other libraries name and shape the same numbers differently; a key map says how, once, for both directions.
So converting holds one tensor at a time, whatever the size of the model.
"""

import json
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pretrain.config import (
    EVAL_CROP_LIMITS,
    MINUS_ONE_TO_ONE,
    Config,
    DataConfig,
    ModelConfig,
    Normalisation,
    choices_of,
)
from pretrain.errors import UserError

# Resizing as timm's and torchvision's names have it; the number is Pillow's, which transformers writes.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class LazyTensor(NamedTuple):
    """A tensor that is read when `read` is called, float32."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """A trained model: its architecture, its tensors by timm's names, and what it needs to be used.

    Raises UserError when the class names are not as many as the classes, or a setting is none that there is.
    """

    source: Path
    model: ModelConfig
    tensors: Mapping[str, LazyTensor]
    num_classes: int  # 0: no head
    class_names: tuple[str, ...] = ()  # empty when unknown
    eval_transform: str = "timm"  # as in DataConfig
    eval_crop: float = 0.875  # as in DataConfig
    interpolation: str = "bicubic"  # as in DataConfig, or another of INTERPOLATIONS
    loss: str | None = None  # with which it was trained; None: its source does not tell
    mean: tuple[float, ...] = MINUS_ONE_TO_ONE.mean  # of the model's input, per channel, as in DataConfig
    std: tuple[float, ...] = MINUS_ONE_TO_ONE.std  # of the model's input, per channel, as in DataConfig

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"{self.source}: has {len(self.class_names)} class names for {self.num_classes} classes")
        allowed = {"eval_transform": choices_of(DataConfig, "eval_transform"), "interpolation": tuple(INTERPOLATIONS)}
        for name, choices in (allowed | {"loss": (*choices_of(Config, "loss"), None)}).items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{self.source}: {name} is {value!r}, expected one of {', '.join(map(str, choices))}")
        lowest, highest = EVAL_CROP_LIMITS
        if not lowest <= self.eval_crop <= highest:
            raise UserError(f"{self.source}: eval_crop is {self.eval_crop}, expected {lowest} to {highest}")
        for problem in self.normalisation.problems():
            raise UserError(f"{self.source}: {problem}")

    @property
    def normalisation(self) -> Normalisation:
        """What the model takes, as `to_float` makes it of pixels."""
        return Normalisation(self.mean, self.std)


# What a folder's config.json keeps of ours under the key OURS, since no key of timm's or transformers' can say it.
OURS = "pretrain"
_USE = ("eval_transform", "eval_crop", "interpolation", "loss", "mean", "std")  # fields of Weights


def kept_use(weights: Weights) -> dict[str, Any]:
    """Returns how the weights are to be used, as JSON values."""
    return {key: getattr(weights, key) for key in _USE}


def use_of(kept: Mapping[str, Any], source: Path, *others: str) -> dict[str, Any]:
    """Returns fields of Weights from what `kept_use` returned, and perhaps keys `others` beside it.

    Raises UserError for any other key.
    """
    if unknown := sorted(kept.keys() - {*_USE, *others}):
        raise UserError(f"{source}: {OURS}.{unknown[0]}: no such key; known are {', '.join((*others, *_USE))}")
    lists = {key: tuple(kept[key]) for key in ("mean", "std") if key in kept}
    return {key: kept[key] for key in _USE if key in kept} | lists


class Part(NamedTuple):
    """Where one of our tensors, or one of several equal pieces of its first dimension, stands in another format."""

    name: str
    shape: tuple[int, ...]
    layout: str = "same"  # same: but for its shape; dense: transposed; conv: height, width, in, out


KeyMap = Mapping[str, Sequence[Part]]


def tensors_from(theirs: Mapping[str, LazyTensor], keys: KeyMap, ours: Mapping[str, tuple[int, ...]], source: Path):
    """Returns our tensors from those of another format, dict of name to LazyTensor.

    ours: name -> shape of every tensor of the model. Raises UserError when a tensor is missing, left over, or has
    another shape; when one is read, also if it holds a value that is not finite.
    """
    needed = {part.name: part for parts in keys.values() for part in parts}
    check_keys(source, found=theirs.keys(), needed=needed.keys())
    for name, part in needed.items():
        if theirs[name].shape != part.shape:
            raise UserError(f"{source}: {name} has shape {theirs[name].shape}, expected {part.shape}")
    return {
        name: LazyTensor(shape, partial(_joined, [(part, theirs[part.name]) for part in keys[name]], shape))
        for name, shape in ours.items()
    }


def tensors_to(ours: Mapping[str, LazyTensor], keys: KeyMap) -> dict[str, LazyTensor]:
    """Returns the tensors of another format from ours; each is read and turned when it is written."""
    return {
        part.name: LazyTensor(part.shape, partial(_piece, ours[name], part, number, len(parts)))
        for name, parts in keys.items()
        for number, part in enumerate(parts)
    }


def check_keys(source: Path, *, found: Iterable[str], needed: Iterable[str]) -> None:
    """Raises UserError, naming them, unless the two sets of names are equal."""
    found_names, needed_names = set(found), set(needed)
    missing, extra = sorted(needed_names - found_names), sorted(found_names - needed_names)
    if missing or extra:
        told = [f"{what}: {few(names)}" for what, names in (("missing", missing), ("unknown", extra)) if names]
        raise UserError(f"{source}: tensors {'; '.join(told)}")


def few(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def square(size: Any, key: str, path: Path) -> int:
    """Returns the side of a size that JSON gives as N, [N, N] or {"height": N, "width": N}.

    Raises UserError when it is not square, or no size.
    """
    sides: Any = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if len(sides) > 2 or not sides or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise UserError(f"{path}: {key} is {size}, expected pixels, as 224")
    if len(set(sides)) > 1:
        raise UserError(f"{path}: {key} is {size}, which is not square; images here are")
    return sides[0]


def per_channel(value: Any) -> tuple[Any, ...]:
    """Returns a mean or deviation that JSON gives as a list of three, or as one number for all channels, as three."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * 3 if len(values) == 1 else values


def _joined(pieces: list[tuple[Part, LazyTensor]], shape: tuple[int, ...]) -> torch.Tensor:
    rows = (shape[0] // len(pieces), *shape[1:])
    return torch.cat([_to_ours(tensor.read(), part.layout, rows) for part, tensor in pieces])


def _piece(ours: LazyTensor, part: Part, number: int, count: int) -> torch.Tensor:
    tensor = ours.read()
    tensor = tensor.chunk(count)[number] if count > 1 else tensor
    if part.layout == "dense":
        tensor = tensor.T
    elif part.layout == "conv":
        tensor = tensor.permute(2, 3, 1, 0)
    return tensor.reshape(part.shape)


def _to_ours(tensor: torch.Tensor, layout: str, shape: tuple[int, ...]) -> torch.Tensor:
    if layout == "dense":
        return tensor.reshape(shape[1], shape[0]).T
    if layout == "conv":
        return tensor.permute(3, 2, 0, 1)
    return tensor.reshape(shape)


def finite(tensor: torch.Tensor, name: str, source: Path) -> torch.Tensor:
    """Returns the tensor. Raises UserError when it holds NaN or an infinity: such weights are of no use to anybody."""
    if not tensor.isfinite().all():
        raise UserError(f"{source}: {name} holds values that are not finite")
    return tensor


# --- files -----------------------------------------------------------------------------------------------------------


# What libraries raise for a file's values. AssertionError: timm's answer to arguments that do not go together.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What cannot be read is the user's file, not our defect: one line, which names it."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {_first_line(error)})") from None
    except (SafetensorError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged, or not what its name says ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a .safetensors file, or of all the files that `model.safetensors.index.json` names."""
    files = [path]
    if path.name.endswith(".index.json"):
        with readable(path):
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            files = [path.parent / Path(name).name for name in sorted(names)]
    tensors = {}
    for file in files:
        with readable(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                shape = tuple(opened.get_slice(name).get_shape())
                tensors[name] = LazyTensor(shape, partial(_read_from_safetensors, file, name))
    return tensors


def _read_from_safetensors(path: Path, name: str) -> torch.Tensor:
    # Opened for each tensor: the file is mapped, and what was read of it counts as this process's memory until then.
    with readable(path), safe_open(path, framework="pt") as file:
        return finite(file.get_tensor(name).float().clone(), name, path)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes float32 tensors, one at a time, readable by everyone."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.write(_array(name, tensor).data)
        file.flush()
        os.fsync(file.fileno())


def write_npz(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes float32 arrays, one at a time, uncompressed: what `numpy.savez` writes."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, tensor in tensors.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, _array(name, tensor), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _array(name: str, tensor: LazyTensor) -> np.ndarray:
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape, f"{name}: {tuple(values.shape)} is not {tensor.shape}"
    return np.ascontiguousarray(values.to(torch.float32).numpy())


def read_npz(path: Path) -> dict[str, LazyTensor]:
    """Returns the arrays of an .npz file. Executes nothing: pickled objects are refused.

    Floats of 2, 4 and 8 bytes, and bfloat16, which numpy stores as 2 bytes of no type. Other numbers, such as the steps
    that stand beside the weights in a training state, are refused when they are read.
    """
    with readable(path), zipfile.ZipFile(path) as archive:
        return {
            info.filename.removesuffix(".npy"): _array_of(archive, info, path)
            for info in archive.infolist()
            if not info.is_dir()
        }


def _array_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> LazyTensor:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        shape, _, dtype = _array_header(member)
        start = member.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which would execute code; only numbers are read")
    if start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise UserError(f"{path}: {name} is said to have shape {shape}, but has {info.file_size - start} bytes")
    return LazyTensor(shape, partial(_read_from_npz, path, info.filename))


def _array_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _read_from_npz(path: Path, filename: str, row: int | None = None) -> torch.Tensor:
    """Returns one array, or one entry of its first axis."""
    name = filename.removesuffix(".npy")
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(filename) as member:
        if row is None:
            array = np.lib.format.read_array(member, allow_pickle=False)
        else:  # a depth's worth of blocks is too much to hold for one of them
            shape, fortran, dtype = _array_header(member)
            if fortran:
                raise UserError(f"{path}: {name} is stored column by column; save it in C order")
            num_bytes = math.prod(shape[1:]) * dtype.itemsize
            member.seek(member.tell() + row * num_bytes)
            array = np.frombuffer(member.read(num_bytes), dtype).reshape(shape[1:])
        if not (array.dtype.kind == "f" or (array.dtype.kind, array.dtype.itemsize) == ("V", 2)):
            raise UserError(f"{path}: {name} is of type {array.dtype}, expected floating-point numbers")
        if array.dtype.kind == "V":
            tensor = torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.array(array, order="C"))
        return finite(tensor.float(), name, path)


def rows_of(path: Path, name: str, stacked: LazyTensor) -> list[LazyTensor]:
    """Returns the entries of an .npz array's first axis, each of which is read alone."""
    read = (partial(_read_from_npz, path, f"{name}.npy", row) for row in range(stacked.shape[0]))
    return [LazyTensor(stacked.shape[1:], entry) for entry in read]
