"""Decoding and cropping: odd files end as pixels or as bad samples, and a crop depends on its key alone."""

import dataclasses
import io
import math
import struct
import subprocess
import sys
import tarfile
import warnings
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from timm.data.transforms_factory import create_transform
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import InterpolationMode

from pretrain.config import DataConfig
from pretrain.data import images
from pretrain.data.crops import inception_crop, random_resized_crop
from pretrain.data.images import (
    decode,
    decode_upright,
    eval_image,
    to_float,
    train_image,
)
from pretrain.data.permutation import uniform, words
from pretrain.data.reader import BadSample

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def config(**changes: Any) -> DataConfig:
    """Data settings; none of the paths is read here."""
    return DataConfig(train=Path("unused"), global_batch=1, **changes)


def picture(height: int = 30, width: int = 40, seed: int = 0) -> Image.Image:
    """A smooth colour picture, so that compression changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(image: Image.Image) -> np.ndarray:
    """What Pillow sees, as [3, height, width]."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def refusal(data: bytes) -> BadSample:
    """The reason why these bytes are no image."""
    with pytest.raises(BadSample) as bad:
        decode(data)
    assert bad.value.reason == "decode" and "\n" not in str(bad.value) and len(str(bad.value)) < 300
    return bad.value


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA"])
def test_lossless_images_of_every_mode_are_decoded_exactly(mode: str) -> None:
    """Gray, palette and transparent PNG become the three channels that Pillow sees; WebP without loss too."""
    image = picture().convert(mode)
    result = decode(encoded(image, "png"))
    assert result.dtype == torch.uint8 and result.shape == (3, 30, 40)
    assert (result.numpy() == rgb(image)).all()
    assert (decode(encoded(picture(), "webp", lossless=True)).numpy() == rgb(picture())).all()


def test_the_name_does_not_matter() -> None:
    """A PNG or WebP that is called .jpg is decoded by its content: `decode` sees no name."""
    for form in ("png", "jpeg", "webp"):
        assert decode(encoded(picture(), form)).shape == (3, 30, 40)


def _png(width: int, height: int, depth: int, pixels: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<html><body>404</body></html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(5000)]
)
def test_what_is_no_image_is_bad(data: bytes) -> None:
    """Empty files, error pages and bare signatures end as bad samples, not as crashes."""
    refusal(data)


@pytest.mark.parametrize("form", ["gif", "bmp", "tiff", "ppm", "eps"])
def test_only_jpeg_png_and_webp_are_decoded(form: str) -> None:
    """Other formats are refused: Pillow would start Ghostscript for one of them."""
    assert str(refusal(encoded(picture(), form))) == "decode: not a JPEG, PNG or WebP"


def test_a_bomb_is_refused_by_its_header() -> None:
    """A few bytes that say 60,000 x 60,000 or 8,000 x 8,000 pixels are refused before memory is taken for them."""
    for side in (8_000, 12_000, 60_000):
        refusal(_png(side, side, depth=8, pixels=zlib.compress(b"\0")))
    assert "8000 x 8000 pixels" in str(refusal(_png(8_000, 8_000, depth=8, pixels=zlib.compress(b"\0"))))


