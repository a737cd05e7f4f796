"""Pictures: decoded, cropped for training, and as evaluation sees them."""

import io
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz.harness import Seed, Target
from fuzz.mutate import changed_picture, png_chunks, png_of
from pretrain.config import DataConfig, choices_of
from pretrain.data.images import decode, decode_upright, eval_image, train_image


def encoded(mode: str, kind: str, size: tuple[int, int] = (23, 17), **options: Any) -> bytes:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def images(folder: Path) -> Target:
    """An encoded image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, png = encoded("RGB", "jpeg"), encoded("RGB", "png")
    good = [
        jpeg,
        png,
        encoded("RGB", "webp"),
        encoded("RGBA", "webp", lossless=True),
        encoded("RGB", "jpeg", progressive=True),
    ]
    good += [encoded(mode, "png") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")] + [
        encoded("P", "png", transparency=3)
    ]
    good += [encoded(mode, "jpeg") for mode in ("L", "CMYK")] + [
        encoded("RGB", "jpeg", exif=exif.tobytes(), subsampling=0)
    ]
    webp, frames = io.BytesIO(), [Image.new("RGB", (9, 9), (i, i, i)) for i in range(3)]
    frames[0].save(webp, "webp", save_all=True, append_images=frames[1:])
    good.append(webp.getvalue())
    transforms = choices_of(DataConfig, "eval_transform")

    def call(data: bytes, own: Path) -> None:
        choice = zlib.crc32(data)
        config = DataConfig(train=Path("a"), eval_transform=transforms[choice % len(transforms)])  # pyright: ignore
        image = decode(data)
        train_image(image, 32, config, 0, "a", 0, choice)
        eval_image(image, 32, config)
        del image
        if len(data) < 10_000:
            decode_upright(data)

    return Target(good, odd_pictures(jpeg, png), large_pictures(), changed_picture, call)


def odd_pictures(jpeg: bytes, png: bytes) -> list[bytes]:
    seeds = [
        b"",
        jpeg[:2],
        jpeg[: len(jpeg) // 2],
        jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        png[:-20],
        png[: len(png) // 2],
    ]
    middle = len(jpeg) // 2
    seeds += [jpeg[:middle] + bytes(200) + jpeg[middle + 200 :], b"\xff\xd8" * 5000, b"\xff\xd8\xff\xd9", jpeg + jpeg]
    seeds += [bytes.fromhex("ffd8 ffc00002 ffda0002") + bytes(more) for more in range(4)]  # a frame and a scan, empty
    at = jpeg.index(b"\xff\xc0")
    for sides in ((0, 0), (1, 65_535), (65_535, 65_535), (7000, 7000), (65_535, 655), (1, 1)):
        seeds.append(jpeg[: at + 5] + struct.pack(">HH", *sides) + jpeg[at + 9 :])
    chunks = png_chunks(png)
    for sides in (
        (0, 0),
        (1, 1 << 31),
        (1 << 31, 1 << 31),
        (13_300, 13_300),
        (7000, 7000),
        (1, 200),
        (7000, 71),
        (1, 1),
    ):
        for depth, colour in ((8, 2), (16, 6), (16, 0), (1, 3), (3, 9)):
            content = struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, 0)
            seeds.append(png_of([(b"IHDR", content), *chunks[1:]]))
    text = b"a\0\0" + zlib.compress(bytes(5_000_000))
    profile = b"a\0\0" + zlib.compress(bytes(5_000_000))
    seeds += [
        png_of([chunks[0], (kind, content), *chunks[1:]]) for kind, content in ((b"zTXt", text), (b"iCCP", profile))
    ]
    seeds += [png_of([chunks[0], *[(b"zTXt", b"a\0\0" + zlib.compress(b"a"))] * 9000, *chunks[1:]])]
    seeds += [
        png_of([chunks[0], *[(b"tEXt", b"a\0b")] * 9000, *chunks[1:]]),
        png_of([*chunks[:-1], *[(b"IDAT", b"")] * 9000, chunks[-1]]),
    ]
    seeds += [
        b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff",
        b"RIFF\x10\0\0\0WEBPVP8L\x05\0\0\0\x2f\xff\xff\xff\xff",
    ]
    seeds += [
        b"GIF89a" + bytes(50),
        b"BM" + bytes(50),
        b"%!PS-Adobe-3.0\n",
        b"II*\0" + bytes(50),
        b"<svg/>",
        b"P6 1 1 255 abc",
    ]
    return seeds


def large_pictures() -> list[Seed]:
    """Of 49 megapixels, which is within the limit, from few bytes; and a progressive one of 500 more scans."""
    return [
        partial(_large_png, 8, 2, 3), partial(_large_png, 16, 0, 2), partial(_large_png, 16, 2, 6), partial(_large_png,
        8, 6, 4),
        partial(_large_png, 1, 0, 0), _large_webp, _large_jpeg, _many_scans, partial(_large_png, 16, 6, 8),
    ]  # fmt: skip


def _large_png(depth: int, colour: int, pixel_bytes: int, side: int = 7000) -> bytes:
    row = bytes(1 + (side * pixel_bytes if pixel_bytes else (side + 7) // 8))
    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png_of(
        [(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)), (b"IDAT", content), (b"IEND", b"")]
    )


def _large_webp() -> bytes:
    """7000 x 7000 black pixels; made here it would take the memory that is measured."""
    return bytes.fromhex("524946461a000000574542505650384c0e0000002f57dbd506071011fd0f4444ff03")


def _large_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(file, "jpeg")
    return file.getvalue()


def _many_scans() -> bytes:
    file = io.BytesIO()
    Image.new("L", (7000, 7000)).save(file, "jpeg", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    last = data[start:-2]
    return data[:start] + last * 500 + b"\xff\xd9"
