"""The manifest and the indexes: they say where each sample lies, and are checked before they are believed."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain import storage
from pretrain.config import MAX_CLASSES
from pretrain.data import manifest as manifests
from pretrain.data import shard_list
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
from pretrain.data.order import Order
from pretrain.data.reader import read_sample
from pretrain.data.shard_list import MAX_SHARD_BYTES, MAX_SHARD_SAMPLES
from pretrain.data.store import Store
from pretrain.errors import StorageError, UserError
from pretrain.json_files import Fields
from pretrain.train.datasets import warn_of_small_store


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
        ({"shards": None}, "shards is null"),
        ({"shards": [{"path": "a.tar"}]}, "shards[0]: num_bytes is missing"),
        ({"label": {"names": None}}, "label: num_classes is missing"),
        ({"label": {"kind": "boxes", "names": None, "num_classes": 5}}, "'boxes', expected one of class, multi"),
        ({"label": {"names": None, "num_classes": "many"}}, "'many'"),
        ({"label": {"names": "nothing.json", "num_classes": 5}}, "nothing.json: not found"),
        ({"label": {"names": "a\n\x1b", "num_classes": 5}}, r"a\n\x1b: not found"),
        ({"label": {"names": "../secret.json", "num_classes": 5}}, "expected a path inside the manifest's folder"),
        ({"shards": [{"path": "../x.tar"}]}, "'../x.tar', expected a path inside"),
        ({"shards": [{"path": "/etc/passwd"}]}, "'/etc/passwd', expected a path inside"),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], said: str, own_shards: Path) -> None:
    """Foreign, inconsistent or hostile manifests end in one line that names the file and the values."""
    assert said in refusal(changed(own_shards, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"a": 1}', "\x00\xff"])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    """Empty, cut and foreign files are refused by name."""
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    assert f"{tmp_path / 'manifest.json'}: is " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "a.tar",
            "a.tar: is a shard, expected a folder with a manifest.json; make its index with python tools/make_sh",
        ),
        ("a.tar.gz", "a.tar.gz: is a shard, expected"),
        ("*.tar", "is a pattern of shards, expected a folder with a manifest.json; make its index with python tools/"),
        ("a-{000..127}.tar", "is a pattern of shards, expected"),
        ("a.tgz", "a.tgz: is not JSON"),
        ("b.tar", "b.tar: not found"),
    ],
)
def test_a_shard_is_no_manifest(name: str, told: str, tmp_path: Path) -> None:
    """Other loaders are given the tars themselves, or a pattern."""
    for there in ("a.tar", "a.tar.gz", "a.tgz"):
        (tmp_path / there).write_bytes(b"\x1f\x8b\0")
    assert told in refusal(tmp_path / name)


def test_a_missing_manifest_names_the_tool(tmp_path: Path) -> None:
    """Who points to a folder without manifest is told what makes one."""
    there = f"make shards and manifest with tools/make_shards.py {tmp_path} OUT, and give OUT"
    assert f"{tmp_path}/manifest.json: not found; {there}" == refusal(tmp_path)
    assert refusal(tmp_path / "no").endswith("no: not found; make shards and manifest with tools/make_shards.py")
    assert refusal(Path("no/set")).endswith(f"tools/make_shards.py; relative paths start at {Path.cwd()}")


@pytest.mark.parametrize("records", [".unfinished-set", ".indexing"])
def test_an_unfinished_set_is_called_so(records: str, tmp_path: Path) -> None:
    """A set whose making was killed has no manifest yet: its command goes on, another one is not needed."""
    (tmp_path / records).mkdir()
    assert f"{tmp_path} is unfinished: the same tools/make_shards.py command" in refusal(tmp_path)


@pytest.mark.parametrize("slow", [False, True])
def test_missing_and_cut_shards_are_found_at_the_start(
    slow: bool, own_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard or an index that is gone, or has another size, is named before the first step; where the disk is slow, by
    many threads."""
    if slow:
        monkeypatch.setattr(manifests, "_LOOKED_AT", 1)
        monkeypatch.setattr(manifests, "_SLOW_S", -1.0)
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


