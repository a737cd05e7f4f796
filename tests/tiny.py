"""A tiny data set and a tiny run, for tests that train."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.config import Config, config_from_dict, config_to_dict
from pretrain.shards.build import build
from pretrain.shards.sources import Item

NUM_CLASSES = 7


def make_shards(folder: Path, *, num_samples: int = 101, image_size: int = 24, seed: int = 0) -> Path:
    """Writes a set of noisy coloured squares in three shards of unequal size and returns its folder."""
    random = np.random.default_rng(seed)
    items = []
    for number in range(num_samples):
        label = number % NUM_CLASSES
        pixels = random.integers(0, 60, (image_size, image_size + number % 5, 3)) + 25 * label
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        items.append(Item(file.getvalue, "png", label, f"square {number}"))
    build(items, [f"shade {i}" for i in range(NUM_CLASSES)], folder, samples_per_shard=40, seed=seed)
    return folder


def tiny_config(shards: Path, output: Path, **changes: Any) -> Config:
    """Returns the config of a 20-step run that takes seconds; `changes` name keys as "engine.zero_stage" would be."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "total_steps": 20,
        "model": {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8},
        "data": {"train": str(shards), "global_batch": 12, "workers": 0},
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "warmup_steps": 3},
        "engine": {"precision": "fp32"},
        "evaluation": {"every_steps": 0, "batch_size": 16},
        "log": {"every_steps": 5, "samples": True},
        "checkpoint": {"every_steps": 5, "keep_last": 3},
    }
    for key, value in changes.items():
        section, _, name = key.replace("__", ".").rpartition(".")
        (values[section] if section else values)[name] = str(value) if isinstance(value, Path) else value
    return config_from_dict(values, "tiny")


def every_other(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of what is tried. Every second one, so that any two values still meet, is for make test-long.

    A value may be a pytest.param of one value with its marks.
    """
    combinations = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        chosen = [axis[place] for axis, place in zip(axes, places)]
        marks = [mark for value in chosen for mark in getattr(value, "marks", ())]
        values = [value.values[0] if hasattr(value, "marks") else value for value in chosen]
        combinations.append(pytest.param(*values, marks=[*marks, pytest.mark.long] if sum(places) % 2 else marks))
    return combinations


def changed(config: Config, **changes: Any) -> Config:
    """Returns `config` with other values for keys such as engine__zero_stage."""
    values = config_to_dict(config)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (values[section] if section else values)[name] = value
    return config_from_dict(values, "changed")
