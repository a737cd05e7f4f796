"""The yardstick: the real training step, timed, with figures that follow from each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import ModelConfig
from pretrain.models.profile import train_flops

ROOT = Path(__file__).resolve().parents[1]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_cell_is_one_json_line(tmp_path: Path) -> None:
    """Rate, FLOP/s and step time agree; a CPU has no peak and so no MFU; the file gets the same line."""
    cell = ["--model", "Ti/16", "--image-size", "32", "--batch", "4", "--steps", "4", "--compile", "off"]
    result = benchmark(*cell, "--out", str(tmp_path / "cells.jsonl"))
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert json.loads((tmp_path / "cells.jsonl").read_text()) == values
    assert values["images_per_s"] == pytest.approx(4000 / values["ms_per_step"]["median"], rel=1e-3)
    flops = train_flops(ModelConfig(name="Ti", image_size=32), 1000)
    assert values["tflop_per_s"] == pytest.approx(values["images_per_s"] * flops / 1e12, abs=1e-4)
    assert values["mfu"] is None and values["compile"] is False and values["zero_stage"] == 1
    assert values["ms_per_step"]["p10"] <= values["ms_per_step"]["median"] <= values["ms_per_step"]["p90"]


def test_a_wrong_model_is_told_before_anything_runs() -> None:
    """Exit code 2, one line."""
    result = benchmark("--model", "B/16", "X/16")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "--model X/16: expected SIZE/PATCH" in result.stderr
