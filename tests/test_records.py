"""Parquet and TFRecord files as sources: the images and labels that were written, whatever was killed on the way."""

import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tfds_records import example, write_split

from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import UserError
from pretrain.shards import parquet as parquet_module
from pretrain.shards.archives import read_member
from pretrain.shards.build import read_dropped
from pretrain.shards.make import Options, make_part, make_shards
from pretrain.shards.parquet import Columns
from pretrain.shards.passes import FOLDER
from pretrain.shards.records import RowsSoFar
from pretrain.shards.tfrecord import file_records, read_record
from tests.test_building import refusal, tree

NAMES = ["ant", "bee", "cow"]
SMALL = Options(samples_per_shard=5, seed=2)


def image(number: int, format: str = "png") -> bytes:
    """An encoded picture of its own."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 9, 3)).astype(np.uint8)).save(file, format)
    return file.getvalue()


IMAGES = [image(number, ("png", "jpeg", "webp")[number % 3]) for number in range(23)]


def parquet(folder: Path, **options: Any) -> list[Path]:
    """Two files of a split in the layout of Hugging Face, ten and thirteen rows."""
    return [parquet_file(folder / f"train-{n:05d}-of-00002.parquet", *rows, **options) for n, rows in enumerate(HALVES)]


HALVES = ((IMAGES[:10], [n % 3 for n in range(10)]), (IMAGES[10:], [n % 3 for n in range(10, 23)]))


def parquet_file(
    path: Path,
    images: list[Any],
    labels: list[Any],
    *,
    names: list[str] | None = NAMES,
    more: dict[str, list] | None = None,
    plain: bool = False,
    group: int = 4,
) -> Path:
    """A file with row groups of four. names: of a ClassLabel in the schema. plain: images are bytes, no structs."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow.parquet import write_table

    rows = images if plain else [{"bytes": data, "path": None} for data in images]
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": labels, **(more or {})})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path, row_group_size=group)
    return path


def tfrecords(folder: Path) -> list[Path]:
    """The same rows as TFDS writes them, with the names of classes beside."""
    records = [example(image=[data], label=[n % 3], file_name=[b"x"]) for n, data in enumerate(IMAGES)]
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, "toy", "train", records, 2)
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return sorted(folder.glob("*.tfrecord-*"))


WRITERS = {"parquet": parquet, "tfrecord": tfrecords}


def content(out: Path) -> list[tuple[bytes, bytes]]:
    """Image and label of each sample of a set, in a fixed order."""
    manifest = load_manifest(out)
    found = (read_sample(manifest, index) for index in range(manifest.num_samples))
    return sorted((sample.image, sample.label) for sample in found)


EXPECTED = sorted((data, str(n % 3).encode()) for n, data in enumerate(IMAGES))


@pytest.mark.parametrize("kind", WRITERS)
def test_all_rows_are_in_the_shards(kind: str, tmp_path: Path) -> None:
    """Bytes and labels as they were written; a folder is its files; parts, then the rest, are the same bytes."""
    files = WRITERS[kind](tmp_path / "source")
    make_shards(files, None, tmp_path / "a" / "set", SMALL)
    assert content(tmp_path / "a" / "set") == EXPECTED
    assert load_manifest(tmp_path / "a" / "set").class_names == tuple(NAMES)
    for part in (1, 0):
        make_part([tmp_path / "source"], None, tmp_path / "b" / "set", (part, 2), SMALL)
    assert (tmp_path / "b" / "set" / FOLDER).exists()
    make_shards([tmp_path / "source"], None, tmp_path / "b" / "set", replace(SMALL, workers=1))
    assert {name for name, digest in tree(tmp_path / "a" / "set").items()} == set(tree(tmp_path / "b" / "set"))
    assert tree(tmp_path / "a" / "set") == tree(tmp_path / "b" / "set")
    assert not list((tmp_path / "b" / "set").glob(".*"))


