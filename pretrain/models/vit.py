"""The Vision Transformer (arXiv 2010.11929), with timm's parameter names.

images [B, 3, H, W] -> patches [B, N, D] -> (class token) + positions -> blocks -> norm -> token or mean -> head [B, C].
Conventions of Google's code: LayerNorm eps 1e-6, tanh GELU, pooling after the last norm, zero-initialised head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.models.positions import sincos2d

NORM_EPS = 1e-6  # torch's default 1e-5 is wrong here, and hardly visible


class PatchEmbed(nn.Module):
    """Cuts images into patches and maps each to a token: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D], raster order


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v in one matrix as in timm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


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


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images, and scales the rest to keep the mean."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """A pre-norm encoder block (paper, equations 2 and 3)."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        width, _, mlp_dim, heads = config.shape
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, config.dropout)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_dim, config.gelu, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """images [B, 3, S, S] in [-1, 1] -> logits [B, num_classes]."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        width, depth, _, _ = config.shape
        side = config.image_size // config.patch_size
        self.pooling = config.pooling
        self.checkpoint_activations = False
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pooling == "token" else None
        if config.positions == "learned":  # one row per token, the class token's first
            tokens = side * side + (self.cls_token is not None)
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        else:  # one row per patch; not a parameter, not saved
            self.register_buffer("pos_embed", sincos2d(side, side, width), persistent=False)
        self.pos_drop = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, num_classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the tokens after the last norm, [B, T, D]; the class token, if any, is the first."""
        x = self._add_positions(self.patch_embed(images))
        for block in self.blocks:
            recompute = self.checkpoint_activations and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.norm(x)

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns logits [B, classes], or with `pre_logits` the head's input [B, D]."""
        pooled = tokens[:, 0] if self.pooling == "token" else tokens.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.pos_embed.to(x.dtype)  # the fixed table stays float32 in any precision
        if self.cls_token is None:
            return self.pos_drop(x + positions)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        if isinstance(self.pos_embed, nn.Parameter):  # the paper: positions have a row for the class token
            return self.pos_drop(torch.cat([cls, x], dim=1) + positions)
        return self.pos_drop(torch.cat([cls, x + positions], dim=1))  # big_vision: the fixed table has none


@torch.no_grad()
def init_weights(model: VisionTransformer, config: ModelConfig, generator: torch.Generator) -> None:
    """Initialises all weights, in float32, as vision_transformer and big_vision do (paper's code, models_vit.py).

    Dense kernels: Xavier uniform, with q, k and v each as its own matrix; MLP biases: N(0, 1e-6); positions: N(0, 0.02)
    patch kernel: LeCun normal (flax's default); head: zeros with a constant bias; the rest: zeros, norms' scales ones.
    """
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name  # bfloat16 would quantise the draws
        if name == "head.bias":
            parameter.fill_(config.head_bias)
        elif name == "pos_embed":
            parameter.normal_(std=0.02, generator=generator)
        elif name == "patch_embed.proj.weight":
            _lecun_normal(parameter, generator)
        elif ".mlp." in name and name.endswith(".bias"):
            parameter.normal_(std=1e-6, generator=generator)
        elif name.endswith("qkv.weight"):
            for part in parameter.chunk(3):
                nn.init.xavier_uniform_(part, generator=generator)
        elif "norm" in name and name.endswith(".weight"):
            parameter.fill_(1.0)
        elif parameter.ndim == 2 and name != "head.weight":
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:  # biases, class token, head kernel
            parameter.zero_()


def _lecun_normal(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """flax.linen's lecun_normal: truncated at two standard deviations, variance 1 / fan_in after truncation."""
    std = math.sqrt(1.0 / parameter[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
