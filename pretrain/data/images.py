"""From encoded bytes to one uint8 image: decoding, the crops of training, and the transforms of evaluation.

The randomness of a training image is keyed by (seed, data set, epoch, index) alone: never by rank, worker or restart.
"""

import io
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from pretrain.config import MINUS_ONE_TO_ONE, DataConfig, Normalisation
from pretrain.data import crops, headers
from pretrain.data.augment import augmented
from pretrain.data.crops import Box
from pretrain.data.damage import listen
from pretrain.data.permutation import uniform, words
from pretrain.data.reader import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")  # whatever the file's name; Pillow knows 40 more, and runs Ghostscript for one
_PNG, _PNG_TEXT = b"\x89PNG\r\n\x1a\n", (b"zTXt", b"iTXt")
# An image of more than _PIECE pixels is resized in bands of rows, so that its copies in other types stay small. In
# uint8 the result equals that of one piece; in float, or for a tall image in Pillow, some values round to the next
# level. A band of floats has more than 32 MB, which malloc returns to the system at once; less stays in its heap.
_PIECE, _BAND = 16_000_000, 4_000_000  # pixels
_AREA_ROWS = 32  # of big_vision's resized image at a time: all of it as float64 would take more than the original


def decode(data: bytes, told: Callable[[str], None] = lambda _: None) -> torch.Tensor:
    """Returns an encoded image as uint8 [3, height, width], gray and CMYK as RGB, EXIF orientation not applied.

    told: called with each warning of the decoder when a damaged JPEG can still be decoded. Raises BadSample("decode")
    when an image cannot be decoded or exceeds the limits of data/headers.py.
    """
    headers.check_parts(data)
    kept, refused = 0.0, None
    if data.startswith(b"\xff\xd8"):  # torchvision takes 2/3 of Pillow's time. A damaged PNG can crash it
        kept, size = headers.jpeg_header(data)
        if size is None:
            size = _opened(data).size  # not kept open: Pillow's copies of segments would stay in memory meanwhile
        headers.check_size(*size)
        headers.check_memory(*size, headers.TORCHVISION_JPEG + kept, data)
        try:
            image, heard = listen(lambda: _decode_jpeg(data))
            for complaint in heard:
                told(complaint)
            return image
        except RuntimeError as error:  # damaged, or of a kind that torchvision does not know: Pillow decides
            refused = str(error).partition("\n")[0]
    data = _without_text(data)
    with _opened(data) as opened:  # the format is the one that Pillow detects
        headers.check_size(*opened.size)
        headers.check_memory(*opened.size, headers.PILLOW.get(opened.format or "", headers.PILLOW["JPEG"]) + kept, data)
        pixels = _pixels(opened)
    if refused is not None:
        told(refused)
    return pixels


