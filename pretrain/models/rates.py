"""Layer-wise decay of the learning rate: the factor of each parameter's rate.

As BEiT and MAE fine-tune (their get_layer_id): layers near the input, which have learnt what all images share, move
less.
"""

import re

from torch import nn

from pretrain.errors import ConfigError
from pretrain.models.vit import VisionTransformer


def rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Returns layer_decay ^ (layers between it and the head) by each parameter's name: 1 for the head.

    Raises ConfigError for a model of timm of which timm does not say in which layer a parameter is.
    """
    layers = _layers_of_ours(model) if isinstance(model, VisionTransformer) else _layers_of_timm(model)
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def _layers_of_ours(model: VisionTransformer) -> dict[str, int]:
    """Embeddings, a hybrid's trunk too, are layer 0, block i is i + 1; the last norm and the head come last."""
    return {name: _layer(name, len(model.blocks)) for name, _ in model.named_parameters()}


def _layer(name: str, depth: int) -> int:
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else depth + 1


def _layers_of_timm(model: nn.Module) -> dict[str, int]:
    """timm's own layers. In its ViTs they are ours, but the last norm, unlike `fc_norm`, is in the last block."""
    from timm.models import group_parameters  # 2 s to import: only where it is used

    matcher = getattr(model, "group_matcher", None)
    layers = group_parameters(model, matcher(coarse=False), reverse=True) if matcher else {}
    if len(set(layers.values())) < 2:
        raise ConfigError(
            f"optim.layer_decay: timm does not say which layers {type(model).__name__} has; leave it at 1, or choose "
            "another model"
        )
    return layers
