"""Which checkpoints are kept."""

import os
import shutil
from pathlib import Path

from pretrain.checkpoint.layout import step_folders, step_of
from pretrain.checkpoint.read import read_state
from pretrain.checkpoint.write import attempt
from pretrain.cluster import ranks
from pretrain.log import warn


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
        if path not in kept and (problem := attempt(lambda path=path: _delete(path))):
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