def _opened(data: bytes) -> Image.Image:
    """Opens an image with Pillow, which reads its header only and decodes pixels on access."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("decode", _reason(error)) from None


def _decode_jpeg(data: bytes) -> torch.Tensor:
    # What torchvision.io.decode_jpeg calls; without its checks and warning, 20 microseconds less. EXIF is not applied.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torch.ops.image.decode_jpeg(encoded, ImageReadMode.RGB.value, False)


def decode_upright(data: bytes, told: Callable[[str], None] = lambda _: None) -> torch.Tensor:
    """Decodes as `decode` does, and applies the EXIF orientation: for people's own photos.

    Published protocols ignore the orientation, as TensorFlow's decoder does; so does everything that reads shards.
    """
    image = decode(data, told)
    with Image.open(io.BytesIO(_without_text(data)), formats=FORMATS) as header:
        try:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # of many types, as in decoding; the pixels are decoded already
            told("EXIF cannot be read")
            orientation = 1
    # The EXIF standard names the sides that the stored first row and column are; 5 to 8 exchange rows and columns.
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    if flipped := [dim for dim, cases in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in cases]:
        for channel in image:  # one by one: a third of the memory
            channel.copy_(channel.flip(flipped))
    return image


def _without_text(data: bytes) -> bytes:
    """Returns a PNG without its compressed text, of which Pillow refuses more than 1 MB; all other data as it is."""
    if not data.startswith(_PNG) or not any(kind in data for kind in _PNG_TEXT):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):  # a chunk: length, kind, content, checksum
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind not in _PNG_TEXT:
            kept.append(data[at:end])
        if kind == b"IEND":  # what follows is no part of the picture
            break
        at = end
    return b"".join(kept)


def _pixels(image: Image.Image) -> torch.Tensor:
    """Converts a Pillow image to uint8 [3, height, width]."""
    try:
        pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
        rows = max(1, _BAND // 4 // image.width)
        for top in range(0, image.height, rows):  # a second image of the whole size would double the memory
            part = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
            if part.mode.startswith("I"):  # 16-bit gray, which `convert` would clip to white
                part = Image.fromarray((np.asarray(part) >> 8).astype(np.uint8))
            elif part.mode == "P":
                part = part.convert("RGBA")  # a palette may have transparency; its colors stay as they are
            pixels[top : top + rows] = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files: struct.error, IndexError, TypeError ...
        raise BadSample("decode", _reason(error)) from None


def _reason(error: Exception) -> str:
    return "not a JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)


def train_image(image: torch.Tensor, size: int, config: DataConfig, *key: object) -> torch.Tensor:
    """Returns a random crop of an image, resized, perhaps flipped and augmented, uint8 [3, size, size].

    key: (seed, data set, epoch, index) of the sample; the same key gives the same pixels.
    """
    # A fixed number of draws in a fixed order, so that a change of one setting leaves the other draws as they were.
    draws = uniform(words(crops.NUM_DRAWS + 1, "v1", "aug", *key))
    if config.crop == "simple":
        result = _simple_crop(image, size, config, draws)
    elif config.crop == "squashed":
        result = _squashed_crop(image, size, config, draws)
    else:
        top, left, height, width = crops.random_box(image.shape[1], image.shape[2], config, draws, *key)
        image = image[:, top : top + height, left : left + width]
        if config.antialias:
            result = _resize(image, (size, size), config)
        else:
            result = _resize_truncated(image, size, config.interpolation)
    if draws[-1] < config.flip:
        result = result.flip(2)
    return augmented(result, config, *key)


def _simple_crop(image: torch.Tensor, size: int, config: DataConfig, draws: np.ndarray) -> torch.Tensor:
    """DeiT III's simple crop: resizes the shorter side to `size`, mirrors the borders, takes a square anywhere."""
    sides = _shorter_side_to(size, image)
    shares = draws[crops.NUM_DRAWS - 2 : crops.NUM_DRAWS].tolist()  # used for top and left by every crop
    rows, columns = (crops.mirrored_places(side, size, share) for side, share in zip(sides, shares))
    return _resize(image, sides, config)[:, rows][:, :, columns]


def _squashed_crop(image: torch.Tensor, size: int, config: DataConfig, draws: np.ndarray) -> torch.Tensor:
    """BiT's crop: resizes the whole image to a square, whatever its shape, and takes a smaller square anywhere in it.

    Source: big_vision configs/transfer.py (resize_crop); big_transfer bit_pytorch/train.py.
    """
    side = round(size / config.crop_share)
    top, left = (int(share * (side - size + 1)) for share in draws[crops.NUM_DRAWS - 2 : crops.NUM_DRAWS].tolist())
    if config.antialias:
        return _resize(image, (side, side), config, (top, left, size, size))
    return _resize_truncated(image, side, config.interpolation)[:, top : top + size, left : left + size]


