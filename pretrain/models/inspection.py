"""What a trained ViT has learned, as numbers to draw: filters, positions, attention (ViT paper, figures 6 and 7).

Everything is computed from the model's own weights and from the attention that its own forward pass computes.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import nn

from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.models.hybrid import standardised
from pretrain.models.positions import Grid, Learned2d
from pretrain.models.vit import Attention, AttentionPool, Block, VisionTransformer, grid_of


class Filters(NamedTuple):
    """Principal components of the filters that meet the pixels."""

    components: torch.Tensor  # [components, 3, height, width], each of norm 1; its largest weight is positive
    variance: torch.Tensor  # [components]: share of the filters' variance, falling
    source: str  # which filters


class Positions(NamedTuple):
    """How similar a model's places are to each other."""

    similarity: torch.Tensor | None  # [rows, columns, rows, columns]: cosine of each place with each; None: no table
    source: str  # which table, or why there is none


class Look(NamedTuple):
    """Where a model looks in one image."""

    distance_px: torch.Tensor  # [depth, heads]: mean attention distance in pixels of the input
    rollout: torch.Tensor  # [rows, columns]: share of each patch in what the head reads; their sum is 1
    source: str  # of the rollout's row


def check_inspectable(model: nn.Module) -> VisionTransformer:
    """Returns the model. Raises UserError when it is not a ViT of this package."""
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{type(model).__name__} is a model of timm; pictures are drawn of this package's ViTs only")
    return model


@torch.no_grad()
def filter_components(model: VisionTransformer, count: int = 28) -> Filters:
    """Returns the first principal components of the patch filters, or of a hybrid's first convolution.

    Each filter is one sample of 3 x height x width values; their mean is subtracted (figure 7, left). A hybrid's are
    standardised, as in its forward pass.
    """
    backbone = model.patch_embed.backbone
    if backbone is None:
        kernel, source = model.patch_embed.proj.weight, "patch embedding"
    else:
        first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
        kernel, source = standardised(first.weight), "first convolution of the ResNet"
    samples = kernel.double().flatten(1)  # [filters, 3 * height * width]
    _, singular, directions = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)
    variance = singular**2 / singular.square().sum()
    count = min(count, len(samples) - 1, samples.shape[1])  # subtracting the mean removes one direction
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))  # a component's sign is arbitrary
    components = (directions * largest.sign()).unflatten(1, kernel.shape[1:])
    return Filters(components.float(), variance[:count].float(), source)


@torch.no_grad()
def position_similarity(model: VisionTransformer, config: ModelConfig) -> Positions:
    """Returns the cosine similarity of every patch's position embedding with every other's (figure 7, centre)."""
    grid = grid_of(config)
    if config.positions in ("none", "relative"):
        kind = {"none": "no position embedding", "relative": "relative positions: no embedding of a place"}
        return Positions(None, kind[config.positions])
    per_layer = config.positions_at == "every_layer"
    table = cast(Block, model.blocks[0]).pos_embed if per_layer else model.pos_embed
    if isinstance(table, Learned2d):
        table = table()
    assert isinstance(table, torch.Tensor)
    patches = table[0, table.shape[1] - math.prod(grid) :]  # [rows * columns, D]; a class token's row comes first
    directions = nn.functional.normalize(patches.float(), dim=1)
    similarity = (directions @ directions.T).reshape(*grid, *grid)
    where = {"stem": "", "every_layer": ", table of block 1 of " + str(len(model.blocks)), "shared": ", at each block"}
    return Positions(similarity, config.positions + where[config.positions_at])


# --- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Returns the softmax [B, heads, T, T] (query, key) that `attention` applies to tokens x [B, T, D]."""
    q, k, _ = attention.by_head(x)  # [B, heads, T, D / heads]
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    relative = attention._relative_logits(q)
    return (logits if relative is None else logits + relative).softmax(-1)


@torch.no_grad()
def probe_weights(pool: AttentionPool, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the softmax [B, heads, T] with which a MAP head's probe reads tokens [B, T, D]."""
    batch, _, width = tokens.shape
    q = pool.q(pool.latent).view(1, pool.heads, 1, width // pool.heads)
    k = pool.kv(tokens).chunk(2, dim=-1)[0].view(batch, -1, pool.heads, width // pool.heads).transpose(1, 2)
    logits = (q * k).sum(-1) / math.sqrt(q.shape[-1])  # [B, heads, T]
    return logits.softmax(-1)


def attentions(model: VisionTransformer, images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the attention [B, heads, T, T] of each block, from the first on, in a forward pass of `images`.

    One block's at a time: all of L/16 at 384 pixels would take 0.5 GB per image.
    """
    inputs: list[torch.Tensor] = []
    blocks = [cast(Block, block) for block in model.blocks]
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in blocks]
    try:
        with torch.no_grad():
            model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    for block, x in zip(blocks, inputs, strict=True):
        yield attention_weights(block.attn, x)


def mean_distance_px(weights: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """Returns how far each head looks, in pixels [B, heads]: distances between patch centres, weighted by attention.

    weights: [B, heads, T, T]. Mean over the patches as queries (figure 7, right). The class token has no place: it is
    left out, as query and as key, and the weights of the patches are scaled to sum to 1.
    """
    slots = weights.shape[-1] - math.prod(grid)
    weights = weights[..., slots:, slots:]
    y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    places = torch.stack([y, x], dim=-1).flatten(0, 1).float() * patch_size  # [N, 2]
    distances = torch.cdist(places, places).to(weights.device)  # [N, N]
    per_query = (weights * distances).sum(-1) / weights.sum(-1)  # [B, heads, N]
    return per_query.mean(-1)


def rollout(head_means: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns how much of each input token is in each output token, [B, T, T] (output, input); rows sum to 1.

    head_means: each block's attention [B, T, T], averaged over heads, from the first block on. Abnar & Zuidema (2020):
    the identity is added for the residual connection, rows are scaled to sum to 1, and blocks are multiplied.
    """
    total = None
    for mean in head_means:
        mixed = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        total = mixed if total is None else mixed @ total
    assert total is not None
    return total


@torch.no_grad()
def look_at(model: VisionTransformer, config: ModelConfig, image: torch.Tensor) -> Look:
    """Returns where the model looks in one image [3, S, S] in [-1, 1]: distances by depth and head, and the rollout.

    The rollout is read as the head reads the tokens: the class token's row, the mean of all rows, or the rows weighted
    by the MAP probe's attention, averaged over its heads. The class token's own share is left out and the rest scaled
    to sum to 1.
    """
    grid = grid_of(config)
    distances, head_means = [], []
    for weights in attentions(model, image[None]):
        distances.append(mean_distance_px(weights, grid, config.patch_size)[0])
        head_means.append(weights.mean(1))
    rows = rollout(head_means)[0]  # [T, T]
    if model.attn_pool is not None:
        tokens = model.forward_features(image[None])
        row = probe_weights(model.attn_pool, tokens)[0].mean(0) @ rows
        source = "the MAP probe's attention, mean over heads"
    elif config.pooling == "token":
        row, source = rows[0], "the class token's row"
    else:
        row, source = rows.mean(0), "mean over all tokens' rows"
    patches = row[len(row) - math.prod(grid) :]
    return Look(torch.stack(distances), (patches / patches.sum()).reshape(grid), source)
