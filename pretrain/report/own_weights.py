"""Which results in a folder belong to the weights that it holds now: results remain when weights are replaced."""

from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import step_folders
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.models.formats import OF_RUN
from pretrain.models.weights import weights_sha256
from pretrain.report.files import inside


def digests_here(folder: Path) -> set[str]:
    """Returns the SHA-256 of converted weights; of a run, of its checkpoints and of what `launch/chain.sh` converted.

    Reads converted weights whole, a second or two for 1 GB. Where something cannot be read, warns and returns an empty
    set: nothing is known.
    """
    try:
        if _is_converted(folder):
            return {weights_sha256(folder)}
        checkpoints = [path for path in step_folders(folder / "checkpoints") if inside(path, "MANIFEST.json")]
        converted = [folder / "converted"] if _is_converted(folder / "converted") else []
        both = {weights_sha256(path, of_run) for path in checkpoints for of_run in OF_RUN}
        return both | {weights_sha256(path) for path in converted}
    except (OSError, UserError) as error:
        warn(f"{folder}: its weights cannot be compared with those of its results ({error})")
        return set()


def _is_converted(folder: Path) -> bool:
    return inside(folder, "config.json") is not None


def evaluation_compared(evaluation: dict[str, Any], folder: Path, here: set[str]) -> dict[str, Any]:
    """Returns records of evaluations; those of other weights than the ones here are marked as such.

    here: from `digests_here`. Records of converted weights in their run's folder are never marked: converted weights
    have a digest of their own, so nothing is known about them.
    """

    def of_others(record: dict[str, Any]) -> bool:
        is_checkpoint = Path(record["weights"]).parent.name == "checkpoints"
        return is_checkpoint != _is_converted(folder) and _are_gone(record["weights_sha256"], here)

    others = [{**record, "is_of_others": of_others(record)} for record in evaluation["others"]]
    return {**evaluation, "is_of_others": of_others(evaluation), "others": others}


def finetuning_compared(found: dict[str, Any], here: set[str]) -> dict[str, Any]:
    """Returns a result of fine-tuning; if it is from other weights than those here, its "differs" says so."""
    if not _are_gone(found["weights_sha256"], here):
        return found
    return {**found, "differs": ["other weights than those here now", *found["differs"]]}


def _are_gone(digest: str, here: set[str]) -> bool:
    return bool(digest and here) and digest not in here
