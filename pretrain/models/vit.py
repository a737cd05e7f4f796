"""The Vision Transformer (arXiv 2010.11929), with timm's parameter names.

images [B, 3, H, W] -> patches [B, N, D] -> (class token) + positions -> blocks -> norm -> pooling -> head [B, C].
Conventions of Google's code: LayerNorm eps 1e-6, tanh GELU, pooling after the last norm, zero-initialised head.
Settings make it ViT-22B (arXiv 2302.05442): parallel blocks, normalised queries and keys, no centring, fewer biases.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.config.model import VitForm
from pretrain.models.hybrid import build_trunk
from pretrain.models.positions import Grid, Learned2d, num_relative_offsets, relative_offsets, sincos2d

NORM_EPS = 1e-6  # torch's default 1e-5 would be wrong, and hard to notice


def build_norm(width: int, form: VitForm) -> nn.Module:
    """Returns the norm of a model's form: with centring and bias, or without both."""
    return nn.RMSNorm(width, eps=NORM_EPS) if form.rms_norm else nn.LayerNorm(width, eps=NORM_EPS)


def grid_of(config: ModelConfig) -> Grid:
    """Returns the patches of an image, down and across."""
    side = config.image_size // config.patch_size
    return Grid(side, side)


class PatchConv(nn.Conv2d):
    """A convolution of adjacent patches, [B, C, H, W] -> [B, D, H / side, W / side], as one matrix product.

    cuDNN has no fast kernel for three channels, and changes the memory layout before and after it: on an H100, 2.5 of
    32 ms of kernels in a step of S/16 (docs/performance.md).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = input.shape
        side = self.kernel_size[0]
        down, across = height // side, width // side
        patches = input.reshape(batch, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
        tokens = F.linear(
            patches.reshape(batch, down * across, channels * side * side), self.weight.flatten(1), self.bias
        )
        return tokens.transpose(1, 2).unflatten(2, (down, across))


class PatchEmbed(nn.Module):
    """Cuts images, or a ResNet's map of them, into patches and maps each to a token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone, channels = None, 3
        if config.trunk_units is not None:
            self.backbone, channels = build_trunk(config.trunk_units, config.trunk_width)
        side = config.patch_size // config.trunk_stride  # of a patch on the map
        self.proj = PatchConv(channels, config.shape.width, kernel_size=side, stride=side)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images if self.backbone is None else self.backbone(images)
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D], raster order


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v in one matrix as in timm.

    With relative positions (paper, D.4) the query also meets an embedding of its offset to the key, which adds to the
    logits: softmax((q k + q r) / sqrt(d)). One table [offsets, D / heads] per block, shared by its heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, _, _, heads = config.shape
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.form.qkv_bias)
        normalised = config.form.qk_norm
        self.q_norm = build_norm(width // heads, config.form) if normalised else None  # one for all heads, as flax's
        self.k_norm = build_norm(width // heads, config.form) if normalised else None
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(config.dropout)
        self.relative_embed = None
        if config.positions == "relative":
            patches, token = math.prod(grid_of(config)), config.pooling == "token"
            self.relative_embed = nn.Parameter(torch.zeros(num_relative_offsets(patches, token), width // heads))
            self.register_buffer("offsets", relative_offsets(patches, token), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.by_head(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._relative_logits(q))
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))

    def by_head(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries, keys and values of tokens x [B, T, D], each [B, heads, T, D / heads]."""
        batch, tokens, _ = x.shape
        # Three parts, not one tensor with an axis for them, which the backward pass would assemble twice.
        q, k, v = (part.view(batch, tokens, self.heads, -1) for part in self.qkv(x).chunk(3, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _relative_logits(self, q: torch.Tensor) -> torch.Tensor | None:
        if self.relative_embed is None:
            return None
        by_offset = q @ self.relative_embed.T / math.sqrt(q.shape[-1])  # [B, heads, T, offsets]
        return by_offset.gather(-1, self.get_buffer("offsets").expand(*q.shape[:2], -1, -1))  # [B, heads, T, T]


class Mlp(nn.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: str, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        self.approximate = "tanh" if gelu == "tanh" else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x), approximate=self.approximate))))


class LayerScale(nn.Module):
    """Multiplies tokens [B, T, D] by a learned factor per channel (arXiv 2103.17239, equation 4); timm's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm encoder block (paper, equations 2 and 3), with a position table of its own where that is asked for.

    With parallel_blocks attention and MLP are given the same tokens, after one norm: x + attn(norm(x)) + mlp(norm(x)).
    With layer_scale each of the two branches has a LayerScale of its own, parallel or not.
    kept: each image's factors of the two branches, see `draw_kept`. They come from outside, because a rate inside would
    be a constant of the compiled code: each block would be another graph, and after eight graphs none is compiled.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, _, mlp_dim, _ = config.shape
        _add_table(self, config, here=config.positions_at == "every_layer")
        self.norm1 = build_norm(width, config.form)
        self.attn = Attention(config)
        self.ls1 = None if config.layer_scale is None else LayerScale(width)
        self.norm2 = None if config.form.parallel_blocks else build_norm(width, config.form)
        self.mlp = Mlp(width, mlp_dim, config.gelu, config.dropout)
        self.ls2 = None if config.layer_scale is None else LayerScale(width)

    def forward(self, x: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        x = _with_positions(x, _table(self))
        normalised = self.norm1(x)
        attended = self.attn(normalised)
        attended = attended if self.ls1 is None else self.ls1(attended)
        x = x + (attended if kept is None else attended * kept[0])
        mapped = self.mlp(normalised if self.norm2 is None else self.norm2(x))
        mapped = mapped if self.ls2 is None else self.ls2(mapped)
        return x + (mapped if kept is None else mapped * kept[1])


def draw_kept(x: torch.Tensor, drop_path: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors [B, 1, 1] of the images in each of two branches: 0, or 1 / (1 - drop_path).

    Stochastic depth: drops a branch for whole images, and scales the rest to keep the mean.
    """
    first, second = (x.new_ones(x.shape[0], 1, 1) for _ in range(2))  # one tensor twice would be another graph
    if drop_path > 0.0:  # the first block draws nothing, and has the same graph as the others
        keep = 1.0 - drop_path
        first.bernoulli_(keep).div_(keep)
        second.bernoulli_(keep).div_(keep)
    return first, second


def drop_path_rates(config: ModelConfig) -> list[float]:
    """Returns for each block the probability that stochastic depth drops a branch of it."""
    depth = config.shape.depth
    if config.drop_path_rule == "uniform":
        return [config.drop_path] * depth
    return [config.drop_path * i / max(1, depth - 1) for i in range(depth)]


class AttentionPool(nn.Module):
    """MAP head: a learned probe attends to all tokens (Scaling ViT; big_vision MAPHead). Names as timm's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, _, mlp_dim, self.heads = config.shape
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = build_norm(width, config.form)
        self.mlp = Mlp(width, mlp_dim, config.gelu, dropout=0.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, _, width = tokens.shape
        q = self.q(self.latent.expand(batch, -1, -1))
        k, v = self.kv(tokens).chunk(2, dim=-1)
        q, k, v = (t.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, width)
        x = self.proj(x)
        return x + self.mlp(self.norm(x))  # [B, D]


class VisionTransformer(nn.Module):
    """images [B, 3, S, S] in [-1, 1] -> logits [B, num_classes], or with num_classes 0 the head's input."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        width, depth, _, _ = config.shape
        self.pooling, self.shared_positions = config.pooling, config.positions_at == "shared"
        self.checkpoint_activations = False
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pooling == "token" else None
        _add_table(self, config, here=config.positions_at != "every_layer")
        self.pos_drop = nn.Dropout(config.dropout)
        self.drop_path = drop_path_rates(config) if config.drop_path else None  # none: nothing is ever dropped
        self.blocks = nn.Sequential(*(Block(config) for _ in range(depth)))
        self.norm = build_norm(width, config.form)
        self.attn_pool = AttentionPool(config) if config.pooling == "map" else None
        rep = config.representation_size
        self.pre_logits = None if rep is None else nn.Linear(width, rep)
        self.head = nn.Linear(width if rep is None else rep, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the tokens after the last norm, [B, T, D]; the class token, if any, is the first."""
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        table = _table(self)
        x = self.pos_drop(_with_positions(x, table))
        for number, block in enumerate(self.blocks):
            if self.shared_positions and number > 0:
                x = _with_positions(x, table)
            kept = draw_kept(x, self.drop_path[number]) if self.drop_path and self.training else None
            recompute = self.checkpoint_activations and self.training
            x = checkpoint(block, x, kept, use_reentrant=False) if recompute else block(x, kept)
        return self.norm(x)

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns logits [B, classes], or with `pre_logits` the head's input [B, D or representation_size]."""
        if self.attn_pool is not None:
            x = self.attn_pool(tokens)
        else:
            x = tokens[:, 0] if self.pooling == "token" else tokens.mean(dim=1)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return x if pre_logits else self.head(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def _add_table(module: nn.Module, config: ModelConfig, here: bool) -> None:
    """Gives `module` its `pos_embed`: a parameter, a buffer that is not saved, a module of two tables, or None."""
    grid, width = grid_of(config), config.shape.width
    if not here or config.positions in ("none", "relative"):
        module.register_parameter("pos_embed", None)
    elif config.positions == "learned":  # the paper: one row per token, the class token's first
        slots = config.pooling == "token" and config.class_position
        module.pos_embed = nn.Parameter(torch.zeros(1, slots + math.prod(grid), width))
    elif config.positions == "learned2d":
        module.pos_embed = Learned2d(grid, width)
    else:
        module.register_buffer("pos_embed", sincos2d(*grid, width), persistent=False)


def _table(module: nn.Module) -> torch.Tensor | None:
    positions = module.pos_embed
    return positions() if isinstance(positions, Learned2d) else positions  # type: ignore[return-value]


def _with_positions(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """Adds a table [1, N or N + 1, D] to tokens [B, T, D]; a class token without a row stays as it is (big_vision)."""
    if table is None:
        return x
    table = table.to(x.dtype)  # the fixed table stays float32 in any precision
    if table.shape[1] == x.shape[1]:
        return x + table
    return torch.cat([x[:, :1], x[:, 1:] + table], dim=1)


@torch.no_grad()
def init_weights(model: VisionTransformer, config: ModelConfig, generator: torch.Generator) -> None:
    """Initialises all weights, in the model's order; see `init_parameter`."""
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, config, generator)


def init_parameter(name: str, value: torch.Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Draws a parameter's first value, in float32, as vision_transformer and big_vision do (models_vit.py,
    models/vit.py), or with init=deit as DeiT does.

    Dense kernels: Xavier uniform, with q, k and v each as its own matrix; MLP biases: N(0, 1e-6); positions: N(0, 0.02)
    (with class_position=false, big_vision's way: N(0, 1 / sqrt(D))); convolutions and the representation layer: LeCun
    normal (flax's default); head: zeros with a constant bias; last norm of a ResNet unit: zeros; layer scale: its
    setting; the rest: zeros, norms' scales ones.
    """
    assert value.dtype == torch.float32, name  # bfloat16 would quantise the draws
    if name == "head.bias":
        value.fill_(config.head_bias)
    elif name.endswith(".gamma"):
        assert config.layer_scale is not None, name
        value.fill_(config.layer_scale)
    elif config.init == "deit":
        _init_as_deit(name, value, generator)
    elif "pos_embed" in name or name.endswith("relative_embed"):
        value.normal_(std=0.02 if config.class_position else config.shape.width**-0.5, generator=generator)
    elif value.ndim == 4 or name == "pre_logits.weight":
        _lecun_normal(value, generator)
    elif ".mlp." in name and name.endswith(".bias"):
        value.normal_(std=1e-6, generator=generator)
    elif name.endswith((".qkv.weight", ".kv.weight")):
        for part in value.split(value.shape[1]):
            nn.init.xavier_uniform_(part, generator=generator)
    elif name == "attn_pool.latent":
        nn.init.xavier_uniform_(value[0], generator=generator)
    elif "norm" in name and name.endswith(".weight"):
        value.fill_(0.0 if name.endswith("norm3.weight") else 1.0)
    elif value.ndim == 2 and name != "head.weight":
        nn.init.xavier_uniform_(value, generator=generator)
    else:  # biases, class token, head kernel
        value.zero_()


def _init_as_deit(name: str, value: torch.Tensor, generator: torch.Generator) -> None:
    """facebookresearch/deit models_v2.py: N(0, 0.02) for dense kernels, positions, class token and probe; convolutions
    as torch's default; biases zero (theirs of the patches are not), norms' scales one. Theirs are truncated at 2, a
    hundred deviations, which cuts nothing.

    A head of zeros would not do with LAMB: its steps are relative to the weights, so the head stays near zero during
    the warm-up, and so do the gradients of all layers below.
    """
    if "norm" in name and name.endswith(".weight"):
        value.fill_(1.0)
    elif value.ndim == 4:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    elif value.ndim == 1:
        value.zero_()
    else:
        value.normal_(std=0.02, generator=generator)


def _lecun_normal(value: torch.Tensor, generator: torch.Generator) -> None:
    """flax.linen's lecun_normal: truncated at two standard deviations, variance 1 / fan_in after truncation."""
    std = math.sqrt(1.0 / value[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
