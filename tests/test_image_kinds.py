"""Every kind of image of the table in docs/data.md: the same in shard making, training and evaluation, or told."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, features

from pretrain.config import config_from_dict
from pretrain.data.images import decode
from pretrain.data.loader import Batch, eval_batches, train_batches
from pretrain.data.manifest import load_manifest
from pretrain.data.order import Order, plan_batch
from pretrain.data.reader import read_sample
from pretrain.shards.build import DataSet, finish, read_dropped, write_samples
from pretrain.shards.make import Options, make_shards

ROOT = Path(__file__).resolve().parents[1]
SIDE = 16  # of all pictures, and of the model: no resize comes between


def pixels(seed: int = 0) -> np.ndarray:
    """A smooth picture that is another one when it is turned, mirrored, or misses a part."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


RGB = Image.fromarray(pixels())
ALPHA = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE))
DEEP = np.linspace(0, 65535, SIDE * SIDE * 3).astype(np.uint16).reshape(SIDE, SIDE, 3)
OTHERS = [Image.fromarray(pixels(seed)) for seed in (1, 2)]


class File(NamedTuple):
    """A file of a kind."""

    ending: str
    data: bytes
    expected: np.ndarray | None  # uint8 [3, height, width]; None: it is no image for anybody
    is_converted: bool = False  # when shards are made; in a tar of somebody else it is no image
    tolerance: int = 0  # in levels


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def planes(image: Image.Image | np.ndarray) -> np.ndarray:
    """An image as uint8 [3, height, width]."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def seen(data: bytes) -> np.ndarray:
    """What Pillow decodes."""
    with Image.open(io.BytesIO(data)) as image:
        return planes(image)


def jpeg(image: Image.Image = RGB, tolerance: int = 0, **options: Any) -> File:
    """A JPEG, which is what Pillow's libjpeg makes of it."""
    data = encoded(image, "jpeg", quality=95, **options)
    return File("jpg", data, seen(data), tolerance=tolerance)


def lossless(image: Image.Image, **options: Any) -> File:
    """A PNG, which is the picture itself."""
    return File("png", encoded(image, "png", **options), planes(image))


def png_of_16_bits(values: np.ndarray) -> File:
    """A PNG of three channels, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return File("png", data, (values >> 8).astype(np.uint8).transpose(2, 0, 1), tolerance=1)


def ycck() -> File:
    """Pillow's CMYK, whose Adobe marker says that the first three channels are a luminance and two colours."""
    plain = encoded(RGB.convert("CMYK"), "jpeg", quality=95)
    at = plain.index(b"Adobe") + 11
    assert plain[at] == 0
    data = plain[:at] + b"\2" + plain[at + 1 :]
    assert np.abs(seen(data).astype(int) - seen(plain)).max() > 50
    return File("jpg", data, seen(data), tolerance=2)