def test_flipped_bits_end_as_pixels_or_as_a_bad_sample() -> None:
    """1,500 damaged files of each kind, in a process of their own: no crash, no other error, the right shape.

    torchvision's PNG decoder ends the whole process on some of them, which is why it is not used.
    """
    program = (
        "import io, random, warnings; warnings.simplefilter('ignore')\n"
        "from test_images import encoded, picture\n"
        "from pretrain.data.images import decode\n"
        "from pretrain.data.reader import BadSample\n"
        "random.seed(0); bad = 0\n"
        "for form in ('png', 'jpeg', 'webp'):\n"
        "    good = encoded(picture(), form)\n"
        "    for _ in range(1500):\n"
        "        data = bytearray(good); at = random.randrange(8 * len(data)); data[at // 8] ^= 1 << at % 8\n"
        "        try: assert decode(bytes(data)).ndim == 3\n"
        "        except BadSample as error: bad += 1; assert error.reason == 'decode'\n"
        "assert bad > 1000, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-2000:]}"


def torchvision_crop(height: int, width: int, area: tuple, ratio: tuple, draws: np.ndarray) -> tuple[int, ...]:
    """RandomResizedCrop.get_params, with its calls of the generator replaced by the given draws."""
    for attempt in range(10):
        target_area = height * width * (area[0] + (area[1] - area[0]) * draws[2 * attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect_ratio = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draws[20] * (height - h + 1)), math.floor(draws[21] * (width - w + 1)), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, int(round(width / min(ratio)))
    elif in_ratio > max(ratio):
        h, w = height, int(round(height * max(ratio)))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "height, width, central",
    [(375, 500, None), (500, 333, None), (64, 64, None), (20, 900, (0, 436, 20, 27)), (900, 7, (445, 0, 9, 7))],
)
def test_crops_equal_torchvisions_formula(height: int, width: int, central: tuple | None) -> None:
    """For 500 sets of draws the crop is torchvision's, in the branch that gives up after ten tries as well."""
    random = np.random.default_rng(0)
    crops = set()
    for _ in range(500):
        draws = random.random(23)
        crop = random_resized_crop(height, width, AREA, RATIO, draws)
        assert crop == torchvision_crop(height, width, AREA, RATIO, draws)
        top, left, crop_height, crop_width = crop
        assert 0 <= top <= top + crop_height <= height and 0 <= left <= left + crop_width <= width
        crops.add(crop)
    assert central is None or central in crops  # the branch was reached: no crop of these ratios is large enough


def test_the_largest_and_smallest_images_are_cropped() -> None:
    """One pixel, one row and one column have a crop inside; the extreme draws stay inside too."""
    for height, width in [(1, 1), (1, 500), (500, 1), (2, 3), (7000, 7000)]:
        for draw in (0.0, 0.5, 1 - 2.0**-53):
            top, left, crop_height, crop_width = random_resized_crop(height, width, AREA, RATIO, np.full(23, draw))
            assert 0 < crop_height <= height - top and 0 < crop_width <= width - left


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (256, 256)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Kolmogorov-Smirnov over 4,000 crops each: area, ratio, top and left come from the same distribution."""
    ours = np.array(
        [
            random_resized_crop(height, width, AREA, RATIO, uniform(words(23, "v1", "aug", 0, "ks", 0, index)))
            for index in range(4000)
        ]
    )
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(blank, list(AREA), list(RATIO)) for _ in range(4000)])
    for ours_values, their_values in zip(_features(ours), _features(theirs)):
        assert ks_pvalue(ours_values, their_values) > 1e-3


def ks_pvalue(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the Kolmogorov-Smirnov test that both come from one distribution."""
    result: Any = ks_2samp(ours, theirs)
    return result.pvalue


def _features(crops: np.ndarray) -> list[np.ndarray]:
    top, left, height, width = crops.T
    return [height * width, height / width, top, left]


def test_a_training_image_depends_on_its_key_alone() -> None:
    """The same key gives the same pixels whatever the global generators say; another epoch, index or seed others."""
    image = torch.from_numpy(rgb(picture(60, 80)).copy())
    first = train_image(image, 24, config(), 0, "trees", 1, 7)
    assert first.dtype == torch.uint8 and first.shape == (3, 24, 24)
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)
        torch.rand(5)
        assert torch.equal(train_image(image, 24, config(), 0, "trees", 1, 7), first)
    for key in [(1, "trees", 1, 7), (0, "shrubs", 1, 7), (0, "trees", 2, 7), (0, "trees", 1, 8)]:
        assert not torch.equal(train_image(image, 24, config(), *key), first)


def test_a_training_image_is_the_crop_of_its_draws() -> None:
    """Crop, resize with antialias and flip are torchvision's operators on the keyed draws, in a fixed order."""
    image = torch.from_numpy(rgb(picture(60, 80)).copy())
    for index in range(20):
        draws = uniform(words(23, "v1", "aug", 3, "trees", 0, index))
        top, left, height, width = torchvision_crop(60, 80, AREA, RATIO, draws)
        part = image[:, top : top + height, left : left + width]
        for interpolation in ("bilinear", "bicubic"):
            settings = config(interpolation=interpolation, crop_ratio=RATIO)
            expected = v2.functional.resize(part, [32, 32], InterpolationMode(interpolation), antialias=True)
            expected = expected.flip(-1) if draws[22] < 0.5 else expected
            assert torch.equal(train_image(image, 32, settings, 3, "trees", 0, index), expected)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (90, 40), (32, 32)])