def test_a_killed_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second file and before the manifest: what was unpacked is not unpacked again."""
    files = parquet(tmp_path / "source")
    real, out, read = parquet_module._rows, tmp_path / "set", []

    def rows(path: Path, *arguments: Any) -> Any:
        read.append(path)
        if len(read) == 2:
            raise KeyboardInterrupt
        return real(path, *arguments)

    monkeypatch.setattr(parquet_module, "_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        make_shards(files, None, out, SMALL)
    make_shards(files, None, out, SMALL)
    assert len(read) == 3 and len(set(read[:2])) == 2 and read[1] == read[2]
    assert content(out) == EXPECTED
    (out / FOLDER).mkdir()  # killed while it removed what it had kept
    assert "holds a data set already" in refusal(make_shards, files, None, out, SMALL)
    assert not (out / FOLDER).exists()


def test_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    """By metadata, by type and name, in dataset_infos.json; texts are classes; two candidates are a question."""
    labels, two = ["b", "a", "b"], {"coarse_label": [0, 0, 1]}
    path = parquet_file(tmp_path / "1" / "x.parquet", IMAGES[:3], labels, names=None, plain=True, more=two)
    make_shards([path], None, tmp_path / "one", SMALL)
    assert load_manifest(tmp_path / "one").class_names == ("a", "b")
    assert content(tmp_path / "one") == sorted(zip(IMAGES[:3], (b"1", b"0", b"1")))
    make_shards([path], None, tmp_path / "two", replace(SMALL, label_column="coarse_label"))
    assert content(tmp_path / "two") == sorted(zip(IMAGES[:3], (b"0", b"0", b"1")))
    more = {"labels": [0, 1, 0]}
    path = parquet_file(tmp_path / "3" / "x.parquet", IMAGES[:3], [0, 1, 2], names=None, more=more)
    assert "give --label-column NAME" in refusal(make_shards, [path], None, tmp_path / "no", SMALL)
    infos = {"default": {"features": {"label": {"_type": "ClassLabel", "names": NAMES}}}}
    (tmp_path / "3" / "dataset_infos.json").write_text(json.dumps(infos))
    make_shards([path], None, tmp_path / "three", SMALL)
    assert load_manifest(tmp_path / "three").class_names == tuple(NAMES)


HUB = [f"train-0000{n}-of-00003-{'abc'[n] * 16}.parquet" for n in range(3)]  # with the digest of each behind


@pytest.mark.parametrize(
    "given, said",
    [
        (HUB, None),
        (["0000.parquet", "0001.parquet"], None),
        (HUB[:2], "is one of 3, 2 were given, of which train-00002-of-00003 is missing"),
        ([*HUB, HUB[0]], "train-00000-of-00003 is too many"),
        ([*HUB[:2], HUB[2].replace("of-00003", "of-00004")], "train-00002-of-00003 is missing"),
        (["0000.parquet", "0001.parquet", "0000.parquet"], "0000.parquet: is given twice"),
        (["0000.parquet", "0001.parquet", "0002.parquet"], "0002.parquet: is given twice, the other time as"),
    ],
)
def test_parquet_files_of_a_split_are_complete(given: list[str], said: str | None, tmp_path: Path) -> None:
    """By the count in their names; where they have none, at least none is there twice, also by a link."""
    for number, name in enumerate(dict.fromkeys(given)):
        if name == "0002.parquet":
            (tmp_path / "in" / name).symlink_to("0000.parquet")
        else:
            parquet_file(tmp_path / "in" / name, IMAGES[2 * number : 2 * number + 2], [0, 1])
    files = [tmp_path / "in" / name for name in given]
    if said:
        assert said in refusal(make_shards, files, None, tmp_path / "set", SMALL)
        return
    make_shards(files, None, tmp_path / "set", SMALL)
    assert load_manifest(tmp_path / "set").num_samples == 2 * len(given)


def test_rows_without_an_image_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null, no image, more than is read; a BMP becomes a PNG, as in folders."""
    monkeypatch.setattr(parquet_module, "MAX_IMAGE_BYTES", 5000)
    images = [IMAGES[0], None, b"no image", bytes(5001), image(1, "bmp")]
    path = parquet_file(tmp_path / "x.parquet", images, [0, 1, 2, 0, 1])
    _, told = make_shards([path], None, tmp_path / "set", SMALL)
    assert told.notes["BMP converted to PNG"] == 1
    dropped = sorted(line.partition("x.parquet")[2] for line in read_dropped(tmp_path / "set"))
    assert [line[:3] for line in dropped] == ["[1]", "[2]", "[3]"]
    assert "holds no image" in dropped[0] and "5001 bytes, at most 5000" in dropped[2]
    assert sorted(label for _, label in content(tmp_path / "set")) == [b"0", b"1"]


