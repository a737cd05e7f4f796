"""Reads PyTorch's own files of tensors (.pth, .pth.tar, .pt, .ckpt, .bin), and executes nothing in them.

A training script saves more than tensors: its optimizer is ignored, its arguments are returned as plain values.
"""

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.models.npz_file import open_archive
from pretrain.models.tensors import LazyTensor, few, file_in, finite, read_safetensors, readable

ENDINGS = (".pth", ".pth.tar", ".pt", ".ckpt", ".bin")
# Where training scripts keep a model's tensors, averages first: they are the intended result of such a run.
_STATES = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module")
MAX_OPCODES = 1 << 20  # of a pickle: 86 million parameters with averages and an optimizer's state take 20,000
# What weights_only would call with a size that the file chooses, and torch.save never writes: 40 bytes could take any
# amount of memory. It does write `torch Tensor` and `torch.storage UntypedStorage`, as types; calls touch no memory.
_ALLOCATING = re.compile(r".* (bytearray|TypedStorage|\w+Tensor)")
_LEGACY_PICKLES = 5  # before PyTorch 1.6: magic number, version, system, values, names of the tensors that follow
_PREFIXES = ("module.", "_orig_mod.", "model.", "ema.")  # of DDP, torch.compile, Lightning, averages


class Saved(NamedTuple):
    """What a file of PyTorch's holds."""

    tensors: dict[str, LazyTensor]
    arch: str | None  # the architecture's name, where the training script wrote it
    arguments: dict[str, Any]  # of the training script


def is_torch_file(path: Path) -> bool:
    """Returns whether a path names a file that PyTorch writes."""
    return path.name.endswith(ENDINGS) and path.is_file()


def read_torch(path: Path) -> Saved:
    """Returns the tensors of a file that torch.save wrote, and what it says of them.

    Only tensors and plain values are read (weights_only): the file cannot execute anything. Raises UserError for one
    that needs more, or holds no tensors.
    """
    with readable(path):
        values = _load(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected the tensors of a model by name")
    found = [key for key in _STATES if isinstance(values.get(key), Mapping)]
    state = values[found[0]] if found else values
    if len(found) > 1:
        warn(f"{path}: {found[0]} is read; {few(found[1:])} beside it is not")
    tensors = {str(name): _lazy(t, str(name), path) for name, t in state.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors of a model; its keys are {few(sorted(map(str, values)))}")
    arguments, arch = values.get("args"), values.get("arch")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    return Saved(plainly_named(tensors, path), arch if isinstance(arch, str) else None, arguments)


def tensors_in(folder: Path, file: Path | None = None) -> dict[str, LazyTensor]:
    """Returns the tensors of a folder with config.json: of safetensors, else of a PyTorch file; or those of `file`.

    Raises UserError when there are none.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.pth", "model.pth.tar")
    files = [file] if file else [file_in(folder, name) for name in names if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder}: has no model.safetensors, nor {', '.join(names[2:])}")
    if files[0].name.endswith(ENDINGS):
        return read_torch(files[0]).tensors
    return plainly_named(read_safetensors(files[0]), files[0])


def _load(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # since PyTorch 1.6: tensors are read when asked for
    if mapped:
        with open_archive(path):  # refuses one that unpacks to far more than its size
            pass
    try:
        _check_pickles(path)
        # timm's arguments are in a Namespace, which only holds values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        told = "is damaged, or a pickle of more than tensors and plain values"
        if mapped and (needs := _unsafe(path)):
            told = f"needs {few(needs)} to be read"
        raise UserError(
            f"{path}: {told}, which may execute code: save its tensors alone, with torch.save(model.state_dict(), ...) "
            "or as safetensors"
        ) from None


def _check_pickles(path: Path) -> None:
    """Raises UserError for a file whose pickles would take memory that the file's size does not bound.

    Raises UnpicklingError for what is no pickle. Nothing is imported or called.
    """
    for pickled in _pickles(path):
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
                if number >= MAX_OPCODES:
                    raise UserError(f"{path}: its pickle has more than {MAX_OPCODES:,} opcodes, which no model's has")
                if opcode.name == "GLOBAL" and _ALLOCATING.fullmatch(str(argument)):
                    made = str(argument).replace(" ", ".")[:100]
                    raise UserError(
                        f"{path}: its pickle makes a {made}, which can take any memory: save its tensors alone, "
                        "with torch.save(model.state_dict(), ...) or as safetensors"
                    )
        except UserError:
            raise
        except (ValueError, MemoryError, OverflowError) as error:  # the latter two: of an impossible length
            raise pickle.UnpicklingError(str(error)) from None


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file's pickles, found as torch.load finds them; one is read before the next is asked for."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            yield io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            yield file


def _unsafe(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # whatever a damaged pickle raises: an error is being reported already
        return []


def _lazy(tensor: torch.Tensor, name: str, path: Path) -> LazyTensor:
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {name[:100]} is said to have shape {tuple(tensor.shape)}, for which it has no values")
    if tensor.is_complex() or tensor.is_quantized or (tensor.is_floating_point() and tensor.element_size() < 2):
        raise UserError(
            f"{path}: {name[:100]} is of type {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    return LazyTensor(tuple(tensor.shape), partial(_read, tensor, name, path), tensor.is_floating_point())


def _read(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    with readable(path):
        return finite(tensor.detach().float().clone(), name, path)


def plainly_named(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Returns tensors without the prefixes that tools put before all names, and warns of it.

    Where averages under "ema." are beside the weights, the averages are returned.
    """
    averages, _ = _stripped({name: tensor for name, tensor in tensors.items() if name.startswith("ema.")})
    beside, _ = _stripped({name: tensor for name, tensor in tensors.items() if not name.startswith("ema.")})
    if averages and averages.keys() == beside.keys():
        warn(f"{path}: the {len(averages)} tensors of ema. are read, not those beside them")
        return averages
    plain, taken = _stripped(tensors)
    if taken:
        warn(f"{path}: {taken} is taken off the names of its {len(tensors)} tensors")
    return plain


def _stripped(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], str]:
    """The tensors without the prefixes that all their names have, and these prefixes."""
    taken = ""
    while tensors and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)):
        tensors, taken = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, taken + prefix
    return tensors, taken
