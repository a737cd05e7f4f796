"""Fine-tuning on own data: the paper's protocol, shortened for small sets, as a sweep of runs; then one test.

OUT/                           what `running.run_sweeps` makes: select-lr..., final-lr...-seed0, sweep.json, configs/
OUT/data/                      shards of the photos, see own_data.py
OUT/results.json results.md    the score over the seeds, as for any task
OUT/accuracy.json              everything that the page shows, see own_results.py
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.cluster.jobs import STOPPED, run_job
from pretrain.cluster.limits import free_memory_bytes
from pretrain.cluster.local import environment
from pretrain.config import MAY_CHANGE, Config
from pretrain.errors import UserError
from pretrain.finetune.own_data import OwnData
from pretrain.finetune.running import scoring, tell_stopped
from pretrain.finetune.scores import chosen_lr, claim_sweep
from pretrain.finetune.sweep import Options, Start, Sweep, asked_for, final_runs, fitting_size, key_of, write_out
from pretrain.json_files import Fields
from pretrain.plan.choose import MOST_WITHOUT_FORMULA, SURE_SHARE, fitting_micro_batch
from pretrain.shards.pool import num_cores
from pretrain.tasks.table import FineTuning, Task

PAPER_SIZE = 384  # pixels, with a GPU: on a CPU a step at 384 px takes as long as four at 224
_MOST_TIMES = 2  # the weights' own size: the paper goes from 224 to 512; position embeddings are stretched no further
STORED_SIDE = 512  # pixels of the shorter side of stored photos: a crop for 384 px is a part of them
_PAPER_RATES = (0.001, 0.003, 0.01, 0.03)  # the paper's, for its small sets
_RATES = _PAPER_RATES[1:]  # the lowest gets nowhere in few steps
_MOST_STEPS, _LEAST_STEPS, _IMAGES_PER_STEP = 20_000, 80, 5
_MOST_BATCH, _LEAST_BATCH = 512, 16
_MOST_WARMUP = 500
_LARGE = 1_000_000  # images: large enough for any protocol
_CHOOSING = 1000  # images to choose the rate on, as for the paper's CIFAR, but at most a fifth of train
_MICRO_BATCH = "engine.max_micro_batch_size"
_MOST_SECONDS = 1e9  # thirty years


def protocol_for(num_train: int, image_size: int) -> FineTuning:
    """Returns the paper's protocol for so many training images: steps and batch as for its sets of that size.

    A fifth as many steps as images, as CIFAR's 10,000 for 50,000; at most ImageNet's 20,000. The batch is 512, but at
    most an eighth of the set: otherwise a step would see half of a small set, and take minutes on a small machine.
    """
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, num_train // _IMAGES_PER_STEP))
    batch = min(_MOST_BATCH, max(_LEAST_BATCH, 1 << int(math.log2(max(1, num_train // 8)))))
    return FineTuning(
        steps=steps,
        warmup_steps=min(_MOST_WARMUP, steps // 10),
        lr_grid=_RATES,
        dev_fraction=min(0.2, max(0.01, _CHOOSING / num_train)),
        image_size=image_size,
        batch_size=batch,
    )


def default_size(start: Start, *, on_gpu: bool) -> int:
    """Returns the default image size in pixels: the paper's 384 on a GPU, never less than the weights' own.

    At most twice the weights' own, rounded down to whole patches. The weights' own on a CPU, and for timm's networks,
    some of whose windows fit only one size.
    """
    own = start.model.image_size
    if not on_gpu or start.model.timm_name is not None:
        return own
    return fitting_size(max(own, min(PAPER_SIZE, _MOST_TIMES * own)), start.model)


def stored_side(image_size: int) -> int:
    """Returns the shorter side in pixels of stored photos, for a model with this image size."""
    return max(STORED_SIDE, -(-image_size * 4 // 3))


def check_asked(name: str, options: Options, *, image_size: int, on_gpu: bool) -> None:
    """Raises UserError for options that no run can have, such as a wrong key, before the photos are read.

    Assumes a large set in place of the photos: errors that depend on their number are raised by `plan_own`.
    """
    data = OwnData(Path("train"), None, Path("test"), _LARGE, _LARGE, ("a", "b"), ())
    sweep = _sweep_of(name, data, options, image_size=image_size, on_gpu=on_gpu)
    final_runs(sweep, sweep.protocol.lr_grid[0])


def plan_own(name: str, data: OwnData, options: Options, *, image_size: int, on_gpu: bool) -> Sweep:
    """Returns the sweep of own data, and claims its folder, which is `options.out` itself. Raises UserError."""
    sweep = _sweep_of(name, data, options, image_size=image_size, on_gpu=on_gpu)
    config = final_runs(sweep, sweep.protocol.lr_grid[0])[0]
    if not any(key_of(override) == _MICRO_BATCH for override in sweep.overrides):
        usable = _usable_bytes(on_gpu)
        most = config.engine.max_micro_batch_size or MOST_WITHOUT_FORMULA
        fitting = fitting_micro_batch(config, sweep.task.num_classes, options.num_gpus or 1, usable, most)
        sweep = replace(sweep, overrides=(f"{_MICRO_BATCH}={fitting}", *sweep.overrides))
    claim_sweep(sweep)
    return sweep


def _sweep_of(name: str, data: OwnData, options: Options, *, image_size: int, on_gpu: bool) -> Sweep:
    task = Task(
        name=name,
        num_classes=len(data.class_names),
        splits={"train": "", "test": ""},
        num_samples={"train": data.num_train, "test": data.num_test},
        tfds="",
        url="",
        licence="",
        finetuning=protocol_for(data.num_train, image_size),
        tested_on="",
    )
    assert task.finetuning is not None
    protocol = asked_for(task.finetuning, options)
    held_out = max(1, round((protocol.dev_fraction or 0) * data.num_train))
    select = (data.train, data.choose, 0) if data.choose else (data.train, None, held_out)
    if not data.choose and held_out >= data.num_train:
        raise UserError(f"{data.train.parent}: {data.num_train} images to learn from are too few; expected at least 2")
    overrides = (*machine_settings(options.overrides, on_gpu=on_gpu), *options.overrides)
    out = options.out.absolute()
    return Sweep(task, protocol, options.start, out, data.train, select, data.test, options.num_seeds, overrides)


def _usable_bytes(on_gpu: bool) -> float:
    if on_gpu:  # this query allocates nothing, which the runs would lack
        return SURE_SHARE * torch.cuda.get_device_properties(0).total_memory
    free = free_memory_bytes()
    return math.inf if free is None else SURE_SHARE * free


def machine_settings(overrides: Sequence[str], *, on_gpu: bool) -> list[str]:
    """Returns overrides that suit this machine, for keys that the user has not overridden."""
    cores = num_cores()
    own = {"data.workers": str(max(1, min(4, cores - 1)))}
    if not on_gpu:
        own["engine.precision"] = "fp32"  # faster where a CPU has no units for bf16
    given = {key_of(override) for override in overrides}
    return [f"{key}={value}" for key, value in own.items() if key not in given]


def differences(sweep: Sweep) -> list[str]:
    """Returns the sweep's differences from the paper's protocol for a set of this size."""
    config, ours, paper = final_runs(sweep, sweep.protocol.lr_grid[0])[0], sweep.protocol, sweep.task.finetuning
    assert paper is not None
    rates, papers = (" ".join(f"{lr:g}" for lr in grid) for grid in (ours.lr_grid, _PAPER_RATES))
    pairs = {
        "steps": (ours.steps, paper.steps),
        "warm-up": (ours.warmup_steps, paper.warmup_steps),
        "rates": (rates, papers),
        "batch": (config.data.global_batch, _MOST_BATCH),
        "px": (config.model.image_size, fitting_size(PAPER_SIZE, config.model)),
        "precision": (config.engine.precision, "bf16"),
    }
    told = [f"{name} {now} instead of {was}" for name, (now, was) in pairs.items() if now != was]
    told += [f"{sweep.num_seeds} instead of 3 seeds"] * (sweep.num_seeds != 3)
    free = {"engine.precision", "data.global_batch", *MAY_CHANGE} - {"data.order"}  # named above, or the machine's
    return told + [one for one in sweep.overrides if key_of(one) not in free]


def in_words(sweep: Sweep, data: OwnData) -> list[str]:
    """Returns what is about to be done, in lines for the user."""
    protocol, config = sweep.protocol, final_runs(sweep, sweep.protocol.lr_grid[0])[0]
    chosen = f"learning rate {protocol.lr_grid[0]:g}"
    if len(protocol.lr_grid) > 1:
        held_out = sweep.select[2]
        on = f"{held_out:,} of them, held out" if held_out else "the validation images"
        chosen = f"learning rate chosen among {', '.join(f'{lr:g}' for lr in protocol.lr_grid)} on {on}"
    differs = "; ".join(differences(sweep)) or "nothing"
    return [
        f"{sweep.task.name}: {data.num_train:,} images of {len(data.class_names):,} classes to learn from, "
        f"{data.num_test:,} to test on",
        f"{config.total_steps:,} steps of {config.data.global_batch} images at {config.model.image_size} px, {chosen}",
        f"other than the paper's protocol: {differs}",
    ]


@contextmanager
def timed(sweep: Sweep) -> Iterator[Callable[[], float]]:
    """Adds the seconds that its block takes to those of earlier calls; yields a function that returns the sum so far.

    Adds nothing when everything was done already.
    """
    path = sweep.folder / "seconds.json"
    began, before = time.monotonic(), 0.0
    if path.is_file():
        before = Fields.read(path).number("seconds", 0, _MOST_SECONDS)
    was_done = chosen_lr(sweep) is not None and predictions_of(final_run(sweep)).is_file()
    try:
        yield lambda: before + (0.0 if was_done else time.monotonic() - began)
    finally:
        if not was_done:
            write_out(path, json.dumps({"seconds": round(before + time.monotonic() - began, 1)}))


def final_run(sweep: Sweep) -> Config:
    """Returns the run whose weights are the result: seed 0 with the chosen rate."""
    lr = chosen_lr(sweep)
    assert lr is not None  # all selecting runs are done
    return final_runs(sweep, lr)[0]


def predictions_of(final: Config) -> Path:
    """Returns the file with the final run's prediction for each test image."""
    return final.output / final.name / "evaluation" / "predictions.jsonl"


def score_images(sweep: Sweep) -> int:
    """Scores each test image with the final weights, unless that is done; returns 0, or STOPPED when asked to stop.

    Raises UserError when the evaluation fails.
    """
    config = final_run(sweep)
    folder, path = config.output / config.name, predictions_of(config)
    if path.is_file():
        return 0
    words = [sys.executable, *scoring(config), "--val", str(sweep.test), "--predictions", str(path)]
    code = run_job(words, environment(), folder / "lock")
    if code == STOPPED:
        return tell_stopped()
    if code:
        raise UserError(f"{folder}: could not be scored (exit code {code}); what went wrong stands above")
    return 0
