"""The formats of weights by name, for command lines, which are read before torch is imported."""

import argparse
from pathlib import Path

from pretrain import cli
from pretrain.models import by_name

READABLE = (
    "a run, a checkpoint step-N, a folder with config.json, Google's .npz or PyTorch's .pth, "
    "timm:NAME, hf-hub:OWNER/NAME or google:NAME"
)
WRITABLE = ("pretrain", "timm", "transformers", "npz", "onnx")  # rows of `convert.TARGETS`
NPZ_NAMINGS = ("released", "vit_jax", "big_vision")  # of the tensors in Google's .npz: as published, or code of today
# What `Weights.of_run` may be, in words: a run with optim.average_decay keeps both.
OF_RUN = {"trained": "the trained weights, not their average", "average": "the average of the trained weights"}


def add_of_run(parser: argparse.ArgumentParser) -> None:
    """Adds the option by which one of the two is chosen."""
    parser.add_argument(
        "--weights", dest="of_run", choices=OF_RUN, help="which, of a run that keeps both (default: the average)"
    )


def told_of_run(of_run: str | None) -> str:
    """Returns which of the two it is, as the end of a list of facts; "" where nothing was to be chosen."""
    return f", {OF_RUN[of_run]}" if of_run in OF_RUN else ""


def check_weights(weights: Path) -> None:
    """Raises UserError for a path that does not exist or a name that cannot be one of weights, before slow imports."""
    if by_name.is_name(weights):
        by_name.check_name(weights)
    else:
        cli.check_found(weights, READABLE)
