"""Scores of a sweep's runs, read from their folders, and the choice of the learning rate."""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import MAX_IMAGE_SIZE, Config, config_to_dict, load_config, resume_differences
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.finetune.sweep import Sweep, selecting_runs, write_out
from pretrain.json_files import Fields
from pretrain.models.weights import weights_sha256

_MAX_IMAGES = 1 << 48  # of a data set
DIVERGED = "DIVERGED"  # file in the folder of a selecting run whose loss did not stay finite


@dataclass(frozen=True)
class RunScore:
    """A finished run's score on its validation images."""

    top1: float  # -1 where the loss did not stay finite
    num_images: int


def score(config: Config) -> RunScore | None:
    """Returns the score of a run, None while it is not done. Raises UserError when it ran with other settings."""
    folder = config.output / config.name
    ended = [folder / name for name in ("DONE", DIVERGED) if (folder / name).is_file()]
    if not ended:
        return None
    saved = config_to_dict(load_config(folder / "config.yaml"))
    if differences := resume_differences(saved, config):
        raise UserError(
            f"{folder}: was run with other settings ({'; '.join(differences)}); give the old values, or another --out"
        )
    if ended[0].name == DIVERGED:
        return RunScore(-1.0, 0)
    try:
        values = Fields.read(ended[0])
        return RunScore(values.number("val/top1", 0, 1), int(values.number("val/images", 0, _MAX_IMAGES)))
    except (OSError, UserError) as error:
        raise UserError(f"{error}: cannot be used as a score; remove {folder} to run it again") from None


def chosen_lr(sweep: Sweep) -> float | None:
    """Returns the rate with the best top-1 on the held-out images; None until all are scored.

    Of equals, the lowest, which changes the weights least. Test images play no part. Raises UserError when no run's
    loss stayed finite.
    """
    rates = sweep.protocol.lr_grid
    if len(rates) == 1:
        return rates[0]
    scores = [score(config) for config in selecting_runs(sweep)]
    if any(found is None for found in scores):
        return None
    best, lr = max((found.top1, -lr) for found, lr in zip(scores, rates) if found)
    if best < 0:
        raise UserError(f"{sweep.folder}: the loss did not stay finite with any of {rates}; give a lower --lr")
    return -lr


def claim_sweep(sweep: Sweep) -> None:
    """Writes sweep.json, or checks the existing one. Raises UserError when it names other weights or data."""
    path = sweep.folder / "sweep.json"
    used = {"train": sweep.select[0], "val": sweep.select[1], "all of train": sweep.train, "test": sweep.test}
    own = {
        "format": "pretrain-sweep",
        "version": 1,
        "task": sweep.task.name,
        "weights": sweep.start.sha256,
        "data": {name: load_manifest(manifest).sha256 for name, manifest in used.items() if manifest},
    }
    if not path.is_file():
        return write_out(path, json.dumps(own, indent=2))
    try:
        found = Fields.read(path).values
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move the folder away, or give another --out") from None
    if different := [key for key in own if found.get(key) != own[key]]:
        raise UserError(f"{path}: was begun with another {' and '.join(different)}; give another --out")


def _is_of(record: Fields, image_size: int, checkpoint: Path, digest: str | None) -> bool:
    """Returns whether a record is of a checkpoint: by digest, or by name where the checkpoint has been removed."""
    if record.integer("image_size", 1, MAX_IMAGE_SIZE) != image_size:
        return False
    if digest is not None:
        return record.text("weights_sha256") == digest
    return Path(record.text("weights")).name == checkpoint.name and record.text("of_run", "") != "trained"


def final_sha256(config: Config) -> str | None:
    """Returns the digest of a final run's last checkpoint, None where it does not exist."""
    final = _final_checkpoint(config)
    return weights_sha256(final) if final.is_dir() else None


def _final_checkpoint(config: Config) -> Path:
    return config.output / config.name / "checkpoints" / f"step-{config.total_steps:010d}"


def real_score(config: Config) -> RunScore | None:
    """Returns a final run's score by ReaL labels, as tools/evaluate.py found it; None when it has not been scored.

    The file also holds records of other checkpoints of the run; the last one to be evaluated comes first.
    """
    path = config.output / config.name / "evaluation" / "results.json"
    if not path.is_file():
        return None
    final, digest = _final_checkpoint(config), final_sha256(config)
    try:
        last = Fields.read(path)
        every = last, *last.parts("others", ())
        records = [one for one in every if _is_of(one, config.model.image_size, final, digest)]
        rows = [row for one in records for row in one.parts("rows")]
        found = next((row for row in rows if row.text("metric") == "real/top1"), None)
        return found and RunScore(found.number("value", 0, 1), found.integer("n", 0, _MAX_IMAGES))
    except (OSError, UserError) as error:
        raise UserError(f"{path}: was not written by tools/evaluate.py ({error}); move it away") from None