def damaged(path: Path, how: str) -> list[Path]:
    """A file that cannot be used, or several that are no set."""
    if how == "cut":
        parquet_file(path, IMAGES[:3], [0, 1, 2])
        os.truncate(path, path.stat().st_size // 2)
    elif how == "no label":
        parquet_file(path, IMAGES[:3], [0, None, -1])
    elif how == "names differ":
        parquet_file(path, IMAGES[:3], [0, 1, 2])
        return [path, parquet_file(path.parent / "y" / path.name, IMAGES[:3], [0, 1, 2], names=["x"])]
    elif how == "splits":
        parquet_file(path, IMAGES[:3], [0, 1, 2])
        parquet_file(path.parent / "test-00000-of-00001.parquet", IMAGES[:3], [0, 1, 2])
        return [path.parent]
    elif how == "bomb":
        parquet_file(path, [bytes(100_000)] * 2000, [0] * 2000, group=2000)
    elif how == "folders of splits":
        parquet_file(path.with_name("0000.parquet"), IMAGES[:3], [0, 1, 2])
        return [
            path.with_name("0000.parquet"),
            parquet_file(path.parent.parent / "test" / "0000.parquet", IMAGES[:3], [0, 1, 2]),
        ]
    else:
        parquet_file(path, IMAGES[:3], LABELS[how], names=None)
    return [path]


LABELS = {"struct": [{"a": 1}] * 3, "list": [[0], [1], [0]]}


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", "not a readable parquet file"),
        ("no label", "[1]: label None is no class"),
        ("names differ", "has other classes than"),
        ("splits", "files of several splits"),
        ("folders of splits", "files of several splits (1 of in/.parquet, 1 of test/.parquet)"),
        ("bomb", "becomes 67,"),
        ("struct", "column label is 'struct<a: int64>', expected whole numbers or names"),
        ("list", "column label is a list; for several labels of an image write files and a .jsonl"),
    ],
)
def test_what_is_no_set_is_one_line(how: str, said: str, tmp_path: Path) -> None:
    """With the file's name; nothing stays that a later call would take."""
    files = damaged(tmp_path / "in" / "train-00000-of-00001.parquet", how)
    assert said in refusal(make_shards, files, None, tmp_path / "set", SMALL)
    assert not list((tmp_path / "set").glob("**/*.images"))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one line."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    assert "pip install -e '.[parquet]'" in refusal(make_shards, [path], None, tmp_path / "set", SMALL)


def test_records_of_a_split_are_complete(tmp_path: Path) -> None:
    """A file that is missing or left out, a record that is not there, and one without a label."""
    files = tfrecords(tmp_path / "t")
    assert "1 were given" in refusal(make_shards, files[:1], None, tmp_path / "set", SMALL)
    assert "00001-of-00002 is missing" in refusal(make_shards, files[:1] * 2, None, tmp_path / "set", SMALL)
    info = {"splits": [{"name": "train", "shardLengths": ["12", "12"]}]}
    (tmp_path / "t" / "dataset_info.json").write_text(json.dumps(info))
    assert "has 23 records, dataset_info.json says 24" in refusal(make_shards, files, None, tmp_path / "set", SMALL)
    other = replace(SMALL, label_column="other")
    assert "has 0 of other" in refusal(make_shards, files, None, tmp_path / "set", other)
    files[1].unlink()
    assert "is missing" in refusal(make_shards, files[:1], None, tmp_path / "set", SMALL)


TRAIN = [f"train-0000{n}-of-00002" for n in range(2)]


