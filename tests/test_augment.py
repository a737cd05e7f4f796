"""timm's and DeiT's augmentations: the libraries' own operations on keyed draws, and their distributions."""

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as F

from pretrain.config import DataConfig
from pretrain.data.augment import color_jitter
from pretrain.data.images import train_image
from pretrain.data.permutation import uniform, words
from tests.test_images import ks_pvalue

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8))


def config(**changes: Any) -> DataConfig:
    """Data settings; none of the paths is read here."""
    return DataConfig(train=Path("unused"), global_batch=1, **changes)


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """uint8 [3, height, width]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def augmented(index: int, **changes: Any) -> torch.Tensor:
    """The training image of NOISE at 32 pixels."""
    return train_image(as_tensor(NOISE), 32, config(**changes), 3, "trees", 0, index)


def jitter_draws(index: int) -> list[float]:
    return uniform(words(4, "v1", "color_jitter", 3, "trees", 0, index)).tolist()


@pytest.mark.parametrize("strength", [0.3, 0.4, 1.5])
def test_a_jittered_image_is_torchvisions(strength: float) -> None:
    """Every pixel: torchvision's functions with the drawn factors, in the drawn order, after crop and flip."""
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    orders = set()
    for index in range(40):
        order, *draws = jitter_draws(index)
        expected: Any = Image.fromarray(augmented(index).permute(1, 2, 0).numpy())
        orders.add(int(order * 6))
        for which in list(permutations(range(3)))[int(order * 6)]:
            low = max(0, 1 - strength)
            expected = functions[which](expected, low + (1 + strength - low) * draws[which])
        assert torch.equal(augmented(index, color_jitter=strength), as_tensor(expected))
    assert orders == set(range(6))


def test_jitter_is_distributed_as_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 6 orders as often, and the factors of 4,000 images against ColorJitter's own (Kolmogorov-Smirnov)."""
    used: list[list[tuple[int, float]]] = []

    class Recorded:
        def __init__(self, which: int) -> None:
            self._which = which

        def __call__(self, picture: Image.Image) -> "Recorded":
            return self

        def enhance(self, factor: float) -> Image.Image:
            used[-1].append((self._which, factor))
            return NOISE

    monkeypatch.setattr("pretrain.data.augment._JITTERS", tuple(map(Recorded, range(3))))
    for index in range(4000):
        used.append([])
        color_jitter(NOISE, 0.4, 0, "ks", 0, index)
    counts = Counter(tuple(which for which, _ in order) for order in used)
    assert len(counts) == 6 and all(abs(count - 4000 / 6) < 5 * (4000 * 5 / 36) ** 0.5 for count in counts.values())
    ours = np.array([[factor for _, factor in sorted(order)] for order in used])
    theirs_of = ColorJitter(0.4, 0.4, 0.4)
    ranges: Any = (theirs_of.brightness, theirs_of.contrast, theirs_of.saturation, theirs_of.hue)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([ColorJitter.get_params(*ranges)[1:4] for _ in range(4000)], dtype=float)
    assert all(ks_pvalue(ours[:, which], theirs[:, which]) > 1e-3 for which in range(3))
