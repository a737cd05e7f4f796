"""The models: timm's logits with the same weights, Google's initialisation, exact counts of parameters and MACs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from weights_on_disk import randomised

from pretrain.config import VIT_SHAPES, ModelConfig, load_config
from pretrain.config.checks import timm_models
from pretrain.config.model import PLAIN_FORM, VIT_FORMS
from pretrain.errors import ConfigError
from pretrain.losses import per_image_loss
from pretrain.models.build import build_model, build_without_values, drawn_values
from pretrain.models.positions import sincos2d
from pretrain.models.profile import forward_macs, num_parameters, train_flops
from pretrain.models.vit import NORM_EPS, Attention, Block, VisionTransformer, draw_kept
from pretrain.optim import build_optimizer, learning_rate, parameter_groups, set_rate

torch.set_num_threads(1)
TINY: dict[str, Any] = {"name": "Ti", "width": 48, "depth": 3, "mlp_dim": 80, "heads": 3, "image_size": 24}
NUM_CLASSES = 11
DEIT3 = Path(__file__).resolve().parents[1] / "configs" / "deit3_imagenet1k.yaml"


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, "patch_size": 8, **changes})


def images(size: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def timm_vit(config: ModelConfig) -> nn.Module:
    """timm's model of the same architecture, its arguments written out here by hand."""
    return timm.create_model(
        "vit_base_patch16_224",
        num_classes=NUM_CLASSES,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.shape.width,
        depth=config.shape.depth,
        num_heads=config.shape.heads,
        mlp_ratio=(config.shape.mlp_dim + 0.5) / config.shape.width,
        class_token=config.pooling == "token",
        global_pool="token" if config.pooling == "token" else "avg",
        fc_norm=False,
        no_embed_class=config.positions == "sincos2d",
        act_layer="gelu_tanh" if config.gelu == "tanh" else "gelu",
    ).eval()


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
@pytest.mark.parametrize("pooling", ["token", "gap"])
@torch.no_grad()
def test_same_weights_give_timms_logits(pooling: Any, positions: Any, gelu: Any) -> None:
    """For all 8 variants: the largest difference is at most 1e-5 of the largest logit, the head's input likewise."""
    config = tiny(pooling=pooling, positions=positions, gelu=gelu)
    ours, theirs = randomised(build_model(config, NUM_CLASSES)), timm_vit(config)
    state = dict(ours.state_dict())
    if positions == "sincos2d":
        state["pos_embed"] = sincos2d(3, 3, 48)
    theirs.load_state_dict(state)
    x = images(24)
    pairs = [(ours(x), theirs(x))]
    features = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (ours, theirs)]  # type: ignore
    for found, expected in [*pairs, tuple(features)]:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = timm_vit(tiny(pooling=pooling, positions=positions, gelu="exact" if gelu == "tanh" else "tanh"))
    other.load_state_dict(state)
    assert (ours(x) - other(x)).abs().max() > 3e-5 * pairs[0][1].abs().max()  # the other GELU is seen


FORM_22B = VIT_FORMS["22B"]._asdict()


