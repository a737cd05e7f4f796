"""Finds results in a folder by file name alone, so that a folder without any is refused before torch is imported."""

from pathlib import Path

from pretrain.errors import UserError

# Files that training, tools/evaluate.py and tools/finetune.py write, in the folder itself or below it.
_NAMES = (
    *("metrics.jsonl", "accuracy.json", "results.json", "evaluation/results.json"),
    *("*/results.json", "finetune*/**/results.json"),
)


def check_any(folder: Path) -> None:
    """Raises UserError for a folder that holds nothing to report."""
    if not any(next(folder.glob(name), None) for name in _NAMES):
        raise nothing_in(folder)


def nothing_in(folder: Path) -> UserError:
    """Returns the error for a folder that holds nothing to report."""
    if not folder.is_dir():
        return UserError(f"{folder}: not found; give the folder of a run, such as runs/NAME")
    if runs := sorted(file.parent for file in folder.glob("*/metrics.jsonl")):
        return UserError(f"{folder}: holds runs; give one of them or several, as {runs[0]}")
    return UserError(
        f"{folder}: nothing to report: no metrics.jsonl of a run that has logged something, and no results of "
        "tools/evaluate.py or tools/finetune.py"
    )
