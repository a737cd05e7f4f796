"""Features of a whole data set, for few-shot and other probes: a model's pre-logits, or the raw pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pretrain import distributed
from pretrain.config import DataConfig
from pretrain.data.images import to_float
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.log import warn


class Features(NamedTuple):
    """Of the images that could be read, in order of their index: the same on every rank and on any number of ranks."""

    values: np.ndarray  # float32 [images, features]
    labels: np.ndarray  # int64 [images]


def pre_logits(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function uint8 images [B, 3, H, W] -> the input of the model's head, float32 [B, D].

    The model is one of this package or of timm, in evaluation mode.
    """
    parts: Any = model  # forward_features and forward_head, as every model of timm has them

    def extract(images: torch.Tensor) -> torch.Tensor:
        tokens = parts.forward_features(to_float(images, torch.float32))
        return parts.forward_head(tokens, pre_logits=True)

    return extract


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """Returns the pixels of uint8 images [B, 3, H, W] in [0, 1], float32 [B, 3 * H * W]: what a model has to beat."""
    return images.flatten(1).float() / 255


@torch.no_grad()
def extract_features(
    extract: Callable[[torch.Tensor], torch.Tensor],
    manifest: Manifest,
    *,
    image_size: int,
    batch_size: int,
    config: DataConfig,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Returns `extract` of every image of a data set, in evaluation's transform. Called by all ranks.

    progress: told the images just done, over all ranks. Images that cannot be read are left out, and rank 0 says how
    many. Raises UserError when none is left, or when the data set has several labels per image.
    """
    if manifest.multi_label:
        raise UserError(f"{manifest.path}: has several labels per image; probes of features need one")
    indices = np.arange(manifest.num_samples)
    options = {"batch_size": batch_size, "image_size": image_size, "config": config}
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in eval_batches(manifest, indices, **options):
        distributed.raise_together(batch.error)
        values = extract(batch.images.to(device)).float().cpu()
        parts.append(tuple(t[batch.valid].numpy() for t in (batch.index, values, batch.labels[:, 0])))
        progress(min(manifest.num_samples, batch_size * distributed.world_size()))
    mine = tuple(np.concatenate(column) for column in zip(*parts))
    index, values, labels = (np.concatenate(column) for column in zip(*distributed.gather(mine)))
    if not len(index):
        raise UserError(f"{manifest.path}: none of the {manifest.num_samples} images can be read")
    if len(index) < manifest.num_samples and distributed.is_main():
        left_out = manifest.num_samples - len(index)
        warn(f"{manifest.path}: {left_out} of {manifest.num_samples} images cannot be read and are left out")
    order = np.argsort(index)
    return Features(values[order], labels[order])
