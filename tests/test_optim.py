"""Schedules, decay groups and optimizers against the numbers of Google's code, and against their formulas."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import Lamb as TimmsLamb
from timm.optim import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pretrain.config import ModelConfig, OptimConfig
from pretrain.errors import ConfigError
from pretrain.models.build import build_model
from pretrain.models.rates import rate_scales
from pretrain.models.vit import VisionTransformer
from pretrain.models.weights import classifier_names
from pretrain.optim import (
    PIECE_ELEMENTS,
    build_optimizer,
    learning_rate,
    moment_dtypes,
    parameter_groups,
    set_rate,
)


def optim(**changes: Any) -> OptimConfig:
    """Settings of the optimizer."""
    return OptimConfig(**({"lr": 1.0} | changes))


def schedule_of(given: dict[str, Any]) -> OptimConfig:
    """The settings that mean what the reference's arguments say: ours are steps, and rates for the batch at hand."""
    total, batch = given["total_steps"], given.get("batch_size", 256)
    warmup = given.get("warmup_steps", 0) + int(given.get("warmup_percent", 0) * total)
    warmup += given.get("warmup_examples", 0) // batch
    scale = batch / 256 if given.get("scale_with_batchsize") else 1.0
    kind = {"polynomial": "linear"}.get(given["decay_type"], given["decay_type"])
    options = {
        "linear": {"end_lr": given.get("end", given.get("linear_end", 0.0)), "power": given.get("power", 1.0)},
        "rsqrt": {"timescale_steps": given.get("timescale"), "shift_steps": given.get("shift", 0)},
        "stair": {"stair_steps": given.get("steps"), "stair_multipliers": given.get("mults")},
    }
    cooldown = given.get("cooldown_steps", 0)
    return optim(
        lr=given["base"] * scale,
        schedule=kind,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        **options.get(kind, {}),
    )


