"""Boxes of random training crops from uniform draws: torchvision's, TensorFlow's and DeiT III's."""

import math

import numpy as np

from pretrain.config import DataConfig
from pretrain.data.permutation import uniform, words

_TRIES = 10  # of RandomResizedCrop, as in torchvision
_INCEPTION_TRIES = 100  # of sample_distorted_bounding_box, TensorFlow's default
NUM_DRAWS = 2 * _TRIES + 2  # of random_resized_crop
_BORDER = 4  # pixels that the simple crop goes beyond the image, as in DeiT III

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def random_box(height: int, width: int, config: DataConfig, draws: np.ndarray, *key: object) -> Box:
    """Returns the box of a crop that is resized after it (random_resized, inception), in an image of these sides.

    draws: [NUM_DRAWS or more], drawn under `key` (seed, data set, epoch, index); `inception` draws its own instead.
    """
    if config.crop == "inception":
        tries = uniform(words(2 * _INCEPTION_TRIES + 2, "v1", "inception", *key))
        return inception_crop(height, width, config.crop_area, config.crop_ratio, tries)
    return random_resized_crop(height, width, config.crop_area, config.crop_ratio, draws)


def inception_crop(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], draws: np.ndarray
) -> Box:
    """Returns the box of TensorFlow's sample_distorted_bounding_box from uniform draws in [0, 1).

    draws: [2 * 100 + 2 or more]: ratio and height of each try, then top and left. If none of 100 tries fits, the box is
    the whole image. Unlike RandomResizedCrop's, ratio and height are uniform, so areas are smaller, and the largest
    offset is never drawn. Computed in float64, TensorFlow's in float32.
    """
    smallest, largest = (share * height * width for share in area)
    for attempt in range(_INCEPTION_TRIES):
        aspect = ratio[0] + (ratio[1] - ratio[0]) * draws[2 * attempt]
        low, high = round(math.sqrt(smallest / aspect)), round(math.sqrt(largest / aspect))
        if round(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
        high = min(high, height)
        low = min(low, high)
        crop_height = low + int(draws[2 * attempt + 1] * (high - low + 1))
        crop_height += round(crop_height * aspect) * crop_height < smallest
        crop_height -= round(crop_height * aspect) * crop_height > largest
        crop_width = round(crop_height * aspect)
        if smallest <= crop_width * crop_height <= largest and 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[2 * _INCEPTION_TRIES] * (height - crop_height))
            left = int(draws[2 * _INCEPTION_TRIES + 1] * (width - crop_width))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def random_resized_crop(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], draws: np.ndarray
) -> Box:
    """Returns the box of torchvision's RandomResizedCrop from uniform draws in [0, 1).

    draws: [2 * tries + 2 or more]: area and log-ratio of each try, then top and left. If no try fits, the box is
    the central crop nearest to the allowed ratios.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for attempt in range(_TRIES):
        crop_area = height * width * (area[0] + (area[1] - area[0]) * draws[2 * attempt])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[2 * attempt + 1])
        crop_width, crop_height = round(math.sqrt(crop_area * aspect)), round(math.sqrt(crop_area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[2 * _TRIES] * (height - crop_height + 1))
            left = int(draws[2 * _TRIES + 1] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(1, round(width / ratio[0])) if width / height < ratio[0] else height)
    crop_width = min(width, max(1, round(height * ratio[1])) if width / height > ratio[1] else width)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def mirrored_places(side: int, length: int, draw: float) -> np.ndarray:
    """Returns the rows (or columns), of `side` in the image, that a simple crop of `length` takes, int64 [length].

    draw: uniform in [0, 1), sets the start within the image and its border of 4 pixels. The border mirrors the image
    about its outermost pixels (torchvision's padding mode "reflect").
    """
    start = int(draw * (side + 2 * _BORDER - length + 1)) - _BORDER
    last = side - 1
    places = np.arange(start, start + length) % max(1, 2 * last)  # the period of the reflection
    return np.minimum(places, 2 * last - places)
