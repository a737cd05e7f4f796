"""What pictures are drawn of: the attention that the model's own forward pass computes, and slow references."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from torch import nn
from weights_on_disk import randomised

from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.models.build import build_model
from pretrain.models.hybrid import standardised
from pretrain.models.inspection import (
    attentions,
    check_inspectable,
    filter_components,
    look_at,
    mean_distance_px,
    position_similarity,
    probe_weights,
    rollout,
)
from pretrain.models.positions import Grid, learned2d_table, sincos2d
from pretrain.models.vit import AttentionPool, Block, VisionTransformer

torch.set_num_threads(1)
TINY: dict[str, Any] = {"name": "Ti", "width": 48, "depth": 3, "mlp_dim": 80, "heads": 3, "image_size": 24}
VARIANTS = [
    {"pooling": "token"},
    {"pooling": "gap", "positions": "sincos2d"},
    {"pooling": "map", "positions": "none"},
    {"pooling": "token", "positions": "relative"},
    {"pooling": "gap", "positions": "relative"},
    {"pooling": "token", "positions": "learned2d", "positions_at": "every_layer"},
    {"pooling": "map", "positions_at": "shared"},
    {"trunk": [1], "trunk_width": 32},
]


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, "patch_size": 8, **changes})


def build(config: ModelConfig) -> VisionTransformer:
    return cast(VisionTransformer, randomised(build_model(config, 11)))


def picture(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_attention(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).mul(2).softmax(-1)


def one_head_output(weights: torch.Tensor, v: torch.Tensor, proj: nn.Module) -> torch.Tensor:
    """What an attention layer returns for weights [B, heads, Q, T] and values [B, heads, T, d]."""
    return proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_weights_give_what_each_block_of_the_forward_pass_gives(changes: dict[str, Any]) -> None:
    """weights @ v, projected, is the output of every block's attention in the model's own forward pass, to 1e-5 of the
    largest value: every kind of position, relative included. Rows sum to 1."""
    model = build(tiny(**changes))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        cast(Block, block).attn.register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
    model(picture())
    forward = seen[:3]
    assert len(forward) == 3
    for block, weights, (x, expected) in zip(model.blocks, attentions(model, picture()), forward, strict=True):
        attention = cast(Block, block).attn
        v = attention.qkv(x).view(*x.shape[:2], 3, 3, 16)[:, :, 2].transpose(1, 2)
        found = one_head_output(weights, v, attention.proj)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.allclose(weights.sum(-1), torch.ones(()))
        assert weights.std(-1).max() > 1e-2  # not uniform, which any logits would pass with


@torch.no_grad()
def test_probe_weights_give_what_the_map_head_gives() -> None:
    """weights @ v, projected, then its MLP, is the head's output."""
    pool = cast(AttentionPool, build(tiny(pooling="map")).attn_pool)
    tokens = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))
    weights = probe_weights(pool, tokens)  # [B, heads, T]
    v = pool.kv(tokens).chunk(2, dim=-1)[1].view(2, 9, 3, 16).transpose(1, 2)
    x = one_head_output(weights[:, :, None], v, pool.proj)[:, 0]
    expected = pool(tokens)
    assert (x + pool.mlp(pool.norm(x)) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- distances -------------------------------------------------------------------------------------------------------


def slow_distance(weights: Sequence[Any], rows: int, columns: int, patch_size: int, slots: int) -> float:
    """One head's mean attention distance, patch by patch."""
    per_query = []
    for query in range(rows * columns):
        total = share = 0.0
        for key in range(rows * columns):
            weight = float(weights[slots + query][slots + key])
            down, across = query // columns - key // columns, query % columns - key % columns
            total += weight * math.hypot(down * patch_size, across * patch_size)
            share += weight
        per_query.append(total / share)
    return sum(per_query) / len(per_query)


@pytest.mark.parametrize("slots", [0, 1])
def test_distances_equal_a_slow_loop(slots: int) -> None:
    """For a grid that is not square, with and without a class token, which is left out on both sides."""
    weights = random_attention(2, 3, slots + 12, slots + 12)
    found = mean_distance_px(weights, Grid(3, 4), 16)
    assert found.shape == (2, 3)
    for image in range(2):
        for head in range(3):
            expected = slow_distance(weights[image, head].tolist(), 3, 4, 16, slots)
            assert found[image, head] == pytest.approx(expected, rel=1e-5)


def test_a_head_that_looks_at_its_right_neighbour_looks_one_patch_far() -> None:
    """16 pixels, on a grid of one row that closes to a ring but for its last patch, which looks 3 patches back."""
    weights = torch.eye(4).roll(1, dims=1)[None, None]
    assert mean_distance_px(weights, Grid(1, 4), 16).item() == pytest.approx((16 + 16 + 16 + 48) / 4)


# --- rollout ---------------------------------------------------------------------------------------------------------


def test_rollout_equals_a_slow_product_and_its_rows_sum_to_one() -> None:
    """Later blocks stand on the left; each row is a share of the input tokens."""
    means = [random_attention(1, 4, 4), random_attention(1, 4, 4).flip(1), random_attention(1, 4, 4).flip(2)]
    found = rollout(means)
    expected = np.eye(4)
    for mean in means:
        mixed = mean[0].double().numpy() + np.eye(4)
        mixed /= mixed.sum(axis=1, keepdims=True)
        new = np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                new[i, j] = sum(mixed[i, k] * expected[k, j] for k in range(4))
        expected = new
    assert np.allclose(found[0].numpy(), expected, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-6)
    assert not torch.allclose(rollout(means[::-1]), found, atol=1e-3)  # the order is seen


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_look_is_what_the_head_reads(changes: dict[str, Any]) -> None:
    """The class token's row, the mean row, or the probe's mean, over patches alone, which sum to 1; distances as the
    mean over patches of each block and head."""
    config = tiny(**changes)
    model, image = build(config), picture()[:1]
    look = look_at(model, config, image[0])
    weights = list(attentions(model, image))
    rows = rollout([w.mean(1) for w in weights])[0]
    if config.pooling == "map":
        with torch.no_grad():
            probe = probe_weights(cast(AttentionPool, model.attn_pool), model.forward_features(image))
        row, said = probe[0].mean(0) @ rows, "MAP"
    else:
        row, said = (rows[0, 1:], "class") if config.pooling == "token" else (rows.mean(0), "mean over all")
    assert look.rollout.shape == (3, 3) and said in look.source
    assert torch.allclose(look.rollout.flatten(), row / row.sum(), atol=1e-6) and float(look.rollout.sum()) == (
        pytest.approx(1.0, abs=1e-6)
    )
    assert look.rollout.std() > 1e-3
    assert look.distance_px.shape == (3, 3)
    expected = [mean_distance_px(w, Grid(3, 3), 8)[0] for w in weights]
    assert torch.equal(look.distance_px, torch.stack(expected))


# --- filters and positions -------------------------------------------------------------------------------------------


def test_components_recover_the_patterns_that_filters_are_made_of() -> None:
    """Filters that mix two patterns on top of a mean have those two components, in the order of their variance."""
    model = build(tiny())
    kernel = model.patch_embed.proj.weight  # [48, 3, 8, 8]
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(192, 3, generator=generator)).Q.T  # mean and two patterns, orthonormal
    amounts = torch.linalg.qr(torch.randn(48, 2, generator=generator) - 0.0).Q
    amounts = torch.linalg.qr(amounts - amounts.mean(0)).Q  # of mean 0, uncorrelated
    with torch.no_grad():
        kernel.copy_((5 * basis[0] + amounts @ (torch.tensor([3.0, 1.0])[:, None] * basis[1:])).view_as(kernel))
    found = filter_components(model, count=2)
    assert torch.allclose(found.variance, torch.tensor([0.9, 0.1]), atol=1e-4)
    for component, pattern in zip(found.components, basis[1:]):
        assert abs(float(component.flatten() @ pattern)) == pytest.approx(1.0, abs=1e-4)
        assert component.max() >= -component.min()


