"""Cells of a benchmark: what is measured in one fresh process, and how such a process is started.

Imports no torch: a wrong argument is told at once, not after the seconds that torch takes.
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
_ROOT = Path(__file__).resolve().parents[2]


def check_name(model: str) -> None:
    """Raises UserError when a model is neither one of ours without its image size, nor one of timm's."""
    named = named_model(model)
    if not model.startswith("timm:") and (named is None or named.image_size is not None):
        sizes = ", ".join([*VIT_SHAPES, *HYBRIDS])
        raise UserError(f"--model {model}: expected SIZE/PATCH with SIZE one of {sizes}, or timm:NAME")


def cell_config(
    model: str, image_size: int, batch: int, precision: str, *, pooling: str | None = None, **engine: bool
) -> Config:
    """Returns the config of a run on random images; `engine` are further keys of its section."""
    check_name(model)
    values = {
        "name": "benchmark",
        "total_steps": 1_000_000,
        "model": {"name": model, "image_size": image_size, **({"pooling": pooling} if pooling else {})},
        "data": {"train": "random", "global_batch": batch},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "engine": {"precision": precision, "max_micro_batch_size": batch, **engine},
    }
    return config_from_dict(values, "benchmark")


def cell_rows(what: str, cell: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Measures a cell in a process of its own; returns the rows that it printed and, when it failed, why.

    what: "train", "model", "save" or "data".
    """
    # A fresh process per cell: what one leaves behind (compiler caches, allocator) must not reach the next.
    command = [sys.executable, "-P", "-m", "pretrain.benchmark", what, json.dumps(cell)]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith(('{"model"', '{"row"'))]
    if result.returncode == 0 and rows:
        return rows, None
    ended = f"ended by signal {-result.returncode}" if result.returncode < 0 else "no message"
    lines = [line for line in result.stderr.splitlines() if line.strip()] or [ended]
    errors = [line for line in lines if re.match(r"(error|[\w.]+(Error|Exception)):", line)]  # messages may go on below
    return rows, (errors or lines)[-1].removeprefix("error: ")
