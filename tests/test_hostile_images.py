"""Images of strangers and bad disks: memory, time and damage, each input small and made here."""

import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny import tiny_config
from torchvision.io import ImageReadMode, decode_jpeg

from pretrain.config import Config, DataConfig, choices_of
from pretrain.data import headers, images
from pretrain.data.images import decode, eval_image, train_image
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import BadSample
from pretrain.shards.build import build
from pretrain.shards.sources import Item
from pretrain.shards.verify import verify
from pretrain.train.run import train

MB = 1_000_000


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat_png(side: int, depth: int, color: int) -> bytes:
    """A black PNG of a few kilobytes; color: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha."""
    row = bytes(1 + side * {0: 1, 2: 3, 4: 2, 6: 4}[color] * depth // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)),
            (b"IDAT", pixels),
            (b"IEND", b""),
        )
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def photo(height: int = 240, width: int = 320, **options: object) -> bytes:
    """A JPEG with something everywhere, so that a hole shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "jpeg", quality=90, **options)


def many_scans(data: bytes, number: int) -> bytes:
    """A JPEG whose last scan comes `number` times more."""
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * number + b"\xff\xd9"


# --- memory and time -------------------------------------------------------------------------------------------------


def seconds_of_uses(data: bytes) -> dict[str, float]:
    """Decodes an image, crops and evaluates it in every way; the processor seconds of each."""
    image = decode(data)
    aspect = image.shape[2] / image.shape[1]
    paths: dict[str, Any] = {"train": Path("unused"), "global_batch": 1}
    whole: dict[str, Any] = {"crop_area": (0.97, 0.98), "crop_ratio": (0.98 * aspect, aspect)}
    timm = DataConfig(**paths, **whole)
    google = DataConfig(**paths, **whole, antialias=False, interpolation="bilinear", crop="inception")
    calls: dict[str, Callable[[], object]] = {
        "crop": lambda: train_image(image, 224, timm, 0, "t", 0, 0),
        "google": lambda: train_image(image, 224, google, 0, "t", 0, 0),
    }
    for name in choices_of(DataConfig, "eval_transform"):
        calls[name] = partial(eval_image, image, 224, DataConfig(**paths, eval_transform=cast(Any, name)))
    seconds = {}
    for name, call in calls.items():
        begun = time.process_time()
        call()
        seconds[name] = time.process_time() - begun
    return seconds


def measured(data: bytes) -> tuple[int, dict[str, float], str]:
    """Megabytes beyond those of small images, the seconds of each use, and why it is a bad sample."""
    torch.set_num_threads(1)
    for form in ("jpeg", "png", "webp"):
        seconds_of_uses(encoded(Image.new("RGB", (300, 200)), form))
    seconds, reason = {}, ""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        seconds = seconds_of_uses(data)
    except BadSample as bad:
        reason = str(bad)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1000, seconds, reason


LARGE = {  # each just within the limits, or just beyond them
    "jpeg": lambda: encoded(Image.new("RGB", (7070, 7070)), "jpeg"),
    "tall jpeg": lambda: encoded(Image.new("RGB", (720, 65_000)), "jpeg"),
    "wide jpeg": lambda: encoded(Image.new("RGB", (65_000, 720)), "jpeg"),
    "png 16 bits": lambda: flat_png(5900, 16, 2),
    "webp": lambda: encoded(Image.new("RGB", (3800, 3800)), "webp", lossless=True, method=0),
    "progressive": lambda: encoded(Image.new("RGB", (5300, 5300)), "jpeg", progressive=True, subsampling=0),
    "png 50 megapixels": lambda: flat_png(7070, 16, 0),
}


@pytest.mark.parametrize("case", LARGE)
def test_no_image_takes_300_mb(case: str) -> None:
    """Decoded, cropped and evaluated in a process of its own, the largest images of each format stay within 300 MB.

    Nor is a transform much slower than the others: an area average over all pixels took 4 s, and the others up to 1.
    """
    ((megabytes, seconds, reason),) = run_ranks(measured, 1, LARGE[case]())
    assert megabytes < 300, reason
    assert ("at most 270" in reason) == (not seconds) == (case == "png 50 megapixels")
    assert all(value < 5 * seconds["timm"] for value in seconds.values()), seconds


def test_the_limits_are_told() -> None:
    """An error names the size, what it takes and what is allowed; photos of cameras and phones pass."""
    with pytest.raises(
        BadSample, match=r"decode: 7000 x 7000 pixels take 343 MB to decode in this format, at most 270"
    ):
        headers.check_memory(7000, 7000, headers.PILLOW["PNG"], b"")
    headers.check_size(8064, 6048)  # 48 megapixels, as phones take them
    headers.check_memory(8064, 6048, headers.TORCHVISION_JPEG, bytes(25 * MB))
    headers.check_memory(6000, 4000, headers.TORCHVISION_JPEG + 6, bytes(15 * MB))  # progressive, colour at full size
    assert headers.jpeg_header(photo()).coefficients == 0
    smooth = Image.new("RGB", (64, 64))
    for subsampling, coefficients in ((2, 3), (0, 6)):
        data = encoded(smooth, "jpeg", progressive=True, subsampling=subsampling)
        assert headers.jpeg_header(data).coefficients == coefficients


@pytest.mark.parametrize(
    "height, width, said",
    [
        (7072, 7072, "7072 x 7072 pixels, at most 50,000,000 in all"),
        (
            13_300,
            13_300,
            "(13300 x 13300 pixels, at most|Image size .176890000 pixels. exceeds limit)",
        ),
        (
            65_000,
            65_000,
            "(65000 x 65000 pixels, at most|Image size .4225000000 pixels. exceeds limit)",
        ),  # Pillow's own
        (65_000, 640, "640 x 65000 pixels"),
        (1, 101, "101 x 1 pixels"),
    ],
)
@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_sizes_beyond_the_limits_are_refused_unread(form: str, height: int, width: int, said: str) -> None:
    """By what a file of some hundred bytes says of itself."""
    if form == "jpeg":
        data = photo(8, 8).replace(b"\0\x08\0\x08\x03", struct.pack(">HHB", height, width, 3), 1)
    else:
        size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = flat_png(1, 8, 2)[:8] + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadSample, match=f"decode: {said}"):
        decode(data)


def baseline_scans(number: int) -> bytes:
    """A baseline JPEG whose first scan holds one of its components only: that is decoded in several passes too."""
    data = bytearray(photo(64, 64, subsampling=0))
    at = data.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(data[at + 14 : -2])
    return bytes(data[:at]) + scan * number + b"\xff\xd9"


PROGRESSIVE = encoded(Image.new("RGB", (64, 64)), "jpeg", progressive=True)
HEAD, REST = photo()[:2], photo()[2:]
PNG_HEAD, PNG_REST = flat_png(64, 8, 2)[:33], flat_png(64, 8, 2)[33:]
RIFF = encoded(Image.new("RGB", (80, 100)), "webp")
RIFF_OF_4_MB = RIFF[:4] + struct.pack("<I", len(RIFF) - 8 + 8 * 400_000) + RIFF[8:]
TOO_MANY = {
    "scans": (many_scans(photo(progressive=True), 500), "more than 20 scans"),
    "scans behind a false end": (
        many_scans(photo(progressive=True)[:-2] + b"\xff\xfe\0\x04\xff\xd9\xff\xd9", 500),
        "more than 20 scans",
    ),
    "scans behind a marker without a length": (
        PROGRESSIVE[:-2] + b"\xff\x01" + PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] * 250 + b"\xff\xd9",
        "more than 20 scans",
    ),
    "baseline scans": (baseline_scans(60), "more than 20 scans"),
    "segments": (HEAD + b"\xff\xfe\0\x02" * 1_000_000 + REST, "more than 50000 segments"),
    "stray bytes": (HEAD + photo()[2:20] + bytes(4 * MB) + photo()[20:], "more than 50000 segments"),
    "EXIF": (HEAD + (b"\xff\xe1\xfd\xe8Exif\0\0" + bytes(64992)) * 900 + REST, "16 MB before its first scan"),
    "chunks": (PNG_HEAD + chunk(b"abCd", b"") * 400_000 + PNG_REST, "more than 50000 chunks"),
    "chunks of WebP": (RIFF_OF_4_MB + b"abcd\0\0\0\0" * 400_000, "more than 50000 chunks"),
    "profiles": (PNG_HEAD + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(MB))) * 200 + PNG_REST, "colour profiles"),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_work_is_bounded_before_it_begins(case: str) -> None:
    """Scans took 20 s for 325 kB; a million empty segments, stray bytes or chunks half a minute, in Pillow's parser."""
    data, reason = TOO_MANY[case]
    began = os.times().user
    with pytest.raises(BadSample, match=f"decode: .*{reason}"):
        decode(data)
    assert os.times().user - began < 2


