"""What only a GPU can show. Skipped elsewhere; run with `pytest -m gpu`."""

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


def train_on_gpu(shards: Path, output: Path, *overrides: str) -> None:
    output.mkdir(exist_ok=True)
    file = output / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(tiny_config(shards, output, engine__precision="bf16"))))
    command = [*launcher(1), str(ROOT / "launch" / "pretrain.py"), "--config", str(file), *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    subprocess.run(command, check=True, env=environment, timeout=500)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_is_the_same_run(stage: int, tmp_path: Path) -> None:
    """On one GPU, with dropout: stopped half-way and resumed equals uninterrupted, bit for bit."""
    shards = make_shards(tmp_path / "squares")
    recipe = (f"engine.zero_stage={stage}", "model.dropout=0.1", "data.workers=1", "optim.schedule=rsqrt")
    train_on_gpu(shards, tmp_path / "whole", *recipe)
    train_on_gpu(shards, tmp_path / "parts", *recipe, "total_steps=10")
    train_on_gpu(shards, tmp_path / "parts", *recipe, "total_steps=20")
    first, second = (newest_valid(tmp_path / name / "tiny" / "checkpoints") for name in ("whole", "parts"))
    assert first and second
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_benchmark_reports_mfu() -> None:
    """One eager cell of Ti/16 on the GPU."""
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "train", "--model", "Ti/16", "--compile", "off"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=300)
    assert '"images_per_s"' in result.stdout


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
