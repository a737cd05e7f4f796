"""RandAugment as Google's TensorFlow code has it, with keyed picks: operations on one uint8 image [3, height, width].

Source: distort_image_with_randaugment in google-research/big_vision pp/archive/autoaugment.py, a fork of tensorflow/tpu
models/official/efficientnet/autoaugment.py. Other re-implementations differ in operations, scale and filling;
TensorFlow's behaviour where the original's numbers overflow uint8 is reproduced too (docs/data.md).

Works in NumPy on contiguous arrays, mostly with lookup tables of 256 bytes and cached pixel maps: a sixth of the time
of the same formulas on tensors, which tests/plain_randaugment.py keeps; every pixel is equal.
"""

import math
from functools import lru_cache

import numpy as np
import torch

from pretrain.data.permutation import uniform, words

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
FILL = 128  # grey, where an operation leaves a pixel empty


def rand_augment(image: torch.Tensor, layers: int, magnitude: float, *key: object) -> torch.Tensor:
    """Returns the image after `layers` operations, each picked among the 16 with equal probability and always applied.

    magnitude: of all operations, 10 for the full scale of AutoAugment. key: (seed, data set, epoch, index).
    """
    if not layers:
        return image
    draws = uniform(words(4 * layers, "v1", "randaugment", *key)).reshape(layers, 4)
    pixels = image.contiguous().numpy()
    for pick, sign, row, column in draws.tolist():
        name = OPERATIONS[int(pick * len(OPERATIONS))]
        pixels = _augmented(pixels, name, magnitude, negative=sign < 0.5, centre=(row, column))
    return torch.from_numpy(pixels)