@torch.no_grad()
def test_the_block_of_22b_is_timms_parallel_one() -> None:
    """Parallel layers on one norm, normalised queries and keys, no centring, no biases in q, k, v: timm's block of that
    paper computes the same with the same weights.
    """
    from timm.layers import GELUTanh
    from timm.layers.norm import RmsNorm
    from timm.models.vision_transformer import ParallelScalingBlock

    ours: Any = randomised(Block(tiny(**FORM_22B)))
    sizes = {"mlp_ratio": 80.5 / 48, "qk_norm": True, "act_layer": GELUTanh}
    theirs = ParallelScalingBlock(48, 3, norm_layer=lambda width, **_: RmsNorm(width, eps=NORM_EPS), **sizes)
    joined = torch.cat([ours.mlp.fc1.weight, ours.attn.qkv.weight])
    names = {"in_norm": ours.norm1, "q_norm": ours.attn.q_norm, "k_norm": ours.attn.k_norm}
    names |= {"attn_out_proj": ours.attn.proj, "mlp_out_proj": ours.mlp.fc2}
    state = {f"{name}.{key}": value for name, module in names.items() for key, value in module.state_dict().items()}
    theirs.load_state_dict(state | {"in_proj.weight": joined, "mlp_bias": ours.mlp.fc1.bias})
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    found, expected = ours(x), theirs(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for other in ({"parallel_blocks": False}, {"qk_norm": False}, {"rms_norm": False}):  # each setting is seen
        plain: Any = Block(tiny(**{**FORM_22B, **other}))
        plain.load_state_dict(ours.state_dict(), strict=False)
        assert (plain(x) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_22b_is_that_of_its_paper() -> None:
    """The name alone says the form; matrices of its 48 blocks have 21,743 million parameters (Table 1)."""
    config = ModelConfig(name="22B", patch_size=14)
    assert config.form._asdict() == FORM_22B and ModelConfig(name="G", patch_size=14).form == PLAIN_FORM
    with torch.device("meta"):
        model = VisionTransformer(config, 1000)
    assert sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2) == 21_743_271_936
    biases = {name for name, _ in model.blocks[0].named_parameters() if name.endswith("bias")}
    assert biases == {"attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"}


@torch.no_grad()
def test_a_vit_of_deit3_is_timms() -> None:
    """Layer scale behind both branches, no class row, exact GELU: timm's own entry has the same tensors and computes
    the same. Its first value is the setting's, and it gets no weight decay.
    """
    config = tiny(patch_size=8, class_position=False, gelu="exact", layer_scale=1e-4)
    ours: Any = build_model(config, NUM_CLASSES)
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 80.5 / 48}
    theirs: Any = timm.create_model(
        "deit3_base_patch16_224", num_classes=NUM_CLASSES, img_size=24, init_values=1e-4, **shape
    )
    scales = {name: value for name, value in ours.state_dict().items() if name.endswith("gamma")}
    assert len(scales) == 6 and all(torch.equal(value, theirs.state_dict()[name]) for name, value in scales.items())
    kernels, _ = parameter_groups(ours, 0.1)
    assert not {id(parameter) for parameter in kernels["params"]} & {id(ours.get_parameter(name)) for name in scales}
    theirs.load_state_dict(randomised(ours).state_dict())
    x = images(24)
    expected = theirs.eval()(x)
    assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name in ("ls1", "ls2"):  # each is seen
        block, kept = ours.blocks[1], getattr(ours.blocks[1], name)
        setattr(block, name, None)
        assert (ours(x) - expected).abs().max() > 1e-3 * expected.abs().max()
        setattr(block, name, kept)


def test_layer_norms_have_googles_epsilon() -> None:
    """1e-6, which logits hardly show: torch's default is 1e-5."""
    norms = [m for m in build_model(tiny(), NUM_CLASSES).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 7 and {norm.eps for norm in norms} == {NORM_EPS} == {1e-6}


# --- counts ----------------------------------------------------------------------------------------------------------


def test_parameters_and_macs_equal_the_reference_numbers(test_fixtures: Path) -> None:
    """Every model of flops_params.json, exactly: parameters, with a 21,843-class head too, and multiply-adds.

    One entry is a note (patch 14 does not divide 384) and has no numbers.
    """
    entries = json.loads((test_fixtures / "flops_params.json").read_text())["models"]
    by_shape = {tuple(shape): name for name, shape in VIT_SHAPES.items()}
    compared = 0
    for key, entry in entries.items():
        if "params" not in entry:
            assert "patch14_384" in key, key
            continue
        shape = (entry["width"], entry["depth"], entry["mlp"], entry["heads"])
        patch, size = (int(part) for part in re.findall(r"patch(\d+)_(\d+)", key)[0])
        plain = PLAIN_FORM._asdict()  # the fixture's 22B is a plain ViT of that width
        config = ModelConfig(name=by_shape[shape], patch_size=patch, image_size=size, **plain)
        with torch.device("meta"):  # 22 billion parameters without their memory
            assert num_parameters(VisionTransformer(config, 1000)) == entry["params"], key
            assert num_parameters(VisionTransformer(config, 21843)) == entry["params_head21843"], key
        assert forward_macs(config, 1000) == entry["macs_fwd"], key
        assert train_flops(config, 1000) == entry["train_flops_3x"], key
        compared += 1
    assert compared == 63


HYBRID_COUNTS = [  # of 1000 classes: timm's own models; R50+L/16 by formula; AugReg gives 6.4M, 36.6M, 330.0M
    ("R+Ti", 32, 6_337_704),
    ("R26+S", 32, 36_431_912),
    ("R26+B", 32, 101_383_976),
    ("R50+B", 16, 98_659_112),
    ("R50+L", 16, 316_483_624),
    ("R50+L", 32, 328_994_856),
]


@pytest.mark.parametrize(("name", "patch_size", "parameters"), HYBRID_COUNTS)
def test_hybrids_have_the_published_parameters(name: str, patch_size: int, parameters: int) -> None:
    """Stages, widths and the patch on the map of every hybrid."""
    with torch.device("meta"):
        assert num_parameters(build_model(ModelConfig(name=name, patch_size=patch_size), 1000)) == parameters


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("vit_base_patch16_384", ("B", 16, 384)),
        ("vit_large_patch14_224.augreg_in21k", ("L", 14, 224)),
        ("vit_base_r50_s16_224", ("R50+B", 16, 224)),
        ("vit_tiny_r_s16_p8_384", ("R+Ti", 32, 384)),
        ("B/32", ("B", 32, 224)),
        ("ViT-H_14", ("H", 14, 224)),
        ("R50+ViT-L_32", ("R50+L", 32, 224)),
        ("R_Ti_16", ("R+Ti", 32, 224)),
    ],
)
def test_names_of_timm_and_google_are_accepted(name: str, means: tuple[str, int, int]) -> None:
    """A name says size, patch and, with timm, resolution; another resolution may be given beside it."""
    config = ModelConfig(name=name)
    assert (config.name, config.patch_size, config.image_size) == means and not list(config.problems())
    assert ModelConfig(name=name, image_size=448).image_size == 448