def _resize(image: torch.Tensor, size: tuple[int, int], config: DataConfig, kept: Box | None = None) -> torch.Tensor:
    """Returns the box `kept` of torchvision's antialiased resize to (height, width), uint8."""

    def resize(part: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
        if config.interpolation == "bicubic":  # what F.resize does, without its 40 microseconds
            return torch.nn.functional.interpolate(part[None], to, mode="bicubic", antialias=True)[0]
        return F.resize(part, list(to), _mode(config), antialias=True)

    return _in_bands(image, size, resize, kept)


def _in_bands(
    image: torch.Tensor,
    size: tuple[int, int],
    resize: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    kept: Box | None = None,
) -> torch.Tensor:
    """Returns the box `kept` (default: all) of an image resized to (height, width).

    resize: resizes to a (height, width), one direction after the other, as all resizes here do inside. A large image is
    resized horizontally in bands of rows, then vertically (a tall one vice versa); what is not kept is dropped between.
    """
    height, width = image.shape[1:]
    top, left, rows, columns = kept or (0, 0, *size)
    if height * width <= _PIECE:
        return resize(image, size)[:, top : top + rows, left : left + columns]
    if height > 2 * width:
        bands = image.split(max(1, _BAND // height), dim=2)
        bands = [resize(band, (size[0], band.shape[2]))[:, top : top + rows].clone() for band in bands]
        return resize(torch.cat(bands, dim=2), (rows, size[1]))[:, :, left : left + columns]
    bands = image.split(max(1, _BAND // width), dim=1)
    # A copy: a view would keep the dropped part in memory.
    bands = [resize(band, (band.shape[1], size[1]))[:, :, left : left + columns].clone() for band in bands]
    return resize(torch.cat(bands, dim=1), (size[0], columns))[:, top : top + rows]


def eval_image(image: torch.Tensor, size: int, config: DataConfig) -> torch.Tensor:
    """Returns an image as evaluation sees it, uint8 [3, size, size], by data.eval_transform (docs/data.md)."""
    if config.eval_transform == "vit":
        return _resize_truncated(image, size, "bilinear")
    if config.eval_transform.startswith("timm"):
        return _timm_eval_image(image, size, config)
    resized = round(size / config.eval_crop)  # 256 for 224 and 0.875
    if config.eval_transform.startswith("transformers"):
        # On tensors, as its processor since version 5: 2 % of pixels differ from Pillow's, by up to 4 levels (bicubic).
        shortest = config.eval_transform == "transformers_shortest"
        sides = _shorter_side_to(resized, image) if shortest else (resized, resized)
        return _resize(image, sides, config, _central_box(sides, size))
    if config.eval_transform == "fewshot":
        top, left, _, _ = _central_box((resized, resized), size)
        return _resize_truncated(image, resized, "bilinear")[:, top : top + size, left : left + size]
    return _resize_small_and_crop(image, resized, size)


def _timm_eval_image(image: torch.Tensor, size: int, config: DataConfig) -> torch.Tensor:
    """Resizes to size / eval_crop, rounded down, then takes the central crop.

    That is the size of the shorter side (timm), of both (timm_squash), or of the longer side, with a border of the
    mean colour around it (timm_border).
    """
    resized = math.floor(size / config.eval_crop)
    sides = _shorter_side_to(resized, image)
    if config.eval_transform == "timm_squash":
        sides = (resized, resized)
    elif config.eval_transform == "timm_border":
        ratio = max(image.shape[1:]) / resized
        sides = max(1, round(image.shape[1] / ratio)), max(1, round(image.shape[2] / ratio))

    # Pillow as in timm: torchvision's own resize is faster, but up to 2 levels off in 0.5 % of the values (bicubic).
    def resize(part: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
        return _tensor(F.resize(_picture(part), list(to), _mode(config), antialias=True))

    top, left = (round(max(0, side - size) / 2) for side in sides)  # half to even, as in torchvision
    kept = top, left, min(sides[0], size), min(sides[1], size)
    image = _in_bands(image, sides, resize, kept)
    if config.eval_transform == "timm_border":
        return _tensor(_padded(_picture(image), size, [round(255 * value) for value in config.mean]))
    return image


def _shorter_side_to(shorter: int, image: torch.Tensor) -> tuple[int, int]:
    """Returns an image's height and width once its shorter side is resized to `shorter`, rounded as in torchvision."""
    height, width = image.shape[1:]
    return int(shorter * height / min(height, width)), int(shorter * width / min(height, width))


def _picture(image: torch.Tensor) -> Any:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _padded(picture: Any, size: int, color: list[int]) -> Any:
    """Pads the picture to `size` where it is smaller; an odd pixel goes to the right or the bottom."""
    missing = [max(0, size - side) for side in picture.size]  # across, down
    border = [pixels // 2 for pixels in missing] + [(pixels + 1) // 2 for pixels in missing]
    return F.pad(picture, border, fill=cast(Any, color)) if any(missing) else picture


def _resize_small_and_crop(image: torch.Tensor, shorter: int, size: int) -> torch.Tensor:
    """big_vision's resize_small to `shorter`, which averages areas, then the central crop."""
    factor = shorter / min(image.shape[1:])
    rows, columns = (_areas(side, round(side * factor), size) for side in image.shape[1:])
    image = image[:, :, columns[0][0] : columns[-1][0] + len(columns[-1][1])]
    columns = [(first - columns[0][0], shares) for first, shares in columns]
    parts = []
    for at in range(0, size, _AREA_ROWS):
        across = _averages(image, rows[at : at + _AREA_ROWS])
        parts.append(_averages(across.transpose(1, 2), columns).transpose(1, 2))
    # Slightly up, so that an average that is a whole number is not truncated to the one below.
    return (torch.cat(parts, dim=1) + 1e-6).to(torch.uint8)


def _averages(image: torch.Tensor, areas: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Returns the rows of an image [3, height, width] averaged over each of these areas, float64 [3, areas, width]."""
    averages = image.new_empty((3, len(areas), image.shape[2]), dtype=torch.float64)
    for new, (first, shares) in enumerate(areas):
        averages[:, new] = shares @ image[:, first : first + len(shares)].double()
    return averages


def _areas(side: int, resized: int, kept: int) -> list[tuple[int, torch.Tensor]]:
    """Returns, for each of the central `kept` of `resized` new pixels, its first old pixel and the old pixels' shares.

    Shares: float64, of sum 1.
    """
    scale, areas = side / resized, []
    for new in range((resized - kept) // 2, (resized - kept) // 2 + kept):
        start = new * scale
        old = torch.arange(int(start), min(side, math.ceil(start + scale)), dtype=torch.float64)
        overlap = (old + 1).clamp(max=start + scale) - old.clamp(min=start)
        areas.append((int(start), overlap / scale))
    return areas


def _resize_truncated(image: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """TensorFlow's resize to a square: half-pixel centres, no antialias, back to uint8 by truncation."""

    def resize(part: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.interpolate(part[None].float(), to, mode=interpolation, antialias=False)[0]

    return _in_bands(image, (size, size), resize).clamp(0, 255).to(torch.uint8)  # bicubic overshoots


def _central_box(sides: tuple[int, int], size: int) -> Box:
    top, left = ((side - size) // 2 for side in sides)  # unlike torchvision's, which rounds a half pixel
    return top, left, size, size


def to_float(images: torch.Tensor, dtype: torch.dtype, normalisation: Normalisation = MINUS_ONE_TO_ONE) -> torch.Tensor:
    """Returns uint8 images [..., 3, H, W] as the model's input: (x / 255 - mean) / std, as its weights expect it.

    By default in [-1, 1] as in Google's code: (x - 127.5) / 127.5.
    """
    pixels = images.to(torch.float32)
    if normalisation == MINUS_ONE_TO_ONE:
        return (pixels / 127.5 - 1.0).to(dtype)
    mean, std = (_per_channel(values, images.device) for values in normalisation)
    return (pixels / 255).sub_(mean).div_(std).to(dtype)  # torchvision's order, to the last bit


def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [3, 1, 1], filled on the device: torch.tensor would copy from the host, with a host sync."""
    result = torch.empty(3, 1, 1, device=device)
    for channel, value in zip(result, values):
        channel.fill_(value)
    return result


def _mode(config: DataConfig) -> F.InterpolationMode:
    return F.InterpolationMode(config.interpolation)
