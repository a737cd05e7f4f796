"""timm's and DeiT's augmentations: the libraries' own operations on keyed draws, and their distributions."""

import random
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter, Grayscale
from torchvision.transforms import functional as F

from pretrain.config import DataConfig, Normalisation
from pretrain.data.augment import color_jitter, erased_box, random_erasing
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


def three_augmented(index: int) -> Image.Image:
    """DeiT III's augmentation of an image after crop and flip, by the functions that its authors call."""
    picture: Any = Image.fromarray(augmented(index).permute(1, 2, 0).numpy())
    pick, share = uniform(words(2, "v1", "three_augment", 3, "trees", 0, index)).tolist()
    blur = ImageFilter.GaussianBlur(radius=0.1 + share * (2.0 - 0.1))
    return [Grayscale(3), ImageOps.solarize, lambda image: image.filter(blur)][int(pick * 3)](picture)


def test_three_augment_is_deits() -> None:
    """Every pixel: grey, solarized or blurred, each a third of the time; the colour jitter comes after it."""
    picks = Counter()
    for index in range(40):
        expected = three_augmented(index)
        assert torch.equal(augmented(index, three_augment=True), as_tensor(expected))
        jittered = color_jitter(expected, 0.3, 3, "trees", 0, index)
        assert torch.equal(augmented(index, three_augment=True, color_jitter=0.3), as_tensor(jittered))
    for index in range(3000):
        picks[int(uniform(words(2, "v1", "three_augment", 3, "trees", 0, index))[0] * 3)] += 1
    assert len(picks) == 3 and all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in picks.values())


def test_each_augmentation_leaves_the_others_draws_as_they_were() -> None:
    """Erasing puts the same noise into the same box whatever becomes of the colours."""
    for index in range(20):
        erased = augmented(index, random_erasing=1.0)
        coloured = augmented(index, three_augment=True, color_jitter=0.3)
        both = augmented(index, three_augment=True, color_jitter=0.3, random_erasing=1.0)
        noise = both != coloured
        assert noise.any() and torch.equal(both[noise], erased[noise])


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def timms_box(erase: RandomErasing, height: int, width: int) -> tuple[int, ...] | None:
    """Where timm's transform sets an image of ones to zero: top, left, height, width."""
    rows, columns = torch.nonzero(erase(torch.ones(1, height, width))[0] == 0, as_tuple=True)
    if not len(rows):
        return None
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (8, 200)])
def test_erased_boxes_are_distributed_as_timms(height: int, width: int) -> None:
    """Kolmogorov-Smirnov over 3,000 boxes each: area, ratio, top, left; as often none where a side is short."""
    theirs_of, state = RandomErasing(1.0, mode="const", device="cpu"), random.getstate()
    random.seed(0)
    theirs = [timms_box(theirs_of, height, width) for _ in range(3000)]
    random.setstate(state)
    keys = [(0, "ks", 0, index) for index in range(3000)]
    ours = [erased_box(height, width, uniform(words(22, "v1", "random_erasing", *key)).tolist()) for key in keys]
    assert abs(ours.count(None) - theirs.count(None)) < 5 * (2 * max(theirs.count(None), 1)) ** 0.5
    pairs = zip(*(np.array([box for box in boxes if box], dtype=float).T for boxes in (ours, theirs)))
    (our_top, their_top), (our_left, their_left), (our_h, their_h), (our_w, their_w) = pairs
    assert ks_pvalue(our_top, their_top) > 1e-3 and ks_pvalue(our_left, their_left) > 1e-3
    assert ks_pvalue(our_h * our_w, their_h * their_w) > 1e-3 and ks_pvalue(our_h / our_w, their_h / their_w) > 1e-3


@pytest.mark.parametrize("normalisation", [Normalisation(), IMAGENET])
def test_erased_pixels_are_a_normal_models_input(normalisation: Normalisation) -> None:
    """Noise in the box alone, for each channel the nearest level of N(0, 1) after the normalisation; none repeated."""
    image = torch.full((3, 96, 96), 77, dtype=torch.uint8)
    noise: list[list[np.ndarray]] = [[], [], []]
    for index in range(60):
        result = random_erasing(image, 1.0, normalisation, 0, "noise", 0, index)
        draws = uniform(words(23, "v1", "random_erasing", 0, "noise", 0, index)).tolist()[1:]
        box = erased_box(96, 96, draws)
        assert box is not None and (image == 77).all()
        top, left, height, width = box
        inside = result[:, top : top + height, left : left + width].reshape(3, -1).numpy().astype(float)
        assert int((result != 77).sum()) == int((inside != 77).sum())
        for channel, values in zip(noise, inside):
            channel.append(values)
    levels = [np.concatenate(parts) for parts in noise]
    normal = np.random.default_rng(0).standard_normal(len(levels[0]))
    for values, mean, std in zip(levels, *normalisation):
        expected = np.clip(np.rint(255 * (mean + std * normal)), 0, 255)
        assert ks_pvalue(values, expected) > 1e-3 and abs(values.mean() - expected.mean()) < 1
    values = np.stack(levels)
    assert np.abs(np.corrcoef(values)[np.triu_indices(3, 1)]).max() < 0.02  # no channel tells another
    assert abs(np.corrcoef(values[0, 1:], values[0, :-1])[0, 1]) < 0.02  # and no pixel the next


def test_images_are_erased_as_often_as_asked() -> None:
    """0 never, 1 always, 0.25 in a quarter, of those that 1 erases; the rest of the image is as without."""
    erased = 0
    for index in range(400):
        never, some, always = (augmented(index, random_erasing=p) for p in (0.0, 0.25, 1.0))
        assert torch.equal(never, augmented(index)) and not torch.equal(always, never)
        assert torch.equal(some, never) or torch.equal(some, always)
        erased += not torch.equal(some, never)
    assert 57 < erased < 143  # 100 +- 5 standard deviations


def test_erasing_depends_on_the_key_alone() -> None:
    """The same key gives the same noise whatever the global generators say, another index other noise."""
    first = augmented(7, random_erasing=1.0)
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(augmented(7, random_erasing=1.0), first)
    assert not torch.equal(augmented(8, random_erasing=1.0), first)