@pytest.mark.parametrize("pooling", ["token", "gap"])
def test_macs_equal_torchs_counter(pooling: Any) -> None:
    """The formula is what torch counts in a forward pass, for both poolings."""
    config = tiny(pooling=pooling)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch 2.9 does not count the CPU's own attention
        build_model(config, NUM_CLASSES).eval()(images(24, count=1))
    assert forward_macs(config, NUM_CLASSES) * 2 == counter.get_total_flops()


# --- initialisation --------------------------------------------------------------------------------------------------


INITIALISED: dict[str, dict[str, Any]] = {
    "token": {"head_bias": -6.9, "representation_size": 256},
    "map": {"pooling": "map", "class_position": False},
    "hybrid": {"trunk": [2, 1], "trunk_width": 64},
    "learned2d": {"positions": "learned2d", "positions_at": "every_layer"},
    "relative": {"positions": "relative"},
    "layer_scale": {"layer_scale": 1e-4},
}


def assert_uniform(values: torch.Tensor, fan_in: int, fan_out: int) -> None:
    """Xavier's bound is reached and not passed, and the spread is the uniform distribution's."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(values.mean()) < 0.02 * bound


@pytest.mark.parametrize("variant", INITIALISED)
def test_every_tensor_is_initialised_as_in_googles_code(variant: str) -> None:
    """One rule per kind of tensor, and every tensor falls under one. Large enough for statistics: width 256."""
    config = tiny(width=256, mlp_dim=512, heads=4, image_size=64, **INITIALISED[variant])
    model = build_model(config, NUM_CLASSES, seed=3)
    positions = 0.02 if config.class_position else 256**-0.5  # vision_transformer's, big_vision's
    for name, tensor in model.named_parameters():
        values = tensor.detach()
        if name.endswith((".qkv.weight", ".kv.weight")):
            for part in values.split(256):  # each of q, k, v is a 256 x 256 matrix of its own: not 256 x 768
                assert_uniform(part, 256, 256)
        elif name.endswith(("attn.proj.weight", "attn_pool.q.weight", "attn_pool.proj.weight")):
            assert_uniform(values, 256, 256)
        elif name == "attn_pool.latent":
            bound = math.sqrt(6 / 257)
            assert 0.95 * bound < values.abs().max() <= bound
        elif name.endswith(("fc1.weight", "fc2.weight")):
            assert_uniform(values, 256, 512)
        elif name.endswith(("fc1.bias", "fc2.bias")):
            assert values.std() == pytest.approx(1e-6, rel=0.15)
        elif "pos_embed" in name or name.endswith("relative_embed"):
            assert values.std() == pytest.approx(positions, rel=0.05) and values.abs().max() > 2.8 * positions
        elif name == "pre_logits.weight" or values.ndim == 4:
            # LeCun normal, truncated at two deviations before rescaling
            std = 1 / math.sqrt(values[0].numel())
            assert values.std() == pytest.approx(std, rel=4 / math.sqrt(2 * values.numel()))
            assert 2.2 * std < values.abs().max() <= 2.0001 / 0.8796 * std
        elif name == "head.bias":
            assert (values == torch.tensor(config.head_bias)).all()
        elif name.endswith(("ls1.gamma", "ls2.gamma")):
            assert (values == torch.tensor(1e-4)).all()
        elif name.endswith("norm3.weight"):  # a ResNet unit starts as its shortcut
            assert (values == 0).all()
        elif "norm" in name and name.endswith(".weight"):
            assert (values == 1).all()
        else:
            assert name in ("cls_token", "head.weight") or name.endswith(".bias"), name
            assert (values == 0).all(), name


@pytest.mark.parametrize("variant", [{"layer_scale": 1e-4, "class_position": False}, {"pooling": "map"}])
def test_every_tensor_is_initialised_as_in_deits_code(variant: dict[str, Any]) -> None:
    """models_v2.py: N(0, 0.02) for all that is dense or learned once, the head too; torch's default for the patches."""
    config = tiny(width=256, mlp_dim=512, heads=4, image_size=64, init="deit", head_bias=-6.9, **variant)
    for name, tensor in build_model(config, NUM_CLASSES, seed=3).named_parameters():
        values = tensor.detach()
        if values.ndim == 4:
            bound = 1 / math.sqrt(values[0].numel())
            assert 0.99 * bound < values.abs().max() <= bound
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        elif values.ndim > 1:  # dense kernels, positions, class token, probe
            assert values.std() == pytest.approx(0.02, rel=4 / math.sqrt(2 * values.numel())), name
        elif name == "head.bias":
            assert (values == torch.tensor(-6.9)).all()
        elif name.endswith("gamma"):
            assert (values == torch.tensor(1e-4)).all()
        else:
            assert (values == ("norm" in name and name.endswith(".weight"))).all(), name


