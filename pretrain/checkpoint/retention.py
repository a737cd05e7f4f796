"""Which checkpoints are kept."""

import os
from pathlib import Path

from pretrain.checkpoint.layout import step_folders, step_of
from pretrain.checkpoint.read import read_state
from pretrain.checkpoint.write import attempt
from pretrain.cluster import ranks
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.storage import remove


def apply_retention(folder: Path, *, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Deletes old checkpoints, never below `keep_last`, pinned steps or the best one. Rank 0; others do nothing.

    Best is the largest "val/top1" in state.json's "metrics"; among equals the earliest. A folder that cannot
    be listed is a warning: the next save tries again.
    """
    if ranks.is_main() and (problem := attempt(_delete_old, folder, keep_last, keep_every_steps, keep_best)):
        warn(f"{folder}: old checkpoints could not be looked for ({problem}); the next save tries again")


def _delete_old(folder: Path, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    folders = step_folders(folder)
    kept = set(folders[:keep_last])
    if keep_every_steps:
        kept |= {path for path in folders if step_of(path) % keep_every_steps == 0}
    if keep_best:
        scores = {path: _validation_score(path) for path in reversed(folders)}
        scored = {path: score for path, score in scores.items() if score is not None}
        kept |= {max(scored, key=lambda path: scored[path])} if scored else set()
    for path in folders:
        if path not in kept and (problem := attempt(_delete, path)):
            warn(f"{path}: an old checkpoint could not be deleted ({problem})")


def _delete(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}")  # one rename, so that no half-deleted folder looks complete
    remove(trash)
    os.replace(path, trash)
    remove(trash)


def _validation_score(path: Path) -> float | None:
    try:
        return Fields.of(read_state(path), str(path)).part("metrics").number("val/top1", 0, 1)
    except (OSError, UserError):  # also one without a score
        return None
