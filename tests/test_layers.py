"""Norms by layer and attention logits that a run logs: those of the plain model, on any ranks, and bits left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config

from pretrain.checkpoint.find import newest_valid
from pretrain.config import Config
from pretrain.data.images import to_float
from pretrain.data.loader import train_batches
from pretrain.data.order import BatchPlan
from pretrain.engine.layers import layer_of
from pretrain.losses import per_image_loss
from pretrain.models.build import build_model
from pretrain.models.vit import Attention
from pretrain.train import building, run
from pretrain.train.datasets import open_data


def with_a_head(*args: Any) -> Any:
    """A model whose head is not zero, as it is at first: nothing else would have a gradient."""
    model: Any = build_model(*args)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def finish(config: Config) -> None:
    building._model_and_values = lambda config, *args, **_: (with_a_head(config.model, *args, config.seed), None)
    run.train(config)


def layers_logged(config: Config) -> dict[int, dict[str, float]]:
    """What stands in metrics.jsonl of each step."""
    rows = [json.loads(line) for line in (config.output / config.name / "metrics.jsonl").read_text().splitlines()]
    kept = {row["step"]: {k: v for k, v in row.items() if k.startswith("layers/")} for row in rows}
    return {step: values for step, values in kept.items() if values}


def plain(config: Config) -> dict[str, float]:
    """The same of the first step, of the plain model on one device; its first rate is 0, so that its weights stay."""
    data = open_data(config)
    model = with_a_head(config.model, data.num_classes, config.seed)
    batch = next(train_batches(data.train, data.order, BatchPlan(config.data.global_batch, 1, 0), config, 0))
    images = to_float(batch.images, torch.float32, config.data.normalisation)
    logits: list[float] = []
    for block in model.blocks:
        attention: Attention = block.attn
        attention.register_forward_pre_hook(lambda module, given: logits.append(largest(module, given[0])))
    losses = per_image_loss(model(images), batch.labels, batch.label_weights, config.loss, config.label_smoothing)
    losses.mean().backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in (("grad", parameter.grad), ("weight", parameter.detach())):
            key = f"layers/{layer_of(name)}/{kind}_norm"
            squares[key] = squares.get(key, 0.0) + float(tensor.double().pow(2).sum())
    found = {key: value**0.5 for key, value in squares.items()}
    return found | {f"layers/attention.{number}/max_logit": value for number, value in enumerate(logits)}


@torch.no_grad()
def largest(module: Any, x: torch.Tensor) -> float:
    q, k, _ = module.by_head(x)
    return float((q @ k.transpose(-2, -1)).max()) / q.shape[-1] ** 0.5


SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in ((2, 3, 6, "fp32"), (3, 2, 2, "fp32"), (2, 1, 3, "bf16"))]


@pytest.mark.parametrize(("num_ranks", "stage", "micro", "precision"), [(2, 1, 6, "fp32"), *SLOW])
def test_layers_are_those_of_the_plain_model(
    num_ranks: int, stage: int, micro: int, precision: str, tmp_path: Path
) -> None:
    """In the first step, whose gradient is clipped to a hundredth of its norm, which does not show."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=3, optim__clip_norm=0.01)
    config = changed(config, engine__zero_stage=stage, engine__max_micro_batch_size=micro, engine__precision=precision)
    config.log.layers_every_steps = 1
    run_ranks(finish, num_ranks, config)
    logged, expected = layers_logged(config), plain(config)
    assert all(value > 0 for name, value in expected.items() if "weight_norm" not in name)
    assert list(logged) == [1, 2, 3] and list(sorted(logged[1])) == sorted(expected)
    relative = 1e-5 if precision == "fp32" else 3e-2
    if num_ranks * micro < config.data.global_batch:  # logits of a micro-batch of each rank, not of all images
        for name in [name for name in expected if name.endswith("max_logit")]:
            assert 0 < logged[1].pop(name) <= expected.pop(name) * (1 + relative)
    assert logged[1] == pytest.approx(expected, rel=relative, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_looking_at_layers_changes_no_bit(stage: int, tmp_path: Path) -> None:
    """Dropout's draws included."""
    changes: dict[str, Any] = {"engine__zero_stage": stage, "model__dropout": 0.1, "total_steps": 6}
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, **changes)
    run_ranks(finish, 2, config)
    looked = changed(config, output=str(tmp_path / "looked"), log__layers_every_steps=1)
    run_ranks(finish, 2, looked)
    first, second = (newest_valid(one.output / one.name / "checkpoints") for one in (config, looked))
    assert first and second
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
