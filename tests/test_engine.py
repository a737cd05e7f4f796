"""The engine: equal losses on any number of ranks and any ZeRO stage, slices that any other layout can read, skips."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from ranks import run_ranks
from safetensors import safe_open
from timm.optim import Lamb as TimmsLamb
from tiny import NUM_CLASSES, changed, every_other, make_shards, tiny_config
from torch import nn
from weights_on_disk import save_checkpoint

from pretrain.checkpoint.layout import DamagedError, Slice
from pretrain.checkpoint.read import CheckpointReader, read_state
from pretrain.cluster import agreement, ranks
from pretrain.config import Config, ModelConfig
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, single_labels, train_batches
from pretrain.data.order import BatchPlan
from pretrain.engine import compiling
from pretrain.engine.device_memory import fitting
from pretrain.engine.patches import after_start
from pretrain.engine.settings import (
    MIN_LOSS_SCALE,
    check_machine,
    check_precision,
    deepspeed_config,
    told_of_overlap,
)
from pretrain.engine.step import Engine, _checkpoint_activations
from pretrain.errors import ConfigError, DeviceMemoryError, StorageError, UserError
from pretrain.models.build import build_model
from pretrain.models.profile import train_flops
from pretrain.optim import learning_rate, moment_dtypes, parameter_groups
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data

STEPS = 20
LAMB: dict[str, Any] = {"optim__name": "lamb", "optim__lr": 2e-2}
needs_fp16 = pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="this CPU has no fp16 instructions (AVX512-FP16 or AMX)"
)
FP16 = pytest.param("fp16", marks=needs_fp16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def start(config: Config) -> tuple[Engine, Any]:
    device = ranks.start(60)
    data = open_data(config)
    return build_engine(config, data, device, from_scratch=True), data


def steps(engine: Engine, data: Any, config: Config, first: int, last: int) -> list[float]:
    """Trains the steps first..last-1 and returns their losses over all ranks."""
    losses = []
    for step, batch in zip(range(first, last), train_batches(data.train, data.order, engine.plan, config, first)):
        result = engine.train_step(batch, learning_rate(config.optim, config.total_steps, step))
        loss, _, images = agreement.add_up(result.sums).tolist()
        assert images == config.data.global_batch and result.applied
        losses.append(loss / images)
    return losses


def losses_of_run(config: Config) -> list[float]:
    engine, data = start(config)
    return steps(engine, data, config, 0, STEPS)


def rate_scale(name: str, config: Config) -> float:
    """What a parameter's rate is multiplied with, by the formula of MAE (util/lr_decay.py)."""
    num_layers = config.model.shape.depth + 1
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        layer = 0
    else:
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else num_layers
    return config.optim.layer_decay ** (num_layers - layer)


def plain_losses(config: Config) -> list[float]:
    """The same run as a plain PyTorch loop: one process, no DeepSpeed, no accumulation."""
    data = open_data(config)
    model = build_model(config.model, data.num_classes, config.seed).train()
    groups = []
    for name, parameter in model.named_parameters():
        decay = config.optim.weight_decay if parameter.ndim >= 2 and name.endswith("weight") else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "scale": rate_scale(name, config)})
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    if config.optim.name == "lamb":  # as in timm and apex
        optimizer = TimmsLamb(groups, eps=1e-8, max_grad_norm=None)  # clipped below
    losses = []
    plan = BatchPlan(config.data.global_batch, 1, 0)
    for step, batch in zip(range(STEPS), train_batches(data.train, data.order, plan, config, 0)):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(config.optim, config.total_steps, step)
        logits = model(to_float(batch.images, torch.float32))
        targets = torch.zeros_like(logits).scatter_add_(1, batch.labels.clamp(min=0), batch.label_weights)
        if config.loss == "softmax":
            loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain(shards: Path) -> list[float]:
    torch.set_num_threads(1)
    return plain_losses(tiny_config(shards, Path("unused")))


def compare(losses: list[float], expected: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) / b for a, b in zip(losses, expected))
    assert len(losses) == len(expected) and worst <= tolerance, (worst, losses, expected)


@pytest.mark.parametrize(("stage", "world_size", "max_micro_batch_size"), every_other([1, 2, 3], [1, 2, 3], [256, 3]))
def test_losses_equal_a_plain_loop(
    stage: int, world_size: int, max_micro_batch_size: int, shards: Path, plain: list[float]
) -> None:
    """ZeRO 1 = 2 = 3 = plain PyTorch, on 1, 2, 3 ranks, with accumulation 1 and 2 to 4: 20 fp32 losses to 1e-5."""
    changes = {"engine__zero_stage": stage, "engine__max_micro_batch_size": max_micro_batch_size}
    config = tiny_config(shards, Path("unused"), **changes)
    compare(run_ranks(losses_of_run, world_size, config)[0], plain, 1e-5)


@pytest.mark.parametrize(
    ("stage", "world_size", "max_micro_batch_size"), [(1, 1, 256), (1, 3, 3), (2, 2, 256), (3, 3, 3)]
)
def test_rates_by_layer_equal_a_plain_loop(
    stage: int, world_size: int, max_micro_batch_size: int, shards: Path, plain: list[float]
) -> None:
    """With a group for each layer, some of fewer elements than ranks: the losses of a plain loop to 1e-5."""
    changes = {"engine__zero_stage": stage, "engine__max_micro_batch_size": max_micro_batch_size}
    config = tiny_config(shards, Path("unused"), **changes, optim__layer_decay=0.5)
    expected = plain_losses(config)
    assert max(abs(a - b) / b for a, b in zip(expected, plain)) > 1e-2
    compare(run_ranks(losses_of_run, world_size, config)[0], expected, 1e-5)


LAMB_LAYOUTS = [(1, 1, 256), (1, 3, 3), (2, 2, 256), (2, 3, 3), (3, 2, 256), (3, 3, 3)]


@pytest.fixture(scope="module")
def plain_lamb(shards: Path) -> list[float]:
    torch.set_num_threads(1)
    return plain_losses(tiny_config(shards, Path("unused"), **LAMB))