@pytest.mark.parametrize("listed", [True, False])
def test_files_are_looked_at_once(listed: bool, own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard its size is asked for, of an index nothing where the folder could be listed; else of both."""
    manifest, real, asked = load_manifest(own_shards), os.lstat, list[str]()
    monkeypatch.setattr(os, "lstat", lambda path: asked.append(os.path.splitext(path)[1]) or real(path))
    if not listed:
        monkeypatch.setattr(os, "scandir", denied)
    check_shards(manifest)
    of_files = [ending for ending in asked if ending in (".tar", ".idx")]  # without those of folders, by realpath
    assert sorted(of_files) == [".idx"] * (0 if listed else 3) + [".tar"] * 3


def denied(*_: object) -> Any:
    """A call that the disk refuses."""
    raise PermissionError(13, "Permission denied", "somewhere")


def test_a_disk_that_does_not_say_a_size_may_do_later(own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 75, with the place."""
    manifest, real = load_manifest(own_shards), os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: denied() if str(path).endswith("1.tar") else real(path))
    with pytest.raises(StorageError, match="somewhere: cannot be looked at .Permission denied"):
        check_shards(manifest)


def test_an_index_reads_back_as_written(tmp_path: Path) -> None:
    """Offsets and key checksums survive the file, up to the largest 32-bit block (2 TiB)."""
    shard = Shard(str(tmp_path / "a.tar"), 3, 1 << 41, "digest")
    offsets, keys = np.array([0, 3, 9, (1 << 32) - 1]), np.array([1, 0, (1 << 32) - 1])
    write_index(shard, ShardIndex(offsets, keys))
    index = load_index(shard)
    assert index.offsets.tolist() == offsets.tolist() and index.key_crc32.tolist() == keys.tolist()
    assert index.byte_range(2) == (9 * 512, ((1 << 32) - 1) * 512)
    assert not list(tmp_path.glob(".tmp-*"))


