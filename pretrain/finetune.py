"""Fine-tuning by the paper's protocol: a sweep is a list of independent pretraining runs with derived configs.

`plan_sweep` hands on a Sweep; `selecting_runs` and `final_runs` are its runs, `results` its table, read from what the
runs leave behind. tools/finetune.py starts them. docs/finetuning.md explains the protocol.

OUT/TASK/                      vtab/eurosat is vtab-eurosat here
  sweep.json                   checksums of the weights and the data: the sweep belongs to them
  configs/NAME.yaml            the derived config of each run
  select-lr0.003/ ...          a run per learning rate, scored on images held out of train
  final-lr0.01-seed0/ ...      a run per seed with the chosen rate, scored on the test images at its end
  results.json  results.md     mean and standard deviation over the seeds
OUT/real/results.json          ImageNet's final runs by ReaL labels, which tools/evaluate.py scores in each run's folder
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config import (
    MAY_CHANGE,
    MINUS_ONE_TO_ONE,
    Config,
    ModelConfig,
    Normalisation,
    config_from_dict,
    config_to_dict,
    load_config,
    resume_differences,
)
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.models.weights import read_weights, results_folder, weights_sha256
from pretrain.storage import write_text
from pretrain.tasks.preparation import set_differences
from pretrain.tasks.table import VTAB, FineTuning, Task, task_folder, vtab_means

# Google's code (vision_transformer, vit_jax/input_pipeline.py and configs/common.py): Inception crop of 5 to 100 % of
# the area, flip; evaluation resizes the whole image to the square.
_CROPPED = {"crop": "inception", "crop_area": [0.05, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5}
# VTAB's code (task_adaptation, data_loader.py): the whole image, no augmentation, which would destroy some labels. An
# Inception crop of all of the area is the whole image, whatever its sides.
_WHOLE = {"crop": "inception", "crop_area": [1.0, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.0}
_GOOGLE_RESIZE = {"interpolation": "bilinear", "antialias": False, "eval_transform": "vit"}

# What the sweep sets itself, with the option that sets it.
_OWN_KEYS = {
    "name": "--out",
    "output": "--out",
    "total_steps": "--steps",
    "optim.lr": "--lr",
    "seed": "--seeds",
    "model.image_size": "--image-size",
    "data.train": "--data",
    "data.val": "--data",
    "data.held_out": "--data",
    "init_from": "WEIGHTS",
    "init_new_head": "WEIGHTS",
    "branch_from": "WEIGHTS",
    "model.num_classes": "--task",
    "data.mean": "WEIGHTS",
    "data.std": "WEIGHTS",
    "evaluation.every_steps": "nothing: each run is scored once, at its end",
}
# The highest resolution rows of the paper's Table 2: ImageNet at 512 px for patches of 16, 518 for those of 14, with
# Polyak averages. Its Table 5, and all other tasks, are at 384 px without.
_TABLE_2_SIZES = {16: 512, 14: 518}
_TABLE_2_AVERAGE = 0.9999
_NUM_REAL = 46_837  # validation images that have a ReaL label; the other 3,163 have none
DIVERGED = "DIVERGED"  # file in the folder of a selecting run whose loss did not stay finite


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from."""

    weights: Path | None  # None: random weights of the architecture, to compare with
    model: ModelConfig  # of the weights
    sha256: str | None  # of the weights
    normalisation: Normalisation = MINUS_ONE_TO_ONE  # of the images that the weights were trained on


@dataclass(frozen=True)
class Sweep:
    """All runs of one task from one start."""

    task: Task
    protocol: FineTuning  # the task's, with what was asked for instead
    start: Start
    folder: Path
    train: Path  # manifest of the final runs
    select: tuple[
        Path, Path | None, int
    ]  # manifests to train and to choose on, and images held out where there is none
    test: Path
    num_seeds: int
    overrides: tuple[str, ...]


def read_start(weights: Path, *, from_scratch: bool) -> Start:
    """Returns what the weights are, and the architecture. Raises UserError when they cannot be read."""
    found = read_weights(weights)
    source = found.source.absolute()
    if from_scratch:
        return Start(None, found.model, None, found.normalisation)
    return Start(source, found.model, weights_sha256(source), found.normalisation)


def default_folder(weights: Path, *, from_scratch: bool) -> Path:
    """Returns where results lie when no --out says it."""
    return results_folder(weights, "finetune-from-scratch" if from_scratch else "finetune")