@pytest.mark.parametrize(
    ("stage", "world_size", "max_micro_batch_size"),
    [
        pytest.param(*layout, marks=[] if layout in LAMB_LAYOUTS else pytest.mark.long)
        for layout in itertools.product([1, 2, 3], [1, 2, 3], [256, 3])
    ],
)
def test_lambs_losses_equal_a_plain_loop(
    stage: int, world_size: int, max_micro_batch_size: int, shards: Path, plain_lamb: list[float]
) -> None:
    """Norms of whole tensors, of which each rank has pieces: the losses of timm's Lamb in a plain loop to 1e-5."""
    changes = {"engine__zero_stage": stage, "engine__max_micro_batch_size": max_micro_batch_size}
    config = tiny_config(shards, Path("unused"), **LAMB, **changes)
    compare(run_ranks(losses_of_run, world_size, config)[0], plain_lamb, 1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_uneven_split_weighs_every_image_alike(loss: str, shards: Path) -> None:
    """12 images on 5 ranks in micro-batches of 2: masked slots, without a label no loss of softmax's, but one of the
    sigmoid's, count for nothing.
    """
    config = tiny_config(shards, Path("unused"), engine__max_micro_batch_size=2, loss=loss)
    compare(run_ranks(losses_of_run, 5, config)[0], plain_losses(config), 1e-5)


@pytest.mark.parametrize("world_size, max_micro_batch_size", [(1, 256), (3, 3), (5, 256)])
def test_mixed_and_smoothed_targets_equal_a_plain_loop(
    world_size: int, max_micro_batch_size: int, shards: Path
) -> None:
    """Mixup, CutMix, RandAugment and label smoothing: the losses of torch's dense targets, whatever the split."""
    changes = {"data__mixup": 0.8, "data__cutmix": 1.0, "data__randaugment_layers": 2, "label_smoothing": 0.1}
    config = tiny_config(shards, Path("unused"), **changes, engine__max_micro_batch_size=max_micro_batch_size)
    compare(run_ranks(losses_of_run, world_size, config)[0], plain_losses(config), 1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "max_micro_batch_size"), every_other([1, 2, 3], ["bf16", FP16], [256, 3])
)
def test_low_precision_follows_fp32(
    stage: int, precision: str, max_micro_batch_size: int, shards: Path, plain: list[float]
) -> None:
    """bf16 stays within 2 % of the fp32 losses (8 bits of mantissa), fp16 within 5 % (it skips its first steps)."""
    changes: dict[str, Any] = {"engine__zero_stage": stage, "engine__precision": precision}
    config = tiny_config(shards, Path("unused"), **changes, engine__max_micro_batch_size=max_micro_batch_size)
    losses = run_ranks(losses_with_skips, 2, config)[0]
    compare(losses[-3:], plain[-3:], 2e-2) if precision == "bf16" else compare(losses[-3:], plain[-3:], 5e-2)


def losses_with_skips(config: Config) -> list[float]:
    """fp16 skips its first steps until the loss scale fits, so its losses lag by a step or two."""
    engine, data = start(config)
    losses = []
    for step, batch in zip(range(STEPS), train_batches(data.train, data.order, engine.plan, config, 0)):
        result = engine.train_step(batch, learning_rate(config.optim, config.total_steps, step))
        loss, _, images = agreement.add_up(result.sums).tolist()
        losses.append(loss / images)
    return losses


# --- slices ----------------------------------------------------------------------------------------------------------


def save_at(config: Config, folder: Path, step: int) -> list[float]:
    """Trains, saves after `step`, goes on to the end; returns the losses after `step`."""
    engine, data = start(config)
    steps(engine, data, config, 0, step)
    engine.check()
    state = {"engine": engine.state()}
    tensors = engine.weights(), engine.moments(), engine.generators()
    assert save_checkpoint(folder, step, *tensors, state, engine.averages())
    return steps(engine, data, config, step, STEPS)


def resume_at(config: Config, path: Path, step: int) -> tuple[list[float], dict[str, float]]:
    """Loads into an engine of other weights that has trained already; returns the losses and the sums of moments."""
    engine, data = start(config)
    steps(engine, data, config, 0, 2)
    engine.load(CheckpointReader(path), read_state(path)["engine"])
    moments = {s.name: float(s.values.double().sum()) for s in engine.moments()}
    return steps(engine, data, config, step, STEPS), moments


class Saved(dict[tuple, tuple[Path, list[float]]]):
    """Checkpoints of step 10 by (stage, ranks, precision), each with the losses of the run that went on; made when
    first asked for, so that a precision that the machine lacks takes no other with it.
    """

    def __init__(self, shards: Path, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._shards, self._factory = shards, factory

    def __missing__(self, key: tuple) -> tuple[Path, list[float]]:
        stage, ranks, precision = key
        folder = self._factory.mktemp(f"stage{stage}-{ranks}-{precision}")
        config = tiny_config(self._shards, folder, engine__zero_stage=stage, engine__precision=precision)
        self[key] = (folder / "step-0000000010", run_ranks(save_at, ranks, config, folder, 10)[0])
        return self[key]


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """See Saved."""
    return Saved(shards, tmp_path_factory)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 2, "fp32"), (1, 2, "fp32")),
        ((1, 2, "fp32"), (3, 1, "fp32")),
        pytest.param((1, 2, "fp32"), (2, 3, "fp32"), marks=pytest.mark.long),
        ((1, 2, "fp32"), (3, 3, "fp32")),
        ((3, 2, "fp32"), (1, 1, "fp32")),
        pytest.param((3, 2, "fp32"), (1, 3, "fp32"), marks=pytest.mark.long),
        ((3, 2, "fp32"), (3, 2, "fp32")),
        ((2, 3, "fp32"), (1, 2, "fp32")),
        ((1, 1, "fp32"), (3, 2, "fp32")),
        ((1, 2, "bf16"), (3, 3, "bf16")),
        ((1, 2, "bf16"), (1, 1, "bf16")),
        pytest.param((1, 2, "fp16"), (1, 2, "fp16"), marks=[needs_fp16, pytest.mark.long]),
        pytest.param((1, 2, "fp16"), (3, 1, "fp16"), marks=needs_fp16),
    ],
)
def test_slices_fit_any_layout(source: tuple, target: tuple, saved: dict, shards: Path) -> None:
    """A checkpoint of one stage and world size goes on in another with the same 10 losses: fp32 to 1e-6, bf16 to 1e-3.

    Not only the first loss: that sees the weights, the next ones see moments, decay groups and the step count.
    """
    stage, ranks, precision = target
    path, expected = saved[source]
    config = tiny_config(shards, path.parent, seed=0, engine__zero_stage=stage, engine__precision=precision)
    losses, _ = run_ranks(resume_at, ranks, config, path, 10)[0]
    if source == target:
        assert losses == expected
    compare(losses, expected, 1e-6 if precision == "fp32" else 1e-3)