def test_two_nodes_may_write_an_index_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements of an array that come to the same shard: each has a temporary file of its own until its rename."""
    shard = Shard(str(tmp_path / "a.tar"), 3, 1 << 20, "digest")
    index, real, others = ShardIndex(np.arange(4) * 3, np.arange(3)), storage.fsync_path, []

    def interrupted(path: Path) -> None:
        if not others:
            others.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                write_index(shard, index)
        real(path)

    monkeypatch.setattr(storage, "fsync_path", interrupted)
    write_index(shard, index)
    assert load_index(shard).offsets.tolist() == [0, 3, 6, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["a.idx"]


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
    shards = [Shard(str(tmp_path / f"ä-{n}.tar"), 2 - n, 4096, f"{n}" * 64) for n in range(2)]
    written = []
    for _ in range(2):
        path = write_manifest(tmp_path, "bäume", shards, 4, has_names=False, shuffle={"scope": "none"})
        written.append(path.read_bytes())
    manifest = load_manifest(path)
    assert manifest.shards == tuple(shards) and manifest.name == "bäume" and manifest.class_names == ()
    assert written[0] == written[1]


# --- from strangers --------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
NUMBERS = [None, True, "5", [], {}, 5.0, NAN, INFINITY, -1, 10**12, 10**30]
WRONG_VALUES: dict[str, list[Any]] = {  # key of the manifest, or of its first shard -> what it must not be
    "label": [None, [], 5, "x", True, INFINITY],
    "label.num_classes": [*NUMBERS, 0, MAX_CLASSES + 1],
    "label.kind": [5, [], "boxes"],
    "label.names": [5, ["classes.json"], ".", "..", "x/../classes.json", "/classes.json", "a\0b", "b" * 256],
    "name": [None, 5, [], "\ud800"],
    "version": ["1", 2, 1.5, [], -1],
    "num_samples": [*NUMBERS, 103.0, 0, 104],
    "num_shards": [*NUMBERS, 3.0],
    "num_bytes": [*NUMBERS, 0],
    "shards": [None, {}, 5, "x", [None], [[]], [5]],
    "shard.num_samples": [*NUMBERS, 40.0, 0, MAX_SHARD_SAMPLES + 1],
    "shard.num_bytes": [*NUMBERS, 0, 1023, MAX_SHARD_BYTES + 1],
    "shard.sha256": [None, [], {}, 5, "", "g" * 64, "a" * 63, "a" * 65, "A" * 64 + "\n"],
    "shard.path": [None, 5, [], "", ".", "..", "./a.tar", "x//a.tar", "x/../a.tar", "a.tar/", "a\0.tar", "a.idx"]
    + ["a.npz", "\ud800.tar", "a" * 5000, "a" * 252 + ".tar", "\u00e4" * 126 + ".tar", "x/" * 2500 + "a.tar"],
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_every_value_is_checked_for_type_and_range(key: str, own_shards: Path) -> None:
    """Whatever stands in the place of a value: one short line that names the file, and nothing is allocated by it."""
    path = own_shards / "manifest.json"
    good = path.read_text()
    *place, last = key.split(".")
    for value in WRONG_VALUES[key]:
        values = json.loads(good)
        at = values["shards"][0] if place == ["shard"] else values["label"] if place else values
        at[last] = value
        path.write_text(json.dumps(values))
        said = refusal(path)
        assert said.startswith(str(path)) and len(said) < 500, value
    path.write_text(good)
    assert load_manifest(path).num_samples == 103


def test_the_short_way_is_the_long_one(own_shards: Path) -> None:
    """Shards as they are usually listed are read in one look, to the same; what is wrong is left to the long way."""
    good = json.loads((own_shards / "manifest.json").read_text())["shards"][0]
    for usual in (good, good | {"path": "x" * 251 + ".tar"}, good | {"num_bytes": 10**12}):
        assert shard_list._plain_shard(usual) == shard_list._shard_of(Fields(usual, "x"))
    strange = [good | {"path": path} for path in ("https://host/a.tar", "train/a.tar", "x" * 252 + ".tar", "ä.tar")]
    for key in ("path", "num_samples", "num_bytes", "sha256"):
        strange.append({other: good[other] for other in good if other != key})
        strange += [good | {key: value} for value in WRONG_VALUES[f"shard.{key}"]]
    strange.remove(good | {"num_bytes": 10**12})
    for entry in strange:
        assert shard_list._plain_shard(entry) is None, entry


def test_a_shard_is_texts_and_numbers(shard_folder: Path) -> None:
    """A path for each of 30,000 would take a fifth of a second."""
    shards = load_manifest(shard_folder).shards
    assert [type(value) for value in shards[1]] == [str, int, int, str, str]
    assert [shard.path for shard in shards] == sorted(shard_folder.glob("*.tar"))


def test_a_store_that_is_too_small_is_told(shard_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where shards are remote."""
    manifest = load_manifest(shard_folder)
    warn_of_small_store(manifest, Order(manifest.num_samples, 0, 4, 0))
    assert not manifest.is_remote
    far = tuple(Shard(f"/set/{n}.tar", 2, 10_000, "0" * 64, f"https://there/{n}.tar") for n in range(3))
    manifest = replace(manifest, shards=far, store=Store(shard_folder, 15_000))
    warn_of_small_store(manifest, Order(manifest.num_samples, 0, 4, 0))
    assert "remote shards do not fit data.store_gb" in capsys.readouterr().out


@pytest.mark.parametrize("again", [[0, 0], [0, 1, 2, 1], [2, 2, 2, 2]], ids=str)
def test_a_shard_that_is_listed_twice_is_refused(again: list[int], own_shards: Path) -> None:
    """Though the totals fit: its samples would come as often."""
    values = json.loads((own_shards / "manifest.json").read_text())
    values["shards"] = shards = [values["shards"][number] for number in again]
    totals = {f"num_{key}": sum(shard[f"num_{key}"] for shard in shards) for key in ("samples", "bytes")}
    changed(own_shards, shards=shards, num_shards=len(shards), **totals)
    assert f"lists '{shards[-1]['path']}' twice" in refusal(own_shards)


@pytest.mark.parametrize("value", [0, -1, -(10**30)])
@pytest.mark.parametrize("key", ["num_samples", "num_bytes"])
def test_no_shard_makes_up_for_another(key: str, value: int, own_shards: Path) -> None:
    """A shard of nothing, or of less, whose neighbour has as much more: the totals fit."""
    shards = json.loads((own_shards / "manifest.json").read_text())["shards"]
    shards[1][key] += shards[0][key] - value
    shards[0][key] = value
    assert f"shards[0]: {key} is {value}, expected an integer from 1" in refusal(changed(own_shards, shards=shards))