def _augmented(
    image: np.ndarray, name: str, magnitude: float, *, negative: bool, centre: tuple[float, float]
) -> np.ndarray:
    """The image, an array in C order, after one operation; itself where nothing changes.

    negative: turns, shears and moves the other way. centre: of the cutout, as shares of height and width in [0, 1).
    Lengths are pixels whatever the image's size, as in the original, which was made for 224.
    """
    level = magnitude / 10
    signed = -level if negative else level
    enhance = level * 1.8 + 0.1  # 1 leaves the image as it is
    match name:
        case "AutoContrast":
            return _autocontrast(image)
        case "Equalize":
            return _equalize(image)
        case "Invert":
            return ~image
        case "Rotate":
            return _rotate(image, math.radians(signed * 30))
        case "Posterize":
            return image & _upper_bits(int(level * 4))
        case "Solarize":
            # in uint8 the threshold of magnitude 10, 256, wraps to 0 and inverts the whole image
            return _by_table(image, _solarize_table(int(level * 256) % 256))
        case "Color":
            return _color(image, enhance)
        case "Contrast":
            # The original's "mean" is the sum of a histogram / 256, which is the number of pixels / 256: 196 at 224 px.
            level_of_all = min(image.shape[1] * image.shape[2] // 256, 255)
            return _by_table(image, _blend_table(level_of_all, enhance))
        case "Brightness":
            return _by_table(image, _blend_table(0, enhance))
        case "Sharpness":
            return _sharpness(image, enhance)
        case "ShearX":
            return _sample(image, (1, signed * 0.3, 0), (0, 1, 0))
        case "ShearY":
            return _sample(image, (1, 0, 0), (signed * 0.3, 1, 0))
        case "TranslateX":
            return _move(image, signed * 100, across=True)
        case "TranslateY":
            return _move(image, signed * 100, across=False)
        case "Cutout":
            return _cutout(image, int(level * 40), centre)
        case "SolarizeAdd":
            return _by_table(image, _solarize_add_table(int(level * 110)))
    raise ValueError(f"{name} is not an operation of RandAugment")


def _by_table(image: np.ndarray, table: bytes) -> np.ndarray:
    """Replaces each value by the table's: half the time of NumPy's `take`, a tenth of torch's indexing."""
    return np.frombuffer(bytearray(image).translate(table), np.uint8).reshape(image.shape)


@lru_cache(maxsize=64)
def _solarize_table(threshold: int) -> bytes:
    return bytes(value if value < threshold else 255 - value for value in range(256))


@lru_cache(maxsize=64)
def _solarize_add_table(added: int) -> bytes:
    return bytes(min(max(value + added, 0), 255) if value < 128 else value for value in range(256))


@lru_cache(maxsize=64)
def _blend_table(start: int, factor: float) -> bytes:
    values = np.arange(256, dtype=np.float32)
    return _blended(np.full_like(values, start), values, factor).tobytes() if factor != 1.0 else bytes(range(256))


def _blended(start: np.ndarray, values: np.ndarray, factor: float) -> np.ndarray:
    """Returns start + factor * (values - start) of float32, truncated to uint8; factors above 1 go beyond the values.

    `values` is overwritten. Any other grouping may move a value by one.
    """
    values -= start
    values *= np.float32(factor)
    values += start
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1.0:
        return image
    # TensorFlow's rgb_to_grayscale, scaled by 255.5 and truncated, not rounded
    values = image.astype(np.float32)
    red, green, blue = values * np.float32(1 / 255)
    red *= np.float32(0.2989)
    red += np.float32(0.587) * green
    red += np.float32(0.114) * blue
    red *= np.float32(255.5)
    grey = red.astype(np.uint8).astype(np.float32)
    return _blended(grey, values, factor)


def _autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0 .. 255, truncated; a flat channel stays."""
    flat = image.reshape(3, -1)
    bounds = zip(flat.min(axis=1).tolist(), flat.max(axis=1).tolist())
    return np.stack([_by_table(channel, _stretching(*bound)) for channel, bound in zip(image, bounds)])


@lru_cache(maxsize=1024)
def _stretching(low: int, high: int) -> bytes:
    values = np.arange(256, dtype=np.float32)
    if high > low:
        scale = np.float32(255) / np.float32(high - low)
        values = np.clip(values * scale - np.float32(low) * scale, 0, 255)
    return values.astype(np.uint8).tobytes()


def _equalize(image: np.ndarray) -> np.ndarray:
    """Pillow's equalize: maps each value of a channel by the number of pixels below it; a flat channel stays."""
    result = np.empty_like(image)
    for channel, equalized in zip(image, result):
        counts = torch.bincount(torch.from_numpy(channel).flatten(), minlength=256).numpy()  # NumPy's copies to int64
        step = (int(counts.sum()) - int(counts[channel.max()])) // 255
        if step == 0:
            equalized[:] = channel
            continue
        below = np.cumsum(counts) - counts
        table = np.minimum((below + step // 2) // step, 255).astype(np.uint8)
        equalized[:] = _by_table(channel, table.tobytes())
    return result


def _upper_bits(bits: int) -> np.uint8:
    """The mask of the upper bits. TensorFlow shifts by at most 7: 0 bits act as 1, and above 8 it wraps around to 7."""
    return np.uint8(0xFF << min((8 - bits) % 256, 7) & 0xFF)


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with Pillow's SMOOTH filter, [1 1 1; 1 5 1; 1 1 1] / 13, truncated; border pixels stay."""
    if factor == 1.0:
        return image
    values = image.astype(np.uint16)
    rows = values[:, :-2] + values[:, 1:-1]
    rows += values[:, 2:]  # [3, height - 2, width]
    smooth = rows[:, :, :-2] + rows[:, :, 1:-1]
    smooth += rows[:, :, 2:]  # [3, height - 2, width - 2]
    inner = values[:, 1:-1, 1:-1]
    smooth += np.uint16(4) * inner
    smooth //= np.uint16(13)
    result = image.copy()
    result[:, 1:-1, 1:-1] = _blended(smooth.astype(np.float32), inner.astype(np.float32), factor)
    return result


def _rotate(image: np.ndarray, angle: float) -> np.ndarray:
    """Turns the image around its centre by `angle` in radians."""
    x, y = (image.shape[2] - 1) / 2, (image.shape[1] - 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return _sample(image, (cos, -sin, x - (cos * x - sin * y)), (sin, cos, y - (sin * x + cos * y)))


Row = tuple[float, float, float]


def _sample(image: np.ndarray, to_x: Row, to_y: Row) -> np.ndarray:
    """Returns the image whose pixel (x, y) is the old one's nearest to (to_x . (x, y, 1), to_y . (x, y, 1))."""
    height, width = image.shape[1:]
    source = np.empty((3, height * width + 1), np.uint8)  # the last one stands for outside
    source[:, :-1], source[:, -1] = image.reshape(3, -1), FILL
    return source.take(_nearest(to_x, to_y, height, width), axis=1, mode="clip").reshape(image.shape)


@lru_cache(maxsize=6)  # three operations in two directions; 8 bytes a pixel
def _nearest(to_x: Row, to_y: Row, height: int, width: int) -> np.ndarray:
    """Which pixel each one is taken from, height * width where that lies outside: int64 [height * width].

    Halves are rounded away from zero and the arithmetic is float32, as in TensorFlow's ImageProjectiveTransform.
    """
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    column, row = (_round(np.float32(a) * x + np.float32(b) * y + np.float32(c)) for a, b, c in (to_x, to_y))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, height * width).ravel()


def _round(values: np.ndarray) -> np.ndarray:
    whole = np.trunc(values)
    return (whole + (np.abs(values - whole) >= 0.5) * np.sign(values)).astype(np.int64)


def _move(image: np.ndarray, pixels: float, *, across: bool) -> np.ndarray:
    """Takes each pixel from `pixels` to the right, or below, rounded as in `_sample`."""
    axis = 2 if across else 1
    to, source = _moved(pixels, image.shape[axis])
    result = np.full_like(image, FILL)
    if across:
        result[:, :, to] = image[:, :, source]
    else:
        result[:, to] = image[:, source]
    return result


@lru_cache(maxsize=64)
def _moved(pixels: float, size: int) -> tuple[slice | np.ndarray, slice | np.ndarray]:
    """Where along a side pixels go to, and where they come from: slices, unless rounding skips one."""
    source = _round(np.arange(size, dtype=np.float32) + np.float32(pixels))
    to = np.flatnonzero((source >= 0) & (source < size))
    source = source[to]
    if len(to) and (np.diff(to) == 1).all() and (np.diff(source) == 1).all():
        return slice(to[0], to[-1] + 1), slice(source[0], source[-1] + 1)
    return to, source


def _cutout(image: np.ndarray, half_side: int, centre: tuple[float, float]) -> np.ndarray:
    """Fills a square of twice `half_side` pixels around a pixel of the image, cut off at the borders."""
    row, column = (int(share * side) for share, side in zip(centre, image.shape[1:]))
    result = image.copy()
    result[:, max(0, row - half_side) : row + half_side, max(0, column - half_side) : column + half_side] = FILL
    return result