def with_gradient(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Leaves key biases out: their gradient is zero but for rounding, which Adam scales to full steps."""
    return torch.cat([tensor[:32], tensor[64:]]) if name.endswith("qkv.bias") else tensor


def test_checkpoint_holds_what_the_ranks_held(saved: dict) -> None:
    """Every tensor is complete in every checkpoint, and weights and moments agree between stages and world sizes."""
    first = CheckpointReader(saved[1, 2, "fp32"][0])
    for key in [(3, 2, "fp32"), (2, 3, "fp32"), (1, 1, "fp32")]:
        other = CheckpointReader(saved[key][0])
        for kind in ("weights", "optimizer"):
            assert first.shapes(kind) == other.shapes(kind)
            for name in first.shapes(kind):
                ours, theirs = (with_gradient(name, reader.tensor(name, kind)) for reader in (first, other))
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6)
    moments = {name: float(first.tensor(name, "optimizer").abs().max()) for name in first.shapes("optimizer")}
    assert all(value > 0 for value in moments.values()), moments


def guard_notices(config: Config) -> str:
    engine, _ = start(config)
    engine.weights()[0].values.add_(1.0)
    try:
        engine.check()
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_guard_sees_slices_that_the_model_does_not_hold(stage: int, shards: Path) -> None:
    """`check` fails when an owned slice and the model disagree, as DeepSpeed's maps did with round-robin gradients."""
    config = tiny_config(shards, Path("unused"), engine__zero_stage=stage)
    assert "is not what the model holds" in run_ranks(guard_notices, 2, config)[0]


def whole(slices: list[Slice]) -> dict[str, np.ndarray]:
    """Returns the tensors, flattened, of which every rank has slices."""
    pieces = [(s.name, s.offset, s.values.numpy().copy()) for s in slices]
    gathered = sorted((piece for of_rank in agreement.gather(pieces) for piece in of_rank), key=lambda p: p[:2])
    names = dict.fromkeys(name for name, _, _ in gathered)
    return {name: np.concatenate([values for other, _, values in gathered if other == name]) for name in names}


# --- optimizers ------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """Parameters whose gradients are what `forward` is given."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.parameters(recurse=False), gradients)]).sum()


class FourTensors(Held):
    """A kernel, a bias, a norm's scale and positions, under names that this package would give them."""

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__(pos_embed=positions)
        self.dense, self.norm = Held(weight=kernel, bias=bias), Held(weight=scale)

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        kernel, bias, scale, positions = gradients
        return super().forward(positions) + self.dense(kernel, bias) + self.norm(scale)


def steps_on_given_gradients(config: Config, arrays: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Returns the weights after each of six steps through DeepSpeed, clipping included."""
    device = ranks.start(60)
    names = ("a/kernel", "a/bias", "LN/scale", "pos_embedding")
    model = FourTensors(*(torch.from_numpy(arrays[f"init/{name}"]) for name in names))
    engine = Engine(model, config, BatchPlan(1, 1, 0), device)
    weights = []
    for step in range(6):
        for group in engine._optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, 6, step)
        loss = engine._engine(*(torch.from_numpy(arrays[f"grad{step}/{name}"]) for name in names))
        engine._engine.backward(loss)
        engine._engine.step()
        assert engine._engine.get_global_grad_norm() > 1.0  # clipping is active in every step
        weights.append(whole(engine.weights()))
    expected = {f"{name}/{part.name}" for name in engine._moments for part in engine.weights()}
    assert {s.name for s in engine.moments()} == expected
    assert {s.values.dtype for s in engine.moments()} == set(engine._moments.values())
    return weights


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("reference", "optim"),
    [
        ("bv_adam", {"lr": 1e-2, "weight_decay": 0.1}),
        ("bv_adam_bf16mu", {"lr": 1e-2, "weight_decay": 0.1, "moment_dtype": "bf16"}),
        ("vt_sgd_momentum_float32", {"name": "sgd", "lr": 0.03}),
        ("vt_sgd_momentum_bfloat16", {"name": "sgd", "lr": 0.03, "moment_dtype": "bf16"}),
    ],
)
def test_optimizers_equal_googles_under_zero(
    reference: str, optim: dict[str, Any], stage: int, shards: Path, test_fixtures: Path
) -> None:
    """Six clipped steps of two ranks, on the reference's gradients, within 1e-6 of its weights."""
    with np.load(test_fixtures / "optimizer_steps" / "data.npz", allow_pickle=False) as file:
        arrays = dict(file)
    config = tiny_config(shards, Path("unused"), engine__zero_stage=stage, data__global_batch=2)
    config = changed(config, optim=optim | {"warmup_steps": 2, "clip_norm": 1.0}, total_steps=6)
    names = {
        "dense.weight": "a/kernel",
        "dense.bias": "a/bias",
        "norm.weight": "LN/scale",
        "pos_embed": "pos_embedding",
    }
    for step, weights in enumerate(run_ranks(steps_on_given_gradients, 2, config, arrays)[0]):
        assert weights.keys() == names.keys()
        for name, theirs in names.items():
            expected = arrays[f"{reference}/step{step}/{theirs}"].reshape(-1)
            assert np.abs(weights[name] - expected).max() < 1e-6, (step, name)


class EightTensors(nn.Module):
    """Two kernels, one of a million times the other's size, and what does not decay."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        for name, scale in (("large", 1e3), ("small", 1e-3)):
            shapes = (61, 67), (67,), (67,), (1, 5, 67)
            self.add_module(name, FourTensors(*(scale * torch.randn(shape, generator=generator) for shape in shapes)))

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        return self.large(*gradients[:4]) + self.small(*gradients[4:])


def lamb_on_given_gradients(config: Config, num_micro: int) -> list[dict[str, np.ndarray]]:
    """Returns weights and moments after six steps on gradients that are the same on each rank; four bits each, so that
    their sums are exact in bf16.
    """
    device = ranks.start(60)
    engine = Engine(EightTensors(torch.Generator().manual_seed(0)), config, BatchPlan(1, num_micro, 0), device)
    for step in range(6):
        for micro in range(num_micro):
            engine._engine.backward(engine._engine(*given_gradients(step, micro)))
            engine._engine.step()
        assert engine._engine.was_step_applied()
    return [whole(engine.weights()), whole(engine.moments())]


def given_gradients(step: int, micro: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + micro)
    shapes = [tensor.shape for tensor in EightTensors(generator).parameters()]
    order = [1, 2, 3, 0, 5, 6, 7, 4]  # kernel, bias, scale, positions, whose parameters come first
    given = [torch.randint(-8, 8, shapes[place], generator=generator).float() for place in order]
    return given


@pytest.mark.parametrize(
    ("stage", "world_size", "num_micro"), [(1, 2, 1), (1, 2, 2), (2, 2, 2), (3, 2, 2), (3, 4, 1), (1, 4, 2)]
)
def test_lamb_equals_timms_under_zero_in_bf16(stage: int, world_size: int, num_micro: int, shards: Path) -> None:
    """Six clipped steps of all three classes of DeepSpeed's: float32 master weights of timm's Lamb, to 1e-6 of each
    tensor's largest.
    """
    config = tiny_config(shards, Path("unused"), engine__zero_stage=stage, data__global_batch=world_size * num_micro)
    optim = {"name": "lamb", "lr": 1e-2, "weight_decay": 0.1, "clip_norm": 1.0}
    config = changed(config, optim=optim, engine__precision="bf16")
    found, _ = run_ranks(lamb_on_given_gradients, world_size, config, num_micro)[0]
    model = EightTensors(torch.Generator().manual_seed(0))
    optimizer = TimmsLamb(parameter_groups(model, 0.1), lr=1e-2, eps=1e-8)
    for step in range(6):
        optimizer.zero_grad()
        for micro in range(num_micro):
            (model(*given_gradients(step, micro)) / num_micro).backward()
        optimizer.step()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, expected in model.named_parameters():
        theirs = expected.detach().numpy().ravel()
        assert np.abs(found[name] - theirs).max() < 1e-6 * np.abs(theirs).max(), name


def losses_with_bad_padding(config: Config) -> list[float]:
    """As losses_of_run, but the padding of the flat tensors is NaN before LAMB is told of the pieces."""
    engine, data = start(config)
    for flat in engine._owned.flat_tensors():
        kept = flat.detach().clone()
        flat.data.fill_(float("nan"))
        for part in engine._owned.parts():
            if part.flat is flat:
                part.slice_of(flat).values.copy_(part.slice_of(kept).values)
    engine._owned.tell_pieces(engine._optimizer)
    return steps(engine, data, config, 0, 6)


def test_lamb_leaves_nothing_in_the_padding(shards: Path) -> None:
    """A group of one tensor, the head's, on three ranks of ZeRO 3: what lies in its gradients' padding is in the next
    step's norm, by which all gradients are clipped.
    """
    config = tiny_config(shards, Path("unused"), **LAMB, optim__head_decay_multiplier=10.0, optim__clip_norm=0.1)
    expected = run_ranks(losses_of_run, 1, config)[0][:6]
    found = run_ranks(losses_with_bad_padding, 3, changed(config, engine__zero_stage=3))[0]
    compare(found, expected, 1e-5)


def decays(config: Config) -> list[float]:
    engine, _ = start(config)
    return [group["weight_decay"] for group in engine._optimizer.param_groups]


@pytest.mark.parametrize("stage", [1, 3])
def test_the_head_has_its_own_decay(stage: int, shards: Path) -> None:
    """The engine tells the optimizer which tensors are the head's, and DeepSpeed keeps the groups."""
    optim: dict[str, Any] = {"optim__weight_decay": 0.1, "optim__head_decay_multiplier": 100.0}
    config = tiny_config(shards, Path("unused"), engine__zero_stage=stage, **optim)
    assert run_ranks(decays, 1, config)[0] == pytest.approx([0.1, 0.0, 10.0])


OTHER_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2e-3, "moment_dtype": "bf16"},
    "sgd": {"name": "sgd", "lr": 0.1, "moment_dtype": "bf16"},
    "lion": {"name": "lion", "lr": 2e-4, "betas": [0.9, 0.99], "moment_dtype": "fp32"},
    "lamb": {"name": "lamb", "lr": 1e-2, "moment_dtype": "bf16"},
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_the_state_of_every_optimizer_fits_any_layout(name: str, shards: Path, tmp_path: Path) -> None:
    """Saved after 10 steps on 2 ranks at stage 1, loaded there: the same losses bit for bit; at stage 3 on 3 ranks: the
    same 10 losses.

    bf16 momenta are bf16 in the file. The head's kernel has its own decay, each layer its own rate.
    """
    optim = OTHER_OPTIMIZERS[name] | {"weight_decay": 0.1, "head_decay_multiplier": 10.0, "warmup_steps": 3}
    optim |= {"layer_decay": 0.7}
    config = changed(tiny_config(shards, tmp_path), optim=optim)
    expected = run_ranks(save_at, 2, config, tmp_path, 10)[0]
    path = tmp_path / "step-0000000010"
    with safe_open(next(path.glob("optimizer-00001*")), framework="pt") as file:
        dtypes = {key.partition("/")[0]: file.get_tensor(key).dtype for key in file.keys()}
    assert dtypes == moment_dtypes(config.optim)
    assert run_ranks(resume_at, 2, config, path, 10)[0][0] == expected
    losses, moments = run_ranks(resume_at, 3, changed(config, engine__zero_stage=3), path, 10)[0]
    assert len(moments) and any(moments.values())
    compare(losses, expected, 1e-4)  # a sign can turn over a rounding error, a bf16 momentum can round the other way


# --- sums over ranks -------------------------------------------------------------------------------------------------


def errors_of_means(layouts: list[tuple[Config, int]]) -> list[float]:
    """How far the ranks' mean gradient is from the one in float64, relative, for each config and number of
    micro-batches. Read from the weights, which plain SGD of rate 1 moves by the mean, from zeros on.
    """
    device, errors = ranks.start(60), []
    for config, num_micro in layouts:
        model = FourTensors(*[torch.zeros(61, 67)] * 4)
        engine = Engine(model, config, BatchPlan(1, num_micro, 0), device)
        for group in engine._optimizer.param_groups:
            group["lr"] = 1.0
        generator = torch.Generator().manual_seed(ranks.rank())
        own = torch.randn(num_micro, 4, 61, 67, generator=generator).bfloat16()
        for gradients in own:
            engine._engine.backward(engine._engine(*gradients))
            engine._engine.step()
        mean = agreement.add_up(own.double().sum(0)) / (ranks.world_size() * num_micro)
        expected: dict[str, Any] = dict(zip(("dense.weight", "dense.bias", "norm.weight", "pos_embed"), mean.numpy()))
        off = [values + expected[name].ravel() for name, values in whole(engine.weights()).items()]
        errors.append(float(np.sqrt(np.mean(np.square(off))) / mean.std()))
        engine.close()
    return errors


def test_sums_in_float32_are_exacter(shards: Path) -> None:
    """Three ranks in bf16, all stages, one and two micro-batches: the error in bf16 and with engine.reduce_dtype=fp32.

    Least is gained on ZeRO 1 and 2 with one micro-batch, which round what they sum, and the sum, to bf16 still.
    """
    optim: dict[str, Any] = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "clip_norm": 0.0}
    config = changed(tiny_config(shards, shards, engine__precision="bf16"), optim=optim)
    layouts = [(stage, num_micro) for stage in (1, 2, 3) for num_micro in (1, 2)]
    configs = {
        dtype: [(changed(config, engine__zero_stage=stage, engine__reduce_dtype=dtype), n) for stage, n in layouts]
        for dtype in ("precision", "fp32")
    }
    found = run_ranks(errors_of_means, 3, configs["precision"] + configs["fp32"])[0]
    for layout, in_bf16, in_float32 in zip(layouts, found, found[len(layouts) :]):
        print(f"ZeRO {layout[0]}, {layout[1]} micro-batches: {in_bf16:.2%}, {in_float32:.2%}")
        assert 2e-3 < in_bf16 < 5e-3 and in_float32 < 0.9 * in_bf16, layout