@pytest.mark.parametrize("file", ["manifest.json", "classes.json"])
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[" * 40 + "]" * 40, "9" * 5000, "\ufeff[]"], ids=len
)
def test_deep_nesting_and_long_numbers_are_refused(text: str, file: str, own_shards: Path) -> None:
    """In both files, by their names."""
    (own_shards / file).write_text(text)
    assert refusal(own_shards).startswith(f"{own_shards / file}: is n")


@pytest.mark.parametrize(
    "names",
    [["a"], [], ["a"] * 4, ["a"] * 100, {"0": "a"}, "abcde", 5, None, [0, 1, 2, 3, 4], [None] * 5, [["a"]] * 5]
    + [[*"abcd", "\udcff"], [*"abcd", "x" * 5000], [*"abcd", {"name": "e"}], [*"abcd", True]],
    ids=repr,
)
def test_class_names_are_as_many_texts_as_classes(names: Any, own_shards: Path) -> None:
    """Others would become the names of the weights' classes, or be lost without a word."""
    (own_shards / "classes.json").write_text(json.dumps(names))
    said = refusal(own_shards)
    assert said.startswith(f"{own_shards / 'classes.json'}: ") and len(said) < 400


def test_the_manifest_does_not_look_at_shards(tmp_path: Path) -> None:
    """30,000 of them would take seconds on a shared disk: that is for `check_shards`."""
    shards = [Shard(str(tmp_path / f"{n}.tar"), 3, 1 << 20, f"{n:064x}") for n in range(500)]
    manifest = load_manifest(write_manifest(tmp_path, "absent", shards, 4, has_names=False, shuffle=None))
    assert manifest.num_samples == 1500
    with pytest.raises(UserError, match="0.tar: listed in .* but not found"):
        check_shards(manifest)


# --- links -----------------------------------------------------------------------------------------------------------


def moved_out(path: Path, aside: Path) -> None:
    """Moves a file to another folder and leaves a link to it."""
    aside.mkdir(exist_ok=True)
    path.symlink_to(path.rename(aside / path.name))


@pytest.mark.parametrize("name", ["manifest.json", "classes.json", "trees-000001.tar", "trees-000001.idx"])
def test_a_link_out_of_the_folder_is_refused(name: str, own_shards: Path, tmp_path: Path) -> None:
    """Of every file: what it leads to may be any file of the reader's."""
    moved_out(own_shards / name, tmp_path / "trees-elsewhere")  # a name that begins alike is another folder
    with pytest.raises(UserError, match=rf"{name}: leads to .*trees-elsewhere/{name}, outside the data set's folder"):
        check_shards(load_manifest(own_shards))


def test_other_ways_out_of_the_folder_are_refused(own_shards: Path, tmp_path: Path) -> None:
    """By a folder that is a link, in two steps, to nothing, and in a circle."""
    (own_shards / "far").symlink_to(tmp_path)
    names = {"far/a.tar": None, "step.tar": "far/a.tar", "gone.tar": tmp_path / "nothing", "round.tar": "round.tar"}
    for name, target in names.items():
        if target:
            (own_shards / name).symlink_to(target)
    (tmp_path / "a.tar").write_bytes(bytes(4096))
    for name in names:
        shard = {"path": name, "num_samples": 1, "num_bytes": 4096, "sha256": "0" * 64}
        changed(own_shards, shards=[shard], num_samples=1, num_shards=1, num_bytes=4096)
        with pytest.raises(UserError, match=f"{name}: (leads to|cannot be looked at)") as caught:
            check_shards(load_manifest(own_shards))
        assert "\n" not in str(caught.value)


def test_links_within_the_folder_and_to_the_folder_are_followed(own_shards: Path, tmp_path: Path) -> None:
    """A set on another disk is reached by one link; its files may lie in folders of their own."""
    for name in ("classes.json", "trees-000000.tar", "trees-000002.idx"):
        moved_out(own_shards / name, own_shards / "parts")
    (tmp_path / "link").symlink_to(own_shards)
    (tmp_path / "again").symlink_to("link")
    for folder in (own_shards, tmp_path / "link", tmp_path / "again"):
        manifest = load_manifest(folder)
        check_shards(manifest)
        assert load_index(manifest.shards[2]).offsets[0] == 0


