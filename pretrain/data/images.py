"""From encoded bytes to one uint8 image: decoding, and the crops of training and of evaluation.

The randomness of a training crop is keyed by (seed, source, epoch, index) alone: never by rank, worker or restart.
"""

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from pretrain.config import DataConfig
from pretrain.data.order import uniform, words
from pretrain.data.reader import BadSample

MAX_PIXELS = 50_000_000  # a larger image is refused by its header: 172 kB of PNG can decode to gigabytes
_FORMATS = ("JPEG", "PNG", "WEBP")  # whatever the name says; Pillow knows 40 more, and runs Ghostscript for one
MAX_ASPECT = 100  # longer / shorter side
_TRIES = 10  # of RandomResizedCrop, as in torchvision


def decode(data: bytes) -> torch.Tensor:
    """Returns an encoded image as uint8 [3, height, width], gray and CMYK as RGB, EXIF orientation not applied.

    Raises BadSample("decode") when it cannot be decoded or has more than 50 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as header:
                width, height = header.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("decode", _reason(error)) from None
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(
            "decode", f"{width} x {height} pixels: no picture, and gigabytes once its shorter side is resized"
        )
    if width * height > MAX_PIXELS:
        raise BadSample("decode", f"{width} x {height} pixels")
    if data.startswith(b"\xff\xd8"):  # JPEG: torchvision takes 2/3 of Pillow's time. A damaged PNG can crash it
        try:
            image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            assert isinstance(image, torch.Tensor)  # a list of images gives a list
            return image
        except RuntimeError:
            pass  # damaged, or of a kind that torchvision does not know: Pillow decides
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P":
                image = image.convert("RGBA")  # a palette may have transparency; its colors stay as they are
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("decode", _reason(error)) from None


def _reason(error: Exception) -> str:
    return "not a JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)


def train_image(image: torch.Tensor, size: int, config: DataConfig, *key: object) -> torch.Tensor:
    """Returns a random crop of an image, resized and perhaps flipped, uint8 [3, size, size].

    key: (seed, source, epoch, index) of the sample; the same key gives the same pixels.
    """
    # A fixed number of draws in a fixed order, so that a change of one setting leaves the other draws as they were.
    draws = uniform(words(2 * _TRIES + 3, "v1", "aug", *key))
    top, left, height, width = random_resized_crop(
        image.shape[1], image.shape[2], config.crop_area, config.crop_ratio, draws
    )
    result = F.resized_crop(image, top, left, height, width, [size, size], _mode(config), antialias=True)
    return F.horizontal_flip(result) if draws[-1] < config.flip else result


def random_resized_crop(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of torchvision's RandomResizedCrop from uniform draws in [0, 1).

    draws: [2 * tries + 2 or more]: area and log-ratio of each try, then top and left. Without a fit after all
    tries: the central crop nearest to the allowed ratios.
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


def eval_image(image: torch.Tensor, size: int, config: DataConfig) -> torch.Tensor:
    """Returns the central crop of the image resized to size / eval_crop (its shorter side), uint8 [3, size, size]."""
    shorter = round(size / config.eval_crop)
    height, width = image.shape[1:]
    scale = shorter / min(height, width)
    resized = [max(shorter, round(height * scale)), max(shorter, round(width * scale))]
    return F.center_crop(F.resize(image, resized, _mode(config), antialias=True), [size, size])


def to_float(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns uint8 images as the model's input, in [-1, 1] as in Google's code: (x - 127.5) / 127.5."""
    return (images.to(torch.float32) / 127.5 - 1.0).to(dtype)


def _mode(config: DataConfig) -> F.InterpolationMode:
    return F.InterpolationMode(config.interpolation)