def test_a_head_of_zeros_stays_there_under_lamb() -> None:
    """LAMB's steps are relative to the weights: after 300 steps of DeiT III's warm-up a head from zero is at 1e-6."""
    settings, rms = load_config(DEIT3).optim, {}
    for init in ("google", "deit"):
        head = build_model(tiny(init=init), NUM_CLASSES, seed=3).head
        optimizer, generator = build_optimizer(settings, nn.Sequential(head)), torch.Generator().manual_seed(0)
        for step in range(300):
            set_rate(optimizer, learning_rate(settings, 500_945, step))
            features = torch.randn(8, head.in_features, generator=generator)
            labels = torch.randint(NUM_CLASSES, (8, 1), generator=generator)
            optimizer.zero_grad()
            per_image_loss(head(features), labels, torch.ones(8, 1), "sigmoid").mean().backward()
            optimizer.step()
        rms[init] = head.weight.detach().square().mean().sqrt()
    assert rms["google"] < 1e-5 and rms["deit"] > 1e-2


def test_the_seed_alone_decides_the_weights() -> None:
    """Same seed, same bits, whatever the global generator did before; another seed, others. timm's models too."""
    for config in (tiny(), ModelConfig(name="timm:test_vit", image_size=32)):
        first = build_model(config, NUM_CLASSES, seed=5).state_dict()
        torch.rand(7)
        before = torch.get_rng_state()
        again, other = (build_model(config, NUM_CLASSES, seed=seed).state_dict() for seed in (5, 6))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("variant", INITIALISED)
def test_values_drawn_one_at_a_time_are_the_model_s(variant: str) -> None:
    """Into a model without values, whose buffers are whole; at each call again, and no other generator moves."""
    config = tiny(**INITIALISED[variant])
    whole, before = build_model(config, NUM_CLASSES, seed=5), torch.get_rng_state()
    model = build_without_values(config, NUM_CLASSES)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), whole.buffers(), strict=True))
    values = drawn_values(model, config, seed=5)
    for _ in range(2):
        for (name, value), (expected, parameter) in zip(values(), whole.named_parameters(), strict=True):
            assert name == expected and torch.equal(value, parameter)
    assert torch.equal(torch.get_rng_state(), before)


# --- positions -------------------------------------------------------------------------------------------------------


def test_sincos2d_is_its_definition() -> None:
    """Entry by entry from the formula, on a grid that is not square."""
    table = sincos2d(3, 5, 16)
    assert table.shape == (1, 15, 16) and table.dtype == torch.float32
    for y in range(3):
        for x in range(5):
            for i in range(4):
                w = 10_000 ** (-i / 3)
                expected = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                found = table[0, y * 5 + x, [i, 4 + i, 8 + i, 12 + i]].tolist()
                assert found == pytest.approx(expected, abs=1e-7)


