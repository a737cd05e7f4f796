"""Any part of any tensor of a checkpoint, on any number of ranks."""

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pretrain.checkpoint.layout import KINDS, DamagedError, Slice
from pretrain.errors import UserError


def read_state(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's state.json."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


class CheckpointReader:
    """Reads any part of any tensor of a checkpoint, opening only the files that hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        self._open = lru_cache(maxsize=64)(lambda file: safe_open(path / Path(file).name, framework="pt"))
        self.index.setdefault("average", {})  # absent from checkpoints of earlier versions
        for kind in KINDS:
            for name, entry in self.index[kind].items():
                self._check_tiling(kind, name, entry)

    def shapes(self, kind: str = "weights") -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a kind: "weights", "optimizer" or "average" (none when not kept)."""
        return {name: tuple(entry["shape"]) for name, entry in self.index[kind].items()}

    def tensor(self, name: str, kind: str = "weights") -> torch.Tensor:
        """Returns one whole tensor, float32."""
        shape = self.shapes(kind)[name]
        values = torch.empty(shape).view(-1)
        self.read_into(Slice(name, shape, 0, values), kind)
        return values.view(shape)

    def read_into(self, part: Slice, kind: str = "weights") -> None:
        """Fills `part.values`. Raises UserError when the checkpoint has no such tensor or another shape."""
        entry = self.index[kind].get(part.name)
        if entry is None:
            raise UserError(f"{self.path}: has no {kind} tensor {part.name}, which the model needs")
        if tuple(entry["shape"]) != tuple(part.shape):
            shapes = f"{tuple(entry['shape'])} in the checkpoint, {tuple(part.shape)} in the model"
            raise UserError(f"{self.path}: {part.name} has shape {shapes}")
        end = part.offset + part.values.numel()
        for offset, numel, file in entry["slices"]:
            low, high = max(offset, part.offset), min(offset + numel, end)
            if low < high:
                values = self._open(file).get_slice(part.name)[low - offset : high - offset]
                part.values.narrow(0, low - part.offset, high - low).copy_(values)

    def generators(self, rank: int) -> dict[str, torch.Tensor]:
        """Returns the random states that a rank saved, empty when the run had fewer ranks."""
        name = f"generators-{rank:05d}.safetensors"
        if not (self.path / name).exists():
            return {}
        with safe_open(self.path / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}

    def _check_tiling(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        """Slices must cover every element once: a stray or missing file would leave garbage in the weights."""
        end = 0
        for offset, numel, _file in entry["slices"]:
            if offset != end:
                raise DamagedError(f"{self.path}: {kind} {name}: slices end at {end}, the next one starts at {offset}")
            end += numel
        if end != torch.Size(entry["shape"]).numel():
            raise DamagedError(
                f"{self.path}: {kind} {name}: slices end at {end} of {torch.Size(entry['shape']).numel()}"
            )


def check_names(reader: CheckpointReader, names: Iterable[str], kind: str = "weights") -> None:
    """Raises UserError unless the checkpoint holds exactly the named tensors."""
    held, needed = set(reader.index[kind]), set(names)
    if held != needed:
        missing, extra = sorted(needed - held), sorted(held - needed)
        raise UserError(
            f"{reader.path}: {kind} tensors missing: {missing[:3] or 'none'}, not in the model: {extra[:3] or 'none'}"
        )
