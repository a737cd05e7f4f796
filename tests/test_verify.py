"""What `make_shards --verify` finds in the sets of others, in any number of processes."""

import hashlib
import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from pretrain.data.manifest import (
    Manifest,
    Shard,
    ShardIndex,
    key_crc32,
    load_index,
    load_manifest,
    write_index,
    write_manifest,
)
from pretrain.shards.build import DataSet, finish
from pretrain.shards.verify import repeated_words, verify


def image_bytes(seed: int) -> bytes:
    """A small picture as a file."""
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (seed, 0, 0)).save(file, "jpeg")
    return file.getvalue()


def foreign_set(folder: Path, *keys: list[str]) -> Manifest:
    """A set of foreign tars, with the indexes and the manifest of somebody who looked at no key."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, names in enumerate(keys):
        members = [
            part for k, key in enumerate(names) for part in ((f"{key}.jpg", image_bytes(k)), (f"{key}.cls", b"1"))
        ]
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            starts = []
            for name, data in members:
                starts += [tar.offset // 512] if name.endswith("jpg") else []
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            end = tar.offset // 512
        shard = Shard(str(path), len(names), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        crcs = np.array([key_crc32(key) for key in names], dtype=np.uint32)
        write_index(shard, ShardIndex(np.array([*starts, end], dtype=np.uint32), crcs))
        shards.append(shard)
    return load_manifest(finish(folder, DataSet(shards, 2, ["x", "y"], None, []), {"scope": "none"}))


@pytest.mark.parametrize(
    "keys, wrong, told",
    [
        ([["a", "b"], ["c", "d"]], [], []),
        ([["a", "b", "a"], ["c"]], ["0.tar: key a occurs twice: a.jpg at byte 0 and a.jpg at byte {}"], []),
        (
            [["a", "b"], ["b", "c"], ["b", "d/a"]],
            [],
            ["2 keys are in several shards, which is no error: sample 1 of 0.tar (b) and sample 0 of 1.tar (b)"],
        ),
    ],
)
def test_verify_compares_keys(keys: list[list[str]], wrong: list[str], told: list[str], tmp_path: Path) -> None:
    """An index is not believed: a key that comes twice in a tar is an error with both members; in two, it is told."""
    manifest, heard = foreign_set(tmp_path / "set", *keys), list[str]()
    found = [problem.removeprefix(f"{tmp_path / 'set'}/") for problem in verify(manifest, told=heard.append)]
    start = load_index(manifest.shards[0]).byte_range(len(keys[0]) - 1)[0]
    assert found == [line.format(start) for line in wrong] and heard == told


def test_verify_finds_samples_without_a_place_in_the_index(tmp_path: Path) -> None:
    """An index of two of three samples: training would never see the third."""
    manifest = foreign_set(tmp_path / "set", ["a", "b", "c"])
    (shard,) = manifest.shards
    index = load_index(shard)
    few = shard._replace(num_samples=2)
    write_index(few, ShardIndex(index.offsets[[0, 1, 3]], index.key_crc32[:2]))
    path = finish(tmp_path / "set", DataSet([few], 2, ["x", "y"], None, []), {"scope": "none"})
    told = list(verify(load_manifest(path)))
    assert told[0].startswith(f"{shard.path}: its index lacks 1 of 3 samples, the first is c.jpg at byte ")
    assert len(told) == 2 and "sample 1: tar" in told[1]  # it has two keys


def test_verify_lists_no_folder_for_each_shard(own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 shards and their indexes: that would be 1.8 billion names. What is missing is told all the same."""
    manifest = load_manifest(own_shards)
    monkeypatch.setattr("pretrain.data.manifest.plain_files", Mock(side_effect=AssertionError))
    assert list(verify(manifest)) == []
    (own_shards / "trees-000001.idx").unlink()
    (problem,) = verify(manifest)
    assert problem.endswith(f"trees-000001.idx: listed in {manifest.path} but not found")


def test_verify_keeps_the_order_of_shards(own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes end as they like; what they found is told shard by shard, and each sample is counted."""
    manifest, counted = load_manifest(own_shards), list[int]()
    for shard in manifest.shards:
        shard.path.with_suffix(".idx").write_bytes(b"{}\n")
    expected = list(verify(manifest))
    assert [problem.split(":")[0] for problem in expected] == [str(s.path.with_suffix(".idx")) for s in manifest.shards]

    def backwards(function: Any, tasks: Any, workers: int, progress: Any) -> Iterator[Any]:
        assert workers == 3
        return (function(task, progress) for task in [*tasks][::-1])

    monkeypatch.setattr("pretrain.shards.verify.results", backwards)
    assert list(verify(manifest, counted.append, workers=8)) == expected


def test_words_that_occur_before_are_counted() -> None:
    """In parts, as numpy's own counting does at once; zeros are no words."""
    random = np.random.default_rng(0)
    words = random.integers(0, 1 << 64, 5000, dtype=np.uint64)
    words[random.integers(0, 5000, 900)] = words[random.integers(0, 5000, 900)]
    words[::50] = 0
    arrays = np.split(words, [0, 1200, 3000])  # the first of a shard that could not be read
    count, (first, second) = repeated_words(arrays)
    assert count == np.sum(np.unique(words[words != 0], return_counts=True)[1] - 1) > 500
    assert first < second and arrays[first[0]][first[1]] == arrays[second[0]][second[1]] != 0
    assert repeated_words([np.arange(9, dtype=np.uint64)]) == (0, [])


def test_a_manifest_of_shards_that_are_not_there_takes_no_memory(tmp_path: Path) -> None:
    """It may claim any number of samples, of any number of shards, at no cost."""
    shards = [Shard(str(tmp_path / f"{number}.tar"), 1 << 24, 1 << 40, f"{number:064x}") for number in range(300)]
    manifest = load_manifest(write_manifest(tmp_path, "absent", shards, 4, has_names=False, shuffle=None))
    tracemalloc.start()
    try:
        assert len(list(verify(manifest))) == 300
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # with all words 40 GB
    finally:
        tracemalloc.stop()
