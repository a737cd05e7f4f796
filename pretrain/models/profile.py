"""Parameters and FLOPs of a model. One multiply-add is one MAC and two FLOPs."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import ModelConfig
from pretrain.models.build import build_model
from pretrain.sizes import is_plain, plain_forward_macs


def num_parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def forward_macs(config: ModelConfig, num_classes: int) -> int:
    """Returns the multiply-adds of one image's forward pass.

    By formula for a plain ViT (pretrain/sizes.py), equal to torch's FLOP counter, which serves for all other models:
    trunks, relative positions, timm's.
    """
    return plain_forward_macs(config, num_classes) if is_plain(config) else _counted_macs(config, num_classes)


def train_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the FLOPs of one image's forward and backward pass: 3 x forward. Recomputation does not count."""
    return 6 * forward_macs(config, num_classes)


def _counted_macs(config: ModelConfig, num_classes: int) -> int:
    with torch.device("meta"):
        model = build_model(config, num_classes).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # as matrix products, which the counter of every torch knows
        model(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    return counter.get_total_flops() // 2
