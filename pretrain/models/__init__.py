"""Models: normalised images [batch, 3, height, width] -> logits [batch, classes]; their weights, in every format."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.models.weights import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Imports `load_model`, and torch with it, at its first use: command lines that only name formats need no torch."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pretrain.models.weights import load_model

    return load_model
