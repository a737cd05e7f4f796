"""Which checkpoints are kept; deletes the others."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from pretrain.checkpoint.layout import step_folders, step_of
from pretrain.checkpoint.read import read_state
from pretrain.checkpoint.write import attempt
from pretrain.cluster import ranks
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.storage import remove


def apply_retention(
    folder: Path, *, keep_last: int, keep_every_steps: int, keep_best: bool, spare: Path | None = None
) -> None:
    """Deletes old checkpoints, except the last `keep_last`, each keep_every_steps and the best. Acts on rank 0 only.

    spare: one that is being read, and stays until the next call. A folder that cannot be listed is a warning: the next
    save tries again.
    """

    def delete_old() -> None:
        by_step = {step_of(path): path for path in step_folders(folder)}
        score = (lambda step: _score_of(by_step[step])) if keep_best else None
        for step in by_step.keys() - kept_steps(list(by_step), keep_last, keep_every_steps, score):
            if by_step[step] != spare and (problem := attempt(_delete, by_step[step])):
                warn(f"{by_step[step]}: an old checkpoint could not be deleted ({problem})")

    if ranks.is_main() and (problem := attempt(delete_old)):
        warn(f"{folder}: old checkpoints could not be looked for ({problem}); the next save tries again")


def kept_steps(
    steps: Sequence[int], keep_last: int, keep_every_steps: int, score: Callable[[int], float | None] | None
) -> set[int]:
    """Returns which of `steps`, given newest first, are kept.

    score: returns a step's score, or None; the largest is the best, among equals the earliest. None: no best is kept.
    """
    kept = set(steps[:keep_last])
    if keep_every_steps:
        kept |= {step for step in steps if step % keep_every_steps == 0}
    if score is not None:
        scores = {step: value for step in reversed(steps) if (value := score(step)) is not None}
        kept |= {max(scores, key=lambda step: scores[step])} if scores else set()
    return kept


def _delete(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}")  # one rename, so that no half-deleted folder looks complete
    remove(trash)
    os.replace(path, trash)
    remove(trash)


def validation_score(state: Fields) -> float:
    """Returns "val/top1" of what a state.json holds. Raises UserError without one."""
    return state.part("metrics").number("val/top1", 0, 1)


def _score_of(path: Path) -> float | None:
    try:
        return _score_read(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@cache
def _score_read(path: Path, _written_ns: int) -> float | None:
    """Cached: otherwise each save would read the state of all kept checkpoints again, class names included.

    A checkpoint that replaces another of the same step has another time.
    """
    try:
        return validation_score(Fields.of(read_state(path), str(path)))
    except UserError:  # without a score
        return None