def test_a_jpeg_may_end_within_its_frame() -> None:
    """A frame without content, and a scan at once: sizes and number of components would lie behind the file's end."""
    data = bytes.fromhex("ffd8 ffc00002 ffda000000")
    assert headers.jpeg_header(data) == headers.JpegHeader(0)
    with pytest.raises(BadSample, match="decode: "):
        decode(data)


def test_usual_files_have_few_parts() -> None:
    """Progressive files of 10 scans, with another picture or a film appended, and 10 more scans pass."""
    plain = photo(progressive=True)
    for data in (plain, plain + photo() + os.urandom(4 * MB), many_scans(plain, 10)):
        assert decode(data).shape == (3, 240, 320)


@pytest.mark.parametrize("form", ["png", "png with text", "webp", "jpeg"])
def test_what_follows_the_end_is_no_part(form: str) -> None:
    """Zeros and chunks behind the picture's own end, which no decoder looks at."""
    data = {
        "png": PNG_HEAD + PNG_REST,
        "png with text": PNG_HEAD + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(4 * MB))) + PNG_REST,
        "webp": RIFF,
        "jpeg": photo(),
    }[form]
    shape = decode(data).shape
    for tail in (bytes(2 * MB), chunk(b"abCd", b"") * 100_000, b"abcd\0\0\0\0" * 100_000):
        began = os.times().user
        assert decode(data + tail).shape == shape
        assert os.times().user - began < 2