def test_components_are_28_or_what_there_is() -> None:
    """28 orthonormal ones; fewer where there are fewer filters; a hybrid's are its stem's, standardised."""
    found = filter_components(build(tiny()))
    flat = found.components.flatten(1)
    assert found.components.shape == (28, 3, 8, 8) and found.source == "patch embedding"
    assert torch.allclose(flat @ flat.T, torch.eye(28), atol=1e-5)
    assert bool((found.variance.diff() <= 0).all()) and 0 < found.variance.sum() < 1
    assert len(filter_components(build(tiny(width=24))).components) == 23
    model = build(tiny(trunk=[1], trunk_width=32))
    found = filter_components(model)
    stem = next(m for m in model.patch_embed.backbone.modules() if isinstance(m, nn.Conv2d))  # type: ignore
    samples = standardised(stem.weight.detach()).flatten(1).double()
    values = torch.linalg.eigvalsh(torch.cov(samples.T)).flip(0)
    assert found.components.shape == (28, 3, 7, 7) and "ResNet" in found.source
    assert torch.allclose(found.variance, (values / values.sum())[:28].float(), atol=1e-5)


@torch.no_grad()
def test_similarities_equal_a_slow_cosine() -> None:
    """For each kind of table: the class token's row is left out, the first block's table stands for all."""
    for changes in [
        {"positions": "learned", "pooling": "token"},
        {"positions": "learned", "pooling": "token", "class_position": False},
        {"positions": "sincos2d", "pooling": "gap"},
        {"positions": "learned2d"},
        {"positions": "learned", "positions_at": "every_layer"},
        {"positions": "learned2d", "positions_at": "every_layer"},
        {"positions": "learned", "positions_at": "shared"},
    ]:
        config = tiny(**changes)
        model = build(config)
        owner = cast(Any, model.blocks[0] if config.positions_at == "every_layer" else model)
        if config.positions == "sincos2d":
            table = sincos2d(3, 3, 48)[0]
        elif config.positions == "learned2d":
            table = learned2d_table(owner.pos_embed.x, owner.pos_embed.y)[0]
        else:
            table = owner.pos_embed[0, -9:]
        found = position_similarity(model, config)
        assert found.similarity is not None and config.positions in found.source
        assert ("block 1 of 3" in found.source) == (config.positions_at == "every_layer")
        for row, column in ((0, 0), (1, 2), (2, 1)):
            own = table[3 * row + column]
            cosines = [float(own @ other / own.norm() / other.norm()) for other in table]
            assert np.allclose(found.similarity[row, column].flatten(), cosines, atol=1e-5), changes


@pytest.mark.parametrize(("kind", "said"), [("none", "no position embedding"), ("relative", "relative positions")])
def test_no_table_is_said(kind: Any, said: str) -> None:
    """Models without a table of places have no similarities, and say why."""
    config = tiny(positions=kind)
    found = position_similarity(build(config), config)
    assert found.similarity is None and said in found.source


def test_models_of_timm_are_refused() -> None:
    """One line that says what can be drawn."""
    with pytest.raises(UserError, match="this package's ViTs only"):
        check_inspectable(timm.create_model("resnet18"))
