"""Features of a data set, for few-shot, nearest neighbours and linear probes: a model's pre-logits, or raw pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import MINUS_ONE_TO_ONE, DataConfig, Normalisation
from pretrain.data.images import to_float
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.evaluation.classification import EvaluationStopped
from pretrain.log import warn

MAX_PIXEL_BYTES = 16 << 30  # of raw pixels as float32: 28,000 images at 224 px

Extract = Callable[[torch.Tensor], torch.Tensor]  # uint8 images [B, 3, H, W] -> features [B, D]


class Features(NamedTuple):
    """Features of the images that could be read, in order of their index: the same on any number of ranks."""

    values: np.ndarray  # float32 [images, features]
    labels: np.ndarray  # int64 [images]


def pre_logits(model: nn.Module, normalisation: Normalisation = MINUS_ONE_TO_ONE) -> Extract:
    """Returns the function uint8 images [B, 3, H, W] -> the input of the model's head, float32 [B, D].

    The model is one of this package or of timm, in evaluation mode. normalisation: the one it was trained with.
    """
    parts: Any = model  # forward_features and forward_head, as every model of timm has them

    def extract(images: torch.Tensor) -> torch.Tensor:
        tokens = parts.forward_features(to_float(images, torch.float32, normalisation))
        return parts.forward_head(tokens, pre_logits=True)

    return extract


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """Returns the pixels of uint8 images [B, 3, H, W] in [0, 1], float32 [B, 3 * H * W]: what a model has to beat."""
    return images.flatten(1).float() / 255


@torch.no_grad()
def extract_features(
    extract: Extract,
    manifest: Manifest,
    indices: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    config: DataConfig,
    device: torch.device,
    max_bytes: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    stop_agreed: Callable[[], bool] = lambda: False,
) -> Features | None:
    """Returns the features of a data set's images on rank 0, None on the others. Called by all ranks.

    Images pass through the evaluation transform. Ranks other than 0 hold one batch at a time. indices: ascending, of
    the samples to take. max_bytes: refuse more than this of float32 features. progress: called with the number of
    images just done, over all ranks. Images that cannot be read are left out, and rank 0 says how many. Raises
    UserError when none is left, when there are too many bytes, or when the data set has several labels per image;
    EvaluationStopped on all ranks when `stop_agreed` returns True between two batches.
    """
    if manifest.multi_label:
        raise UserError(f"{manifest.path}: has several labels per image; probes of features need one")
    batches = eval_batches(manifest, indices, batch_size=batch_size, image_size=image_size, config=config)
    read = np.zeros(len(indices), dtype=bool)
    labels = np.zeros(len(indices), dtype=np.int64)
    values: np.ndarray | None = None  # allocated at the first batch, which shows the number of features
    for batch in batches:
        agreement.raise_together(batch.error)
        if stop_agreed():
            raise EvaluationStopped
        on_device = extract(batch.images.to(device)).float()
        found: torch.Tensor = watchdog.from_device(on_device.cpu)  # [B, D]
        if max_bytes is not None and (needed := 4 * len(indices) * found.shape[1]) > max_bytes:
            raise UserError(
                f"{manifest.path}: {found.shape[1]:,} features of {len(indices):,} images take {needed >> 20:,} MB, "
                f"at most {max_bytes >> 20:,}"
            )
        mine = tuple(t[batch.valid].numpy() for t in (batch.index, found, batch.labels[:, 0]))
        # Gathered batch by batch: otherwise every rank would hold its share of all features until the end.
        for part_index, part_values, part_labels in agreement.to_main(mine):
            places = np.searchsorted(indices, part_index)
            read[places] = True
            values = np.empty((len(indices), found.shape[1]), dtype=np.float32) if values is None else values
            values[places], labels[places] = part_values, part_labels
        progress(min(len(indices), batch_size * ranks.world_size()))
    if not agreement.any_rank(bool(read.any())):
        raise UserError(f"{manifest.path}: none of the {len(indices)} images can be read")
    if not ranks.is_main():
        return None
    assert values is not None
    if not read.all():
        warn(f"{manifest.path}: {np.sum(~read)} of {len(indices)} images cannot be read and are left out")
        values, labels = values[read], labels[read]
    return Features(values, labels)