@pytest.mark.parametrize("height, width", [(2100, 2050), (350, 12_000), (12_000, 350)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bands_give_the_pixels_of_one_piece(
    height: int, width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large images are resized in bands. The same pixels, or a level apart: vit, tall images."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image = image.permute(2, 0, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for piece in (1 << 21, 1 << 40):
            monkeypatch.setattr(images, "_PIECE", piece)
            monkeypatch.setattr(images, "_BAND", min(piece, 1 << 26) // 8)
            settings = DataConfig(train=Path("unused"), global_batch=1, crop_area=(0.99, 1.0), crop_ratio=(0.9, 1.1))
            results.append(
                [
                    train_image(image, 64, settings, 0, "t", 0, 0),
                    *(
                        eval_image(image, 64, DataConfig(train=Path("unused"), global_batch=1, eval_transform=name))
                        for name in (
                            "transformers",
                            "transformers_shortest",
                            "timm",
                            "timm_squash",
                            "timm_border",
                            "big_vision",
                            "vit",
                        )
                    ),
                ]
            )
    finally:
        torch.set_num_threads(before)
    *uint8, areas, floats = list(zip(*results))
    is_tall = height > 2 * width  # whose height is resized first
    assert torch.equal(*areas) and all(torch.equal(*pair) for pair in uint8 if not is_tall)
    for banded, whole in [*uint8, floats]:
        assert (banded.int() - whole.int()).abs().max() <= 1


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(kind: str, data: bytes) -> bytes:
    """A JPEG that decodes, with less in it than there was."""
    half = len(data) // 2
    if kind == "tail lost":
        return data[:half] + b"\xff\xd9"
    if kind == "hole":
        return data[:half] + bytes(500) + data[half + 500 :]
    if kind == "random bytes":
        return data[:half] + np.random.default_rng(1).bytes(60).replace(b"\xff", b"a") + data[half + 60 :]
    return data[:half] + b"\xff\xd3" + data[half:]  # a restart marker where there is none


DAMAGES = ("tail lost", "hole", "random bytes", "stray marker")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_is_told_and_its_pixels_stay(
    kind: str, progressive: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """What libjpeg warns of is handed on, nothing comes to stderr, and the pixels are the decoder's own."""
    data = damaged(kind, photo(progressive=progressive))
    told: list[str] = []
    image = decode(data, told.append)
    assert len(told) == 1 and told[0].startswith(("Corrupt JPEG data", "Inconsistent progression"))
    assert capfd.readouterr() == ("", "")
    alone = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, image)
    assert "Corrupt" in capfd.readouterr().err or progressive
    decode(photo(progressive=progressive), told.append)
    assert len(told) == 1  # and nothing is left over for the next image


def test_what_others_write_meanwhile_reaches_stderr(capfd: pytest.CaptureFixture[str], monkeypatch: object) -> None:
    """Text of other threads goes on to stderr, after an exception too; a child of a fork hears only itself."""
    from pretrain.data.damage import listen

    def noisy() -> int:
        os.write(2, b"progress 3/10\rCorrupt JPEG data: bad Huffman code\nhello\n")
        return 7

    assert listen(noisy) == (7, ["Corrupt JPEG data: bad Huffman code"])
    assert capfd.readouterr().err == "progress 3/10\rhello\n"

    def failing() -> None:
        os.write(2, b"before\n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        listen(failing)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"

    def both() -> None:
        child = os.fork()
        if not child:
            os.write(2, b"x" * 10_000)
            os._exit(listen(noisy)[1] != ["Corrupt JPEG data: bad Huffman code"])
        assert os.waitpid(child, 0)[1] == 0

    both()
    assert listen(lambda: 1) == (1, [])


def test_threads_hear_their_own_images(capfd: pytest.CaptureFixture[str]) -> None:
    """Four threads decode good and damaged images at once: each hears of its own, and stderr is itself afterwards."""
    good, bad = photo(), damaged("hole", photo())
    wrong: list[int] = []

    def work(data: bytes, expected: int) -> None:
        for _ in range(20):
            told: list[str] = []
            decode(data, told.append)
            if len(told) != expected:
                wrong.append(len(told))

    threads = [threading.Thread(target=work, args=(data, n)) for data, n in ((good, 0), (bad, 1)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"end\n")
    assert wrong == [] and capfd.readouterr().err == "end\n"


def test_without_stderr_images_are_decoded() -> None:
    """A daemon has closed it: the image is used, nothing is told."""
    program = (
        "import os; os.close(2)\n"
        "from test_hostile_images import damaged, photo\n"
        "from pretrain.data.images import decode\n"
        "print(decode(damaged('hole', photo())).shape[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0 and json.loads(done.stdout) == 3


@pytest.mark.parametrize("missing", ["os.memfd_create", "os.ftruncate", "os.dup"])
def test_without_memory_to_listen_images_are_decoded(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that fails is no damage of the image, and the next one is heard again."""
    from pretrain.data import damage

    def failing(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(damage, "_memory", [])
    with monkeypatch.context() as patch:
        patch.setattr(missing, failing)
        assert decode(photo()).shape == (3, 240, 320)
    told: list[str] = []
    decode(damaged("hole", photo()), told.append)
    assert len(told) == 1


def test_a_small_webp_that_says_it_is_large_is_refused() -> None:
    """34 bytes that say 7000 x 7000."""
    data = bytes.fromhex("524946461a000000574542505650384c0e0000002f57dbd506071011fd0f4444ff03")
    with pytest.raises(BadSample, match="7000 x 7000 pixels take"):
        decode(data)


# --- from the shard to the log ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_damage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 images; two of them are JPEGs that lost half of their data, or have a hole, and are decoded."""
    whole = photo(64, 64)
    cut, hole = whole[: len(whole) // 2] + b"\xff\xd9", bytearray(whole)
    hole[len(whole) // 2 : len(whole) // 2 + 500] = bytes(500)
    contents = [whole] * 22 + [cut, bytes(hole)]
    items = [Item(lambda c=c: c, "jpg", number % 7, f"photo {number}") for number, c in enumerate(contents)]
    folder = tmp_path_factory.mktemp("shards") / "photos"
    build(items, [f"class {number}" for number in range(7)], folder, samples_per_shard=24, seed=0)
    return folder


def finish(config: Config) -> None:
    train(config)


@pytest.mark.parametrize("strict", [False, True])
def test_a_run_tells_of_damaged_images_and_leaves_them_out_when_asked(
    strict: bool, with_damage: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, two epochs: each damaged image is counted each time, named with its file, and used, or not."""
    config = tiny_config(with_damage, tmp_path, total_steps=4, data__strict_images=strict, data__max_bad_fraction=0.5)
    run_ranks(finish, 2, config)
    told, name = capfd.readouterr(), "bad_samples.jsonl" if strict else "damaged_samples.jsonl"
    assert "Premature end" not in told.err and "Corrupt JPEG" not in told.err
    rows = [json.loads(line) for line in (tmp_path / "tiny" / name).read_text().splitlines()]
    assert len(rows) == 4 and {row["reason"] for row in rows} == {"damaged"}
    assert all(row["shard"] == "photos-000000.tar" and "JPEG" in row["detail"] for row in rows)
    last = json.loads((tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["train/damaged_samples"], last["train/bad_samples"]) == ((0, 4) if strict else (4, 0))
    used = [
        len(json.loads(line)["samples"])
        for line in (tmp_path / "tiny" / "samples-00000.jsonl").read_text().splitlines()
    ]
    assert used == [6] * 4


def test_verify_names_damaged_images(with_damage: Path) -> None:
    """By shard, number and key."""
    told = list(verify(load_manifest(with_damage)))
    assert len(told) == 2
    assert all(re.search(r"photos-000000.tar: sample \d+: \w+: damaged: .*JPEG", line) for line in told)