def test_schedules_equal_googles(test_fixtures: Path) -> None:
    """The rate of each step is that of vision_transformer and big_vision within 1e-6, in all 14 cases."""
    folder = test_fixtures / "lr_schedules"
    cases = json.loads((folder / "config.json").read_text())["schedules"]
    with np.load(folder / "values.npz", allow_pickle=False) as values:
        assert len(cases) == 14 and set(values) == {"steps", *cases}
        for name, given in cases.items():
            config = schedule_of(given)
            rates = [learning_rate(config, given["total_steps"], int(step)) for step in values["steps"]]
            assert len(rates) == 51 and rates == pytest.approx(values[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine"}, {5: 1.0, 10: 2.0, 40: 1.5, 55: 1.0, 70: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "end_lr": 0.2}, {5: 1.0, 10: 2.0, 40: 1.55, 55: 1.1, 70: 0.65, 100: 0.2}),
        ({"schedule": "linear", "end_lr": 0.2}, {5: 1.0, 10: 2.0, 55: 1.1, 100: 0.2}),
        ({"schedule": "linear", "end_lr": 0.2, "power": 2.0}, {5: 1.0, 10: 2.0, 55: 0.65, 82: 0.272, 100: 0.2}),
        ({"schedule": "rsqrt", "timescale_steps": 20}, {5: 1.0, 10: 2.0, 70: 1.0, 90: 0.894427191}),
        ({"schedule": "rsqrt", "timescale_steps": 20, "shift_steps": 60}, {5: 0.5, 10: 1.0, 30: 0.894427191}),
        ({"schedule": "constant"}, {0: 0.0, 5: 1.0, 10: 2.0, 99: 2.0}),
        ({"schedule": "constant", "cooldown_steps": 20}, {5: 1.0, 80: 2.0, 81: 1.9, 90: 1.0, 99: 0.1, 100: 0.0}),
        ({"schedule": "cosine", "cooldown_steps": 60}, {10: 2.0, 40: 1.5, 55: 0.75, 70: 0.25}),
        (
            {"schedule": "stair", "stair_steps": [8, 50, 60], "stair_multipliers": [0.5, 0.25, 2.0]},
            {7: 1.4, 8: 0.8, 10: 1.0, 49: 1.0, 50: 0.5, 59: 0.5, 60: 4.0, 100: 4.0},
        ),
        ({"schedule": "stair"}, {10: 2.0, 99: 2.0}),
    ],
)
def test_schedules_by_hand(changes: dict[str, Any], expected: dict[int, float]) -> None:
    """Rates worked out by hand, of 100 steps with a warm-up of 10 and a peak of 2."""
    config = optim(lr=2.0, warmup_steps=10, **changes)
    assert {step: learning_rate(config, 100, step) for step in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("end_lr", [0.0, 1e-5])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_cosine_equals_timms(warmup: int, end_lr: float) -> None:
    """The rate of each step is that of timm's CosineLRScheduler with --min-lr and --warmup-prefix, to rounding."""
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    length: dict[str, Any] = {"t_initial": 100 - warmup, "warmup_t": warmup, "warmup_prefix": True}
    schedule = CosineLRScheduler(theirs, **length, lr_min=end_lr, t_in_epochs=False)
    ours = optim(lr=3e-3, warmup_steps=warmup, end_lr=end_lr)
    for step in range(101):
        schedule.step_update(step)
        expected = pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        assert learning_rate(ours, 100, step) == expected, step


def test_the_warm_up_rises_linearly_from_zero() -> None:
    """Step 0 has rate 0, the peak comes when the warm-up is over, and without warm-up the run starts there."""
    for schedule in ("cosine", "linear", "rsqrt"):
        rates = [learning_rate(optim(schedule=schedule, warmup_steps=10), 100, step) for step in range(101)]
        assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
        assert max(rates) == rates[10] == 1.0
        assert all(a > b for a, b in zip(rates[10:], rates[11:]))
        assert learning_rate(optim(schedule=schedule), 100, 0) == 1.0


def test_the_schedules_end_where_they_should() -> None:
    """Cosine and linear end at end_lr, 0 unless set; rsqrt does not depend on the end, so a run may be prolonged."""
    assert learning_rate(optim(), 100, 100) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(optim(), 100, 50) == pytest.approx(0.5)
    for schedule in ("cosine", "linear"):
        assert learning_rate(optim(schedule=schedule, end_lr=0.25), 100, 100) == 0.25
    rsqrt = optim(schedule="rsqrt", warmup_steps=10, timescale_steps=20)
    assert [learning_rate(rsqrt, total, 70) for total in (71, 100, 10**6)] == [1 / math.sqrt(1 + 60 / 20)] * 3


def test_a_warm_up_as_long_as_the_run() -> None:
    """Nothing divides by zero when the run ends with its warm-up."""
    for schedule in ("cosine", "linear", "rsqrt"):
        assert learning_rate(optim(schedule=schedule, warmup_steps=10), 10, 9) == pytest.approx(0.9)


@pytest.mark.parametrize("pooling, positions", [("token", "learned"), ("gap", "sincos2d")])
def test_only_kernels_decay(pooling: Any, positions: Any) -> None:
    """The matrices of patches, attention, MLP and head decay; biases, norms, class token and positions do not."""
    config = ModelConfig(
        name="Ti", width=16, depth=2, mlp_dim=32, heads=2, image_size=16, pooling=pooling, positions=positions
    )
    model = VisionTransformer(config, num_classes=5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernels, others = parameter_groups(model, 0.3)
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    decayed = {names[id(parameter)] for parameter in kernels["params"]}
    dense = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert decayed == {f"{name}.weight" for name in dense}
    assert len(decayed) == 1 + 2 * 4 + 1
    rest = {names[id(parameter)] for parameter in others["params"]}
    assert decayed | rest == set(names.values()) and not decayed & rest
    assert ("cls_token" in rest) == (pooling == "token")


@pytest.mark.parametrize("multiplier", [100.0, 0.0, 1.0])
def test_the_head_may_decay_otherwise(multiplier: float) -> None:
    """The head's kernel alone is in a third group; without a multiplier there are two groups, as before."""
    shape: dict[str, Any] = {"name": "Ti", "width": 16, "depth": 2, "mlp_dim": 32, "heads": 2, "image_size": 16}
    model = VisionTransformer(ModelConfig(**shape), num_classes=5)
    optimizer = build_optimizer(
        optim(weight_decay=0.03, head_decay_multiplier=multiplier), model, classifier_names(model)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values()) and len(optimizer.param_groups) == (2 if multiplier == 1.0 else 3)
    assert decays["head.weight"] == pytest.approx(0.03 * multiplier) and decays["head.bias"] == 0.0
    assert decays["blocks.0.attn.qkv.weight"] == 0.03


class Named(nn.Module):
    """Parameters under given names, which may contain dots."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(torch.ones(shape)))


def test_what_is_no_kernel_does_not_decay() -> None:
    """Probes, positions of every kind and class tokens have two and more dimensions, and are no kernels."""
    kernels = {"attn_pool.q.weight": (4, 4), "patch_embed.proj.weight": (4, 3, 2, 2), "fc.weight": (4, 4)}
    others = {
        "attn_pool.latent": (1, 1, 4),
        "cls_token": (1, 1, 4),
        "pos_embed": (1, 9, 4),
        "axes.pos_embed.x": (3, 2),
        "axes.pos_embed.y": (3, 2),
        "blocks.0.pos_embed": (1, 9, 4),
        "blocks.0.attn.relative": (17, 4),
        "norm.weight": (4,),
        "fc.bias": (4,),
    }
    model = Named({**kernels, **others})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(kernels)
    assert {names[id(parameter)] for parameter in spared["params"]} == set(others)


# --- layer-wise decay ------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"name": "Ti", "width": 16, "depth": 3, "mlp_dim": 32, "heads": 2, "image_size": 16}
SMALL |= {"patch_size": 8}
DECAY, NUM_CLASSES = 0.75, 5


def both(pooling: Any) -> tuple[nn.Module, Any, dict[str, str]]:
    """Our model, timm's of the same weights, and our name for each of its parameters."""
    ours = build_model(ModelConfig(**SMALL, pooling=pooling), NUM_CLASSES)
    form = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    timms_pooling = {"token": "token", "gap": "avg", "map": "map"}[pooling]
    form |= {"class_token": pooling == "token", "global_pool": timms_pooling, "act_layer": "gelu_tanh"}
    theirs: Any = timm.create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, **form)
    names = {name: name.replace("fc_norm.", "norm.") for name, _ in theirs.named_parameters()}
    assert sorted(names.values()) == sorted(name for name, _ in ours.named_parameters())
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights[own] for name, own in names.items()})
    return ours, theirs, names


