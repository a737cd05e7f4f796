"""Models: normalised images [batch, 3, height, width] -> logits [batch, classes]; their weights, in every format."""

from pretrain.models.weights import load_model

__all__ = ["load_model"]
