"""What only a GPU can show. Skipped elsewhere; run with `pytest -m gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import make_shards, tiny_config

from pretrain.checkpoint.behind import HostCopies
from pretrain.checkpoint.find import newest_valid
from pretrain.cluster.local import launcher
from pretrain.config import config_to_dict

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train_on_gpu(shards: Path, output: Path, *overrides: str, num_ranks: int = 1) -> None:
    output.mkdir(exist_ok=True)
    file = output / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(tiny_config(shards, output, engine__precision="bf16"))))
    command = [*launcher(num_ranks), str(ROOT / "launch" / "pretrain.py"), "--config", str(file), *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    subprocess.run(command, check=True, env=environment, timeout=500)


ACCUMULATED = "engine.max_micro_batch_size=5"  # 12 images in three micro-batches
EVERYTHING = ("optim.average_decay=0.9", "evaluation.every_steps=5", "data.held_out=20", "model.drop_path=0.1")


@pytest.mark.parametrize(
    "changes",
    [
        ("engine.zero_stage=1",),
        ("engine.zero_stage=2",),
        ("engine.zero_stage=3",),
        ("engine.zero_stage=1", ACCUMULATED),
        ("engine.zero_stage=2", ACCUMULATED),
        ("engine.zero_stage=1", "engine.compile=true", *EVERYTHING),
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_the_same_run(changes: tuple[str, ...], tmp_path: Path) -> None:
    """On one GPU, with dropout: stopped half-way and resumed equals uninterrupted, bit for bit."""
    shards = make_shards(tmp_path / "squares")
    recipe = (*changes, "model.dropout=0.1", "data.workers=1", "optim.schedule=rsqrt")
    train_on_gpu(shards, tmp_path / "whole", *recipe)
    train_on_gpu(shards, tmp_path / "parts", *recipe, "total_steps=10")
    train_on_gpu(shards, tmp_path / "parts", *recipe, "total_steps=20")
    first, second = (newest_valid(tmp_path / name / "tiny" / "checkpoints") for name in ("whole", "parts"))
    assert first and second
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def losses(output: Path) -> list[float]:
    lines = (output / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_are_one(stage: int, precision: str, tmp_path: Path) -> None:
    """Over NCCL: the losses of one GPU, but for rounding."""
    shards = make_shards(tmp_path / "squares")
    recipe = (f"engine.zero_stage={stage}", f"engine.precision={precision}", ACCUMULATED, "log.every_steps=1")
    for num_ranks in (1, 2):
        train_on_gpu(shards, tmp_path / str(num_ranks), *recipe, num_ranks=num_ranks)
    one, two = (losses(tmp_path / str(num_ranks)) for num_ranks in (1, 2))
    assert len(one) == 20 and two == pytest.approx(one, rel=1e-4 if precision == "fp32" else 3e-2)


def test_out_of_memory_is_told(tmp_path: Path) -> None:
    """Exit code 2, one line that names the key."""
    result = benchmark("--model", "B/16", "--batch", "30000", "--compile", "off", check=False)
    assert result.returncode == 2 and "engine.max_micro_batch_size: 30000 images at a time" in result.stderr


def test_a_peer_is_measured_beside_us(tmp_path: Path) -> None:
    """A small cell, compiled and eager, with a measured peak."""
    small = ["--image-size", "32", "--batch", "8", "--steps", "3", "--warmup", "2", "--rounds", "2"]
    benchmark("--peer", "--model", "Ti/16", *small, "--out", str(tmp_path / "cells.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert {(row["loop"], row["compile"]) for row in rows} == {
        (loop, compiled) for loop in ("ours", "timm", "plain") for compiled in (True, False)
    }
    assert all(row["parts_ms"]["forward"] > 0 and row["measured_peak_tflop_per_s"] > 0 for row in rows)


def benchmark(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "train", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.run(command, check=check, env=environment, capture_output=True, text=True, timeout=500)


def test_benchmark_reports_mfu() -> None:
    """One eager cell of Ti/16 on the GPU."""
    assert '"images_per_s"' in benchmark("--model", "Ti/16", "--compile", "off").stdout


def test_copies_are_pinned_and_whole(tmp_path: Path) -> None:
    """Taken on the device's stream, waited for, written: the bytes of safetensors; later steps do not touch them."""
    tensors = {"b": torch.arange(3_000_001.0, device="cuda"), "a": torch.ones(5, dtype=torch.bfloat16, device="cuda")}
    save_file(tensors, tmp_path / "theirs")
    copy = HostCopies().take({"ours": tensors})["ours"]
    for tensor in tensors.values():
        tensor.zero_()
    copy.write(tmp_path / "ours")
    assert copy._bytes.is_pinned()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
