"""Checkpoints and runs with random weights, made without training; and the command lines, run as users run them."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import torch
from ranks import run_forked
from torch import nn

from pretrain.checkpoint.layout import Slice
from pretrain.checkpoint.write import Save
from pretrain.config import Config, ModelConfig, config_to_dict, config_to_yaml
from pretrain.models.build import build_model
from pretrain.models.equivalent import own_tensors
from pretrain.models.tensors import LazyTensor, Weights

ROOT = Path(__file__).resolve().parents[1]


def save_checkpoint(*contents: Any) -> bool:
    """A save of what `Save` takes, waited for; whether it was published. Called by all ranks."""
    return Save(*contents).finish()


def tiny_model(**changes: Any) -> ModelConfig:
    """A ViT of width 32 and depth 2 for images of 16 pixels, 4 patches."""
    shape: dict[str, Any] = {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
    return ModelConfig(**{**shape, "image_size": 16, "patch_size": 8, **changes})


def in_memory(model: nn.Module, config: ModelConfig, class_names: tuple[str, ...] = (), **use: Any) -> Weights:
    """A model as weights that were read from nowhere."""
    held = {name: tensor.detach() for name, tensor in own_tensors(model).items()}
    tensors = {name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in held.items()}
    num_classes = len(held["head.bias"]) if "head.bias" in held else 0
    return Weights(Path("memory"), config, tensors, num_classes, class_names, **use)


def one_line(error: BaseException) -> str:
    """Checks that an error's message is one line, and returns it."""
    assert "\n" not in str(error)
    return str(error)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every tensor, head and biases included, so that a tensor that is not used is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def save_run(
    config: Config, class_names: list[str], *, step: int = 20, average: nn.Module | None = None, **state: Any
) -> nn.Module:
    """Writes the run's folder with one checkpoint of random weights; returns the model. state: more of state.json."""
    num_classes = config.model.num_classes or len(class_names)
    model = randomised(build_model(config.model, num_classes))
    slices, averages = (
        [Slice(n, tuple(p.shape), 0, p.detach().flatten()) for n, p in kept.named_parameters()] if kept else []
        for kept in (model, average)
    )
    state = {
        "step": step,
        "metrics": {},
        "config": config_to_dict(config),
        "num_classes": num_classes,
        "class_names": class_names,
        "world_size": 1,
        **state,
    }
    folder = config.output / config.name
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert save_checkpoint(folder / "checkpoints", step, slices, [], {}, state, averages)
    return model


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs tools/NAME.py in a process of its own, forked from one that has imported torch (tests/ranks.py)."""
    path = ROOT / "tools" / f"{name}.py"
    return run_forked(path, *map(str, arguments), timeout_s=240)


def load_tool(name: str) -> Any:
    """Returns tools/NAME.py as a module: its main without the seconds that a process of its own takes."""
    specification = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def one_line_error(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Checks that a tool ended with `code` and one line on stderr, no traceback, and returns the line."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
