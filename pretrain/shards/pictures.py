"""Converts a picture file to what shards hold: JPEG, PNG and WebP as they are, other formats as PNG, without loss.

Readers of shards decode these three formats only, whatever a file's name.
"""

import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from pretrain.data import headers
from pretrain.data.images import FORMATS
from pretrain.data.manifest import IMAGE_ENDINGS
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample

# Endings of formats that Pillow reads with its own C code, or with a library made for untrusted files.
_CONVERTED = {"bmp": "BMP", "dib": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "avif": "AVIF", "apng": "PNG"}
PICTURE_ENDINGS = tuple(_CONVERTED)  # some builds of Pillow lack AVIF
JPEG_ENDINGS = ("jfif", "jpe", "jif", "jfi")  # beside those of IMAGE_ENDINGS
# Pictures that cannot be read here: reported, never left out silently.
REFUSED_ENDINGS = (
    *("heic", "heif", "jxl", "jp2", "j2k", "jpf", "jpx", "psd", "svg", "eps", "ico", "tga", "exr", "hdr", "xcf"),
    *("ppm", "pgm", "pbm", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "srw"),
)


def stored_ending(name: str) -> str | None:
    """Returns the ending that a picture file has in a shard, None for files that are no pictures."""
    ending = ending_of(name)
    if ending in IMAGE_ENDINGS:
        return ending
    if ending in JPEG_ENDINGS:
        return "jpg"
    return "png" if _CONVERTED.get(ending) in formats() else None


def ending_of(name: str) -> str:
    """Returns a name's ending in small letters, "" when it has none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def formats() -> tuple[str, ...]:
    """Returns the formats that can be converted, as Pillow calls them."""
    found = (*dict.fromkeys(_CONVERTED.values()),)
    return found if features.check("avif") else tuple(name for name in found if name != "AVIF")


def read_picture(path: Path, notes: Counter[str], apply_orientation: bool = False) -> bytes:
    """Returns the bytes of a picture file as a shard holds them; `notes` counts what is changed or will look different.

    apply_orientation: photos with an EXIF orientation are turned, and stored as PNG. Raises OSError when the file
    cannot be read, BadSample when it cannot be converted.
    """
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise BadSample("tar", f"{path.stat().st_size} bytes, at most {MAX_IMAGE_BYTES}")
    return picture_of(path.read_bytes(), path.name, notes, apply_orientation)


def picture_of(data: bytes, name: str, notes: Counter[str], apply_orientation: bool = False) -> bytes:
    """Returns what `read_picture` does, for the bytes of a file of this name. Raises BadSample as it does."""
    headers.check_parts(data)
    coefficients = 0  # bytes per pixel that its decoder keeps beside the pixels
    if data.startswith(b"\xff\xd8"):
        coefficients = headers.jpeg_header(data).coefficients
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=(*FORMATS, *formats())) as image:
                headers.check_size(image.width, image.height)
                if image.format not in (*FORMATS, "MPO") or (apply_orientation and _turned(image)):
                    # It becomes a PNG: it is decoded here, and the PNG has to be read again.
                    most = headers.PILLOW.get(image.format or "", headers.PILLOW["PNG"])
                    headers.check_memory(image.width, image.height, most + coefficients, b"")
                return _stored(image, data, notes, apply_orientation)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many types on damaged files: struct.error, IndexError, TypeError ...
        if ending_of(name) in IMAGE_ENDINGS:
            return data  # the decoder of every reader reports what is wrong with it
        raise BadSample("decode", f"{type(error).__name__}: {error}") from None


def _stored(image: Image.Image, data: bytes, notes: Counter[str], apply_orientation: bool) -> bytes:
    # MPO is a JPEG with further pictures behind it, as phones write it: its decoder takes the first.
    kept = image.format in (*FORMATS, "MPO")
    turned = _turned(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        notes["with transparency, which is dropped: the colours beneath it show"] += 1
    if turned and not apply_orientation and image.format != "TIFF":
        notes["that their EXIF says to turn, kept as they lie (--apply-orientation turns them)"] += 1
    if kept and not (turned and apply_orientation):
        return data
    if not kept:
        if getattr(image, "is_animated", False):  # Pillow's n_frames takes quadratic time
            notes[f"{image.format} with several pictures, of which the first is taken"] += 1
        notes[f"{image.format} converted to PNG"] += 1
    picture: Image.Image = image
    if turned and image.format == "TIFF":  # Pillow turns it when it is loaded
        notes["TIFF turned as their tag says"] += 1
    elif turned and apply_orientation:
        notes["turned as their EXIF says, stored as PNG"] += 1
        picture = ImageOps.exif_transpose(image)
    return _png(_of_8_bits(picture))


def png_of(pixels: np.ndarray, **options: Any) -> bytes:
    """Returns uint8 pixels [height, width] or [height, width, 3] as a PNG file. options: Pillow's."""
    return _png(Image.fromarray(pixels), **options)


def _png(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png", **options)
    return file.getvalue()


def _turned(image: Image.Image) -> bool:
    """Whether a picture's EXIF says to turn or mirror it."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """The picture in a mode that PNG holds without loss, or RGB. Raises BadSample where that would clip its values."""
    if picture.mode == "I;16":
        if picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(262) == 0:
            raise BadSample("decode", "16-bit TIFF with white as 0; convert it")
        return picture
    if picture.mode.startswith(("I", "F")):
        raise BadSample("decode", f"pixels of mode {picture.mode}, whose range is not known; convert it to 8 bits")
    return picture if picture.mode in ("1", "L", "P", "RGB", "RGBA", "LA") else picture.convert("RGB")