def test_a_simple_crop_is_deits(height: int, width: int) -> None:
    """torchvision's resize of the shorter side, reflecting border of 4 and crop at the drawn place, then the flip.

    All places are reached, those at both ends of the border included.
    """
    image = torch.from_numpy(rgb(picture(height, width)).copy())
    smooth: Any = v2.functional.resize(image, [32], InterpolationMode.BICUBIC, antialias=True)
    padded = v2.functional.pad(smooth, [4], padding_mode="reflect")
    seen: set[tuple[int, int]] = set()
    for index in range(400):
        draws = uniform(words(23, "v1", "aug", 3, "trees", 0, index))
        top, left = (int(share * (side - 31)) for share, side in zip(draws[20:22], padded.shape[1:]))
        expected = padded[:, top : top + 32, left : left + 32]
        expected = expected.flip(-1) if draws[22] < 0.5 else expected
        assert torch.equal(train_image(image, 32, config(crop="simple"), 3, "trees", 0, index), expected)
        seen.add((top, left))
    assert [{place[axis] for place in seen} for axis in (0, 1)] == [set(range(side - 31)) for side in padded.shape[1:]]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (90, 40)])
def test_a_squashed_crop_is_bits(height: int, width: int, antialias: bool) -> None:
    """The whole image as a square of size / crop_share, of which the drawn place is kept; all places are reached."""
    image = torch.from_numpy(rgb(picture(height, width)).copy())
    settings = config(crop="squashed", crop_share=32 / 37, interpolation="bilinear", antialias=antialias)
    resized: Any = v2.functional.resize(image.float(), [37, 37], InterpolationMode.BILINEAR, antialias=antialias)
    square = resized.round() if antialias else resized.floor()
    seen: set[tuple[int, int]] = set()
    for index in range(200):
        draws = uniform(words(23, "v1", "aug", 3, "trees", 0, index))
        top, left = (int(share * 6) for share in draws[20:22])
        expected = square[:, top : top + 32, left : left + 32]
        expected = expected.flip(-1) if draws[22] < 0.5 else expected
        found = train_image(image, 32, settings, 3, "trees", 0, index)
        assert (found - expected).abs().max() <= antialias  # uint8 and float32 sums round differently
        seen.add((top, left))
    assert len(seen) == 36


def test_the_flip_is_separate_from_the_crop() -> None:
    """flip=0 never flips, flip=1 always, 0.5 in half of the cases; the crop is the same in all three."""
    image = torch.from_numpy(rgb(picture(60, 80)).copy())
    flipped = 0
    for index in range(400):
        never, always, half = (train_image(image, 8, config(flip=p), 0, "t", 0, index) for p in (0.0, 1.0, 0.5))
        assert torch.equal(never.flip(-1), always)
        assert torch.equal(half, never) or torch.equal(half, always)
        flipped += not torch.equal(half, never)
    assert 150 < flipped < 250  # 200 +- 5 standard deviations


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (256, 256)])
@pytest.mark.parametrize("sampler", ["inception", "random_resized"])
def test_inception_crops_are_distributed_as_tensorflows(
    sampler: str, height: int, width: int, test_fixtures: Path
) -> None:
    """Area, ratio, top and left of 4,000 boxes against TensorFlow's recorded ones; RandomResizedCrop fails the same."""
    recorded = np.load(test_fixtures / "preprocess_tf" / "inception_boxes_H_W_y_x_h_w.npy", allow_pickle=False)
    theirs = recorded[(recorded[:, :2] == (height, width)).all(1)][:, 2:].astype(int)
    assert len(theirs) == 2000
    boxes = []
    for index in range(4000):
        draws = uniform(words(202, "v1", "inception", 0, "ks", 0, index))
        crop = inception_crop if sampler == "inception" else random_resized_crop
        boxes.append(crop(height, width, (0.05, 1.0), (0.75, 1.33), draws))
    ours = np.array(boxes)
    pvalues = [ks_pvalue(a, b) for a, b in zip(_features(ours), _features(theirs))]
    expected = {375: 0.348, 500: 0.299, 256: 0.379}[height]
    mean = (ours[:, 2] * ours[:, 3] / (height * width)).mean()
    if sampler == "inception":
        assert min(pvalues) > 1e-3 and abs(mean - expected) < 0.015
    else:
        assert min(pvalues) < 1e-20 and mean > expected + 0.05


