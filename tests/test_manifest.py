"""The manifest and the indexes: they say where each sample lies, and are checked before they are believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.manifest import (
    Manifest,
    Shard,
    ShardIndex,
    check_shards,
    load_index,
    load_manifest,
    write_index,
    write_manifest,
)
from pretrain.errors import UserError


def changed(folder: Path, **changes: Any) -> Path:
    """The folder's manifest.json with other values at the top level."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def refusal(path: Path) -> str:
    """The message with which a manifest is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        load_manifest(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_manifest_says_what_the_set_consists_of(shard_folder: Path, manifest: Manifest) -> None:
    """Counts, classes, digests and sizes agree with the files; the folder and the file name the same set."""
    assert (manifest.num_samples, manifest.num_classes) == (103, 5)
    assert manifest.class_names == ("ash", "birch", "cedar", "elm", "fir")
    assert [shard.num_samples for shard in manifest.shards] == [40, 40, 23]
    assert manifest.first_indices.tolist() == [0, 40, 80, 103]
    assert manifest.sha256 == hashlib.sha256((shard_folder / "manifest.json").read_bytes()).hexdigest()
    for shard in manifest.shards:
        data = shard.path.read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert load_manifest(shard_folder / "manifest.json") == manifest
    check_shards(manifest)


def test_every_index_is_located(manifest: Manifest) -> None:
    """Each index leads to its shard and its number there, at the borders of shards too."""
    located = [(shard.path.name, number) for shard, number in map(manifest.locate, range(103))]
    expected = [(shard.path.name, number) for shard in manifest.shards for number in range(shard.num_samples)]
    assert located == expected


def test_the_manifest_is_canonical_json(shard_folder: Path) -> None:
    """Sorted keys, no spaces, one final newline, no times or host names: equal sets have equal digests."""
    text = (shard_folder / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert set(json.loads(text)) == {
        *("format", "version", "name", "num_samples", "num_shards", "num_bytes", "members", "label", "keys"),
        *("shuffle", "image", "shards"),
    }
    assert not list(shard_folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": "other"}, "is 'other' version 1, expected 'pretrain-shards' 1"),
        ({"version": 2}, "version 2"),
        ({"num_samples": 104}, "says (104, 3, "),
        ({"num_shards": 2}, "its list adds up to (103, 3, "),
        ({"num_bytes": 1}, "says (103, 3, 1)"),
        ({"shards": [], "num_samples": 0, "num_shards": 0, "num_bytes": 0}, "lists no samples"),
        ({"shards": None}, "not a manifest of shards"),
        ({"shards": [{"path": "a.tar"}]}, "'num_samples'"),
        ({"label": {"names": None}}, "'num_classes'"),
        ({"label": {"kind": "boxes", "names": None, "num_classes": 5}}, "'boxes', expected one of class, multi"),
        ({"label": {"names": None, "num_classes": "many"}}, "'many'"),
        ({"label": {"names": "nothing.json", "num_classes": 5}}, "nothing.json: not found"),
        ({"label": {"names": "../secret.json", "num_classes": 5}}, "lies outside the manifest's folder"),
        ({"shards": [{"path": "../x.tar", "num_samples": 1, "num_bytes": 1, "sha256": ""}]}, "lies outside"),
        ({"shards": [{"path": "/etc/passwd", "num_samples": 1, "num_bytes": 1, "sha256": ""}]}, "lies outside"),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], said: str, own_shards: Path) -> None:
    """Foreign, inconsistent or hostile manifests end in one line that names the file and the values."""
    assert said in refusal(changed(own_shards, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"a": 1}', "\x00\xff"])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    """Empty, cut and foreign files are refused by name."""
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    assert f"{tmp_path / 'manifest.json'}: not a manifest of shards" in refusal(tmp_path)


def test_a_missing_manifest_names_the_tool(tmp_path: Path) -> None:
    """Who points to a folder without manifest is told what makes one."""
    assert "manifest.json: not found; make shards and manifest with tools/make_shards.py" in refusal(tmp_path)


def test_missing_and_cut_shards_are_found_at_the_start(own_shards: Path) -> None:
    """A shard or an index that is gone, or has another size, is named before the first step."""
    manifest = load_manifest(own_shards)
    shard = manifest.shards[1].path
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"{shard.name}: has {len(data) - 512} bytes, manifest.json says {len(data)}"):
        check_shards(manifest)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: listed in .* but not found"):
        check_shards(manifest)
    shard.write_bytes(data)
    shard.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=f"{shard.stem}.idx: listed in .* but not found"):
        check_shards(manifest)


def test_an_index_reads_back_as_written(tmp_path: Path) -> None:
    """Offsets and key checksums survive the file, up to the largest 32-bit block (2 TiB)."""
    shard = Shard(tmp_path / "a.tar", 3, 1 << 40, "digest")
    offsets, keys = np.array([0, 3, 9, (1 << 32) - 1]), np.array([1, 0, (1 << 32) - 1])
    write_index(shard, ShardIndex(offsets, keys))
    index = load_index(shard)
    assert index.offsets.tolist() == offsets.tolist() and index.key_crc32.tolist() == keys.tolist()
    assert index.byte_range(2) == (9 * 512, ((1 << 32) - 1) * 512)
    assert not list(tmp_path.glob(".tmp-*"))


def test_every_damage_to_an_index_is_found(own_shards: Path) -> None:
    """No flipped bit, cut or addition in an index goes unnoticed: it would deliver other samples.

    The shard's name in the header is not compared, so that files may be renamed; a flip there is harmless.
    """
    shard = load_manifest(own_shards).shards[2]
    path = shard.path.with_suffix(".idx")
    good, before = path.read_bytes(), load_index(shard)
    random = np.random.default_rng(0)
    payload_start = good.index(b"\n") + 1
    for position in [*range(payload_start), *random.integers(payload_start, len(good), 100)]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            index = load_index(shard)
        except UserError as error:
            assert "index the shard again" in str(error) and "\n" not in str(error)
        else:
            assert position < payload_start
            assert (index.offsets == before.offsets).all() and (index.key_crc32 == before.key_crc32).all()
    for data in (b"", good[:-4], good + b"\0\0\0\0", good[payload_start:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="index the shard again"):
            load_index(shard)


def test_an_index_of_another_shard_is_refused(own_shards: Path) -> None:
    """An index left from an older shard of the same name does not fit: both digests are told."""
    first, second, _ = load_manifest(own_shards).shards
    first.path.with_suffix(".idx").write_bytes(second.path.with_suffix(".idx").read_bytes())
    with pytest.raises(UserError, match=f"shard_sha256 is '{second.sha256}', expected '{first.sha256}'"):
        load_index(first)


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    """Names in any language survive; the same shards give the same bytes."""
    shards = [Shard(tmp_path / "ä-0.tar", 2, 1024, "aa"), Shard(tmp_path / "ä-1.tar", 1, 512, "bb")]
    written = []
    for _ in range(2):
        path = write_manifest(tmp_path, "bäume", shards, 4, has_names=False, shuffle={"scope": "none"})
        written.append(path.read_bytes())
    manifest = load_manifest(path)
    assert manifest.shards == tuple(shards) and manifest.name == "bäume" and manifest.class_names == ()
    assert written[0] == written[1]
