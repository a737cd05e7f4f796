"""Models: images [batch, 3, height, width] in [-1, 1] -> logits [batch, classes]. They know nothing of DeepSpeed."""

from pretrain.models.weights import load_model

__all__ = ["load_model"]
