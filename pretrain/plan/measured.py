"""A step's rate as `tools/benchmark.py train --peer` measured it, for the plan of the same model on the same GPU."""

from pathlib import Path
from typing import NamedTuple

from pretrain.config import Config, ModelConfig, model_name, named_model
from pretrain.errors import UserError
from pretrain.gpus import Device, known_gpu
from pretrain.json_files import Fields, read_bytes
from pretrain.sizes import is_plain


class Measured(NamedTuple):
    """The newest line of a file for the plan's model, precision and device."""

    mfu: float  # of the precision's peak
    batch: int  # images of a forward pass


def read_rows(file: Path) -> list[Fields]:
    """Returns the lines of a file of results, except those of loops that failed. Raises UserError for another file."""
    try:
        lines = read_bytes(file).splitlines()
    except OSError as error:
        raise UserError(f"--from {file}: {error.strerror}") from None
    rows = [Fields.parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    for row in rows:
        row.text("loop")  # a file of another benchmark has none
    return [row for row in rows if "failed" not in row.values]


def measured(rows: list[Fields], config: Config, device: Device) -> Measured | None:
    """Returns what was measured on one rank, compiled or not as the config says, without recomputation; None: nothing.

    Steps on real images are left out: the loader may have bounded them.
    """
    compiled = config.engine.compiles(on_gpu=True, stage=1)  # the extra cost of ZeRO 3 is an assumption of the plan
    for row in reversed(rows):  # the newest is the last
        alone = row.text("loop") == "ours" and row.integer("ranks", 1, 1 << 20) == 1
        alone = alone and row.integer("zero_stage", 1, 3) < 3
        random = row.text("data").startswith("random") and not row.flag("checkpoint_activations")
        same = row.flag("compile") == compiled and row.text("precision").split()[0] == config.engine.precision
        if alone and random and same and known_gpu(row.text("device")) == device and _same_model(row, config.model):
            mfu = 1e12 * row.number("tflop_per_s", 0, 1e6) / device.peak(config.engine.precision)
            return Measured(mfu, row.integer("batch_per_rank", 1, 1 << 20))
    return None


def wanted(rows: list[Fields], config: Config, device: Device) -> str:
    """Returns what is missing from the file, and what it has instead, for an error."""
    found = dict.fromkeys(f"{row.text('model')} on {row.text('device')}" for row in rows)
    compiled = "compiled" if config.engine.compiles(on_gpu=True, stage=1) else "not compiled"
    scaled = "" if config.model.layer_scale is None else " with layer scale"
    return (
        f"no line of {model_name(config.model)}{scaled}, {config.engine.precision}, "
        f"{compiled}, on one {device.name}; it has {', '.join(list(found)[:6]) or 'no line at all'}"
    )


def _same_model(row: Fields, model: ModelConfig) -> bool:
    """Whether a line is for a plain ViT of this shape, patch and image; none is for one with layer scale."""
    named = named_model(row.text("model"))
    sides = row.integer("image_size", 1, 1 << 20), named and named.patch_size
    if named is None or sides != (model.image_size, model.patch_size):
        return False
    other = ModelConfig(name=row.text("model"))
    return is_plain(other) and (other.shape, other.form) == (model.shape, model.form) and model.layer_scale is None
