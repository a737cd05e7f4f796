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
    torch's flop counter, which is asked for timm's models.
    """
    if config.timm_name is not None:
        return _counted_macs(config, num_classes)
    width, depth, mlp_dim, _ = config.shape
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (config.pooling == "token")
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    return patches * 3 * config.patch_size**2 * width + depth * block + width * num_classes


def train_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the FLOPs of one image's forward and backward pass: 3 x forward. Recomputation does not count."""
    return 6 * forward_macs(config, num_classes)


def _counted_macs(config: ModelConfig, num_classes: int) -> int:
    model = build_model(config, num_classes).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    return counter.get_total_flops() // 2
