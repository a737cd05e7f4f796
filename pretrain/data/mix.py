"""Mixup and CutMix: one draw per global step, and for each slot of the global batch a partner with another image.

Neither depends on how the batch is split over ranks and micro-batches.
"""

import math
from typing import NamedTuple

import torch

from pretrain.config import DataConfig
from pretrain.data.permutation import uniform, words


class Mix(NamedTuple):
    """How the images of a step are mixed: all values by `own_share`, or a box replaced."""

    own_share: float  # of the image and of its label, at least 0.5; the rest is the partner's
    box: tuple[int, int, int, int] | None  # CutMix: top, left, height, width of what comes from the partner


def partner(slot: int, repeats: int = 1) -> int:
    """Returns the slot that a slot is mixed with: the same copy of image XOR 1, where each image fills `repeats` slots.

    With an odd number of images, the last one has no partner: the slot returned lies beyond the batch.
    """
    image, copy = divmod(slot, repeats)
    return (image ^ 1) * repeats + copy


def draw_mix(config: DataConfig, size: int, seed: int, step: int) -> Mix | None:
    """Returns how a step is mixed, None without mixup and CutMix. Images are `size` pixels high and wide.

    Mixup: a of Beta(p, p), then max(a, 1 - a), as in big_vision's get_mixup (arXiv 1710.09412). CutMix
    (arXiv 1905.04899): a draw of the same kind is the share of the image to keep; the box has the image's shape, its
    centre is anywhere, and it is clipped to the image, so own_share is counted in pixels. With both, a coin decides.
    """
    if not config.mixup and not config.cutmix:
        return None
    coin, mixup, cutmix, row, column = uniform(words(5, "v1", "mix", seed, step)).tolist()
    if config.mixup and (not config.cutmix or coin < 0.5):
        return Mix(_own_share(config.mixup, mixup), None)
    side = size * math.sqrt(1 - _own_share(config.cutmix, cutmix))
    top, height = _span(int(row * size), side, size)
    left, width = _span(int(column * size), side, size)
    return Mix(1 - height * width / size**2, (top, left, height, width))


def _own_share(p: float, draw: float) -> float:
    """Returns the larger share of a Beta(p, p) draw, computed from a uniform draw by the inverse CDF."""
    from scipy.special import betaincinv  # 3 % of the import time at start: only where batches are mixed

    share = float(betaincinv(p, p, draw))
    return float(torch.tensor(max(share, 1 - share)))  # float32: the last bits may differ between releases of scipy


def _span(centre: int, length: float, size: int) -> tuple[int, int]:
    """Returns start and length of a span around a pixel, within 0 .. size."""
    half = int(length) // 2
    start, end = max(0, centre - half), min(size, centre + half)
    return start, end - start


def mixed(image: torch.Tensor, other: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Returns an image mixed with its partner's, uint8 [3, height, width]; mixup rounds to whole values."""
    if mix.box is None:
        return (image * mix.own_share + other * (1 - mix.own_share)).round().to(torch.uint8)
    top, left, height, width = mix.box
    result = image.clone()
    result[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
    return result
