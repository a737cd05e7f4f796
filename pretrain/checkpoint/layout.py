"""Checkpoints: a complete, checksummed folder, or nothing. Knows the format, not the engine.

    step-0000001000/
      weights-00003-of-00008.safetensors     the fp32 slices that rank 3 owns: NAME -> flat values
      optimizer-00003-of-00008.safetensors   the optimizer's moments, same slices: MOMENT/NAME -> flat values
      average-00003-of-00008.safetensors     the Polyak average of the weights, same slices; only when one is kept
      generators-00003.safetensors           random states of rank 3
      index.json                             every tensor: shape, and which file holds which part of it
      state.json                             step, config, counters, versions: all that is not a tensor
      MANIFEST.json                          every file with bytes and CRC-32C; its presence means complete

A folder is written under a temporary name and published by one rename. The newest valid one wins. There is no pickle
in it and no world size baked in: any number of ranks reads the slices that overlap what it owns now.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from pretrain.errors import UserError

FORMAT, VERSION = "pretrain-checkpoint", 1
_STEP_FOLDER = re.compile(r"step-(\d{10})")
KINDS = ("weights", "optimizer", "average")


@dataclass(frozen=True)
class Slice:
    """A run of consecutive elements of the flattened tensor `name`, which one rank owns."""

    name: str  # "blocks.0.attn.qkv.weight"; with a moment in front in the optimizer's files: "exp_avg/blocks..."
    shape: tuple[int, ...]  # of the whole tensor
    offset: int  # of the first element
    values: torch.Tensor  # [elements], float32 (a moment may be bfloat16); saving reads it, loading writes into it


class DamagedError(UserError):
    """A checkpoint is not what its manifest says."""


def manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as written: with its own checksum, so that a flipped bit in it does not accuse another file."""
    checksum = google_crc32c.Checksum(json.dumps(manifest, sort_keys=True).encode()).hexdigest().decode()
    return json.dumps({**manifest, "crc32c": checksum}, indent=1, sort_keys=True) + "\n"


def file_name(kind: str, rank: int, world: int) -> str:
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


def step_folders(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint folder's name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read_manifest(path: Path) -> dict[str, Any]:
    text = (path / "MANIFEST.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    manifest.pop("crc32c")
    if text != manifest_text(manifest):
        raise ValueError("its text does not have the checksum that it names")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{manifest['format']!r} version {manifest['version']}, expected {FORMAT!r} {VERSION}")
    return manifest