# --- averages --------------------------------------------------------------------------------------------------------


def followed(engine: Engine, data: Any, config: Config, first: int, last: int, average: dict[str, Any]) -> float:
    """Trains, follows the average in float64, and returns how far the engine's own is from it in the end."""
    for step in range(first, last):
        steps(engine, data, config, step, step + 1)
        for name, values in whole(engine.weights()).items():
            kept = average.get(name, values.astype(np.float64))
            average[name] = config.optim.average_decay * kept + (1 - config.optim.average_decay) * values.astype(
                np.float64
            )
    own = whole(engine.averages())
    assert own.keys() == average.keys()
    return max(float(np.abs(own[name] - values).max()) for name, values in average.items())


def average_and_save(config: Config, folder: Path) -> tuple[float, float, dict[str, Any]]:
    engine, data = start(config)
    average = {name: values.astype(np.float64) for name, values in whole(engine.weights()).items()}  # starts there
    distance = followed(engine, data, config, 0, 6, average)
    away = max(float(np.abs(values - average[name]).max()) for name, values in whole(engine.weights()).items())
    tensors = engine.weights(), engine.moments(), engine.generators()
    assert save_checkpoint(folder, 6, *tensors, {"engine": engine.state()}, engine.averages())
    return distance, away, average


def average_on(config: Config, path: Path, average: dict[str, Any]) -> float:
    engine, data = start(config)
    steps(engine, data, config, 0, 1)
    engine.load(CheckpointReader(path), read_state(path)["engine"])
    return followed(engine, data, config, 6, 12, average)