def timms_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """As timm's train.py makes them of --layer-decay."""
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_layer_decay(model, weight_decay, spared, layer_decay=DECAY)


def of_each(model: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    """What each parameter's group says, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("pooling", ["token", "gap", "map"])
def test_rates_by_layer_equal_timms(pooling: str) -> None:
    """Scale and weight decay of every parameter are those of timm's param_groups_layer_decay, but for the last norm
    where it stands before the pooling: timm counts it to the last block. In MAE, as here, its rate is the head's.
    """
    ours, theirs, names = both(pooling)
    groups = build_optimizer(
        optim(weight_decay=0.05, layer_decay=DECAY), ours, rate_scales=rate_scales(ours, DECAY)
    ).param_groups
    assert len(groups) == len(timms_groups(theirs, 0.05)) == 2 * (SMALL["depth"] + 2)
    for key in ("lr_scale", "weight_decay"):
        expected = {names[name]: value for name, value in of_each(theirs, timms_groups(theirs, 0.05), key).items()}
        found = of_each(ours, groups, key)
        assert found.keys() == expected.keys()
        different = {name: (found[name], expected[name]) for name in found if found[name] != expected[name]}
        if key == "lr_scale":
            assert different == ({} if pooling == "gap" else dict.fromkeys(("norm.weight", "norm.bias"), (1.0, DECAY)))
        else:
            assert different == ({"attn_pool.latent": (0.0, 0.05)} if pooling == "map" else {})


def test_steps_by_layer_equal_timms() -> None:
    """20 steps of AdamW beside timm's model, groups and schedule, the last norm taken out of its group: losses to 1e-5.

    Not the GAP model, whose norm stands behind the pooling in timm.
    """
    ours, theirs, _ = both("token")
    config = optim(lr=1e-2, weight_decay=0.05, warmup_steps=3, end_lr=1e-4, layer_decay=DECAY)
    optimizer = build_optimizer(config, ours, rate_scales=rate_scales(ours, DECAY))
    groups, norm = timms_groups(theirs, 0.05), list(theirs.norm.parameters())
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if all(parameter is not own for own in norm)]
    groups.append({"params": norm, "weight_decay": 0.0, "lr_scale": 1.0})
    timms = torch.optim.AdamW(groups, lr=1e-2)
    schedule = CosineLRScheduler(timms, 17, lr_min=1e-4, warmup_t=3, warmup_prefix=True, t_in_epochs=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        images = torch.rand(8, 3, 16, 16, generator=generator)
        labels = torch.randint(0, NUM_CLASSES, (8,), generator=generator)
        losses = [nn.functional.cross_entropy(model(images), labels) for model in (ours, theirs)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5), step
        set_rate(optimizer, learning_rate(config, 20, step))
        schedule.step_update(step)
        for loss, each in zip(losses, (optimizer, timms)):
            each.zero_grad()
            loss.backward()
            each.step()


@pytest.mark.parametrize(
    "changes", [{"positions": "learned2d", "positions_at": "every_layer"}, {"trunk": [1], "image_size": 32}], ids=str
)
def test_every_part_has_a_layer(changes: dict[str, Any]) -> None:
    """Tables of positions at each block are the block's, a hybrid's trunk is an embedding; the rest is the head's."""
    config = ModelConfig(**{**SMALL, "patch_size": 16, "representation_size": 8, **changes})
    scales = rate_scales(VisionTransformer(config, NUM_CLASSES), DECAY)
    for name, scale in scales.items():
        first, second, *_ = [*name.split("."), ""]
        block = {"blocks": int(second) + 1} if first == "blocks" else {}
        layer = {"patch_embed": 0, "cls_token": 0, "pos_embed": 0, "norm": 4, "pre_logits": 4, "head": 4, **block}
        assert scale == DECAY ** (4 - layer[first]), name
    assert scales["pre_logits.weight"] == scales["head.bias"] == 1.0


def test_models_of_timm_have_timms_layers() -> None:
    """A network that is no ViT has the layers that timm gives it; one of which timm says nothing is refused."""
    model: Any = timm.create_model("convnext_atto", num_classes=3)
    expected = of_each(model, timms_groups(model, 0.05), "lr_scale")
    assert rate_scales(model, DECAY) == expected and len(set(expected.values())) > 4
    with pytest.raises(ConfigError, match="^optim.layer_decay: timm does not say which layers Sequential has"):
        rate_scales(dense(bias=True), DECAY)


def dense(*, bias: bool) -> nn.Module:
    """One dense layer, as part of a model."""
    return nn.Sequential(nn.Linear(3, 2, bias=bias))


def test_the_optimizer_has_the_settings() -> None:
    """AdamW with the config's rate, betas and eps in both groups; an empty group is left out."""
    optimizer = build_optimizer(optim(lr=0.5, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.2), dense(bias=True))
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.95), 1e-5, decay)
    assert len(build_optimizer(optim(), dense(bias=False)).param_groups) == 1