def test_two_names_of_one_shard_are_found(own_shards: Path) -> None:
    """A link from one listed shard to another one, with an index of its own."""
    for ending in ("tar", "idx"):
        (own_shards / f"again.{ending}").symlink_to(f"trees-000000.{ending}")
    first = json.loads((own_shards / "manifest.json").read_text())["shards"][0]
    shards = [first, {**first, "path": "again.tar"}]
    changed(own_shards, shards=shards, num_samples=80, num_shards=2, num_bytes=2 * first["num_bytes"])
    with pytest.raises(UserError, match="lists again.tar, which is the same file as trees-000000.tar"):
        check_shards(load_manifest(own_shards))


@pytest.mark.parametrize("name", ["manifest.json", "classes.json", "trees-000001.tar", "trees-000001.idx"])
def test_what_is_no_file_is_refused(name: str, own_shards: Path) -> None:
    """A pipe would wait for its writer, for ever; a folder has no bytes."""
    for make in (os.mkfifo, os.mkdir):
        path = own_shards / name
        path.rename(own_shards / "aside")
        make(path)
        with pytest.raises(UserError, match=f"{name}: is not a file"):
            check_shards(load_manifest(own_shards))
        path.unlink() if path.is_fifo() else path.rmdir()
        (own_shards / "aside").rename(path)


# --- indexes with a valid checksum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offsets, said",
    [
        ([0, 9, 6, 12, 15], "sample 1 ends at block 6"),
        ([0, 6, 6, 12, 15], "sample 1 ends at block 6"),
        ([(1 << 32) - 1, 6, 9, 12, 15], "sample 0 ends at block 6"),
        ([0, 3, 6, 9, 0], "sample 3 ends at block 0"),
        ([0, 3, 6, 9, 17], "its last sample ends at byte 8704, the shard has 8192"),
        ([0, 3, 6, 9, (1 << 32) - 1], "its last sample ends at byte"),
        ([16, 17, 18, 19, 20], "its last sample ends at byte"),
    ],
)
def test_offsets_that_fall_or_overlap_are_damaged_data(offsets: list[int], said: str, tmp_path: Path) -> None:
    """Though the checksum fits. Not a disk that fails for now: reading again cannot help, exit 2."""
    shard = Shard(str(tmp_path / "a.tar"), 4, 8192, "digest")
    shard.path.write_bytes(bytes(8192))
    write_index(shard, ShardIndex(np.array(offsets), np.zeros(4)))
    with pytest.raises(UserError, match=said) as caught:
        read_sample(Manifest(tmp_path, "", "", 4, 5, (), (shard,)), 1)
    assert caught.value.exit_code == 2 and "a.idx: does not fit its shard" in str(caught.value)


@pytest.mark.parametrize(
    "line", [b"[" * 3000, b'{"a":' * 800, b"[]", b"5", b"null", b"9" * 4090, b"", b"{" + b" " * 9000]
)
def test_an_index_whose_header_is_none_is_refused(line: bytes, own_shards: Path) -> None:
    """Nested, of another type, or longer than any header."""
    shard = load_manifest(own_shards).shards[0]
    path = shard.path.with_suffix(".idx")
    path.write_bytes(line + b"\n" + path.read_bytes().partition(b"\n")[2])
    with pytest.raises(UserError, match="a.*.idx: (does not fit its shard|has more than)") as caught:
        load_index(shard)
    assert len(str(caught.value)) < 600


def test_an_index_is_not_read_beyond_what_its_samples_need(own_shards: Path) -> None:
    """A terabyte of holes behind it costs nothing; a number of samples that needs as much is none."""
    shard = load_manifest(own_shards).shards[0]
    os.truncate(shard.path.with_suffix(".idx"), 1 << 40)
    with pytest.raises(UserError, match="has more than 4,580 bytes"):
        load_index(shard)


def test_nobody_writes_an_index_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of samples holds for the writer too."""
    monkeypatch.setattr(manifests, "MAX_SHARD_SAMPLES", 2)
    with pytest.raises(UserError, match="a.tar: has 3 samples, at most 2"):
        write_index(Shard(str(tmp_path / "a.tar"), 3, 8192, ""), ShardIndex(np.arange(4), np.zeros(3)))
