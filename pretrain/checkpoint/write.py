"""Saving: every rank writes what it owns, rank 0 publishes it by one rename, or nobody sees anything of it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrain.checkpoint.layout import FORMAT, KINDS, VERSION, Slice, file_name, manifest_text, set_aside, step_folders
from pretrain.cluster import agreement, ranks
from pretrain.log import warn
from pretrain.storage import crc32c, fsync_path, remove, write_text


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
    problem = attempt(_make_temporary, temporary) if ranks.is_main() else None
    agreement.barrier()
    slices = {kind: part for kind, part in zip(KINDS, (weights, optimizer, average)) if part or kind != "average"}
    parts = {file_name(kind, rank, world): {s.name: s.values for s in part} for kind, part in slices.items()}
    parts[f"generators-{rank:05d}.safetensors"] = dict(generators)
    entries: list[dict[str, Any]] = []
    problem = problem or attempt(lambda: entries.extend(_write_tensors(temporary / n, t) for n, t in parts.items()))
    index = [(s.name, s.shape, s.offset, s.values.numel(), kind) for kind, part in slices.items() for s in part]
    gathered = agreement.gather((problem, entries, index))
    problems = [f"rank {r}: {p}" for r, (p, _, _) in enumerate(gathered) if p]
    if ranks.is_main():
        files = [entry for _, of_rank, _ in gathered for entry in of_rank]
        header = {"format": FORMAT, "version": VERSION, "step": step, "world_size": world}
        tensors = _tensor_index([rows for _, _, rows in gathered], world)
        problems = problems or _listed(attempt(_publish, temporary, published, header, files, tensors, state))
        if problems:
            attempt(remove, temporary)
            warn(
                f"CHECKPOINT NOT SAVED at step {step}: {'; '.join(problems)}. Newest checkpoint: {_newest_name(folder)}"
            )
    return agreement.from_main(lambda: not problems)


def _make_temporary(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    attempt(_clean_up, temporary.parent)  # if not now, at the next save
    remove(temporary)
    temporary.mkdir()


def _clean_up(folder: Path) -> None:
    """Removes what killed saves left, links among it, and puts a step back that was being replaced."""
    names = os.listdir(folder)
    for path in [folder / name for name in names if name.startswith((".tmp-step-", ".trash-"))]:
        attempt(remove, path)
    for published in [folder / name.removeprefix(".old-") for name in names if name.startswith(".old-step-")]:
        if published.name in names:
            attempt(remove, set_aside(published))
        else:
            os.replace(set_aside(published), published)


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
    write_text(temporary / "MANIFEST.json", manifest_text(manifest))
    old = set_aside(published)
    again = os.path.lexists(published)  # damaged and not used, or saved before its validation was made up for
    if again:
        remove(old)
        os.replace(published, old)  # readers know this name: a death before the next rename loses nothing
    try:
        os.replace(temporary, published)
    except OSError:
        if again:
            os.replace(old, published)
        raise
    fsync_path(published.parent)
    attempt(remove, old)


def _tensor_index(rows_of_ranks: list[list[tuple]], world: int) -> dict[str, Any]:
    """{kind: {name: {"shape": [...], "slices": [[offset, elements, file], ...]}}}, slices in order of offset."""
    tensors: dict[str, Any] = {kind: {} for kind in KINDS}
    for rank, rows in enumerate(rows_of_ranks):
        for name, shape, offset, numel, kind in rows:
            entry = tensors[kind].setdefault(name, {"shape": list(shape), "slices": []})
            entry["slices"].append([offset, numel, file_name(kind, rank, world)])
    for entry in (entry for kind in KINDS for entry in tensors[kind].values()):
        entry["slices"].sort(key=lambda part: part[0])
    return tensors


def attempt(action: Callable[..., Any], *arguments: Any) -> str | None:
    """Returns what went wrong, None when nothing did."""
    try:
        action(*arguments)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        return f"{type(error).__name__}: {error}"
    return None


def _listed(problem: str | None) -> list[str]:
    return [problem] if problem else []


def _newest_name(folder: Path) -> str:
    try:
        folders = step_folders(folder)
    except OSError as error:
        return f"not known ({error.strerror})"
    return folders[0].name if folders else "none"