REFERENCE_NAMES = {
    "dense.weight": "a/kernel",
    "dense.bias": "a/bias",
    "norm.weight": "LN/scale",
    "pos_embed": "pos_embedding",
}
# The reference's optimizers, written in this config's terms.
REFERENCE_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "bv_adam": {"lr": 1e-2, "weight_decay": 0.1},
    "bv_adam_bf16mu": {"lr": 1e-2, "weight_decay": 0.1, "moment_dtype": "bf16"},
    "vt_sgd_momentum_float32": {"name": "sgd", "lr": 0.03},
    "vt_sgd_momentum_bfloat16": {"name": "sgd", "lr": 0.03, "moment_dtype": "bf16"},
}


def _farthest(arrays: Any, reference: str, config: OptimConfig) -> float:
    """Takes six clipped steps on the reference's gradients; returns the largest distance from its tensors."""
    names = REFERENCE_NAMES
    model = Named({name: arrays[f"init/{theirs}"].shape for name, theirs in names.items()})
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(arrays[f"init/{names[name]}"])
    optimizer = build_optimizer(config, model)
    worst = 0.0
    for step in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(arrays[f"grad{step}/{names[name]}"])
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1.0  # clipping is active in every step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, 6, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            distance = np.abs(parameter.detach().numpy() - arrays[f"{reference}/step{step}/{names[name]}"]).max()
            worst = max(worst, float(distance))
    return worst


