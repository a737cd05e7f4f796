"""RandAugment: every operation against plain numpy loops, the table of magnitudes, and picks that the key decides."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pretrain.data.permutation import uniform, words
from pretrain.data.randaugment import OPERATIONS, _augmented, rand_augment
from tests import plain_randaugment

SIZES = [(7, 9), (13, 5), (3, 3)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with flat parts and both ends of the range, uint8 [height, width, 3]."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    image[:2], image[-1] = 255, image[-1] // 4
    return image.astype(np.uint8)


def augment(
    image: torch.Tensor, name: str, magnitude: float, *, negative: bool = False, centre: tuple[float, float] = (0, 0)
) -> torch.Tensor:
    """One operation on a tensor."""
    return torch.from_numpy(_augmented(image.contiguous().numpy(), name, magnitude, negative=negative, centre=centre))


def augmented(image: np.ndarray, name: str, magnitude: float, **options: Any) -> np.ndarray:
    """Ours, in numpy's layout."""
    result = augment(torch.from_numpy(image).permute(2, 0, 1), name, magnitude, **options)
    assert result.dtype == torch.uint8 and result.shape == (3, *image.shape[:2])
    return result.permute(1, 2, 0).numpy()


def pixelwise(image: np.ndarray, function: Callable[[int], float]) -> np.ndarray:
    """A function of each value, cut off at 0 and 255 and truncated."""
    table = np.array([int(min(255.0, max(0.0, function(value)))) for value in range(256)], dtype=np.uint8)
    return table[image]