@pytest.mark.parametrize(
    "there, given, said",
    [
        (TRAIN, [""], None),
        ([name + ".tfrecord" for name in TRAIN], [""], None),
        (["part-1.tfrecord", "part-2.tfrecord"], [""], None),
        (TRAIN, [TRAIN[0]] * 2, "2 were given, of which train-00001-of-00002 is missing"),
        (TRAIN, [*TRAIN, TRAIN[0]], "train-00000-of-00002 is too many"),
        (["part-1.tfrecord", "part-2.tfrecord"], ["part-1.tfrecord"] * 2, "part-1.tfrecord: is given twice"),
        (["train.tfrecord", "validation.tfrecord"], [""], "files of several splits"),
        ([*TRAIN, "validation-00000-of-00001"], [""], "files of several splits"),
        (["a/0.tfrecord", "b/0.tfrecord"], ["a/0.tfrecord", "b/0.tfrecord"], "files of several splits"),
    ],
)
def test_files_of_one_split_by_any_name(there: list[str], given: list[str], said: str | None, tmp_path: Path) -> None:
    """As TensorFlow's script for ImageNet names them, with the ending behind, and by no rule; all of them, once."""
    for number, name in enumerate(there):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        records = [example(image__encoded=[IMAGES[number]], image__class__label=[number])]
        write_split(tmp_path, "toy", "x", records, 1)
        (tmp_path / "toy-x.tfrecord-00000-of-00001").rename(tmp_path / "in" / name)
    files = [tmp_path / "in" / name for name in given]
    if said:
        assert said in refusal(make_shards, files, None, tmp_path / "set", SMALL)
        return
    make_shards(files, None, tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == sorted((IMAGES[number], b"%d" % number) for number in range(2))


@pytest.mark.parametrize(
    "labels, said",
    [
        ([b"a", 0], "its label is a number"),
        ([0, "a"], "its label is a name"),
        (["a", "b", 1], "its label is a number"),
        (["a", None], "label None is no class"),
        ([b"a", b"\xff"], "a name in UTF-8"),
    ],
)
def test_labels_are_of_one_kind(labels: list[Any], said: str) -> None:
    """A number among names would be taken for a name's place; bytes that are no text would all be one name."""
    rows = RowsSoFar("x")
    for label in labels[:-1]:
        rows.add(0, b"", label)
    message = refusal(rows.add, 0, b"", labels[-1])
    assert said in message and message.startswith(f"x[{len(labels) - 1}]: ")


def test_columns_that_say_they_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and labels together; nothing is unpacked before."""
    path = parquet_file(tmp_path / "x.parquet", IMAGES[:8], [f"{n:0200}" for n in range(8)], names=None)
    num_bytes = sum(map(len, IMAGES[:8])) + 8 * 200
    monkeypatch.setattr(parquet_module, "max_unpacked_bytes", lambda _: num_bytes)
    rows = parquet_module._rows(path, Columns("image.bytes", "label", []))
    assert f"at most {num_bytes:,}" in refusal(next, rows)


def test_a_label_column_of_what_has_no_columns(tmp_path: Path) -> None:
    """It would have no effect."""
    (tmp_path / "x.npz").write_bytes(b"")
    other = replace(SMALL, label_column="x")
    with pytest.raises(UserError, match="--label-column is for parquet and TFRecord files"):
        make_shards([tmp_path / "x.npz"], None, tmp_path / "set", other)


def test_a_mount_that_gives_less_at_a_time_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounts of FUSE and of networks may: only nothing at all is the end of a file."""
    data = IMAGES[0]
    (tmp_path / "x").write_bytes(data)
    write_split(tmp_path, "toy", "train", [data], 1)
    (record,) = file_records(tmp_path / "toy-train.tfrecord-00000-of-00001")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: real(file, max(1, count // 3), at))
    assert read_member(tmp_path / "x", 0, len(data), len(data)) == data
    assert parquet_module._read(tmp_path / "x", 0, len(data), Counter(), False) == data
    assert read_record(record) == data
    with pytest.raises(UserError, match="ends at byte"):
        read_member(tmp_path / "x", 0, len(data) + 1, 1 << 20)
