"""Which results in a folder are of the weights that it holds now: results stay where weights are made anew."""

from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import step_folders
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.models.weights import weights_sha256
from pretrain.report.files import inside


def digest_here(folder: Path) -> str | None:
    """Returns the SHA-256 of converted weights, or of a run's newest checkpoint; None where there are none.

    It reads converted weights whole, a second or two for 1 GB. What cannot be read is told.
    """
    try:
        if _is_converted(folder):
            return weights_sha256(folder)
        steps = (path for path in step_folders(folder / "checkpoints") if inside(path, "MANIFEST.json"))
        newest = next(steps, None)
        return newest and weights_sha256(newest)
    except (OSError, UserError) as error:
        return warn(f"{folder}: its weights cannot be compared with those of its results ({error})")


def _is_converted(folder: Path) -> bool:
    return inside(folder, "config.json") is not None


def evaluation_compared(evaluation: dict[str, Any], folder: Path, here: str | None) -> dict[str, Any]:
    """Returns records of evaluations with what is of other weights than those here marked as such.

    Converted weights that were evaluated into their run's folder have a digest of their own: nothing is known of those.
    """

    def of_others(record: dict[str, Any]) -> bool:
        is_checkpoint = Path(record["weights"]).parent.name == "checkpoints"
        return (
            is_checkpoint != _is_converted(folder) and here is not None and record["weights_sha256"] not in ("", here)
        )

    others = [{**record, "is_of_others": of_others(record)} for record in evaluation["others"]]
    return {**evaluation, "is_of_others": of_others(evaluation), "others": others}


def finetuning_compared(found: dict[str, Any], here: str | None) -> dict[str, Any]:
    """Returns a result of fine-tuning; from other weights than those here it is no score of the folder's."""
    if here is None or found["weights_sha256"] in ("", here):
        return found
    return {**found, "differs": ["other weights than those here now", *found["differs"]]}
