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
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pretrain.cluster import agreement, ranks
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.storage import crc32c, fsync_path, write_text

FORMAT, VERSION = "pretrain-checkpoint", 1
_STEP_FOLDER = re.compile(r"step-(\d{10})")
_KINDS = ("weights", "optimizer", "average")


@dataclass(frozen=True)
class Slice:
    """A run of consecutive elements of the flattened tensor `name`, which one rank owns."""

    name: str  # "blocks.0.attn.qkv.weight"; with a moment in front in the optimizer's files: "exp_avg/blocks..."
    shape: tuple[int, ...]  # of the whole tensor
    offset: int  # of the first element
    values: torch.Tensor  # [elements], float32 (a moment may be bfloat16); saving reads it, loading writes into it


class DamagedError(UserError):
    """A checkpoint is not what its manifest says."""


# --- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    weights: list[Slice],
    optimizer: list[Slice],
    generators: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    average: Sequence[Slice] = (),
) -> bool:
    """Writes `folder`/step-N with what every rank owns, and publishes it when all ranks succeeded. Called by all ranks.

    Returns whether it was published. On failure (a full disk) the temporary folder is removed, rank 0 warns, and no
    earlier checkpoint is touched.
    """
    rank, world = ranks.rank(), ranks.world_size()
    temporary = folder / f".tmp-step-{step:010d}"
    published = folder / f"step-{step:010d}"
    problem = _attempt(lambda: _make_temporary(temporary)) if ranks.is_main() else None
    agreement.barrier()
    slices = {kind: part for kind, part in zip(_KINDS, (weights, optimizer, average)) if part or kind != "average"}
    parts = {_file_name(kind, rank, world): {s.name: s.values for s in part} for kind, part in slices.items()}
    parts[f"generators-{rank:05d}.safetensors"] = dict(generators)
    entries: list[dict[str, Any]] = []
    problem = problem or _attempt(lambda: entries.extend(_write_tensors(temporary / n, t) for n, t in parts.items()))
    index = [(s.name, s.shape, s.offset, s.values.numel(), kind) for kind, part in slices.items() for s in part]
    gathered = agreement.gather((problem, entries, index))
    problems = [f"rank {r}: {p}" for r, (p, _, _) in enumerate(gathered) if p]
    if ranks.is_main():
        files = [entry for _, of_rank, _ in gathered for entry in of_rank]
        header = {"format": FORMAT, "version": VERSION, "step": step, "world_size": world}
        tensors = _tensor_index([rows for _, _, rows in gathered], world)
        problems = problems or _listed(_attempt(lambda: _publish(temporary, published, header, files, tensors, state)))
        if problems:
            shutil.rmtree(temporary, ignore_errors=True)
            warn(
                f"CHECKPOINT NOT SAVED at step {step}: {'; '.join(problems)}. Newest checkpoint: {_newest_name(folder)}"
            )
    return agreement.from_main(lambda: not problems)


def _make_temporary(temporary: Path) -> None:
    for stale in [*temporary.parent.glob(".tmp-step-*"), *temporary.parent.glob(".trash-*")]:
        shutil.rmtree(stale, ignore_errors=True)  # left by a killed save
    temporary.mkdir(parents=True)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes files that only their owner reads
    return _sealed(path)


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _sealed(path)


def _sealed(path: Path) -> dict[str, Any]:
    """Brings a file to the disk and returns its entry in the manifest, from what reads back."""
    fsync_path(path)
    return {"path": path.name, "bytes": path.stat().st_size, "crc32c": crc32c(path)}


