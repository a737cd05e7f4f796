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

Beside the steps there may be .tmp-step-N, a save in progress or killed; .old-step-N, a step that is being saved again,
which counts as long as there is no step-N; and .trash-step-N, which is being deleted.
"""

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from pretrain.config import MAX_STEP
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief

if TYPE_CHECKING:  # takes a second to import, which tools/audit.py does without
    import torch

FORMAT, VERSION = "pretrain-checkpoint", 1
_OLD = ".old-"
_STEP_FOLDER = re.compile(rf"(?:{re.escape(_OLD)})?step-(\d{{10}})")  # up to MAX_STEP
# An entry of index.json has 75 bytes: 2,000 tensors (g/14 with two moments and averages) in slices of 1,700 ranks.
MAX_INDEX_BYTES = 256 << 20
MAX_RANKS = 1 << 20  # of a run
MAX_INDEX_MARKS = 20 << 20  # 4 for each slice; under ZeRO 3 every rank has one of each tensor
MAX_FILE_BYTES = 2**63 - 1  # of any file system
KINDS = ("weights", "optimizer", "average")


@dataclass(frozen=True)
class Slice:
    """Consecutive elements of the flattened tensor `name`, owned by one rank."""

    name: str  # "blocks.0.attn.qkv.weight"; with a moment in front in the optimizer's files: "exp_avg/blocks..."
    shape: tuple[int, ...]  # of the whole tensor
    offset: int  # of the first element
    values: "torch.Tensor"  # [elements], float32 (a moment may be bfloat16); saving reads it, loading writes into it


class DamagedError(UserError):
    """A checkpoint is not what its manifest says."""


def manifest_text(manifest: dict[str, Any]) -> str:
    """Returns the manifest as written, with its own checksum: a flipped bit in it must not implicate another file."""
    checksum = google_crc32c.Checksum(json.dumps(manifest, sort_keys=True).encode()).hexdigest().decode()
    return json.dumps({**manifest, "crc32c": checksum}, indent=1, sort_keys=True) + "\n"


def file_name(kind: str, rank: int, world: int) -> str:
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


def step_folders(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a run, newest first; none when there is no such folder.

    Raises OSError when it cannot be listed. A glob may ignore that, and the run would start from scratch.
    """
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if _STEP_FOLDER.fullmatch(entry.name) and entry.is_dir()}
    except FileNotFoundError:
        return []
    found = [folder / name for name in names if not (name.startswith(_OLD) and name.removeprefix(_OLD) in names)]
    return sorted(found, key=step_of, reverse=True)


def set_aside(published: Path) -> Path:
    """Returns the name of a published step while the same step is saved again."""
    return published.with_name(f"{_OLD}{published.name}")


def own_file(folder: Path, name: str) -> Path:
    """Returns the path of a checkpoint's file. Raises DamagedError unless it is a file in that very folder."""
    if flaw := flaw_of_file(folder, name):
        raise DamagedError(f"{folder}: {flaw}")
    return folder / name


def flaw_of_file(folder: Path, name: str) -> str | None:
    """Says why a name is not that of a file in a checkpoint's folder, None when it is. Raises OSError."""
    if name != Path(name).name or "\0" in name:
        return f"{brief(name)} is not the name of a file in it"
    try:
        mode = (folder / name).lstat().st_mode
    except FileNotFoundError:
        return f"{name} is missing"
    if stat.S_ISLNK(mode):
        return f"{name} is a link, which may lead anywhere; put the file itself in its place"
    return None if stat.S_ISREG(mode) else f"{name} is not a file"


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint folder's name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read_manifest(path: Path) -> list[tuple[str, int, str]]:
    """Returns name, bytes and CRC-32C of each file of a checkpoint. Raises UserError, OSError."""
    file = own_file(path, "MANIFEST.json")
    manifest = Fields.read(file)
    unsigned = {key: value for key, value in manifest.values.items() if key != "crc32c"}
    if file.read_text(encoding="utf-8") != manifest_text(unsigned):
        raise UserError(f"{file}: its text does not have the checksum that it names")
    found = manifest.text("format"), manifest.integer("version", 0, MAX_STEP)
    if found != (FORMAT, VERSION):
        raise UserError(f"{file}: {brief(found[0])} version {found[1]}, expected {FORMAT!r} {VERSION}")
    rows = manifest.parts("files")
    return [(row.text("path"), row.integer("bytes", 0, MAX_FILE_BYTES), row.text("crc32c")) for row in rows]