def test_learned2d_is_its_definition() -> None:
    """Entry (x, y) is concat(X[x], Y[y]); the class token has none; at every layer each block adds its own."""
    config = tiny(positions="learned2d", positions_at="every_layer")
    model: Any = randomised(build_model(config, NUM_CLASSES))
    table = model.blocks[1].pos_embed()
    for y in range(3):
        for x in range(3):
            assert torch.equal(table[0, y * 3 + x, :24], model.blocks[1].pos_embed.x[x])
            assert torch.equal(table[0, y * 3 + x, 24:], model.blocks[1].pos_embed.y[y])
    tokens = torch.randn(2, 10, 48)
    shifted = tokens.clone()
    shifted[:, 1:] += table
    expected = model.blocks[1](tokens)
    model.blocks[1].pos_embed = None
    assert torch.equal(model.blocks[1](shifted), expected)


@torch.no_grad()
def test_a_shared_table_is_added_before_each_block() -> None:
    """The same forward pass written out: class row included, one table, three additions."""
    model: Any = randomised(build_model(tiny(positions_at="shared"), NUM_CLASSES))
    x = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images(24))], dim=1)
    for block in model.blocks:
        x = block(x + model.pos_embed)
    torch.testing.assert_close(model.forward_features(images(24)), model.norm(x), rtol=0, atol=0)
    assert sum("pos_embed" in name for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize("pooling", ["token", "gap"])
@torch.no_grad()
def test_relative_positions_are_their_definition(pooling: Any) -> None:
    """Query by query and key by key: content logits plus the query times the embedding of its offset, then softmax."""
    model: Any = randomised(build_model(tiny(positions="relative", pooling=pooling), NUM_CLASSES))
    attention, patches, token = model.blocks[0].attn, 9, pooling == "token"
    x = torch.randn(1, patches + token, 48, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.qkv(x)[0].view(-1, 3, 3, 16).permute(1, 2, 0, 3)  # each [heads, tokens, 16]
    embed, out = attention.relative_embed, torch.zeros(patches + token, 3, 16)
    for head in range(3):
        for i in range(patches + token):
            logits = []
            for j in range(patches + token):
                row = i - j + patches - 1
                if token and 0 in (i, j):
                    row = 2 * patches - 1 + (2 if i == j else 0 if i == 0 else 1)
                logits.append((q[head, i] @ k[head, j] + q[head, i] @ embed[row]) / 4)
            out[i, head] = torch.stack(logits).softmax(0) @ v[head]
    expected = attention.proj(out.flatten(1))
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-5, atol=1e-5)
    assert len(embed) == 2 * patches - 1 + 3 * token


# --- randomness and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["dropout", "drop_path"])
def test_dropout_and_drop_path_act_in_training_only(setting: str) -> None:
    """Two passes differ in training, are equal in evaluation, and equal to those of a model without either."""
    model = randomised(build_model(tiny(**{setting: 0.5}), NUM_CLASSES))
    plain = build_model(tiny(), NUM_CLASSES).eval()
    plain.load_state_dict(model.state_dict())
    x = images(24)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    """Each image's branch is either zero or scaled by 1 / 0.75; rates rise linearly from 0 to the last block's, or are
    that of all blocks.
    """
    torch.manual_seed(0)
    for kept in draw_kept(torch.ones(4000, 2, 3), 0.25):
        assert set(kept.unique().tolist()) == {0.0, (torch.ones(()) / 0.75).item()}
        assert kept.shape == (4000, 1, 1) and kept.mean() == pytest.approx(1, abs=0.03)
    model: Any = build_model(tiny(drop_path=0.4), NUM_CLASSES)
    assert model.drop_path == pytest.approx([0.0, 0.2, 0.4])
    model = build_model(tiny(drop_path=0.4, drop_path_rule="uniform"), NUM_CLASSES)
    assert model.drop_path == [0.4, 0.4, 0.4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"drop_path": 0.4},
        {"drop_path": 0.4, "positions": "relative"},
        {"drop_path": 0.4, "drop_path_rule": "uniform", "layer_scale": 0.1},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_the_forms_for_speed_have_the_bits_of_the_plain_ones(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k, v as three parts, and scales drawn outside of the block, against one tensor with an axis for q, k, v and
    scales drawn where they are needed: output, gradients and the generator. (With both dropouts the draws come in
    another order.)
    """
    found = []
    for plain in (False, True):
        model: Any = randomised(build_model(tiny(**changes), NUM_CLASSES)).to(dtype).train()
        if plain:
            monkeypatch.setattr(Attention, "forward", plain_attention)
            monkeypatch.setattr(Block, "forward", plain_block)
            for block, rate in zip(model.blocks, model.drop_path or [0.0] * len(model.blocks)):
                block.rate = rate
            model.drop_path = None
        torch.manual_seed(0)
        logits = model(images(24).to(dtype))
        logits.float().square().sum().backward()
        found.append([logits, torch.get_rng_state(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def plain_attention(attention: Any, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, width = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.heads, width // attention.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention._relative_logits(q))
    return attention.drop(attention.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


def plain_block(block: Any, x: torch.Tensor, _: None) -> torch.Tensor:
    def dropped(branch: torch.Tensor) -> torch.Tensor:
        keep = 1.0 - block.rate
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep) if block.rate else branch

    def scaled(branch: torch.Tensor, scale: Any) -> torch.Tensor:
        return branch if scale is None else branch * scale.gamma

    x = x + dropped(scaled(block.attn(block.norm1(x)), block.ls1))
    return x + dropped(scaled(block.mlp(block.norm2(x)), block.ls2))


def test_dropout_acts_after_positions_and_dense_layers_but_not_in_attention() -> None:
    """The paper's places (B.1): one after the positions, and per block one after the projection and two in the MLP."""
    model = build_model(tiny(dropout=0.3), NUM_CLASSES)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.3]
    assert found == ["pos_drop"] + [f"blocks.{i}.{part}.drop" for i in range(3) for part in ("attn", "mlp")]


def test_recomputing_activations_gives_the_same_gradients() -> None:
    """Bit for bit, with dropout drawn again the same way."""
    gradients = []
    for recompute in (False, True):
        model: Any = randomised(build_model(tiny(dropout=0.1, drop_path=0.2), NUM_CLASSES)).train()
        model.checkpoint_activations = recompute
        torch.manual_seed(0)
        model(images(24)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# --- timm's models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("test_vit", 32), ("test_resnet", 40), ("tiny_vit_5m_224", 224)])
def test_timm_models_build_at_the_configs_size(name: str, size: int) -> None:
    """A ViT, whose grid is fixed when it is built, a ResNet, which takes any size, and one that has "vit" in its name
    and refuses the argument.
    """
    config = ModelConfig(name=f"timm:{name}", image_size=size)
    model = build_model(config, NUM_CLASSES).eval()
    with torch.no_grad():
        assert model(images(size, count=2)).shape == (2, NUM_CLASSES)
    assert forward_macs(config, NUM_CLASSES) > 0


@pytest.mark.parametrize(
    ("name", "suggestion"), [("vit_tiny_patch16_225", "vit_tiny_patch16_224"), ("resnet5", "resnet50")]
)
def test_an_unknown_timm_name_is_one_line_with_a_suggestion(name: str, suggestion: str) -> None:
    """A misspelt name and a part of one both lead to the model that was meant."""
    with pytest.raises(ConfigError, match=f"timm has no model '{name}'.*{suggestion}") as caught:
        build_model(ModelConfig(name=f"timm:{name}"), NUM_CLASSES)
    assert "\n" not in str(caught.value)


def test_timms_names_are_known_without_importing_it() -> None:
    """As timm itself lists them: for the config's messages, which come before torch."""
    assert set(timm_models()) == set(timm.list_models())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depth": 1025}, "depth 1025, width 32"),
        ({"width": 65_568}, "width 65568"),
        ({"mlp_dim": 65_537}, "mlp_dim 65537 are too large: at most 1024 blocks, 65536 channels"),
        ({"trunk": [1000, 25], "image_size": 32}, "model.trunk has 1025 units, expected at most 1024"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_they_are_built(changes: dict[str, Any], told: str) -> None:
    """Somebody's file may claim anything; building 4000 blocks takes half a minute."""
    shape: dict[str, Any] = {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch_size": 8}
    assert any(told in problem for problem in ModelConfig(**{**shape, **changes}).problems())
    largest = {"depth": 1024, "width": 65_536, "mlp_dim": 65_536, "trunk": [1000, 24], "image_size": 32}
    assert not list(ModelConfig(**{**shape, **largest}).problems())