@pytest.mark.parametrize(("stage", "then"), [(1, (3, 3)), (2, (1, 1)), (3, (2, 3))])
def test_averages_follow_the_recursion(stage: int, then: tuple[int, int], shards: Path, tmp_path: Path) -> None:
    """decay * average + (1 - decay) * weights from the initial weights on, in float64, within 1e-6 over 6 steps of two
    ranks and 6 more at another stage and world size, with bf16 weights in the model."""
    changes: dict[str, Any] = {"engine__precision": "bf16", "optim__average_decay": 0.8, "optim__lr": 1e-2}
    changes |= {"optim__layer_decay": 0.7} if stage == 1 else {}
    config = tiny_config(shards, tmp_path, engine__zero_stage=stage, **changes)
    distance, away, average = run_ranks(average_and_save, 2, config, tmp_path)[0]
    assert distance < 1e-6 and away > 1e-3
    other, ranks = then
    distances = run_ranks(
        average_on, ranks, changed(config, engine__zero_stage=other), tmp_path / "step-0000000006", average
    )
    assert max(distances) < 1e-6


def swapped(config: Config) -> tuple[bool, bool, bool, list[float]]:
    """Returns whether the averaged model predicts with the averages, is not the trained one, and leaves no trace."""
    engine, data = start(config)
    steps(engine, data, config, 0, 4)
    images = next(train_batches(data.train, data.order, engine.plan, config, 0)).images
    before = [s.values.clone() for s in engine.weights() + engine.moments() + engine.averages()]
    plain = build_model(config.model, data.num_classes).to(engine.dtype).eval()
    averages = whole(engine.averages())
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(torch.from_numpy(averages[name]).view(parameter.shape))
    trained = engine.predict(images)
    with engine.averaged():
        logits = engine.predict(images)
    with torch.no_grad():
        expected = plain(to_float(images, engine.dtype))
    after = [s.values for s in engine.weights() + engine.moments() + engine.averages()]
    same = all(torch.equal(a, b) for a, b in zip(before, after)) and torch.equal(trained, engine.predict(images))
    return torch.equal(logits, expected), torch.equal(logits, trained), same, steps(engine, data, config, 4, 8)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "bf16"),
        (2, "fp32"),
        (3, "bf16"),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_averages_come_and_go_without_a_trace(stage: int, precision: str, shards: Path) -> None:
    """Inside `averaged` the model predicts with the averages; after it weights, moments, averages, predictions are bit
    for bit what they were, and the run goes on with the losses of one that never looked.

    bf16 with accumulation: at stage 1 that is another optimizer of DeepSpeed's.
    """
    changes: dict[str, Any] = {"engine__zero_stage": stage, "engine__precision": precision}
    changes["engine__max_micro_batch_size"] = 3 if precision == "bf16" else 256
    config = tiny_config(shards, Path("unused"), optim__average_decay=0.7, **changes)
    expected = run_ranks(first_losses, 2, changed(config, optim__average_decay=0.0))[0][4:]
    for predicts_average, predicts_trained, same, losses in run_ranks(swapped, 2, config):
        assert (predicts_average, predicts_trained, same) == (True, False, True)
        assert losses == expected


