"""A sweep: fine-tuning by the paper's protocol as a list of independent pretraining runs with derived configs.

`plan_sweep` returns a Sweep; `selecting_runs` and `final_runs` are its runs. running.py starts them, scores.py reads
their scores, results.py makes the table. docs/finetuning.md explains the protocol.

OUT/TASK/                      vtab/eurosat is vtab-eurosat here
  sweep.json                   checksums of the weights and the data: the sweep belongs to them
  configs/NAME.yaml            the derived config of each run
  select-lr0.003/ ...          a run per learning rate, scored on images held out of train
  final-lr0.01-seed0/ ...      a run per seed with the chosen rate, scored on the test images at its end
  results.json  results.md     mean and standard deviation over the seeds
OUT/real/results.json          ImageNet's final runs by ReaL labels, which tools/evaluate.py scores in each run's folder
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain import cli
from pretrain.config import MINUS_ONE_TO_ONE, Config, ModelConfig, Normalisation, config_from_dict
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.models.weights import read_weights, weights_sha256
from pretrain.storage import write_text
from pretrain.tasks.table import FineTuning, Task, task_folder

# Google's code (vision_transformer, vit_jax/input_pipeline.py and configs/common.py): Inception crop of 5 to 100 % of
# the area, flip; evaluation resizes the whole image to the square.
_CROPPED = {"crop": "inception", "crop_area": [0.05, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5}
_VTAB_CROP_SHARE = 384 / 448  # the image is resized to a square of 448 pixels, of which 384 are used
_GOOGLE_RESIZE = {"interpolation": "bilinear", "antialias": False, "eval_transform": "vit"}

_DATA = "--data with --task, --test with --train"
# Keys that the sweep sets itself, with the option to use instead.
_OWN_KEYS = {
    "name": "--out",
    "output": "--out",
    "total_steps": "--steps",
    "total_epochs": "--steps",
    "epochs": "--steps",  # as other programs call it
    "optim.lr": "--lr",
    "lr": "--lr",
    "seed": "--seeds",
    "model.image_size": "--image-size",
    "data.train": _DATA,
    "data.val": _DATA,
    "data.held_out": _DATA,
    "data.subset": "nothing: a run takes all of a task's images",
    "init_from": "WEIGHTS",
    "init_new_head": "WEIGHTS",
    "branch_from": "WEIGHTS",
    "model.num_classes": "--task; of own images their classes are counted",
    "data.mean": "WEIGHTS",
    "data.std": "WEIGHTS",
    "evaluation.every_steps": "nothing: each run is scored once, at its end",
    "checkpoint.copy_to": "nothing: sweeps name their runs alike, and a second place knows them by their names",
}


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from."""

    weights: Path | None  # None: random weights of the architecture, to compare with
    model: ModelConfig  # of the weights
    sha256: str | None  # of the weights
    normalisation: Normalisation = MINUS_ONE_TO_ONE  # that the weights were trained with


@dataclass(frozen=True)
class Options:
    """The user's options, the same for each task."""

    start: Start
    data: Path
    out: Path
    num_seeds: int
    steps: int | None = None  # with fewer than the paper's, the warm-up shrinks in proportion
    lr_grid: tuple[float, ...] | None = None
    image_size: int | None = None
    overrides: tuple[str, ...] = ()
    num_gpus: int | None = None  # ranks; None: all GPUs, or one CPU rank


@dataclass(frozen=True)
class Sweep:
    """All runs of one task from one start."""

    task: Task
    protocol: FineTuning  # the task's, changed by the user's options
    start: Start
    folder: Path
    train: Path  # manifest of the final runs
    select: tuple[Path, Path | None, int]  # manifests to train and choose on; None: hold out so many images
    test: Path
    num_seeds: int
    overrides: tuple[str, ...]


def read_start(weights: Path, *, from_scratch: bool) -> Start:
    """Returns the weights as a start; `from_scratch`: only their architecture. Raises UserError if unreadable."""
    found = read_weights(weights)
    source = found.source.absolute()
    if from_scratch:
        return Start(None, found.model, None, found.normalisation)
    return Start(source, found.model, weights_sha256(source), found.normalisation)


def plan_sweep(task: Task, options: Options) -> Sweep:
    """Returns the sweep of a task whose data lies below `options.data`. Reads manifests, no images; writes nothing.

    Raises UserError when the task has no training images, or an override is of a key that the sweep sets itself.
    """
    if task.finetuning is None:
        raise UserError(
            f"{task.name} has no training images: fine-tune on imagenet, then score with tools/evaluate.py --tasks"
        )
    protocol = asked_for(task.finetuning, options)
    splits = {name: (task_folder(task, options.data) / name / "manifest.json").absolute() for name in task.splits}
    if protocol.dev_fraction is None:
        train, select = splits["trainval"], (splits["train"], splits["val"], 0)
    else:
        train = splits["train"]
        select = train, None, max(1, round(protocol.dev_fraction * load_manifest(train).num_samples))
    folder, test = options.out.absolute() / task.name.replace("/", "-"), splits[task.test_split]
    return Sweep(task, protocol, options.start, folder, train, select, test, options.num_seeds, options.overrides)


