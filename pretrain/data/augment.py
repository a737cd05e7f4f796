"""Augmentations of a training image after its crop and flip: RandAugment, and those of timm and DeiT.

Each draws under its own key, so turning one on does not change the crop, the flip or the others.
"""

import math
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pretrain.config import DataConfig, Normalisation
from pretrain.data.permutation import uniform, words
from pretrain.data.randaugment import rand_augment

_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ORDERS = tuple(permutations(range(len(_JITTERS))))
_BLUR_RADIUS = (0.1, 2.0)  # pixels, whatever the image's size
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # shares of the image, height / width: timm's, for DeiT too
_ERASING_TRIES = 10  # as in timm
_NOISE_STEPS = 1 << 16  # equal steps of probability, in which noise levels are tabulated


def augmented(image: torch.Tensor, config: DataConfig, *key: object) -> torch.Tensor:
    """Applies the augmentations that the config enables, in the order below, to an image, uint8 [3, height, width].

    key: (seed, data set, epoch, index) of the sample; the same key gives the same pixels.
    """
    image = rand_augment(image, config.randaugment_layers, config.randaugment_magnitude, *key)
    if config.three_augment or config.color_jitter:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if config.three_augment:
            picture = three_augment(picture, *key)
        if config.color_jitter:
            picture = color_jitter(picture, config.color_jitter, *key)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return random_erasing(image, config.random_erasing, config.normalisation, *key) if config.random_erasing else image


def three_augment(picture: Image.Image, *key: object) -> Image.Image:
    """Makes the picture grey, solarized or blurred, each with probability 1/3: DeiT III's 3-Augment.

    The colour jitter is a separate setting, as in DeiT. Source: facebookresearch/deit, augment.py.
    """
    pick, share = uniform(words(2, "v1", "three_augment", *key)).tolist()
    match int(pick * 3):
        case 0:
            return ImageOps.grayscale(picture).convert("RGB")
        case 1:
            return ImageOps.solarize(picture)  # inverts values from 128 on
        case _:
            low, high = _BLUR_RADIUS
            return picture.filter(ImageFilter.GaussianBlur(low + (high - low) * share))


def color_jitter(picture: Image.Image, strength: float, *key: object) -> Image.Image:
    """Changes brightness, contrast and saturation in a random order, as torchvision's ColorJitter does.

    strength: each factor is uniform in [max(0, 1 - strength), 1 + strength]. The hue is unchanged, as in timm and DeiT.
    """
    order, *draws = uniform(words(1 + len(_JITTERS), "v1", "color_jitter", *key)).tolist()
    low, high = max(0.0, 1 - strength), 1 + strength
    for which in _ORDERS[int(order * len(_ORDERS))]:
        picture = _JITTERS[which](picture).enhance(low + (high - low) * draws[which])
    return picture


def random_erasing(image: torch.Tensor, probability: float, normalisation: Normalisation, *key: object) -> torch.Tensor:
    """Fills a box with noise with this probability: timm's RandomErasing in mode "pixel", as DeiT uses it.

    timm draws a pixel's normalised values from a normal distribution; here they become their nearest uint8 levels.
    """
    do_it, *draws = uniform(words(2 * _ERASING_TRIES + 3, "v1", "random_erasing", *key)).tolist()
    box = erased_box(image.shape[1], image.shape[2], draws)
    if do_it >= probability or box is None:
        return image
    top, left, height, width = box
    raw = words(-(-3 * height * width // 4), "v1", "erasing_noise", *key)  # four pieces of 16 bits in each word
    steps = raw.astype("<u8").view("<u2")[: 3 * height * width].reshape(3, height, width)
    result = image.clone()
    for channel, piece, mean, std in zip(result, steps, *normalisation):
        channel[top : top + height, left : left + width] = torch.from_numpy(_noise_levels(mean, std)[piece])
    return result


def erased_box(height: int, width: int, draws: list[float]) -> tuple[int, int, int, int] | None:
    """Returns top, left, height and width of timm's box from uniform draws in [0, 1); None where no try fits.

    draws: [2 * 10 + 2]: area and log-ratio of each try, then top and left.
    """
    area, log_ratio = _ERASED_AREA, tuple(map(math.log, _ERASED_RATIO))
    for attempt in range(_ERASING_TRIES):
        box_area = height * width * (area[0] + (area[1] - area[0]) * draws[2 * attempt])
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[2 * attempt + 1])
        box_height, box_width = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if box_height < height and box_width < width:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    return None


@lru_cache(maxsize=6)
def _noise_levels(mean: float, std: float) -> np.ndarray:
    """The noise level, 0 to 255, at each of 2^16 equal steps of a normal distribution's probability: uint8 [65536].

    Computed from the 255 borders between levels, which is faster than from 65,536 quantiles.
    """
    borders = [(level + 0.5) / 255 for level in range(255)]
    below = [(1 + math.erf((border - mean) / (std * math.sqrt(2)))) / 2 for border in borders]
    ends = np.rint(np.array([0, *below, 1]) * _NOISE_STEPS).astype(int)
    return np.repeat(np.arange(256, dtype=np.uint8), np.diff(ends))