def test_inception_crops_by_hand() -> None:
    """Chosen draws against boxes worked out on paper: ratio and height are uniform, the last offset is never drawn."""
    draws = np.zeros(202)
    draws[:2] = 0.5, 0.999999  # ratio 1.0, the greatest height
    assert inception_crop(100, 200, (0.05, 1.0), (0.5, 1.5), draws) == (0, 0, 100, 100)
    draws[200:] = 0.999999
    assert inception_crop(100, 200, (0.05, 1.0), (0.5, 1.5), draws) == (0, 99, 100, 100)
    draws[1] = 0.0  # the least height: sqrt(0.05 * 20,000) = 31.6
    assert inception_crop(100, 200, (0.05, 1.0), (0.5, 1.5), draws) == (67, 167, 32, 32)
    draws[:4] = 0.0, 0.0, 1.0, 0.5  # ratio 0.5: 45 high, 22 wide (22.5 to even) is too small, 46 x 23 is not
    assert inception_crop(100, 200, (0.05, 1.0), (0.5, 1.5), draws) == (53, 176, 46, 23)
    assert inception_crop(10, 900, (0.9, 1.0), (0.75, 1.33), np.full(202, 0.5)) == (0, 0, 10, 900)  # nothing fits


def test_inception_crops_lie_inside() -> None:
    """One pixel, one row, one column and extreme draws give a box inside the image; the areas are as asked."""
    for height, width in [(1, 1), (1, 500), (500, 1), (2, 3), (33, 50), (7000, 7000)]:
        for draw in (0.0, 0.25, 0.5, 1 - 2.0**-53):
            top, left, crop_height, crop_width = inception_crop(height, width, (0.05, 1.0), RATIO, np.full(202, draw))
            assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width
            assert 0.05 * height * width <= crop_height * crop_width


def test_an_inception_crop_is_the_box_of_its_draws() -> None:
    """Pixels: the keyed box, TensorFlow's resize, and the flip that the other crop has; the key decides alone."""
    image = torch.from_numpy(rgb(picture(60, 80)).copy())
    settings = config(crop="inception", crop_area=(0.05, 1.0), interpolation="bilinear", antialias=False)
    for index in range(20):
        box = inception_crop(60, 80, (0.05, 1.0), RATIO, uniform(words(202, "v1", "inception", 3, "trees", 0, index)))
        top, left, height, width = box
        expected = tensorflow_resize(image[:, top : top + height, left : left + width], 32, 32)
        if uniform(words(23, "v1", "aug", 3, "trees", 0, index))[22] < 0.5:
            expected = expected.flip(-1)
        assert_truncated_alike(train_image(image, 32, settings, 3, "trees", 0, index), expected)


