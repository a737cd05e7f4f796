"""The formats of weights by name, for command lines, which are read before torch is imported."""

from pathlib import Path

from pretrain import cli
from pretrain.models import by_name

READABLE = (
    "a run, a checkpoint step-N, a folder with config.json, Google's .npz or PyTorch's .pth, "
    "timm:NAME, hf-hub:OWNER/NAME or google:NAME"
)
WRITABLE = ("pretrain", "timm", "transformers", "npz", "onnx")  # rows of `convert.TARGETS`
NPZ_NAMINGS = ("released", "vit_jax", "big_vision")  # of the tensors in Google's .npz: as published, or code of today


def check_weights(weights: Path) -> None:
    """Raises UserError for a path that does not exist or a name that cannot be one of weights, before slow imports."""
    if by_name.is_name(weights):
        by_name.check_name(weights)
    else:
        cli.check_found(weights, READABLE)