def plan_sweep(
    task: Task,
    start: Start,
    *,
    data: Path,
    out: Path,
    num_seeds: int,
    steps: int | None = None,
    lr_grid: tuple[float, ...] | None = None,
    image_size: int | None = None,
    overrides: Sequence[str] = (),
) -> Sweep:
    """Returns the sweep of a task whose data lies below `data`. Reads no data and writes nothing.

    steps: fewer than the paper's scale the warm-up with them. Raises UserError when the task is not fine-tuned on, or a
    setting is out of range.
    """
    if task.finetuning is None:
        raise UserError(
            f"{task.name} has no training images: fine-tune on imagenet, then score with tools/evaluate.py --tasks"
        )
    for override in overrides:
        if (key := _key(override)) in _OWN_KEYS:
            raise UserError(f"{override}: the sweep sets {key} itself; give {_OWN_KEYS[key]}")
    if num_seeds < 1 or (steps is not None and steps < 1):
        raise UserError(f"--seeds is {num_seeds}, --steps {steps}: expected at least 1")
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size is {image_size}, expected pixels")
    if lr_grid is not None and (not lr_grid or not all(0 < lr < 1e3 for lr in lr_grid)):
        raise UserError(f"--lr is {lr_grid}, expected positive rates, as 0.003,0.01")
    protocol = task.finetuning
    protocol = replace(
        protocol,
        steps=steps or protocol.steps,
        warmup_steps=round(protocol.warmup_steps * min(1.0, (steps or protocol.steps) / protocol.steps)),
        lr_grid=tuple(sorted(set(lr_grid or protocol.lr_grid))),
        image_size=image_size or _fitting(protocol.image_size, start.model),
    )
    splits = {name: (task_folder(task, data) / name / "manifest.json").absolute() for name in task.splits}
    train = splits[_train_split(protocol)]
    if protocol.dev_fraction is None:
        select = splits["train"], splits["val"], 0
    else:
        select = train, None, max(1, round(protocol.dev_fraction * load_manifest(train).num_samples))
    folder = out.absolute() / task.name.replace("/", "-")
    return Sweep(task, protocol, start, folder, train, select, splits[task.test_split], num_seeds, tuple(overrides))


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _train_split(protocol: FineTuning) -> str:
    """The split that final runs train on."""
    return "trainval" if protocol.dev_fraction is None else "train"


def _fitting(image_size: int, model: ModelConfig) -> int:
    """The size, less the pixels that fill no patch: 378 of 384 for H/14, where Google's convolution drops the rest."""
    return image_size if model.timm_name is not None else image_size - image_size % model.patch_size


# --- the runs --------------------------------------------------------------------------------------------------------


def selecting_runs(sweep: Sweep) -> list[Config]:
    """Returns a run per learning rate, from the lowest; none where there is one rate and so nothing to choose."""
    if len(sweep.protocol.lr_grid) == 1:
        return []
    train, val, held_out = sweep.select
    every_steps = math.ceil(sweep.protocol.steps / 10)
    data = {"train": str(train), "val": str(val) if val else None, "held_out": held_out}
    return [_run(sweep, f"select-lr{lr:g}", lr, 0, data, every_steps) for lr in sweep.protocol.lr_grid]


def final_runs(sweep: Sweep, lr: float) -> list[Config]:
    """Returns a run per seed on all training images. Each scores the test images once, after its last step."""
    data = {"train": str(sweep.train), "val": str(sweep.test), "held_out": 0}
    return [
        _run(sweep, f"final-lr{lr:g}-seed{seed}", lr, seed, data, sweep.protocol.steps)
        for seed in range(sweep.num_seeds)
    ]


