"""RandAugment by plain formulas on tensors, one after the other: what pretrain/data/randaugment.py must equal."""

import math

import torch
from torchvision.transforms.v2 import functional as F

FILL = 128  # grey, where an operation leaves a pixel empty


def augment(
    image: torch.Tensor, name: str, magnitude: float, *, negative: bool = False, centre: tuple[float, float] = (0, 0)
) -> torch.Tensor:
    """Returns the image after one operation, uint8 [3, height, width].

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
            return F.equalize(image)
        case "Invert":
            return 255 - image
        case "Rotate":
            return _rotate(image, math.radians(signed * 30))
        case "Posterize":
            return _posterize(image, int(level * 4))
        case "Solarize":
            threshold = int(level * 256) % 256  # uint8: 256, of magnitude 10, is 0 and inverts the whole image
            return torch.where(image < threshold, image, 255 - image)
        case "Color":
            return _blend(_grey(image).expand_as(image), image, enhance)
        case "Contrast":
            # The original's "mean" is the sum of a histogram / 256, which is the number of pixels / 256: 196 at 224 px.
            level_of_all = min(image.shape[1] * image.shape[2] // 256, 255)
            return _blend(torch.full_like(image, level_of_all), image, enhance)
        case "Brightness":
            return _blend(torch.zeros_like(image), image, enhance)
        case "Sharpness":
            return _blend(_smooth(image), image, enhance)
        case "ShearX":
            return _sample(image, (1, signed * 0.3, 0), (0, 1, 0))
        case "ShearY":
            return _sample(image, (1, 0, 0), (signed * 0.3, 1, 0))
        case "TranslateX":
            return _sample(image, (1, 0, signed * 100), (0, 1, 0))
        case "TranslateY":
            return _sample(image, (1, 0, 0), (0, 1, signed * 100))
        case "Cutout":
            return _cutout(image, int(level * 40), centre)
        case "SolarizeAdd":
            return torch.where(image < 128, (image.int() + int(level * 110)).clamp(0, 255).to(torch.uint8), image)
    raise ValueError(f"{name} is not an operation of RandAugment")


def _blend(degenerate: torch.Tensor, image: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns degenerate + factor * (image - degenerate), truncated; factors above 1 go beyond the image."""
    if factor == 1.0:
        return image
    start = degenerate.float()
    return (start + factor * (image.float() - start)).clamp(0, 255).to(torch.uint8)


def _grey(image: torch.Tensor) -> torch.Tensor:
    """Returns TensorFlow's rgb_to_grayscale, uint8 [1, height, width]: scaled by 255.5 and truncated, not rounded."""
    red, green, blue = image.float() * (1 / 255)
    return ((0.2989 * red + 0.587 * green + 0.114 * blue) * 255.5).to(torch.uint8)[None]


def _autocontrast(image: torch.Tensor) -> torch.Tensor:
    """Stretches each channel to 0 .. 255, truncated; a flat channel stays."""
    values = image.float()
    low, high = (bound(values, (1, 2))[:, None, None] for bound in (torch.amin, torch.amax))  # [3, 1, 1]
    scale = torch.tensor(255.0) / (high - low)  # 255 / tensor would be 255 * reciprocal, a bit off
    stretched = (values * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _posterize(image: torch.Tensor, bits: int) -> torch.Tensor:
    """Keeps the upper bits. TensorFlow shifts by at most 7: no bit is one bit. Beyond 8 the shift wraps around to 7."""
    shift = min((8 - bits) % 256, 7)
    return image >> shift << shift


def _smooth(image: torch.Tensor) -> torch.Tensor:
    """Returns Pillow's SMOOTH filter, [1 1 1; 1 5 1; 1 1 1] / 13, truncated; border pixels stay."""
    values = image.to(torch.int16)
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]  # [3, height - 2, width]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]  # [3, height - 2, width - 2]
    result = image.clone()
    result[:, 1:-1, 1:-1] = ((box + 4 * values[:, 1:-1, 1:-1]) // 13).to(torch.uint8)
    return result


def _rotate(image: torch.Tensor, angle: float) -> torch.Tensor:
    """Turns the image around its centre by `angle` in radians."""
    x, y = (image.shape[2] - 1) / 2, (image.shape[1] - 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return _sample(image, (cos, -sin, x - (cos * x - sin * y)), (sin, cos, y - (sin * x + cos * y)))


def _sample(image: torch.Tensor, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> torch.Tensor:
    """Returns the image whose pixel (x, y) is the old one's nearest to (to_x . (x, y, 1), to_y . (x, y, 1)).

    FILL where that lies outside. Halves are rounded away from zero and the arithmetic is float32, as in TensorFlow's
    ImageProjectiveTransform.
    """
    height, width = image.shape[1:]
    x, y = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)[:, None]
    column, row = (_round(a * x + b * y + c) for a, b, c in (to_x, to_y))  # [height, width]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    nearest = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten()  # one index: a third less
    return torch.where(inside, image.flatten(1).index_select(1, nearest).view_as(image), FILL)


def _round(values: torch.Tensor) -> torch.Tensor:
    whole = values.trunc()
    return (whole + ((values - whole).abs() >= 0.5) * values.sign()).long()


def _cutout(image: torch.Tensor, half_side: int, centre: tuple[float, float]) -> torch.Tensor:
    """Fills a square of twice `half_side` pixels around a pixel of the image, cut off at the borders."""
    row, column = (int(share * side) for share, side in zip(centre, image.shape[1:]))
    result = image.clone()
    result[:, max(0, row - half_side) : row + half_side, max(0, column - half_side) : column + half_side] = FILL
    return result
