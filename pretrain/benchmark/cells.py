"""Cells of a benchmark: a cell is what one fresh process measures; this starts such processes.

Imports no torch, so that a wrong argument is refused at once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.config import HYBRIDS, VIT_SHAPES, Config, config_from_dict, named_model
from pretrain.errors import UserError

NUM_CLASSES = 1000
LOOPS = ("ours", "timm", "timm-tanh", "plain")  # what train.py times, and loops.py builds
TIMEOUT_S = 24 * 3600  # of a collective: other ranks wait for rank 0 while other loops start and have their turn
RANDOM = "random"  # as data.train: generated images, none are read
RANDOM_IMAGES = "random, on the device"  # their name in a row
ROOT = Path(__file__).resolve().parents[2]


def check_name(model: str) -> None:
    """Raises UserError unless a model is one of timm's, or one of ours named without an image size."""
    named = named_model(model)
    if not model.startswith("timm:") and (named is None or named.image_size is not None):
        sizes = ", ".join([*VIT_SHAPES, *HYBRIDS])
        raise UserError(f"--model {model}: expected SIZE/PATCH with SIZE one of {sizes}, or timm:NAME")


def cell_config(
    model: str,
    image_size: int,
    batch: int,
    precision: str,
    *,
    pooling: str | None = None,
    data: dict[str, Any] | None = None,
    **engine: Any,
) -> Config:
    """Returns the config of a run, on random images unless `data` says otherwise; `engine`: keys of its section."""
    check_name(model)
    values = {
        "name": "benchmark",
        "total_steps": 1_000_000,
        "model": {"name": model, "image_size": image_size, **({"pooling": pooling} if pooling else {})},
        "data": {"train": RANDOM, "global_batch": batch} | (data or {}),
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "engine": {"precision": precision, "max_micro_batch_size": batch, "timeout_s": TIMEOUT_S} | engine,
    }
    return config_from_dict(values, "benchmark")


def cell_rows(what: str, cell: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Measures a cell in a process of its own; returns the rows that it printed and, if it failed, the reason.

    what: "train", "bottleneck", "model", "save", "data" or "device".
    """
    # A fresh process per cell: state of one (compiler caches, allocator) must not affect the next.
    result = subprocess.run(command_of(what, cell), env=environment_of(), capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith(('{"model"', '{"row"'))]
    if result.returncode == 0 and rows:
        return rows, None
    return rows, why_it_failed(result.returncode, result.stderr)


def last_row(what: str, cell: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the last row of a cell. Raises UserError, which begins with the name, when it fails."""
    rows, failure = cell_rows(what, cell)
    if failure:
        raise UserError(f"{name}: {failure}")
    return rows[-1]


def command_of(what: str, cell: dict[str, Any]) -> list[str]:
    """Returns the command that measures a cell."""
    return [sys.executable, "-P", "-m", "pretrain.benchmark", what, json.dumps(cell)]


def environment_of(threads: int | None = None) -> dict[str, str]:
    """Returns the environment of such a process. threads: on a CPU; None: all of its share."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def why_it_failed(code: int, stderr: str) -> str:
    """Returns the line of a process's stderr that says why it ended."""
    ended = f"ended by signal {-code}" if code < 0 else "no message"
    lines = [line for line in stderr.splitlines() if line.strip()] or [ended]
    errors = [line for line in lines if re.match(r"(error|[\w.]+(Error|Exception)):", line)]  # messages may go on below
    return (errors or lines)[-1].removeprefix("error: ")
