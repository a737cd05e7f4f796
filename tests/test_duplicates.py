"""Images that look like those of an evaluation set are found and left out, whatever was done to them."""

import io
import os
from dataclasses import replace
from errno import EIO, EMFILE, ENFILE, ENOMEM
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import StorageError
from pretrain.shards import duplicates
from pretrain.shards import items as items_module
from pretrain.shards.build import build
from pretrain.shards.duplicates import MAX_DISTANCE, NEAR_FILE, perceptual_hash
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.make import Options, make_part, make_shards
from pretrain.shards.passes import Work
from pretrain.shards.sources import Told, file_item, folder_items
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


def test_a_set_to_stay_away_from_that_cannot_be_used(source: Path, tmp_path: Path) -> None:
    """The set itself, which leaves nothing; one with a shard that is a FIFO, or leads out, or is not there."""
    test = tmp_path / "sets" / "test"
    away = replace(SMALL, away_from=(test,))
    (tmp_path / "test" / "a" / "plain.png").unlink()  # near to nothing
    assert "all 12 images look like" in refusal(make_shards, [tmp_path / "test"], None, tmp_path / "set", away)
    shard = test / "test-000000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    assert "but not found" in refusal(make_shards, [source], None, tmp_path / "set", away)
    shard.symlink_to(tmp_path / "elsewhere.tar")
    assert "outside the data set's folder" in refusal(make_shards, [source], None, tmp_path / "set", away)
    shard.unlink()
    os.mkfifo(shard)
    assert str(shard) in refusal(make_shards, [source], None, tmp_path / "set", away)


def test_a_pass_after_another_choice_of_items_is_done_anew(tmp_path: Path) -> None:
    """As many items are left, but others: their digests are not those of the first ones."""
    items = PackedItems(partial(file_item, tmp_path, False))
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
        items.append(f"{name}.png", 0)
    work = Work(tmp_path / "set")
    found = [duplicates._pass(duplicates._digests, items.without([k]), work, "", "1").tolist() for k in (0, 2)]
    assert found[0][0] == found[1][1] and found[0][1] != found[1][0]


def test_a_file_that_has_gone_is_not_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    """It was listed: it may be seen by other machines. The call ends, and nothing is kept."""
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        photo(1).save(tmp_path / "in" / name)
    items, classes = folder_items(tmp_path / "in")
    (tmp_path / "in" / "b" / "1.png").unlink()
    for call in (
        partial(build, items, classes, tmp_path / "set", samples_per_shard=9, seed=None),
        partial(duplicates.merged, items, Work(tmp_path / "set"), Told()),
    ):
        with pytest.raises(StorageError, match="b/1.png: cannot be read for now"):
            call()
    assert not list((tmp_path / "set").glob("*.tar"))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one line."""
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    assert "pip install -e '.[duplicates]'" in refusal(perceptual_hash, photo(1))


class _Disk:
    """A file whose reads fail, each with an error of its own; then it is read."""

    def __init__(self, data: bytes, *numbers: int) -> None:
        self.data, self.numbers = data, list(numbers)

    def read(self) -> bytes:
        """The bytes, when no failure is left."""
        if self.numbers:
            raise OSError(self.numbers[0], os.strerror(self.numbers.pop(0)))
        return self.data


def test_a_read_that_fails_for_now_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO, as of a network disk, is tried again; without memory or descriptors the build ends, and goes on later."""
    monkeypatch.setattr(items_module, "RETRY_AFTER_S", (0.0, 0.0), raising=False)
    file = io.BytesIO()
    photo(1).save(file, "png")
    again, worn, poor = (_Disk(file.getvalue(), *[error] * n) for error, n in ((EIO, 2), (EIO, 9), (EMFILE, 9)))
    items = [Item(disk.read, "png", 0, name) for disk, name in ((again, "again"), (worn, "worn"))]
    told = Told()
    build(items, ["a"], tmp_path / "set", samples_per_shard=5, seed=None, told=told)
    assert load_manifest(tmp_path / "set").num_samples == 1 and len(worn.numbers) == 6
    assert told.num_dropped == 1 and told.first_dropped.startswith("worn: missing: cannot be read (")
    for error in (EMFILE, ENFILE, ENOMEM):
        poor.numbers = [error]
        with pytest.raises(StorageError, match="poor: cannot be read for now"):
            items_module.read_item(Item(poor.read, "png", 0, "poor"))


def test_what_could_not_be_compared_does_not_come_in_later(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives a copy of a test image when its shard is written, not when it is looked at: it stays outside."""
    monkeypatch.setattr(items_module, "RETRY_AFTER_S", (), raising=False)
    copy = photo(100)
    copy.save(source / "a" / "copy.png")
    nearest_of, reads = duplicates._nearest_of, []

    def fails(item: Item) -> bytes:
        reads.append(item.source)
        raise OSError(EIO, os.strerror(EIO))

    def nearest(near: duplicates.Near, item: Item) -> int:
        own = item._replace(read=partial(fails, item)) if item.source.endswith("copy.png") else item
        return nearest_of(near, own)

    monkeypatch.setattr(duplicates, "_nearest_of", nearest)
    away = replace(SMALL, away_from=(tmp_path / "sets" / "test",))
    _, told = make_shards([source], None, tmp_path / "set", away)
    assert load_manifest(tmp_path / "set").num_samples == 31 and len(reads) == 1
    assert f"{source}/a/copy.png,,," in (tmp_path / "set" / NEAR_FILE).read_text().splitlines()
    assert told.passed_over[f"images that cannot be read, and not be compared with them ({NEAR_FILE})"] == 1
    assert told.passed_over[f"images that look like those of evaluation sets ({NEAR_FILE})"] == 3