def _publish(
    temporary: Path, published: Path, header: dict, files: list[dict], tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    files.append(_write_json(temporary / "index.json", tensors))
    files.append(_write_json(temporary / "state.json", state))
    manifest = {**header, "files": sorted(files, key=lambda entry: entry["path"])}
    write_text(temporary / "MANIFEST.json", _manifest_text(manifest))
    if published.exists():  # of the same step: damaged and not used, or saved before its validation was made up for
        os.replace(published, published.with_name(f".trash-{published.name}"))
    os.replace(temporary, published)
    fsync_path(published.parent)


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as written: with its own checksum, so that a flipped bit in it does not accuse another file."""
    checksum = google_crc32c.Checksum(json.dumps(manifest, sort_keys=True).encode()).hexdigest().decode()
    return json.dumps({**manifest, "crc32c": checksum}, indent=1, sort_keys=True) + "\n"


def _tensor_index(rows_of_ranks: list[list[tuple]], world: int) -> dict[str, Any]:
    """{kind: {name: {"shape": [...], "slices": [[offset, elements, file], ...]}}}, slices in order of offset."""
    tensors: dict[str, Any] = {kind: {} for kind in _KINDS}
    for rank, rows in enumerate(rows_of_ranks):
        for name, shape, offset, numel, kind in rows:
            entry = tensors[kind].setdefault(name, {"shape": list(shape), "slices": []})
            entry["slices"].append([offset, numel, _file_name(kind, rank, world)])
    for entry in (entry for kind in _KINDS for entry in tensors[kind].values()):
        entry["slices"].sort(key=lambda part: part[0])
    return tensors


def _file_name(kind: str, rank: int, world: int) -> str:
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


def _attempt(action: Any) -> str | None:
    """Returns what went wrong, None when nothing did."""
    try:
        action()
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        return f"{type(error).__name__}: {error}"
    return None


def _listed(problem: str | None) -> list[str]:
    return [problem] if problem else []


def apply_retention(folder: Path, *, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Deletes old checkpoints, never below `keep_last`, pinned steps or the best one. Rank 0; others do nothing.

    Best is the largest "val/top1" in state.json's "metrics"; among equals the earliest.
    """
    if not ranks.is_main():
        return
    folders = step_folders(folder)
    kept = set(folders[:keep_last])
    if keep_every_steps:
        kept |= {path for path in folders if step_of(path) % keep_every_steps == 0}
    if keep_best:
        scores = {path: _validation_score(path) for path in reversed(folders)}
        scored = {path: score for path, score in scores.items() if score is not None}
        kept |= {max(scored, key=lambda path: scored[path])} if scored else set()
    for path in folders:
        if path not in kept and (problem := _attempt(lambda path=path: _delete(path))):
            warn(f"{path}: an old checkpoint could not be deleted ({problem})")


def _delete(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}")  # one rename, so that no half-deleted folder looks complete
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _validation_score(path: Path) -> float | None:
    try:
        return read_state(path)["metrics"].get("val/top1")
    except (OSError, ValueError, KeyError):
        return None


# --- reading ---------------------------------------------------------------------------------------------------------


def step_folders(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint folder's name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def newest_valid(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is complete and undamaged, None when there is none. Called by all ranks.

    Each damaged one is passed over with a warning that names the file at fault; ranks share the reading. Raises
    DamagedError when there are checkpoints but none is valid: a silent fresh start would lose the run.
    """
    folders = agreement.from_main(lambda: step_folders(folder))
    for path in folders:
        problems = _damages_shared(path)
        if not problems:
            return path
        if ranks.is_main():
            warn(f"{path}: {problems[0]}; trying the checkpoint before it")
    if folders:
        raise DamagedError(f"{folder}: none of the {len(folders)} checkpoints is valid; move them away to start afresh")
    return None


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint at `path`: a step folder, or the newest valid one of a run. Called by all ranks.

    Raises UserError when there is none, DamagedError when it cannot be used.
    """
    if agreement.from_main(lambda: (path / "MANIFEST.json").is_file()):
        if problems := _damages_shared(path):
            raise DamagedError(f"{path}: {problems[0]}")
        return path
    if agreement.from_main(lambda: (path / "checkpoints").is_dir()):
        newest = newest_valid(path / "checkpoints")
        if newest is not None:
            return newest
    raise UserError(f"{path}: has no checkpoint; expected a run's folder or one of its checkpoints/step-N")


def set_aside_newer(checkpoint: Path) -> None:
    """Renames the checkpoints newer than the one in use, which are damaged, to damaged-step-N. Rank 0 only.

    The run goes on before their step: they must not count as checkpoints kept.
    """
    if ranks.is_main():
        for path in step_folders(checkpoint.parent):
            if step_of(path) > step_of(checkpoint):
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                warn(f"{path} is now {aside.name}: delete it when you have looked at it")


def _newest_name(folder: Path) -> str:
    folders = step_folders(folder)
    return folders[0].name if folders else "none"


def validate(path: Path) -> None:
    """Checks a checkpoint folder. Raises DamagedError, naming the file and what is wrong with it."""
    if problem := next(_damages(path, share=False), None):
        raise DamagedError(f"{path}: {problem}")


def _damages_shared(path: Path) -> list[str]:
    """What is wrong with a checkpoint, on every rank alike; each reads a share of it."""
    return [problem for found in agreement.gather(list(_damages(path))) for problem in found]


def _damages(path: Path, share: bool = True) -> Iterator[str]:
    """Yields what is wrong, over this rank's share of the files."""
    try:
        files = [(entry["path"], entry["bytes"], entry["crc32c"]) for entry in _read_manifest(path)["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"MANIFEST.json cannot be used ({error})"
        return
    rank, world = (ranks.rank(), ranks.world_size()) if share else (0, 1)
    for name, num_bytes, checksum in files[rank::world]:
        file = path / Path(name).name
        try:
            if not file.is_file():
                yield f"{name} is missing"
            elif file.stat().st_size != num_bytes:
                yield f"{name} has {file.stat().st_size} bytes, MANIFEST.json says {num_bytes}"
            elif (found := crc32c(file)) != checksum:
                yield f"{name} has CRC {found}, MANIFEST.json says {checksum}"
        except OSError as error:  # a bad sector, for example
            yield f"{name} cannot be read ({error.strerror})"


def _read_manifest(path: Path) -> dict[str, Any]:
    text = (path / "MANIFEST.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    manifest.pop("crc32c")
    if text != _manifest_text(manifest):
        raise ValueError("its text does not have the checksum that it names")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{manifest['format']!r} version {manifest['version']}, expected {FORMAT!r} {VERSION}")
    return manifest


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
        for kind in _KINDS:
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