def _run(sweep: Sweep, name: str, lr: float, seed: int, data: dict[str, Any], evaluate_every_steps: int) -> Config:
    """The protocol as a pretraining run: ViT, B.1.1 and Table 4; what it leaves open as in vision_transformer."""
    start, protocol = sweep.start, sweep.protocol
    # A new head is zero, bias included, and stands on the width: the tanh layer belongs to the old one. The
    # paper's fine-tuning has no stochastic depth.
    model = replace(
        start.model,
        image_size=protocol.image_size,
        num_classes=sweep.task.num_classes,
        representation_size=None,
        head_bias=0.0,
        drop_path=0.0,
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
            **(_WHOLE if sweep.task.group else _CROPPED),
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


@dataclass(frozen=True)
class RunScore:
    """What a finished run reached on the images that it was validated on."""

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
        values = json.loads(ended[0].read_text(encoding="utf-8"))
        return RunScore(float(values["val/top1"]), int(values["val/images"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{ended[0]}: cannot be used ({error!r}); remove {folder} to run it again") from None


def chosen_lr(sweep: Sweep) -> float | None:
    """Returns the rate with the best top-1 on the held-out images, the lowest of equals; None until all are scored.

    The lowest: it changes the weights least. Test images play no part. Raises UserError when no run stayed finite.
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
    """Writes sweep.json, or checks it. Raises UserError when the folder belongs to other weights or data."""
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
        return _write(path, json.dumps(own, indent=2))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move the folder away, or give another --out") from None
    if different := [key for key in own if found.get(key) != own[key]]:
        raise UserError(f"{path}: was begun with another {' and '.join(different)}; give another --out")


# --- what came out ---------------------------------------------------------------------------------------------------


def results(sweep: Sweep) -> dict[str, Any] | None:
    """Returns a task's line of the table from what its runs left, None while no final run is done.

    No times and no paths: the same sweep gives the same bytes however often it was interrupted.
    """
    lr = chosen_lr(sweep)
    if lr is None:
        return None
    found = [score(config) for config in final_runs(sweep, lr)]
    done = [one for one in found if one is not None]
    if not done:
        return None
    selected = [(config.optim.lr, score(config)) for config in selecting_runs(sweep)]
    return {
        "format": "pretrain-finetuning",
        "version": 1,
        "task": sweep.task.name,
        "metric": sweep.task.metric,
        **_over_seeds(done),
        "seeds": [seed for seed, one in enumerate(found) if one is not None],
        "complete": len(done) == sweep.num_seeds,
        "lr": lr,
        "selection": [
            {"lr": rate, "top1": one.top1 if one.num_images else None, "n": one.num_images}
            for rate, one in selected
            if one
        ],
        "from_scratch": sweep.start.weights is None,
        "weights": sweep.start.sha256,
        "model": sweep.start.model.name,
        "image_size": sweep.protocol.image_size,
        "steps": sweep.protocol.steps,
        "differs": differences_from_paper(sweep, min(one.num_images for one in done)),
    }


def _over_seeds(scores: Sequence[RunScore]) -> dict[str, Any]:
    values = [one.top1 for one in scores]
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,  # of a sample: divided by n - 1
        "values": values,
        "n": min(one.num_images for one in scores),
    }


def differences_from_paper(sweep: Sweep, num_scored: int) -> list[str]:
    """Returns what forbids to compare the result with the paper's."""
    paper, ours = sweep.task.finetuning, sweep.protocol
    assert paper is not None
    table_2 = _is_table_2(sweep)
    size = ours.image_size if table_2 else _fitting(paper.image_size, sweep.start.model)
    pairs = {name: (getattr(ours, name), getattr(paper, name)) for name in ("steps", "warmup_steps", "lr_grid")}
    pairs["image_size"] = (ours.image_size, size)
    told = [f"{name}: {shown(now)} instead of {shown(was)}" for name, (now, was) in pairs.items() if now != was]
    told += set_differences(sweep.test.parent.parent)
    if num_scored != (num_images := load_manifest(sweep.test).num_samples):
        told.append(f"{num_scored:,} of {num_images:,} test images could be scored")
    if sweep.num_seeds != 3:
        told.append(f"{sweep.num_seeds} instead of 3 seeds")
    free = {*MAY_CHANGE, "optim.average_decay"} if table_2 else set(MAY_CHANGE)
    return told + [override for override in sweep.overrides if _key(override) not in free]


def _is_table_2(sweep: Sweep) -> bool:
    """Whether this is ImageNet as in the paper's Table 2: at a higher resolution, with averaged weights."""
    config = final_runs(sweep, sweep.protocol.lr_grid[0])[0]
    sizes = (sweep.protocol.image_size, _TABLE_2_SIZES.get(sweep.start.model.patch_size))
    return sweep.task.name == "imagenet" and sizes[0] == sizes[1] and config.optim.average_decay == _TABLE_2_AVERAGE


def real_results(sweep: Sweep, imagenet: dict[str, Any]) -> dict[str, Any] | None:
    """Returns ReaL's line: the final runs of ImageNet's line by ReaL labels, None until all of them are scored."""
    configs = {config.seed: config for config in final_runs(sweep, imagenet["lr"])}
    scores = [real_score(configs[seed]) for seed in imagenet["seeds"]]
    found = [one for one in scores if one is not None]
    if len(found) < len(scores):
        return None
    line = {**imagenet, "task": "real", **_over_seeds(found), "selection": []}
    if line["n"] != _NUM_REAL:
        told = f"{line['n']:,} instead of {_NUM_REAL:,} images with ReaL labels"
        line["differs"] = [*imagenet["differs"], told]
    return line


def real_score(config: Config) -> RunScore | None:
    """Returns what tools/evaluate.py found by ReaL labels for a final run, None when it has not scored them."""
    path = config.output / config.name / "evaluation" / "results.json"
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return next(
            (RunScore(float(row["value"]), int(row["n"])) for row in rows if row["metric"] == "real/top1"), None
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: was not written by tools/evaluate.py ({error!r}); move it away") from None


def shown(value: Any) -> str:
    """Returns a number or numbers as the tables show them."""
    return " ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else str(value)


def write_results(folder: Path, found: dict[str, Any]) -> None:
    """Writes a line's results.json and results.md."""
    scored = "random weights" if found["from_scratch"] else "pretrained weights"
    seeds = f"{len(found['values'])} seed" + "s" * (len(found["values"]) > 1)
    lines = [
        f"# {found['task']}",
        "",
        f"{found['model']} at {found['image_size']} px, {found['steps']:,} steps from {scored}: "
        f"**{percent(found)}** {found['metric']} on {found['n']:,} test images ({seeds}), rate {found['lr']:g}.",
        "",
    ]
    if found["selection"]:
        lines += ["| learning rate | top-1 on held-out training images | images |", "| ---: | ---: | ---: |"]
        for one in found["selection"]:
            cell = "not finite" if one["top1"] is None else f"{one['top1']:.2%}"
            lines.append(f"| {one['lr']:g} | {cell} | {one['n']:,} |")
        lines.append("")
    if found["differs"]:
        lines += [f"Not the paper's protocol: {'; '.join(found['differs'])}.", ""]
    _write(folder / "results.json", json.dumps(found, indent=2))
    _write(folder / "results.md", "\n".join(lines))


def vtab_results(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns VTAB's line: the flat mean over its tasks, and the means of the groups, over the seeds that all have.

    Without all 19 tasks, or with runs missing, the name says so: such a mean is not VTAB's. Raises UserError when there
    is no seed that all tasks have.
    """
    by_task = {one["task"]: one for one in found}
    names = [name for name in VTAB if name in by_task]
    seeds = [seed for seed in by_task[names[0]]["seeds"] if all(seed in by_task[name]["seeds"] for name in names)]
    if not seeds:
        raise UserError("no seed is done in all of these tasks; run the missing ones first")
    scores = {name: dict(zip(by_task[name]["seeds"], by_task[name]["values"])) for name in names}
    means = [vtab_means({name: scores[name][seed] for name in names}) for seed in seeds]
    values = [of_seed["vtab"] for of_seed in means]
    complete = len(names) == len(VTAB) and all(by_task[name]["complete"] for name in names)
    rates = {by_task[name]["lr"] for name in names}
    return {
        "format": "pretrain-finetuning",
        "version": 1,
        "task": "vtab" if complete else f"vtab, incomplete: {len(names)} of {len(VTAB)} tasks",
        "metric": "top1",
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        "seeds": seeds,
        "complete": complete,
        "lr": rates.pop() if len(rates) == 1 else None,
        "n": sum(by_task[name]["n"] for name in names),
        "groups": {name: statistics.fmean(of[name] for of in means) for name in means[0] if name != "vtab"},
        "tasks": {name: statistics.fmean(scores[name][seed] for seed in seeds) for name in names},
        "missing": [name for name in VTAB if name not in by_task],
        "from_scratch": by_task[names[0]]["from_scratch"],
        "differs": list(dict.fromkeys(text for name in names for text in by_task[name]["differs"])),
    }


def write_vtab(out: Path, found: dict[str, Any]) -> None:
    """Writes VTAB's results.json and results.md into OUT/vtab."""
    lines = [f"# {found['task']}", "", f"Mean of the tasks: **{percent(found)}**.", "", "| | top-1 |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2%} |" for name, value in (found["tasks"] | found["groups"]).items()]
    if found["missing"]:
        lines += ["", f"Missing: {', '.join(found['missing'])}."]
    if found["differs"]:
        lines += ["", f"Not the paper's protocol: {'; '.join(found['differs'])}."]
    _write(out / "vtab" / "results.json", json.dumps(found, indent=2))
    _write(out / "vtab" / "results.md", "\n".join(lines) + "\n")


def percent(found: dict[str, Any]) -> str:
    """Returns mean and standard deviation as the tables show them."""
    return f"{found['mean']:.2%}" + (f" ± {100 * found['std']:.2f}" if found["std"] is not None else "")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n", shared=True)  # elements of a job array write the same file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