def of_12_bits() -> File:
    """An extended sequential JPEG whose frame says so."""
    data = bytearray(encoded(RGB, "jpeg"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = 0xC1, 12
    return File("jpg", bytes(data), None)


def cut() -> Iterator[File]:
    for form, ending in (("jpeg", "jpg"), ("png", "png"), ("webp", "webp")):
        data = encoded(RGB, form)
        yield from (File(ending, data[: int(len(data) * part)], None) for part in (0.05, 0.5, 0.9))


def converted(ending: str, form: str, **options: Any) -> File:
    """A picture of another format."""
    data = encoded(RGB, form, **options)
    return File(ending, data, seen(data), is_converted=True)


def animated() -> Iterator[File]:
    every = {"save_all": True, "append_images": OTHERS}
    yield converted("gif", "gif", **every)
    yield File("png", encoded(RGB, "png", **every), planes(RGB))
    yield File("webp", encoded(RGB, "webp", lossless=True, **every), planes(RGB))


def turned() -> Iterator[File]:
    exif = Image.Exif()
    exif[0x0112] = 6
    yield jpeg(exif=exif)
    yield lossless(RGB, exif=exif)
    yield File("webp", encoded(RGB, "webp", lossless=True, exif=exif), planes(RGB))


def palette() -> Image.Image:
    """Sixteen colours."""
    return RGB.quantize(16)


WEBP = File("webp", encoded(RGB, "webp", lossless=True), planes(RGB))
RGBA, LA = RGB.copy(), RGB.convert("L").convert("LA")
RGBA.putalpha(ALPHA)
LA.putalpha(ALPHA)
TRANSPARENT_WEBP = encoded(RGBA, "webp", lossless=True, exact=True)

# A row of the table in docs/data.md each.
KINDS: dict[str, list[File]] = {
    "grey": [jpeg(RGB.convert("L")), lossless(RGB.convert("L")), lossless(RGB.convert("1"))],
    "CMYK JPEG": [jpeg(RGB.convert("CMYK"), tolerance=2)],
    "YCCK JPEG": [ycck()],
    "RGBA": [lossless(RGBA)._replace(expected=planes(RGB)), File("webp", TRANSPARENT_WEBP, planes(RGB))],
    "LA": [lossless(LA)._replace(expected=planes(RGB.convert("L")))],
    "16-bit PNG": [
        File("png", encoded(Image.fromarray(DEEP[:, :, 0]), "png"), planes((DEEP[:, :, 0] >> 8).astype(np.uint8))),
        png_of_16_bits(DEEP),
    ],
    "palette, with transparency": [
        lossless(palette()),
        lossless(palette(), transparency=bytes(range(0, 256, 16)))._replace(expected=planes(palette())),
    ],
    "animated": [*animated()],
    "MPO": [jpeg()._replace(data=encoded(RGB, "MPO", quality=95, save_all=True, append_images=OTHERS))],
    "turned by EXIF": [*turned()],
    "progressive JPEG": [jpeg(progressive=True), jpeg(RGB.convert("L"), progressive=True)],
    "12-bit JPEG": [of_12_bits()],
    "truncated": [*cut()],
    "bytes after the end": [
        file._replace(data=file.data + b"\xff\xd8 junk" * 99) for file in (jpeg(), lossless(RGB), WEBP)
    ],
    "BMP": [converted("bmp", "bmp")],
    "GIF": [converted("gif", "gif")],
    "TIFF": [converted("tiff", "tiff"), converted("tif", "tiff", compression="tiff_lzw")],
    "AVIF": [converted("avif", "avif")] if features.check("avif") else [],
}
FILES = [(kind, file) for kind, files in KINDS.items() for file in files]


class Seen(NamedTuple):
    """What became of all files."""

    made: dict[int, torch.Tensor]  # by file: the image of the shard that was made
    kept: dict[int, bytes]  # its bytes
    left_out: str
    train: Batch  # of a tar of somebody else, in the order of the files
    evaluation: Batch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Shards made of all files, each a class; and batches of training and evaluation from a tar that holds them."""
    folder = tmp_path_factory.mktemp("kinds")
    for number, (_, file) in enumerate(FILES):
        (folder / "photos" / f"{number:03d}").mkdir(parents=True)
        (folder / "photos" / f"{number:03d}" / f"file.{file.ending}").write_bytes(file.data)
    manifest = load_manifest(make_shards([folder / "photos"], None, folder / "made", Options())[0])
    raw = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    numbers = [int(manifest.class_names[int(sample.label)]) for sample in raw]
    foreign = folder / "foreign"
    foreign.mkdir()
    samples = [(file.data, number) for number, (_, file) in enumerate(FILES)]
    shard = write_samples(samples, "jpg", foreign / "foreign-000000.tar", 0)
    names = [str(number) for number in range(len(FILES))]
    theirs = load_manifest(finish(foreign, DataSet([shard], len(names), names, None, []), {"scope": "none"}))
    whole = {"crop_area": [1, 1], "crop_ratio": [1, 1], "flip": 0, "eval_transform": "timm", "eval_crop": 1}
    config = config_from_dict(
        {
            "name": "kinds",
            "total_steps": 1,
            "model": {"name": "Ti", "image_size": SIDE},
            "data": {"train": str(foreign), "global_batch": len(FILES), "workers": 0} | whole,
            "optim": {"lr": 1e-3},
        },
        "kinds",
    )
    order, plan = Order(len(FILES), 0, len(FILES), 0), plan_batch(len(FILES), 1, len(FILES))
    (train,) = train_batches(theirs, order, plan, config, 0)
    place = torch.argsort(train.index)
    train = train._replace(images=train.images[place], valid=train.valid[place])
    options: dict[str, Any] = {"batch_size": len(FILES), "image_size": SIDE, "config": config.data}
    (evaluation,) = eval_batches(theirs, np.arange(len(FILES)), **options)
    images = {number: decode(sample.image) for number, sample in zip(numbers, raw)}
    data = {number: sample.image for number, sample in zip(numbers, raw)}
    return Seen(images, data, " ".join(read_dropped(folder / "made")), train, evaluation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_the_same_everywhere(kind: str, outcome: Seen) -> None:
    """Its pixels in the made shard, in training and in evaluation; or it is left out by name, and a bad sample in both.

    What shards hold byte for byte is not changed when they are made.
    """
    if not KINDS[kind]:
        pytest.skip("this Pillow was built without it")
    for number, file in ((number, file) for number, (own, file) in enumerate(FILES) if own == kind):
        named = f"photos/{number:03d}/file.{file.ending}: decode"
        batches = outcome.train, outcome.evaluation
        if file.expected is None:
            assert number not in outcome.made and named in outcome.left_out
        else:
            assert named not in outcome.left_out
            assert near(outcome.made[number], file) and file.is_converted == (outcome.kept[number] != file.data)
        if file.expected is None or file.is_converted:
            assert not any(batch.valid[number] or batch.images[number].any() for batch in batches)
            for batch in batches:
                (row,) = (row for row in batch.bad if row.index == number)
                assert row.reason == "decode" and "\n" not in row.detail and len(row.detail) < 300
        else:
            assert all(batch.valid[number] and near(batch.images[number], file) for batch in batches)
            assert torch.equal(*(batch.images[number] for batch in batches))
            assert torch.equal(outcome.made[number], outcome.train.images[number])


def near(image: torch.Tensor, file: File) -> bool:
    """Whether an image is a file's, to its tolerance."""
    assert file.expected is not None
    return bool(np.abs(image.numpy().astype(int) - file.expected).max() <= file.tolerance)


def test_the_table_has_a_row_for_each_kind() -> None:
    """docs/data.md lists what is tested here, and nothing else."""
    table = (ROOT / "docs" / "data.md").read_text().partition("## Kinds of images\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)[1:] == list(KINDS)
