"""Shrinks images when shards are made: fewer bytes to store and to decode, where training would shrink them anyway."""

import io
from typing import NamedTuple

import torch
from PIL import Image

_MAX_JPEG_SIDE = 65_500  # libjpeg's limit

NOTE = "larger than --shorter-side, resized and stored as JPEG"


class Resizing(NamedTuple):
    """What larger images become."""

    shorter_side: int  # pixels
    quality: int  # of the JPEG, 1 to 100


def resized(image: torch.Tensor, resizing: Resizing) -> bytes | None:
    """Returns an image, uint8 [3, height, width], as a JPEG with the shorter side wanted; None unless that is smaller.

    Pillow's bicubic filter with antialiasing. The pixels are those of the decoder: neither turned by EXIF, nor in
    another colour space. None also where the result would exceed JPEG's largest side.
    """
    height, width = image.shape[1:]
    scale = resizing.shorter_side / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if scale >= 1 or max(size) > _MAX_JPEG_SIDE:
        return None
    # One channel after the other: no copy of the whole image beside the decoder's.
    channels = [Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC) for channel in image]
    file = io.BytesIO()
    Image.merge("RGB", channels).save(file, "jpeg", quality=resizing.quality)
    return file.getvalue()
