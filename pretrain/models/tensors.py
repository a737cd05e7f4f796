"""Weights as a value: a model's config and its tensors, each read only when it is asked for.

Formats of other libraries name and shape the same numbers differently; a key map says how, once, for both directions.
So converting holds one tensor at a time, whatever the size of the model.
"""

import json
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
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pretrain.config import (
    EVAL_CROP_LIMITS,
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    MINUS_ONE_TO_ONE,
    Config,
    DataConfig,
    ModelConfig,
    Normalisation,
    choices_of,
)
from pretrain.errors import UserError, first_line
from pretrain.json_files import Fields, brief, is_text
from pretrain.models.formats import OF_RUN

# Methods of resizing by timm's and torchvision's names; the numbers are Pillow's, which transformers writes.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


# What a file of weights may claim.
MAX_TENSORS = 20_000  # a ViT of MAX_DEPTH blocks has 16,400 in .npz; ViT-22B with its optimizer's moments 2,400
MAX_HEADER_BYTES = 16 << 20  # of safetensors: MAX_TENSORS entries of 256 letters
MAX_JSON_BYTES = 16 << 20  # of config.json: ImageNet-21k's names both ways have 2 MB
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; 8-bit floats have scales elsewhere
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
_LARGEST = 1e9  # of a number whose bounds are checked elsewhere


class LazyTensor(NamedTuple):
    """A tensor that is read when `read` is called, float32."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    is_float: bool = True  # false: its file has whole numbers, as counters of batch norm are


@dataclass(frozen=True)
class Weights:
    """A trained model: its architecture, its tensors by timm's names, and what it needs to be used.

    Raises UserError when class names are not texts or not as many as the classes, or a setting has no known value.
    """

    source: Path
    model: ModelConfig
    tensors: Mapping[str, LazyTensor]
    num_classes: int  # 0: no head
    class_names: tuple[str, ...] = ()  # empty when unknown
    eval_transform: str = "timm"  # as in DataConfig
    eval_crop: float = 0.875  # as in DataConfig
    interpolation: str = "bicubic"  # as in DataConfig, or another of INTERPOLATIONS
    loss: str | None = None  # with which it was trained; None: unknown
    mean: tuple[float, ...] = MINUS_ONE_TO_ONE.mean  # of the model's input, per channel, as in DataConfig
    std: tuple[float, ...] = MINUS_ONE_TO_ONE.std  # of the model's input, per channel, as in DataConfig
    of_run: str | None = None  # of OF_RUN, which of the two, where its run keeps an average; None: not so, or unknown

    def __post_init__(self) -> None:
        if not is_whole(self.num_classes) or not 0 <= self.num_classes <= MAX_CLASSES:
            found = brief(self.num_classes)
            raise UserError(f"{self.source}: num_classes is {found}, expected 0 (no head) to {MAX_CLASSES}")
        if other := [name for name in self.class_names if not is_text(name)]:
            raise UserError(f"{self.source}: a class is called {brief(other[0])}, expected a text")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"{self.source}: has {len(self.class_names)} class names for {self.num_classes} classes")
        allowed = {"eval_transform": choices_of(DataConfig, "eval_transform"), "interpolation": tuple(INTERPOLATIONS)}
        allowed |= {"loss": (*choices_of(Config, "loss"), None), "of_run": (*OF_RUN, None)}
        for name, choices in allowed.items():
            if (value := getattr(self, name)) not in choices:
                expected = ", ".join(map(str, choices))
                raise UserError(f"{self.source}: {name} is {brief(value)}, expected one of {expected}")
        lowest, highest = EVAL_CROP_LIMITS
        if not lowest <= self.eval_crop <= highest:
            raise UserError(f"{self.source}: eval_crop is {self.eval_crop}, expected {lowest} to {highest}")
        for problem in self.normalisation.problems():
            raise UserError(f"{self.source}: {problem}")

    @property
    def normalisation(self) -> Normalisation:
        """The model's input, as `to_float` makes it of pixels."""
        return Normalisation(self.mean, self.std)


# Key in a folder's config.json for what of ours no key of timm's or transformers' can say.
OURS = "pretrain"
_USE = ("eval_transform", "eval_crop", "interpolation", "loss", "mean", "std", "of_run")  # fields of Weights


def kept_use(weights: Weights) -> dict[str, Any]:
    """Returns how the weights are to be used, and what they are, as JSON values; without what is not known."""
    return {key: value for key in _USE if (value := getattr(weights, key)) is not None}


def use_in(config: Config) -> dict[str, Any]:
    """Returns these fields of Weights, as far as a run's config has them."""
    data = config.data
    use = {"eval_transform": data.eval_transform, "eval_crop": data.eval_crop, "interpolation": data.interpolation}
    return {**use, "loss": config.loss, **data.normalisation._asdict()}


def use_of(kept: Fields, *others: str) -> dict[str, Any]:
    """Returns fields of Weights from what `kept_use` returned, and perhaps keys `others` beside it.

    Raises UserError for any other key, and for a value of another type.
    """
    if unknown := sorted(kept.values.keys() - {*_USE, *others}):
        known = ", ".join((*others, *_USE))
        raise UserError(f"{kept.source}.{unknown[0][:100]}: no such key; known are {known}")
    return {key: _use_value(kept, key) for key in _USE if kept.values.get(key) is not None}


def _use_value(kept: Fields, key: str) -> Any:
    if key in ("mean", "std"):
        return per_channel(kept, key)
    return kept.number(key, -_LARGEST, _LARGEST) if key == "eval_crop" else kept.text(key)  # Weights knows their bounds


class Part(NamedTuple):
    """Where another format stores one of our tensors, or one of several equal pieces of its first dimension."""

    name: str
    shape: tuple[int, ...]
    layout: str = "same"  # same: except for its shape; dense: transposed; conv: height, width, in, out


