"""Products in fp8: what they are, where they are not, and what is refused. Most of it needs torchao (`.[fp8]`)."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config
from torch import nn

from pretrain.cluster import ranks
from pretrain.config import Config, ModelConfig, config_to_dict
from pretrain.config.changes import resume_differences
from pretrain.data.loader import train_batches
from pretrain.data.order import plan_batch
from pretrain.engine import fp8
from pretrain.engine.fp8 import check_fp8, train_in_fp8
from pretrain.engine.step import Engine
from pretrain.errors import ConfigError, UserError
from pretrain.models.build import build_model, compile_blocks
from pretrain.train.datasets import open_data

NUM_CLASSES = 7
SHAPE: dict[str, Any] = {"width": 32, "depth": 4, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
# torchao's own files, where Python compiles them for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine__precision": "fp32"}, "engine.fp8 needs engine.precision=bf16 and zero_stage 1 or 2, not fp32"),
        ({"engine__zero_stage": 3}, "not bf16 with 3"),
        ({"model__mlp_dim": 72}, "engine.fp8 needs multiples of 16: model.width is 32, mlp_dim 72"),
        ({"model__width": 40}, "model.width is 40"),
        ({"model": {"name": "timm:resnet18"}}, "engine.fp8 works with our own ViTs only, not with timm:resnet18"),
    ],
    ids=str,
)
def test_what_fp8_is_not_for(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Told by the config, in one line."""
    with pytest.raises(ConfigError) as error:
        tiny_config(tmp_path, tmp_path, **{"engine__precision": "bf16", "engine__fp8": True, **changes})
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_machine_without_fp8_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchao, and on a GPU before Ada; who does not ask needs neither."""
    config = tiny_config(tmp_path, tmp_path, engine__precision="bf16", engine__fp8=True)
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine.fp8=true: torchao is not installed; pip install [^\n]*$"):
        check_fp8(config)
    check_fp8(changed(config, engine__fp8=False))
    monkeypatch.setattr(fp8, "find_spec", lambda name: name)
    monkeypatch.setattr(fp8.ranks, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match="engine.fp8=true: A100 cannot multiply in fp8[^\n]*$"):
        check_fp8(config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_fp8(config)


def test_a_resume_keeps_its_arithmetic(tmp_path: Path) -> None:
    """Switched on or off in a run it is refused, as another precision is."""
    config = tiny_config(tmp_path, tmp_path, engine__precision="bf16")
    told = resume_differences(config_to_dict(config), changed(config, engine__fp8=True))
    assert told == ["engine.fp8: was False, is True"]


def models() -> tuple[Any, Any]:
    """The same model in bf16, and with the products of its blocks in fp8."""
    plain, ours = (build_model(ModelConfig(name="Ti", **SHAPE), NUM_CLASSES).bfloat16() for _ in range(2))
    train_in_fp8(ours)
    return plain, ours


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 values as fp8 holds them, scaled so that the largest is its largest."""
    scale = torch.finfo(dtype).max / values.abs().max().double().clamp(min=1e-12)
    scaled = (values * scale.float()).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return scaled.to(dtype).float() / scale.float()


@needs_torchao
def test_products_are_those_of_rounded_values() -> None:
    """Of a layer, against float32 products of what fp8 holds of both sides: equal to bf16's rounding of the result.

    The weights' gradient is the product of what was given, in bf16.
    """
    _, model = models()
    layer, generator = model.train().blocks[0].mlp.fc1, torch.Generator().manual_seed(0)
    given, back = (torch.randn(5, 7, size, generator=generator).bfloat16() for size in (32, 64))  # 35 tokens
    given.requires_grad_()
    out = layer(given)
    out.backward(back)
    assert given.grad is not None
    x, w, g = given.detach().float().view(35, 32), layer.weight.detach().float(), back.float().view(35, 64)
    qx, qw, qg = rounded(x, torch.float8_e4m3fn), rounded(w, torch.float8_e4m3fn), rounded(g, torch.float8_e5m2)
    for found, expected in (
        (out.detach().view(35, 64), qx @ qw.T + layer.bias.detach().float()),
        (given.grad.view(35, 32), qg @ qw),
        (layer.weight.grad, g.T @ x),
        (layer.bias.grad, g.sum(0)),
    ):
        assert (found.float() - expected).norm() <= 2**-8 * expected.norm()
    assert (qx @ qw.T - x @ w.T).norm() > 2**-6 * (x @ w.T).norm()  # fp8's own error, beside which that is small


@needs_torchao
def test_evaluation_stays_as_it_is() -> None:
    """The same bits as without; parameters of the same names; and training differs."""
    plain, ours = models()
    for model in (plain, ours):
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 16, 16).bfloat16()
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert plain.state_dict().keys() == ours.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), ours.eval()(images))
        assert not torch.equal(plain.train()(images), ours.train()(images))


@needs_torchao
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for training and one for evaluation, as without fp8."""
    counted, compile_module = [0, 0], nn.Module.compile

    def backend(graph: Any, example: Any) -> Any:
        counted[0] += 1

        def called(*args: Any) -> Any:
            counted[1] += 1
            return graph(*args)

        return called

    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compile_module(module, backend=backend, **options)
    )
    torch.compiler.reset()
    _, model = models()
    compile_blocks(model)
    images = torch.randn(4, 3, 16, 16).bfloat16()
    for _ in range(2):
        model.train()(images).sum().backward()
    assert counted == [1, 2 * 4]
    with torch.no_grad():
        model.eval()(images)
    assert counted == [2, 2 * 4 + 4]
    torch.compiler.reset()


def trained(config: Config) -> tuple[list[float], list[str]]:
    """The losses of a run's steps, and the names of what its checkpoints would hold."""
    device, data = ranks.start(60), open_data(config)
    plan = plan_batch(config.data.global_batch, ranks.world_size(), config.engine.max_micro_batch_size)
    engine = Engine(build_model(config.model, data.num_classes, config.seed), config, plan, device)
    losses = []
    for batch in train_batches(data.train, data.order, plan, config, 0):
        result = engine.train_step(batch, 3e-3)
        assert result.applied
        losses.append(float(result.sums[0] / result.sums[2]))
    engine.check()
    return losses, [part.name for part in engine.weights()]


@needs_torchao
@pytest.mark.parametrize(("stage", "max_micro_batch_size"), [(1, 256), (2, 5)])
def test_a_model_trains_in_fp8(stage: int, max_micro_batch_size: int, tmp_path: Path) -> None:
    """60 steps, with DeepSpeed: the loss falls as bf16's does, and a checkpoint's names are the same."""
    shards = make_shards(tmp_path / "squares")
    recipe = {"engine__precision": "bf16", "engine__zero_stage": stage, "total_steps": 60}
    config = tiny_config(shards, tmp_path, **recipe, engine__max_micro_batch_size=max_micro_batch_size)
    (expected, names), (found, same_names) = (
        run_ranks(trained, 1, changed(config, engine__fp8=asked))[0] for asked in (False, True)
    )
    last, their_last = (sum(losses[-10:]) / 10 for losses in (found, expected))
    print(f"ZeRO {stage}: {found[0]:.3f} to {last:.3f}; bf16 {expected[0]:.3f} to {their_last:.3f}")
    assert found[0] == pytest.approx(math.log(NUM_CLASSES), rel=0.01) and last < 0.6 * found[0]
    assert last == pytest.approx(their_last, rel=0.1) and found != expected and names == same_names