def first_losses(config: Config) -> list[float]:
    engine, data = start(config)
    assert engine.averages() == []
    return steps(engine, data, config, 0, 8)


# --- steps that are not finite ---------------------------------------------------------------------------------------


def poisoned_step(config: Config, poison: str) -> tuple[bool, bool, bool]:
    """Returns whether a step with NaN on the last rank was applied, whether it changed anything, and the next one."""
    engine, data = start(config)
    batches = train_batches(data.train, data.order, engine.plan, config, 0)
    engine.train_step(next(batches), 1e-3)
    before = [s.values.clone() for s in engine.weights() + engine.moments() + engine.averages()]
    model = engine._engine.module
    hook = None
    if ranks.rank() == ranks.world_size() - 1:
        value = float("nan") if poison == "nan" else float("inf")
        hook = model.register_forward_hook(
            lambda module, inputs, logits: logits + value * (logits[:1].detach() * 0 + 1)
        )
    bad = engine.train_step(next(batches), 1e-3)
    if hook:
        hook.remove()
    after = [s.values for s in engine.weights() + engine.moments() + engine.averages()]
    moved = not all(torch.equal(a, b) for a, b in zip(before, after))
    engine.check()
    while not (good := engine.train_step(next(batches), 1e-3)).applied and config.engine.precision == "fp16":
        pass
    finite = all(bool(s.values.isfinite().all()) for s in engine.weights() + engine.moments())
    return bad.applied, moved, good.applied and finite


@pytest.mark.parametrize(
    ("stage", "precision", "max_micro_batch_size"), every_other([1, 2, 3], ["fp32", "bf16", FP16], [256, 3])
)
def test_not_finite_on_one_rank_skips_all(stage: int, precision: str, max_micro_batch_size: int, shards: Path) -> None:
    """NaN on one rank, in any micro-batch: no rank applies the step, nothing changes, the next step is fine."""
    changes: dict[str, Any] = {"engine__zero_stage": stage, "engine__precision": precision, "optim__average_decay": 0.5}
    config = tiny_config(shards, Path("unused"), **changes, engine__max_micro_batch_size=max_micro_batch_size)
    assert run_ranks(poisoned_step, 2, config, "nan") == [(False, False, True)] * 2


def infinite_loss(config: Config) -> tuple[bool, bool]:
    """A loss that is infinite while its gradients are finite."""
    import pretrain.engine.step

    engine, data = start(config)
    batch = next(train_batches(data.train, data.order, engine.plan, config, 0))
    engine.train_step(batch, 1e-3)
    real = pretrain.engine.step.per_image_loss
    pretrain.engine.step.per_image_loss = lambda *arguments: real(*arguments) + float("inf")
    skipped = engine.train_step(batch, 1e-3)
    pretrain.engine.step.per_image_loss = real
    return skipped.applied, engine.train_step(batch, 1e-3).applied


def test_infinite_loss_is_skipped(shards: Path) -> None:
    """An infinite loss whose gradients are finite is skipped too."""
    assert run_ranks(infinite_loss, 2, tiny_config(shards, Path("unused"))) == [(False, True)] * 2


# --- DeepSpeed's configuration and inside ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("plan", [BatchPlan(4, 1, 0), BatchPlan(2, 2, 0)])
def test_deepspeed_parses_what_we_mean(precision: str, plan: BatchPlan, shards: Path) -> None:
    """DeepSpeed's own parser arrives at our stage, precision, clipping and batch sizes."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = tiny_config(
        shards, Path("unused"), engine__zero_stage=2, engine__precision=precision, optim__clip_norm=0.0
    )
    parsed = DeepSpeedConfig(deepspeed_config(config, plan, 1, 10, 100))
    assert parsed.zero_config.stage == 2 and parsed.gradient_clipping == 0.0
    assert (parsed.float16_config.enabled, parsed.bfloat16_config.enabled) == (precision == "fp16", precision == "bf16")
    assert parsed.train_micro_batch_size_per_gpu == plan.micro_batch
    assert parsed.gradient_accumulation_steps == plan.accumulation
    assert parsed.zero_config.overlap_comm is False and parsed.zero_config.round_robin_gradients is False
    expected = "fp32" if plan.accumulation > 1 and precision == "bf16" else None
    assert parsed.grad_accum_dtype == expected and parsed.communication_data_type is None
    config = changed(config, engine__reduce_dtype="fp32")
    assert DeepSpeedConfig(deepspeed_config(config, plan, 1, 10, 100)).communication_data_type == torch.float32


@pytest.mark.parametrize(
    ("stage", "num_ranks", "accumulation", "largest", "overlaps", "bucket", "told"),
    [
        (1, 1, 1, 10, False, 500_000_000, "one rank sums nothing"),
        (1, 2, 1, 10, True, 50_000_000, ""),
        (3, 2, 4, 60_000_000, True, 60_000_000, ""),  # no gradient goes around the bucket
        (1, 2, 4, 10, True, 50_000_000, "ZeRO 1 in bf16 with several micro-batches"),
    ],
)
def test_where_reductions_are_overlapped(
    stage: int,
    num_ranks: int,
    accumulation: int,
    largest: int,
    overlaps: bool,
    bucket: int,
    told: str,
    shards: Path,
) -> None:
    """On several ranks, in small buckets; where it does nothing the start says so. By default it is off."""
    config, plan = tiny_config(shards, shards, engine__precision="bf16"), BatchPlan(2, accumulation, 0)
    sizes = plan, num_ranks, largest
    zero = deepspeed_config(config, *sizes, 10**9)["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (False, 500_000_000)
    assert deepspeed_config(config, *sizes, 10**8)["zero_optimization"]["reduce_bucket_size"] == 10**8  # all of a model
    assert not told_of_overlap(config, plan, num_ranks)
    config = changed(config, engine__overlap_reduction=True, engine__zero_stage=stage)
    zero = deepspeed_config(config, *sizes, 10**9)["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (overlaps, bucket)
    line = told_of_overlap(config, plan, num_ranks)
    assert told in line and bool(told) == line.startswith("engine.overlap_reduction=true has no effect: ")


@pytest.mark.parametrize("precision, others", [("fp16", "bf16 or fp32"), ("bf16", "fp16 or fp32")])
def test_a_precision_that_the_machine_lacks_is_one_line(
    precision: str, others: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine has: DeepSpeed's answer is asked before DeepSpeed starts, and the others are named."""
    config = tiny_config(shards, Path("unused"), engine__precision=precision)
    monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda: None)  # as its fp16 answers: not False
    with pytest.raises(UserError, match=f"engine.precision={precision}: this CPU has no .* choose {others}"):
        check_precision(config)
    monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda: True)
    check_precision(config)