def assert_truncated_alike(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but where a mean is a whole number and the last bit decides; rounding would change half of the values."""
    difference = (result.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


def tensorflow_resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear with half-pixel centres between the two nearest rows and columns, truncated; float32 as TensorFlow."""
    values = image.numpy().astype(np.float32)
    for axis, size in ((1, height), (2, width)):
        side = image.shape[axis]
        at = np.maximum(
            (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(side / size) - np.float32(0.5), 0
        )
        low = np.minimum(at.astype(int), side - 1)
        high, share = np.minimum(low + 1, side - 1), at - low
        share = share.reshape([-1, 1] if axis == 1 else [-1])
        values = np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share
    return torch.from_numpy((values + np.float32(1e-4)).astype(np.uint8))


def test_the_resize_without_antialias_is_tensorflows_formula() -> None:
    """Enlarged and reduced: a truncated bilinear mean of two rows and two columns; rounding would be a level off."""
    for height, width, size in [(30, 40, 24), (100, 75, 16), (9, 20, 32)]:
        image = torch.from_numpy(rgb(picture(height, width)).copy())
        result = eval_image(image, size, config(eval_transform="vit"))
        assert_truncated_alike(result, tensorflow_resize(image, size, size))
    for value in (1, 127, 255):  # a white background stays white
        flat = torch.full((3, 37, 50), value, dtype=torch.uint8)
        assert (eval_image(flat, 16, config(eval_transform="vit")) == value).all()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    "transform, name, levels, share",
    [("vit", "squash", 0, 0), ("fewshot", "fewshot", 1, 0.001), ("big_vision", "eval", 1, 0.04)],
)
def test_evaluation_equals_tensorflows_pixels(
    transform: str, name: str, levels: int, share: float, number: int, test_fixtures: Path
) -> None:
    """Pixels that big_vision's ops gave: equal, or a truncation apart in few values. 40 resized, 32 cropped."""
    with np.load(test_fixtures / "preprocess_tf" / "data.npz", allow_pickle=False) as arrays:
        image, expected = arrays[f"im{number}"], arrays[f"im{number}/{name}"]
    settings = config(eval_transform=transform, eval_crop=0.8)
    result = eval_image(torch.from_numpy(image).permute(2, 0, 1), 32, settings).permute(1, 2, 0).numpy()
    difference = np.abs(result.astype(int) - np.rint(expected * 127.5 + 127.5).astype(int))
    assert difference.max() <= levels and (difference > 0).mean() <= share


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_crop_of_the_whole_image_equals_tensorflows_squash(number: int, test_fixtures: Path) -> None:
    """Training's resize too is TensorFlow's without antialias: the whole image as the crop."""
    with np.load(test_fixtures / "preprocess_tf" / "data.npz", allow_pickle=False) as arrays:
        image, expected = arrays[f"im{number}"], arrays[f"im{number}/squash"]
    settings = config(
        crop="inception", crop_area=(1.0, 1.0), crop_ratio=(9.0, 9.0), interpolation="bilinear", antialias=False, flip=0
    )
    result = train_image(torch.from_numpy(image).permute(2, 0, 1), 32, settings, 0, "t", 0, 0).permute(1, 2, 0).numpy()
    assert (result == np.rint(expected * 127.5 + 127.5)).all()
    smooth = train_image(
        torch.from_numpy(image).permute(2, 0, 1), 32, dataclasses.replace(settings, antialias=True), 0, "t", 0, 0
    )
    assert np.abs(smooth.permute(1, 2, 0).numpy().astype(int) - result).max() > 10


@pytest.mark.parametrize("height, width", [(64, 64), (60, 80), (80, 60), (64, 200), (33, 50), (10, 12), (375, 500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_evaluation_image_is_timms(height: int, width: int, interpolation: str) -> None:
    """eval_transform=timm gives the pixels of timm's own transform, all sizes rounded as it rounds them."""
    image = picture(height, width)
    for size, share in ((32, 0.875), (32, 1.0), (24, 0.8), (30, 0.9)):
        options = {"interpolation": interpolation, "crop_pct": share, "mean": (0, 0, 0), "std": (1, 1, 1)}
        theirs: Any = create_transform(size, is_training=False, **options)
        settings = config(eval_crop=share, interpolation=interpolation)
        result = eval_image(torch.from_numpy(rgb(image).copy()), size, settings)
        assert torch.equal(result, (theirs(image) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transformers_squashes_with_its_own_interpolation(interpolation: str) -> None:
    """eval_transform=transformers: Pillow's antialiased squash, but for a few levels, then the central crop.

    Its processor's own pixels are compared in test_transformers.py.
    """
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3)).astype(np.uint8)  # any other filter is far off
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    # 28 / (28 / 50) is a hair below 50.
    for size, share, side in ((32, 1.0, 32), (28, 0.875, 32), (28, 28 / 50, 50)):
        squashed = torch.from_numpy(np.array(Image.fromarray(noise).resize((side, side), method))).permute(2, 0, 1)
        margin = (side - size) // 2
        expected = squashed[:, margin : margin + size, margin : margin + size]
        settings = config(eval_transform="transformers", eval_crop=share, interpolation=interpolation)
        result = eval_image(torch.from_numpy(noise).permute(2, 0, 1), size, settings)
        assert (result.int() - expected.int()).abs().max() <= 4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_real_photos_are_evaluated_as_by_timm(interpolation: str, test_data: Path) -> None:
    """Whole ImageNet photos from the file on: every pixel equals timm's."""
    options = {"interpolation": interpolation, "crop_pct": 0.875, "mean": (0, 0, 0), "std": (1, 1, 1)}
    theirs: Any = create_transform(224, is_training=False, **options)
    settings = config(interpolation=interpolation)
    with tarfile.open(test_data / "imagenet_val_fullsize_dev-000000.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")][::2]
        assert len(files) >= 5
        for file in files:
            assert file is not None
            data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                expected = (theirs(image.convert("RGB")) * 255).round().to(torch.uint8)
            assert torch.equal(eval_image(decode(data), 224, settings), expected)


def test_the_area_resize_keeps_means() -> None:
    """big_vision: 2 x 2 blocks become their truncated mean; a flat image stays flat at any ratio, enlarged too."""
    random = np.random.default_rng(0)
    image = torch.from_numpy(random.integers(0, 256, (3, 16, 24)).astype(np.uint8))
    result = eval_image(image, 8, config(eval_transform="big_vision", eval_crop=1.0))
    blocks = image.numpy().astype(int).reshape(3, 8, 2, 12, 2).sum((2, 4)) // 4
    assert (result.numpy() == blocks[:, :, 2:10]).all()
    for height, width in [(17, 31), (50, 33), (5, 7)]:
        for value in (1, 127, 255):
            flat = torch.full((3, height, width), value, dtype=torch.uint8)
            assert (eval_image(flat, 13, config(eval_transform="big_vision")) == value).all()


def test_an_evaluation_image_has_no_randomness_and_keeps_equal_images() -> None:
    """An image of the right size passes through unchanged when nothing is cropped away."""
    image = torch.from_numpy(rgb(picture(32, 32)).copy())
    for transform in ("timm", "vit", "big_vision", "fewshot"):
        assert torch.equal(eval_image(image, 32, config(eval_crop=1.0, eval_transform=transform)), image)


def test_the_models_input_lies_between_minus_one_and_one() -> None:
    """0, 127.5 and 255 become -1, 0 and 1, as in Google's code; every value stays distinct in float32."""
    values = torch.arange(256, dtype=torch.uint8)
    result = to_float(values, torch.float32)
    assert (result[0], result[-1]) == (-1.0, 1.0)
    assert torch.allclose(result, (values.double() - 127.5).div(127.5).float(), rtol=0, atol=1.5e-7)
    assert len(result.unique()) == 256
    assert to_float(values, torch.bfloat16).dtype == torch.bfloat16


def test_real_photos_equal_pillow(test_data: Path) -> None:
    """27 ImageNet photos, gray ones and two with EXIF orientation among them: the pixels that Pillow gives."""
    with tarfile.open(test_data / "imagenet_train_photos_dev-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        odd = [m for m in members if m.name.startswith(("n02951585", "n03337140"))]
        assert len(odd) == 2
        modes = set()
        for member in [*odd, *members[::6]]:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                modes.add(image.mode)
                expected = rgb(image)
            assert (decode(data).numpy() == expected).all()
        assert "RGB" in modes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_a_persons_photo_is_turned_as_its_exif_says(orientation: int, form: str) -> None:
    """All eight orientations equal Pillow's exif_transpose, pixel by pixel; what shards hold is decoded as it lies."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, exif=exif, **({"lossless": True} if form == "webp" else {}))
    data = file.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        turned = Image.fromarray(decode(data).permute(1, 2, 0).numpy())
        turned.getexif()[0x0112] = image.getexif()[0x0112]
        expected = np.asarray(ImageOps.exif_transpose(turned))
    assert np.array_equal(decode_upright(data).permute(1, 2, 0).numpy(), expected)
    assert decode(data).shape == (3, 16, 24)


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_a_photo_with_damaged_exif_stays_as_it_lies(exif: bytes, form: str) -> None:
    """Its pixels are there; what cannot be read is told, and says nothing."""
    file, told = io.BytesIO(), []
    Image.new("RGB", (24, 16)).save(file, form, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_upright(file.getvalue(), told.append).shape == (3, 16, 24)
    assert told in ([], ["EXIF cannot be read"])
    assert told or form == "jpeg" or b"TIFF" not in exif  # Pillow passes over a JPEG's


@pytest.mark.parametrize("error", [SyntaxError, ValueError, IndexError, KeyError, struct.error, TypeError])
def test_errors_of_exif_of_any_type_are_told(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    file, told = io.BytesIO(), []
    Image.new("RGB", (24, 16)).save(file, "jpeg")

    def failing(_: object) -> None:
        raise error("damaged")

    monkeypatch.setattr(Image.Image, "getexif", failing)
    assert decode_upright(file.getvalue(), told.append).shape == (3, 16, 24)
    assert told == ["EXIF cannot be read"]


def test_a_cmyk_photo_is_not_decoded_beside_pillow_s_header_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow says its size, and keeps copies of its segments, up to 16 MB, as long as its image lives."""
    opened: list[weakref.ref] = []
    alive: list[bool] = []
    real, real_decode = images._opened, images._decode_jpeg

    def noting(data: bytes) -> Image.Image:
        image = real(data)
        opened.append(weakref.ref(image))
        return image

    def decoding(data: bytes) -> torch.Tensor:
        alive.extend(image() is not None for image in opened)
        return real_decode(data)

    monkeypatch.setattr(images, "_opened", noting)
    monkeypatch.setattr(images, "_decode_jpeg", decoding)
    assert decode(encoded(picture().convert("CMYK"), "jpeg")).shape == (3, 30, 40)
    assert alive == [False]