@pytest.mark.parametrize("reference", REFERENCE_OPTIMIZERS)
def test_optimizers_equal_googles(reference: str, test_fixtures: Path) -> None:
    """Six steps on four tensors within 1e-6 of big_vision's and vision_transformer's optimizers.

    big_vision does not multiply the decay by the rate: 1e-3 / 1e-2 = 0.1 here, and the raw number is far off.
    """
    settings = REFERENCE_OPTIMIZERS[reference]
    with np.load(test_fixtures / "optimizer_steps" / "data.npz", allow_pickle=False) as arrays:
        assert _farthest(arrays, reference, optim(warmup_steps=2, **settings)) < 1e-6
        if reference.startswith("bv_adam"):
            assert _farthest(arrays, reference, optim(warmup_steps=2, **(settings | {"weight_decay": 1e-3}))) > 1e-3


def rounded(values: Any, dtype: str) -> Any:
    """float64 values as they are after a stay in bfloat16."""
    values = np.asarray(values, dtype=np.float64)
    return torch.from_numpy(values).float().bfloat16().double().numpy() if dtype == "bf16" else values


def by_the_book(config: OptimConfig, weights: Any, gradients: list[Any]) -> Any:
    """Returns the weights by the formulas in float64; momenta are rounded where they are stored or decayed."""
    dtype = config.moment_dtype
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    (b1, b2), decay = config.betas, config.weight_decay

    def decayed(beta: float) -> Any:
        return rounded(rounded(beta, dtype) * first, dtype)

    for t, gradient in enumerate(gradients, 1):
        if config.name in ("adamw", "lamb"):
            new = decayed(b1) + (1 - b1) * gradient
            second = b2 * second + (1 - b2) * gradient**2
            move = (new / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + config.eps)
        elif config.name == "sgd":
            new = move = decayed(config.momentum) + gradient
        else:
            move = np.sign(decayed(b1) + (1 - b1) * gradient)
            new = decayed(b2) + (1 - b2) * gradient
        first = rounded(new, dtype)
        move = move + decay * weights
        ratio = np.linalg.norm(weights) / np.linalg.norm(move) if config.name == "lamb" else 1.0
        weights = weights - config.lr * ratio * move
    return weights


