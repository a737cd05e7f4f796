"""Parameters and FLOPs of a model. One multiply-add is one MAC and two FLOPs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import ModelConfig
from pretrain.models.build import build_model


def num_parameters(model: nn.Module) -> int:
    """Returns the number of trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def forward_macs(config: ModelConfig, num_classes: int) -> int:
    """Returns the multiply-adds of one image's forward pass.

    The ViT: patch convolution, q, k, v, attention, MLP and head; norms, softmax, GELU, biases are not counted. Equal to
    torch's flop counter, which is asked for what is not a plain ViT: trunks, MAP heads, relative positions, timm's.
    """
    plain = config.timm_name is None and config.trunk_units is None and config.pooling != "map"
    if not plain or config.positions == "relative":
        return _counted_macs(config, num_classes)
    width, depth, mlp_dim, _ = config.shape
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (config.pooling == "token")
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    rep = config.representation_size
    head = width * num_classes if rep is None else width * rep + rep * num_classes
    return patches * 3 * config.patch_size**2 * width + depth * block + head


def train_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the FLOPs of one image's forward and backward pass: 3 x forward. Recomputation does not count."""
    return 6 * forward_macs(config, num_classes)


def _counted_macs(config: ModelConfig, num_classes: int) -> int:
    with torch.device("meta"):
        model = build_model(config, num_classes).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    return counter.get_total_flops() // 2