KeyMap = Mapping[str, Sequence[Part]]


def tensors_from(
    theirs: Mapping[str, LazyTensor], keys: KeyMap, ours: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, LazyTensor]:
    """Returns our tensors from those of another format.

    ours: name -> shape of every tensor of the model. Raises UserError when a tensor is missing, left over, or has
    another shape; when one is read, also if it holds a value that is not finite.
    """
    needed = {part.name: part for parts in keys.values() for part in parts}
    check_keys(source, found=theirs.keys(), needed=needed.keys())
    for name, part in needed.items():
        if theirs[name].shape != part.shape:
            raise UserError(f"{source}: {name} has shape {theirs[name].shape}, expected {part.shape}")
        if not theirs[name].is_float:
            raise UserError(f"{source}: {name} holds whole numbers, expected {', '.join(_FLOATS)}")
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
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def square(size: Any, key: str, source: object) -> int:
    """Returns the side of a size that JSON gives as N, [N, N] or {"height": N, "width": N}.

    Raises UserError when it is not square, or no size.
    """
    sides: Any = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if len(sides) > 2 or not sides or not all(is_whole(side) and 1 <= side <= MAX_IMAGE_SIZE for side in sides):
        raise UserError(f"{source}: {key} is {brief(size)}, expected pixels, as 224, at most {MAX_IMAGE_SIZE}")
    if len(set(sides)) > 1:
        raise UserError(f"{source}: {key} is {size}, which is not square; images here are")
    return sides[0]


def per_channel(fields: Fields, key: str, default: float | EllipsisType = ...) -> tuple[float, ...]:
    """Returns a mean or deviation that JSON gives as a list of three, or as one number for all channels, as three.

    Raises UserError when it is something else.
    """
    value = fields.values.get(key)
    if not isinstance(value, list | tuple):
        value = (fields.number(key, -_LARGEST, _LARGEST, default),)
    if len(value) not in (1, 3) or not all(map(_is_number, value)):
        fields.wrong(key, "three numbers")
    return tuple(map(float, value)) * (3 // len(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def number_as_text(value: Any) -> Any:
    """Returns a number or truth value as text, since some classes are called so; any other value unchanged."""
    return str(value) if isinstance(value, int | float) else value


def is_whole(value: object) -> bool:
    """Returns whether a value is an integer; neither true nor 1.0 is one."""
    return isinstance(value, int) and not isinstance(value, bool)


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


# What libraries raise for a file's values. AssertionError: by timm, for arguments that do not fit together.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError)
_UNREADABLE += (ArithmeticError,)


@contextmanager
def readable(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Reports what cannot be read as the user's file, not our defect: in one line that names it.

    others: further exceptions to report so; Exception where a library builds a model from the file.
    """
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise UserError(f"{path}: damaged, or not what its name says ({first_line(error)[:500]})") from None
    except (*_UNREADABLE, *others) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)[:500]})") from None


def file_in(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder that others may have made.

    Raises UserError when it is a link out of the folder, which could reveal or pass on any file of this machine.
    In Hugging Face's cache, models--OWNER--NAME/snapshots/REVISION, files are links to blobs of models--*.
    """
    path = folder / name
    with readable(path):
        root, target = folder.resolve(), path.resolve()
        for inner in (root, *root.parents):  # the snapshot itself, or a folder in it
            if inner.parent.name == "snapshots" and inner.parent.parent.name.startswith("models--"):
                root = inner.parent.parent
                break
    if not target.is_relative_to(root):
        raise UserError(f"{path}: is a link to {target}, outside of its folder; put the file itself there")
    return path


def read_fields(folder: Path, name: str) -> Fields:
    """Returns the object that a file of JSON in a folder of weights holds. Raises UserError."""
    path = file_in(folder, name)
    with readable(path):
        return Fields.read(path, max_bytes=MAX_JSON_BYTES)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a .safetensors file, or of all the files that `model.safetensors.index.json` names.

    Floats of 2, 4 and 8 bytes, and whole numbers, which are marked. Raises UserError for other types.
    """
    files = [path]
    if path.name.endswith(".index.json"):
        named = read_fields(path.parent, path.name).part("weight_map")
        files = [file_in(path.parent, name) for name in sorted({Path(named.text(key)).name for key in named.values})]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        with readable(file):
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                limit = f"a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}"
                raise UserError(f"{file}: damaged, or not what its name says ({limit})")
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: _in_safetensors(file, name, opened.get_slice(name)) for name in opened.keys()}
        if len(tensors) > MAX_TENSORS:
            raise UserError(f"{file}: has {len(tensors):,} tensors, expected at most {MAX_TENSORS:,}")
    return tensors


def _in_safetensors(path: Path, name: str, found: Any) -> LazyTensor:
    kind = found.get_dtype()
    if kind not in (*_FLOATS, *_INTEGERS):
        raise UserError(f"{path}: {name[:100]} is of type {kind}, expected one of {', '.join(_FLOATS)}")
    return LazyTensor(tuple(found.get_shape()), partial(_read_from_safetensors, path, name), kind in _FLOATS)


def _read_from_safetensors(path: Path, name: str) -> torch.Tensor:
    # Opened for each tensor: an open file is mapped, and what was read of it counts as this process's memory.
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
            file.write(array_of(name, tensor).data)
        file.flush()
        os.fsync(file.fileno())


def array_of(name: str, tensor: LazyTensor) -> np.ndarray:
    """Returns a tensor's values, float32, as they are written."""
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape, f"{name}: {tuple(values.shape)} is not {tensor.shape}"
    return np.ascontiguousarray(values.to(torch.float32).numpy())
