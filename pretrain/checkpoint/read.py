"""Reads any part of any tensor of a checkpoint, on any number of ranks."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.layout import KINDS, MAX_INDEX_BYTES, MAX_INDEX_MARKS, DamagedError, Slice, own_file
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief


def read_state(path: Path) -> dict[str, Any]:
    """Returns the object in a checkpoint's state.json. Raises UserError when it is something else."""
    file = own_file(path, "state.json")
    return Fields.read(file).values


class CheckpointReader:
    """Reads any part of any tensor of a checkpoint, opening only the files that hold it.

    checked: whether this index has been checked already, on this rank or another: one check for each slice.
    """

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        self.path = path
        file = own_file(path, "index.json")
        index = Fields.read(file, max_bytes=MAX_INDEX_BYTES, max_marks=MAX_INDEX_MARKS)
        index.values.setdefault("average", {})  # absent from checkpoints of earlier versions
        self.index = {kind: index.part(kind).values for kind in KINDS}
        self._open = lru_cache(maxsize=64)(lambda name: safe_open(own_file(path, name), framework="pt"))
        for kind in KINDS:
            for name, entry in self.index[kind].items() if not checked else ():
                self._check_tiling(kind, name, entry)

    def shapes(self, kind: str = "weights") -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a kind: "weights", "optimizer" or "average" (none when not kept)."""
        return {name: tuple(entry["shape"]) for name, entry in self.index[kind].items()}

    def tensor(self, name: str, kind: str = "weights") -> torch.Tensor:
        """Returns one whole tensor, float32."""
        shape = self.shapes(kind)[name]
        values = torch.empty(shape).view(-1)
        self.read_into(Slice(name, shape, 0, values), kind=kind)
        return values.view(shape)

    def read_into(self, *parts: Slice, kind: str = "weights") -> None:
        """Fills the values of parts, file after file, each opened once for all its tensors.

        Raises UserError when the checkpoint has no such tensor, or one of another shape.
        """
        pieces: dict[str, list[tuple[Slice, int, int, int]]] = {}
        for part in parts:
            end = part.offset + part.values.numel()
            slices = self._slices_of(part, kind)
            first = bisect_right(slices, part.offset, key=lambda row: row[0]) - 1
            for offset, numel, file in islice(slices, max(0, first), None):
                if offset >= end:
                    break
                low, high = max(offset, part.offset), min(offset + numel, end)
                if low < high:
                    pieces.setdefault(file, []).append((part, offset, low, high))
        for file in sorted(pieces):
            for piece in pieces[file]:
                self._read_piece(file, *piece)

    def _slices_of(self, part: Slice, kind: str) -> list[list]:
        entry = self.index[kind].get(part.name)
        if entry is None:
            raise UserError(f"{self.path}: has no {kind} tensor {part.name}, which the model needs")
        if tuple(entry["shape"]) != tuple(part.shape):
            shapes = f"{tuple(entry['shape'])}, expected {tuple(part.shape)}"
            raise UserError(f"{self.path}: {part.name} has shape {shapes}")
        return entry["slices"]

    def _read_piece(self, file: str, part: Slice, offset: int, low: int, high: int) -> None:
        """Copies elements low to high of a tensor from a file that holds its elements from `offset` on."""
        try:
            values = self._open(file).get_slice(part.name)[low - offset : high - offset]
        except SafetensorError as error:
            raise DamagedError(f"{self.path}: damaged, {file} is not what index.json says ({error})") from None
        if values.shape != (high - low,):
            raise DamagedError(f"{self.path}: damaged, {file}: {part.name} is shorter than index.json says")
        part.values.narrow(0, low - part.offset, high - low).copy_(values)

    def generators(self, rank: int) -> dict[str, torch.Tensor]:
        """Returns the random states that a rank saved, empty when the run had fewer ranks."""
        name = f"generators-{rank:05d}.safetensors"
        if not (self.path / name).exists():
            return {}
        try:
            with safe_open(own_file(self.path, name), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise DamagedError(f"{self.path}: damaged, {name} holds no tensors ({error})") from None

    def _check_tiling(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        """Raises DamagedError unless slices cover each element once: a gap would leave garbage in the weights."""
        if not _is_entry(entry):
            expected = '{"shape": [...], "slices": [[offset, elements, file], ...]}'
            raise DamagedError(f"{self.path}/index.json: {kind}: {brief(name)} is {brief(entry)}, expected {expected}")
        end = 0
        for offset, numel, _file in entry["slices"]:
            if offset != end:
                raise DamagedError(f"{self.path}: {kind} {name}: slices end at {end}, the next one starts at {offset}")
            end += numel
        if end != (numel := math.prod(entry["shape"])):
            raise DamagedError(f"{self.path}: {kind} {name}: slices end at {end} of {numel}")


def _is_entry(entry: object) -> bool:
    """Whether a value has the form of an index.json entry; the order of slices is not checked."""
    if not isinstance(entry, dict) or not (
        isinstance(entry.get("shape"), list) and isinstance(entry.get("slices"), list)
    ):
        return False
    if not all(map(_is_size, entry["shape"])):
        return False
    return all(
        isinstance(row, list) and len(row) == 3 and _is_size(row[0]) and _is_size(row[1]) and isinstance(row[2], str)
        for row in entry["slices"]
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def check_names(reader: CheckpointReader, names: Iterable[str], kind: str = "weights") -> None:
    """Raises UserError unless the checkpoint holds exactly the named tensors."""
    held, needed = set(reader.index[kind]), set(names)
    if held != needed:
        missing, extra = sorted(needed - held), sorted(held - needed)
        raise UserError(
            f"{reader.path}: {kind} tensors missing: {missing[:3] or 'none'}, not in the model: {extra[:3] or 'none'}"
        )
