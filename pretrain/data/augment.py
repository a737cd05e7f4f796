"""What is done to a training image after its crop and flip: RandAugment, or the augmentations of timm and DeiT.

Each draws under a key of its own, so that turning one on leaves the crop, the flip and the others as they were.
"""

from itertools import permutations

import numpy as np
import torch
from PIL import Image, ImageEnhance

from pretrain.config import DataConfig
from pretrain.data.permutation import uniform, words
from pretrain.data.randaugment import rand_augment

_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ORDERS = tuple(permutations(range(len(_JITTERS))))


def augmented(image: torch.Tensor, config: DataConfig, *key: object) -> torch.Tensor:
    """Returns the image, uint8 [3, height, width], after all that the config asks for, in this order.

    key: (seed, data set, epoch, index) of the sample; the same key gives the same pixels.
    """
    image = rand_augment(image, config.randaugment_layers, config.randaugment_magnitude, *key)
    if config.color_jitter:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = color_jitter(picture, config.color_jitter, *key)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return image


def color_jitter(picture: Image.Image, strength: float, *key: object) -> Image.Image:
    """Returns the picture with other brightness, contrast and saturation, in any order: torchvision's ColorJitter.

    strength: each factor is uniform from max(0, 1 - strength) to 1 + strength. The hue stays, as in timm and DeiT.
    """
    order, *draws = uniform(words(1 + len(_JITTERS), "v1", "color_jitter", *key)).tolist()
    low, high = max(0.0, 1 - strength), 1 + strength
    for which in _ORDERS[int(order * len(_ORDERS))]:
        picture = _JITTERS[which](picture).enhance(low + (high - low) * draws[which])
    return picture