LACKS_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error in: NCCLUtils.hpp:77\nLast error:\nFailed to CUDA calloc async 608 bytes"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
]


@pytest.mark.parametrize("lack", LACKS_OF_MEMORY, ids=["torch", "cublas", "nccl", "cuda"])
def test_out_of_memory_of_the_model_and_of_layer_norms(
    lack: Exception, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be changed is named; norms of layers can be done without."""

    def no_room(*_: Any, **__: Any) -> None:
        raise lack

    config = tiny_config(shards, Path("unused"))
    monkeypatch.setattr("pretrain.train.building.Engine", no_room)
    with pytest.raises(DeviceMemoryError, match="^model.name: this GPU does not hold .*; try engine.zero_stage=2"):
        build_engine(config, open_data(config), torch.device("cpu"), from_scratch=True)
    with pytest.raises(DeviceMemoryError, match="^log.layers_every_steps: 4 images .*; 0 switches it off$"):
        with fitting("log.layers_every_steps", 4):
            no_room()


def test_slow_emulation_of_bf16_does_not_count(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch and DeepSpeed have it on GPUs before Ampere."""
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    config = tiny_config(shards, Path("unused"), engine__precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="engine.precision=bf16: Tesla V100 has no .* choose fp16 or fp32"):
        check_precision(config)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision(config)


@pytest.mark.parametrize("asked", [True, "max-autotune"])
def test_a_missing_compiler_is_one_line(
    asked: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before the engine is built; CC and CXX name others, and who does not compile needs none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    check_machine(tiny_config(shards, tmp_path))
    config = tiny_config(shards, tmp_path, engine__compile=asked)
    with pytest.raises(UserError, match=f"engine.compile={str(asked).lower()}: .*apt install build-essential") as error:
        check_machine(config)
    assert "\n" not in str(error.value)
    (tmp_path / "mine").touch(mode=0o755)
    monkeypatch.setenv("CXX", "mine")
    check_machine(config)


@pytest.mark.parametrize(
    ("asked", "stage", "device", "lacks", "compiled", "told"),
    [
        ("auto", 1, "cuda", None, True, "engine.compile=auto: blocks are compiled"),
        ("auto", 2, "cuda", "g++ only", False, "engine.compile=auto: blocks are not compiled (no C compiler: apt"),
        ("auto", 1, "cuda", "CC", False, "engine.compile=auto: blocks are not compiled (CC=ccache gcc is not there)"),
        ("auto", 1, "cuda", "no header", False, "engine.compile=auto: blocks are not compiled (no Python.h: apt"),
        ("auto", 1, "cuda", "old GPU", False, "engine.compile=auto: blocks are not compiled (the GPU is older than"),
        ("auto", 3, "cuda", None, False, "engine.compile=auto: blocks are not compiled (ZeRO 3 would"),
        ("auto", 1, "cpu", None, False, ""),
        (True, 3, "cuda", "g++ only", True, "engine.compile=true: blocks are compiled"),
        (True, 1, "cpu", None, True, ""),
        ("max-autotune", 1, "cuda", "g++ only", True, "engine.compile=max-autotune: blocks are compiled"),
        (False, 1, "cuda", None, False, "engine.compile=false: blocks are not compiled"),
    ],
)
def test_what_is_compiled(
    asked: Any,
    stage: int,
    device: str,
    lacks: str | None,
    compiled: bool,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default on GPUs where each rank finds what Triton needs, and told; a reason where it does not."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if lacks == "CC":
        monkeypatch.setenv("CC", "ccache gcc")  # Triton takes it for a file's name
    (tmp_path / ("g++" if lacks == "g++ only" else "gcc")).touch(mode=0o755)
    (tmp_path / ("none" if lacks == "no header" else "Python.h")).touch()
    monkeypatch.setattr("sysconfig.get_path", lambda *names: str(tmp_path))
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    capability = (6, 1) if lacks == "old GPU" else (7, 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    config = tiny_config(tmp_path, tmp_path, engine__compile=asked, engine__zero_stage=stage)
    found, line = compiling.compiles(config, torch.device(device))
    assert found is compiled and line.startswith(told) and bool(line) == bool(told) and "\n" not in line


def test_all_ranks_compile_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot is enough, and its reason is told."""
    monkeypatch.setattr(compiling, "_lacking", lambda device: None)
    monkeypatch.setattr(compiling.agreement, "gather", lambda own: [own, "no Triton", own])
    assert compiling.compiles(tiny_config(tmp_path, tmp_path), torch.device("cuda")) == (
        False,
        "engine.compile=auto: blocks are not compiled (no Triton)",
    )


def names_missing(config: Config) -> list[str]:
    """The private names of DeepSpeed that engine/slices.py relies on and that are not there."""
    engine, _ = start(config)
    zero, parameter = engine._zero, next(engine._engine.module.parameters())
    if config.engine.zero_stage == 3:
        wanted = {
            zero: ["grad_position", "get_param_id", "_get_param_partition_rank", "fp32_partitioned_groups_flat"]
            + ["fp16_groups", "_reassign_or_swap_out_partitioned_parameters"]
            + ["checkpoint_event_prologue", "checkpoint_event_epilogue"],
            parameter: ["ds_numel", "ds_shape", "ds_tensor"],
        }
    else:
        wanted = {
            zero: ["update_lp_params", "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"],
            parameter: ["_hp_mapping"],
        }
    return [name for thing, names in wanted.items() for name in names if not hasattr(thing, name)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_private_names_exist(stage: int, shards: Path) -> None:
    """A new DeepSpeed that renames what checkpoints read fails here, by name."""
    assert run_ranks(names_missing, 1, tiny_config(shards, Path("unused"), engine__zero_stage=stage)) == [[]]


def test_batch_split_keeps_order() -> None:
    """Micro-batches are consecutive runs of the rank's slots."""
    slots = torch.arange(6)
    batch = Batch(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), *single_labels(slots), slots >= 0, slots, slots, [])
    assert [part.labels[:, 0].tolist() for part in batch.split(2)] == [[0, 1], [2, 3], [4, 5]]


def master_weights(config: Config) -> tuple[dict[str, np.ndarray], bool]:
    engine, _ = start(config)
    owned = whole(engine.weights())
    precise = all(torch.equal(p.float(), p.float().bfloat16().float()) for p in engine._engine.module.parameters())
    engine.close()
    return owned, precise


@pytest.mark.parametrize(("stage", "max_micro_batch_size"), every_other([1, 2, 3], [256, 3]))
def test_a_bf16_run_starts_from_float32_weights(stage: int, max_micro_batch_size: int, shards: Path) -> None:
    """The master weights are the initial draws, bit for bit, not those rounded to bf16 that DeepSpeed makes them from:
    8 bits of a fine-tuning's first weights would be all that is left. The model's own weights are bf16.
    """
    changes = {"engine__precision": "bf16", "engine__max_micro_batch_size": max_micro_batch_size}
    config = tiny_config(shards, shards, engine__zero_stage=stage, **changes)
    held, rounded = run_ranks(master_weights, 2, config)[0]
    drawn = build_model(config.model, NUM_CLASSES, config.seed).state_dict()
    assert rounded and held.keys() == drawn.keys()
    for name, tensor in drawn.items():
        assert np.array_equal(held[name], tensor.numpy().ravel()), name


def test_random_states_of_something_else_are_refused(tmp_path: Path) -> None:
    """In a checkpoint that others made, whose checksums are right: one line."""
    reader = object.__new__(CheckpointReader)
    reader.path = tmp_path
    (tmp_path / "generators-00000.safetensors").write_bytes(b"junk")
    with pytest.raises(DamagedError, match="generators-00000.safetensors holds no tensors"):
        reader.generators(0)
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    for state in (torch.zeros(3), torch.zeros(5, dtype=torch.uint8)):
        with pytest.raises(UserError, match="random states are not torch's"):
            Engine.load_generators(engine, {"cpu": state})


@pytest.mark.parametrize("lack", LACKS_OF_MEMORY, ids=["torch", "cublas", "nccl", "cuda"])
def test_out_of_memory_names_the_key(lack: Exception) -> None:
    """No engine is needed: what its first step raises becomes a user's error, in one line; later it is another one."""
    engine = Engine.__new__(Engine)
    engine.plan, engine._fits = BatchPlan(96, 1, 0), False

    def no_room(*_: Any) -> None:
        raise lack

    engine._train_step = no_room  # type: ignore[method-assign,assignment]
    with pytest.raises(
        DeviceMemoryError, match="^engine.max_micro_batch_size: 96 images at a time .* try 48, or"
    ) as caught:
        engine.train_step(None, 0.1)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    engine._fits = True
    with pytest.raises(DeviceMemoryError, match="^this GPU's memory does not hold a step, as it did before") as caught:
        engine.train_step(None, 0.1)  # type: ignore[arg-type]
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    lack = RuntimeError("an illegal memory access")  # `no_room` raises what the name stands for now
    with pytest.raises(RuntimeError, match="^an illegal memory access$"):
        engine.train_step(None, 0.1)  # type: ignore[arg-type]


def test_forward_passes_are_timed_without_hooks() -> None:
    """Compiled code would trace them: of a model that is compiled as a whole they break the graph."""
    engine, found = Engine.__new__(Engine), list[float]()
    engine._module, engine.device = torch.nn.Linear(2, 2), torch.device("cpu")
    engine.on_forward(found.append)
    with engine._forward_clock:
        time.sleep(0.01)
    assert not engine._module._forward_hooks and not engine._module._forward_pre_hooks and 0.01 <= found[0] < 10


def test_timms_own_limits_are_one_line() -> None:
    """What a model of timm's has no way to do."""
    for name, changes, told in (
        ("timm:vgg11", {"drop_path": 0.1}, "model.drop_path: timm's vgg11 has none"),
        ("timm:crossvit_tiny_240", {}, "engine.checkpoint_activations: timm does not recompute"),
    ):
        with pytest.raises(ConfigError, match=told), torch.device("meta"):
            _checkpoint_activations(build_model(ModelConfig(name=name, **changes), 10))


@pytest.mark.parametrize("name", ["B/16", "timm:test_vit", "timm:resnet18"])
def test_a_gpus_random_state_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is built, or counted, behind the point where a resume has restored it."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    config = ModelConfig(name=name)
    train_flops(config, 10)
    with torch.device("meta"):
        build_model(config, 10, seed=3)
    assert not seeded and torch.equal(torch.get_rng_state(), before)


def test_the_search_for_a_loss_scale_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would end the process by a bare exception; here such a step is skipped, and counts as a fault."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # who tells of it
    scaler = DynamicLossScaler(4.0, 1000, 1, 1, False)
    after_start(600, SimpleNamespace(dtype=torch.float16, loss_scaler=scaler))
    for _ in range(5):
        scaler.update_scale(True)
    assert scaler.cur_scale == MIN_LOSS_SCALE


@pytest.mark.parametrize("what", ["predict", "features"])
def test_out_of_memory_in_an_evaluation_names_the_key(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of its own kind: who meets a user's error puts the trained weights back, which all ranks do together."""
    engine = Engine.__new__(Engine)
    engine._module = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)})

    def no_room(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr("pretrain.engine.step._head_of", lambda module: module["head"])
    engine._logits = no_room  # type: ignore[method-assign,assignment]
    with pytest.raises(DeviceMemoryError, match="^evaluation.batch_size: 8 images at a time, .*; try 4$") as caught:
        getattr(engine, what)(torch.zeros(8, 3, 4, 4))
    assert not isinstance(caught.value, (UserError, StorageError)) and caught.value.exit_code == 2
    assert not engine._module["head"]._forward_pre_hooks  # it would keep the features of each batch to come
