"""Images that look like those of an evaluation set are found and left out, whatever was done to them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.shards import duplicates
from pretrain.shards.duplicates import MAX_DISTANCE, NEAR_FILE, perceptual_hash
from pretrain.shards.make import Options, make_part, make_shards
from tests.test_building import refusal, tree

SMALL = Options(samples_per_shard=9, seed=1)


def photo(seed: int, side: int = 96) -> Image.Image:
    """Smooth patches, as photos have them: noise made larger."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def changed(image: Image.Image, how: str) -> Image.Image:
    """What people do to a picture before it is on the web again."""
    if how == "smaller":
        return image.resize((40, 40), Image.Resampling.BILINEAR)
    if how == "mirrored":
        return ImageOps.mirror(image)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=30)
    return Image.open(file)


CHANGES = ("smaller", "mirrored", "saved anew")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty photos, of which three are changed ones of the evaluation set, and one of one colour."""
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    for split, seeds in (("test", range(100, 112)), ("train", range(30))):
        for seed in seeds:
            path = tmp_path / split / "ab"[seed % 2] / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(seed).save(path)
    for seed, how in zip((100, 103, 107), CHANGES):
        changed(photo(seed), how).save(tmp_path / "train" / "a" / f"{how}.png")
    for split in ("train", "test"):
        Image.new("RGB", (9, 9), (50, 60, 70)).save(tmp_path / split / "a" / "plain.png")
    make_shards([tmp_path / "test"], None, tmp_path / "sets" / "test", SMALL)
    return tmp_path / "train"


def test_what_looks_like_an_image_of_the_test_is_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three, named with the sample that they look like; nothing else. The same with parts, and small pieces."""
    away = replace(SMALL, away_from=(tmp_path / "sets" / "test",))
    _, told = make_shards([source], None, tmp_path / "a" / "set", away)
    assert load_manifest(tmp_path / "a" / "set").num_samples == 31
    head, *rows = (tmp_path / "a" / "set" / NEAR_FILE).read_text().splitlines()
    assert head == "image,set,sample,distance" and len(rows) == 3
    test = load_manifest(tmp_path / "sets" / "test")
    for row in rows:
        path, name, sample, distance = row.split(",")
        seed = dict(zip(CHANGES, (100, 103, 107)))[Path(path).stem]
        own = io.BytesIO()
        photo(seed).save(own, "png")
        assert name == "test" and int(distance) <= MAX_DISTANCE
        assert read_sample(test, int(sample)).image == own.getvalue()
    assert told.passed_over[f"images that look like those of evaluation sets ({NEAR_FILE})"] == 3
    monkeypatch.setattr(duplicates, "_PIECE", 10)
    make_part([source], None, tmp_path / "b" / "set", (0, 2), away)
    make_shards([source], None, tmp_path / "b" / "set", away)
    assert tree(tmp_path / "b" / "set") == tree(tmp_path / "a" / "set")


def test_a_hash_tells_pictures_apart() -> None:
    """Of different pictures many bits differ; a plain picture has none, and is near to nothing."""
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    hashes = np.array([perceptual_hash(photo(seed)) for seed in range(40)], dtype=np.uint64)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(40, 1)]
    assert distances.min() > 2 * MAX_DISTANCE
    assert perceptual_hash(Image.new("RGB", (64, 64), (3, 200, 9))) == 0


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one line."""
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    assert "pip install 'vit-pretrain[duplicates]'" in refusal(perceptual_hash, photo(1))