@pytest.mark.parametrize("moment_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb"])
def test_optimizers_follow_the_book(name: Any, moment_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps equal the formulas, in float64, within 1e-6; in pieces that do not divide the tensor as in one."""
    config = optim(name=name, lr=1e-2, weight_decay=0.1, moment_dtype=moment_dtype, betas=(0.9, 0.97))
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(9, 11)), [random.normal(size=(9, 11)) for _ in range(10)]
    start, *gradients = (array.astype(np.float32).astype(np.float64) for array in (start, *gradients))
    ends = []
    for pieces in (PIECE_ELEMENTS, 7):
        monkeypatch.setattr("pretrain.optim.PIECE_ELEMENTS", pieces)
        model = Named({"dense.weight": (9, 11)})
        (weights,) = model.parameters()
        weights.data = torch.from_numpy(start).float()
        optimizer = build_optimizer(config, model)
        for gradient in gradients:
            weights.grad = torch.from_numpy(gradient).float()
            optimizer.step()
        ends.append(weights.detach())
        assert {n: t.dtype for n, t in optimizer.state[weights].items() if n != "step"} == moment_dtypes(config)
    assert torch.equal(*ends)
    assert np.abs(ends[0].numpy() - by_the_book(config, start, gradients)).max() < 1e-6


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb"])
def test_no_step_reads_a_value(name: Any) -> None:
    """On the meta device, where no value exists, a step works: on a GPU nothing waits for the device."""
    model = Named({"dense.weight": (3, 5), "dense.bias": (5,)}).to("meta")
    optimizer = build_optimizer(
        optim(name=name, moment_dtype="bf16", weight_decay=0.1, betas=(0.9, 0.99), clip_norm=0.0), model
    )
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_is_the_plain_one(dtype: torch.dtype) -> None:
    """AdamW in one kernel against torch's plain loop over the same gradients: within 2e-6 after 30 steps of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(30, 40)
    plain = nn.Linear(30, 40)
    plain.load_state_dict(model.state_dict())
    ours = build_optimizer(optim(lr=1e-2, weight_decay=0.1), model)
    theirs = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    assert ours.defaults["fused"] and not theirs.defaults["fused"]
    for _ in range(30):
        for parameter, other in zip(model.parameters(), plain.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype).float()
            other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-6)


# --- LAMB ------------------------------------------------------------------------------------------------------------


def test_lamb_equals_timms() -> None:
    """20 steps beside timm's Lamb, its clipping included, on the same gradients: weights to 1e-6, which is the rounding
    of float32 over 20 steps of 1e-2; ratios of 0.1 to 10 would be far off. The head starts from zeros, and a kernel
    without gradient at first has no step: both norms have been 0.
    """
    shapes = {"a.weight": (30, 40), "a.bias": (30,), "norm.weight": (30,), "pos_embed": (1, 4, 30)}
    shapes |= {"late.weight": (5, 30), "head.weight": (7, 30), "head.bias": (7,)}
    ours, theirs = Named(shapes), Named(shapes)
    generator = torch.Generator().manual_seed(0)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters()):
        own.data = torch.randn(own.shape, generator=generator) * (not name.startswith("head")) * 0.5
        other.data = own.data.clone()
    optimizer = build_optimizer(optim(name="lamb", eps=1e-6, weight_decay=0.1), ours)
    timms = TimmsLamb(parameter_groups(theirs, 0.1), lr=1.0)
    assert timms.defaults["eps"] == 1e-6 and timms.defaults["max_grad_norm"] == 1.0
    for step in range(20):
        for (name, own), other in zip(ours.named_parameters(), theirs.named_parameters()):
            scale = 0.0 if name == "late.weight" and step < 5 else 10.0 ** (step % 3 - 1)
            own.grad = torch.randn(own.shape, generator=generator) * scale
            other[1].grad = own.grad.clone()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        set_rate(optimizer, 1e-2 * step / 20)
        set_rate(timms, 1e-2 * step / 20)
        optimizer.step()
        timms.step()
        for (name, own), other in zip(ours.named_parameters(), theirs.parameters()):
            assert float((own - other).detach().abs().max()) < 1e-6, (name, step)
    assert all(float(parameter.detach().abs().max()) > 0 for parameter in ours.parameters())


def test_lambs_gradients_become_its_directions() -> None:
    """No second copy of the weights: a step allocates nothing as large as a parameter but Adam's temporaries."""
    model = Named({"a.weight": (4, 3)})
    (weights,) = model.parameters()
    optimizer = build_optimizer(optim(name="lamb", lr=0.1, weight_decay=0.5), model)
    weights.grad = torch.full((4, 3), 2.0)
    held = weights.grad
    optimizer.step()
    assert weights.grad is held and torch.allclose(held, torch.full((4, 3), 1.5))  # 1, Adam's first step, and 0.5 w
    assert torch.allclose(weights, torch.full((4, 3), 1 - 0.1 * 1.5 / 1.5))