def blended(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """degenerate + factor * (image - degenerate) in float32, value by value."""
    result = np.empty_like(image)
    for place in np.ndindex(image.shape):
        start, end = np.float32(degenerate[place]), np.float32(image[place])
        result[place] = int(min(max(start + np.float32(factor) * (end - start), np.float32(0)), np.float32(255)))
    return result


def grey(image: np.ndarray) -> np.ndarray:
    """TensorFlow's weights and its way back to uint8, [height, width]."""
    result = np.empty(image.shape[:2], dtype=np.uint8)
    for place in np.ndindex(result.shape):
        red, green, blue = (np.float32(value) * np.float32(1 / 255) for value in image[place])
        weights = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
        result[place] = int((weights[0] * red + weights[1] * green + weights[2] * blue) * np.float32(255.5))
    return result


def sampled(image: np.ndarray, source: Callable[[int, int], tuple[float, float]]) -> np.ndarray:
    """The nearest pixel of source(x, y), halves away from zero, grey outside."""
    height, width = image.shape[:2]
    result = np.full_like(image, 128)
    for y in range(height):
        for x in range(width):
            column, row = (int(math.floor(abs(v) + 0.5) * math.copysign(1, v)) for v in source(x, y))
            if 0 <= column < width and 0 <= row < height:
                result[y, x] = image[row, column]
    return result


@pytest.mark.parametrize("size", SIZES)
def test_operations_on_single_values(size: tuple[int, int]) -> None:
    """Invert, Solarize, SolarizeAdd, Posterize and Brightness are tables of 256 values, at the paper's magnitudes.

    At 10 the threshold 256 of Solarize is 0 in uint8, so that the image is inverted (big_vision issue 110); at 0
    Posterize keeps one bit, since TensorFlow shifts by at most 7; at 30 its 12 bits wrap around to the same.
    """
    image = picture(*size)
    for magnitude, threshold, bits, added in [(0, 0, 1, 0), (5, 128, 2, 55), (10, 0, 4, 110), (15, 128, 6, 165)]:
        assert (augmented(image, "Invert", magnitude) == 255 - image).all()
        solarized = pixelwise(image, lambda v, t=threshold: v if v < t else 255 - v)
        assert (augmented(image, "Solarize", magnitude) == solarized).all()
        lighter = pixelwise(image, lambda v, a=added: v + a if v < 128 else v)
        assert (augmented(image, "SolarizeAdd", magnitude) == lighter).all()
        fewer = pixelwise(image, lambda v, b=bits: v // 2 ** (8 - b) * 2 ** (8 - b))
        assert (augmented(image, "Posterize", magnitude) == fewer).all()
    assert (augmented(image, "Posterize", 20) == image).all()
    assert (augmented(image, "Posterize", 30) == augmented(image, "Posterize", 0)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("magnitude, factor", [(0, 0.1), (2, 0.46), (5, 1.0), (10, 1.9), (15, 2.8)])
def test_operations_that_blend(magnitude: float, factor: float, size: tuple[int, int]) -> None:
    """Color, Contrast, Brightness and Sharpness between a degenerate image and the image, and beyond it."""
    image = picture(*size)
    shades = np.repeat(grey(image)[:, :, None], 3, 2)
    assert (augmented(image, "Color", magnitude) == blended(shades, image, factor)).all()
    level = np.full_like(image, size[0] * size[1] // 256)
    assert (augmented(image, "Contrast", magnitude) == blended(level, image, factor)).all()
    assert (augmented(image, "Brightness", magnitude) == blended(np.zeros_like(image), image, factor)).all()
    smooth = image.copy()
    for y in range(1, size[0] - 1):
        for x in range(1, size[1] - 1):
            around = image[y - 1 : y + 2, x - 1 : x + 2].astype(int).sum((0, 1))
            smooth[y, x] = (around + 4 * image[y, x].astype(int)) // 13
    assert (augmented(image, "Sharpness", magnitude) == blended(smooth, image, factor)).all()


@pytest.mark.parametrize("size, level", [((40, 30), 4), ((224, 224), 196), ((230, 300), 255)])
def test_contrast_is_against_the_number_of_pixels(size: tuple[int, int], level: int) -> None:
    """The original sums a histogram of the grey image and divides by its 256 bins: 196 at 224 pixels, dark or bright,
    cut off at 255; a factor of 0.1 is nearly that level, one of 1.9 goes away from it.
    """
    for value in (0, 90, 255):
        image = np.full((*size, 3), value, dtype=np.uint8)
        for magnitude, factor in [(0, np.float32(0.1)), (10, np.float32(1.9))]:
            expected = np.float32(level) + factor * (np.float32(value) - np.float32(level))
            assert (augmented(image, "Contrast", magnitude) == int(min(max(expected, 0), 255))).all()


@pytest.mark.parametrize("size", [*SIZES, (40, 30)])
def test_operations_on_histograms(size: tuple[int, int]) -> None:
    """AutoContrast stretches each channel; Equalize is Pillow's algorithm. Flat channels stay as they are."""
    image = picture(*size)
    image[:, :, 0] = 77
    image[:, :, 1] //= 3
    for channel in range(3):
        values = image[:, :, channel]
        low, high = int(values.min()), int(values.max())
        expected = values.copy()
        for place in np.ndindex(values.shape):
            if high > low:
                scale = np.float32(255) / np.float32(high - low)
                stretched = np.float32(values[place]) * scale + np.float32(-low) * scale
                expected[place] = int(min(max(stretched, np.float32(0)), np.float32(255)))
        assert (augmented(image, "AutoContrast", 10)[:, :, channel] == expected).all()
        counts = [int((values == v).sum()) for v in range(256)]
        step = (sum(counts) - counts[high]) // 255
        lookup = [min(255, (sum(counts[:v]) + step // 2) // step) if step else v for v in range(256)]
        assert (augmented(image, "Equalize", 10)[:, :, channel] == np.array(lookup)[values]).all()
    assert (augmented(image, "Equalize", 3) == np.asarray(ImageOps.equalize(Image.fromarray(image)))).all()
    assert (augmented(image, "AutoContrast", 3)[:, :, 0] == 77).all()
    assert (step > 0) == (size == (40, 30))  # both branches were seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("magnitude", [0, 0.5, 7, 9.7, 15])
@pytest.mark.parametrize("negative", [False, True])
def test_operations_that_move_pixels(negative: bool, magnitude: float, size: tuple[int, int]) -> None:
    """Shear from the corner by 0.3, translation by 100 pixels, rotation around the centre by 30 degrees per level.

    Nearest pixel, grey outside, in loops over the pixels.
    """
    image, level = picture(*size), (-1 if negative else 1) * magnitude / 10

    def check(name: str, source: Callable[[int, int], tuple[float, float]]) -> None:
        assert (augmented(image, name, magnitude, negative=negative) == sampled(image, source)).all(), name

    check("ShearX", lambda x, y: (x + level * 0.3 * y, y))
    check("ShearY", lambda x, y: (x, y + level * 0.3 * x))
    check("TranslateX", lambda x, y: (x + level * 100, y))
    check("TranslateY", lambda x, y: (x, y + level * 100))
    angle = level * 30 / 180 * math.pi
    middle_x, middle_y = (size[1] - 1) / 2, (size[0] - 1) / 2

    def turned(x: int, y: int) -> tuple[float, float]:
        right, down = x - middle_x, y - middle_y
        return (
            middle_x + math.cos(angle) * right - math.sin(angle) * down,
            middle_y + math.sin(angle) * right + math.cos(angle) * down,
        )

    check("Rotate", turned)


def test_what_moves_is_seen() -> None:
    """One white pixel goes where it should; small translations move it, large ones leave grey alone."""
    image = np.zeros((9, 9, 3), dtype=np.uint8)
    image[4, 6] = 255
    for name, negative, place in [
        ("TranslateX", False, (4, 4)),
        ("TranslateX", True, (4, 8)),
        ("TranslateY", False, (2, 6)),
        ("TranslateY", True, (6, 6)),
    ]:
        moved = augmented(image, name, 0.2, negative=negative)  # 2 pixels
        assert np.argwhere(moved[:, :, 0] == 255).tolist() == [list(place)] and (moved == 128).sum() == 2 * 9 * 3
    assert (augmented(image, "TranslateX", 10) == 128).all()
    assert (augmented(image, "Rotate", 30) == 255).nonzero()[0].tolist()[:1] == [2]  # 90 degrees: from right to top


def test_cutout_is_a_square_around_its_centre() -> None:
    """4 pixels per unit of magnitude to each side of the centre, less what lies outside, filled with grey."""
    image = picture(30, 50)
    for share, row, column in [((0.0, 0.0), 0, 0), ((0.5, 0.5), 15, 25), ((0.999, 0.999), 29, 49)]:
        for magnitude, half in [(0, 0), (1, 4), (2.6, 10), (10, 40)]:
            expected = image.copy()
            for y in range(30):
                for x in range(50):
                    if row - half <= y < row + half and column - half <= x < column + half:
                        expected[y, x] = 128
            assert (augmented(image, "Cutout", magnitude, centre=share) == expected).all()


def test_the_key_decides() -> None:
    """Equal keys give equal pixels; layers are operations in a row, picked with equal probability, both signs alike."""
    image = torch.from_numpy(picture(12, 12)).permute(2, 0, 1)
    assert rand_augment(image, 0, 10.0, 0, "t", 0, 0) is image
    picks, negatives = [], 0
    for index in range(3200):
        key = (0, "t", 0, index)
        draws = uniform(words(8, "v1", "randaugment", *key)).reshape(2, 4)
        picks.append(int(draws[0, 0] * 16))
        negatives += draws[0, 1] < 0.5
        if index % 40:
            continue
        expected = image
        for pick, sign, row, column in draws:
            name = OPERATIONS[int(pick * 16)]
            expected = augment(expected, name, 7.0, negative=bool(sign < 0.5), centre=(row, column))
        state = torch.random.get_rng_state()
        assert torch.equal(rand_augment(image, 2, 7.0, *key), expected)
        assert torch.equal(rand_augment(image, 2, 7.0, *key), expected)
        assert torch.equal(torch.random.get_rng_state(), state)
    counts = np.bincount(picks, minlength=16)
    assert len(OPERATIONS) == 16 and counts.min() > 140 and counts.max() < 260  # 200 +- 4 standard deviations
    assert 1450 < negatives < 1750


def test_unknown_operations_are_refused() -> None:
    """A name that is none of the 16 does not pass silently."""
    with pytest.raises(ValueError, match="Blur is not"):
        augment(torch.zeros(3, 4, 4, dtype=torch.uint8), "Blur", 1.0)


def _images() -> list[torch.Tensor]:
    """Noise, a gradient, few values, a flat channel: of several sizes and layouts, tiny ones too."""
    random = np.random.default_rng(3)
    sizes = (224, 224), (17, 33), (3, 2), (1, 1)
    images = [random.integers(0, 256, (*size, 3)) for size in sizes]
    images.append(np.add.outer(np.arange(150), np.arange(100))[..., None] + np.array([0, 3, 7]))
    images.append(random.choice([0, 90, 255], (60, 50, 3)))
    images.append(np.where([True, False, False], 77, random.integers(100, 130, (40, 70, 3))))
    as_tensors = [torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1) for image in images]
    return [image if number % 2 else image.contiguous() for number, image in enumerate(as_tensors)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_pixel_is_that_of_the_plain_formulas(name: str) -> None:
    """All magnitudes, both directions; the image that is given stays as it was."""
    for image in _images():
        before = image.clone()
        for magnitude in (0, 0.25, 3, 5, 9.7, 10, 15, 30):
            for negative in (False, True):
                options: dict[str, Any] = {"negative": negative, "centre": (0.3, 0.9)}
                expected = plain_randaugment.augment(image, name, magnitude, **options)
                found = augment(image, name, magnitude, **options)
                assert torch.equal(found, expected), (image.shape, magnitude, negative)
        assert torch.equal(image, before)