def asked_for(protocol: FineTuning, options: Options) -> FineTuning:
    """Returns a protocol changed by the options. Raises UserError for an override of a key that the sweep sets."""
    steps, lr_grid, image_size = options.steps, options.lr_grid, options.image_size
    for override in options.overrides:
        if (key := key_of(override)) in _OWN_KEYS:
            raise UserError(f"{override}: the sweep sets {key} itself; give {_OWN_KEYS[key]}")
    return replace(
        protocol,
        steps=steps or protocol.steps,
        warmup_steps=round(protocol.warmup_steps * min(1.0, (steps or protocol.steps) / protocol.steps)),
        lr_grid=tuple(sorted(set(lr_grid or protocol.lr_grid))),
        image_size=image_size or fitting_size(protocol.image_size, options.start.model),
    )


def key_of(override: str) -> str:
    """Returns the key of KEY=VALUE."""
    return override.partition("=")[0].strip()


def fitting_size(image_size: int, model: ModelConfig) -> int:
    """Returns the size rounded down to whole patches: 378 for 384 and H/14. Google's convolution drops the rest.

    The size of timm's networks is left as it is.
    """
    return image_size if model.timm_name is not None else image_size - image_size % model.patch_size


# --- the runs --------------------------------------------------------------------------------------------------------


def selecting_runs(sweep: Sweep) -> list[Config]:
    """Returns a run per learning rate, from the lowest; none where there is only one rate and nothing to choose."""
    if len(sweep.protocol.lr_grid) == 1:
        return []
    train, val, held_out = sweep.select
    every_steps = math.ceil(sweep.protocol.steps / 10)
    data = {"train": str(train), "val": str(val) if val else None, "held_out": held_out}
    return [_run(sweep, f"select-lr{lr:g}", lr, 0, data, every_steps) for lr in sweep.protocol.lr_grid]


def final_runs(sweep: Sweep, lr: float) -> list[Config]:
    """Returns a run per seed on all training images. Each is scored on the test images once, after its last step."""
    data = {"train": str(sweep.train), "val": str(sweep.test), "held_out": 0}
    return [
        _run(sweep, f"final-lr{lr:g}-seed{seed}", lr, seed, data, sweep.protocol.steps)
        for seed in range(sweep.num_seeds)
    ]


def _run(sweep: Sweep, name: str, lr: float, seed: int, data: dict[str, Any], evaluate_every_steps: int) -> Config:
    """Returns the protocol (ViT paper, B.1.1 and Table 4) as a run; what it leaves open is as in vision_transformer."""
    start, protocol = sweep.start, sweep.protocol
    # The new head is zero, bias included, and has no tanh layer before it, which belongs to the old head. The
    # paper's fine-tuning has no stochastic depth.
    model = replace(
        start.model,
        image_size=protocol.image_size,
        num_classes=sweep.task.num_classes,
        representation_size=None,
        head_bias=0.0,
        drop_path=0.0,
        init="google",
    )
    values = {
        "name": name,
        "output": str(sweep.folder),
        "seed": seed,
        "total_steps": protocol.steps,
        "init_from": str(start.weights) if start.weights else None,
        "init_new_head": start.weights is not None,
        "model": asdict(model),
        "data": {
            **data,
            "global_batch": protocol.batch_size,
            **_training_images(sweep),
            **_GOOGLE_RESIZE,
            **start.normalisation._asdict(),
        },
        "optim": {
            "name": "sgd",
            "lr": lr,
            "momentum": 0.9,
            "moment_dtype": "bf16",
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_steps": protocol.warmup_steps,
        },
        "engine": {"max_micro_batch_size": 64},
        "evaluation": {"every_steps": evaluate_every_steps},
        "log": {"every_steps": min(50, math.ceil(protocol.steps / 50))},
        "checkpoint": {"every_steps": min(1000, math.ceil(protocol.steps / 5))},
    }
    return config_from_dict(values, sweep.task.name, sweep.overrides)


def _training_images(sweep: Sweep) -> dict[str, Any]:
    """Returns how training sees the images. Some labels of VTAB would not outlive a crop or a flip."""
    if sweep.task.group is None:
        return _CROPPED
    crop_share = _VTAB_CROP_SHARE if sweep.protocol.crops else 1.0
    return {"crop": "squashed", "crop_share": crop_share, "flip": 0.5 if sweep.protocol.flips else 0.0}


def write_out(path: Path, text: str) -> None:
    """Writes a file into the results folder. Raises UserError when it cannot be written."""
    with cli.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n", shared=True)  # elements of a job array write the same file
