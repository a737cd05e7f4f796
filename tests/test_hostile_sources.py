"""Sources of data sets from strangers: whatever is wrong with an array, a list or a record is one line."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c
from scipy.io import savemat

from pretrain.data.reader import MAX_LABELS, BadSample, parse_labels
from pretrain.errors import UserError
from pretrain.shards import matlab
from pretrain.shards.build import build
from pretrain.shards.counts import FILE as COUNTS
from pretrain.shards.counts import read_counts, table_of
from pretrain.shards.existing import index_existing
from pretrain.shards.imagenet import DEVKIT, imagenet, val_labels
from pretrain.shards.make import Options, make_shards
from pretrain.shards.originals import dtd, flowers, pets
from pretrain.shards.packs import pack_originals
from pretrain.shards.sources import Item, Told, npz_items
from pretrain.shards.tfrecord import Record, file_records, parse_example, read_features, split_records, tfds_folder
from pretrain.shards.tfrecord import masked_crc32c as masked

GOOD = {
    "blob": np.frombuffer(b"\x89PNG\x89PNG", np.uint8),
    "offset": np.array([0, 4, 8]),
    "label": np.array([0, 1], np.uint8),
    "classes": np.array(["a", "b"]),
}


def refusal(function: Callable, *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused, checked to be one short line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


def npz(path: Path, **changes: Any) -> Path:
    """An archive of two images, or something like it."""
    np.savez(path, **(GOOD | changes))
    return path


def raw_npz(path: Path, member: bytes, **options: Any) -> Path:
    """The same with the bytes of `label.npy` as given."""
    np.savez(path, **{name: array for name, array in GOOD.items() if name != "label"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label.npy", member)
    return path


def npy(header: bytes, version: bytes = b"\x01\x00") -> bytes:
    """The bytes of an array with this header and two bytes of data."""
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + b"\0\1"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"label": np.array([0.0, np.nan])}, "label is float64, expected whole numbers"),
        ({"label": np.array([0.0, np.inf])}, "label is float64"),
        ({"label": np.array(["0", "1"])}, "label is <U1"),
        ({"label": np.array([0, 1], "datetime64[s]")}, "expected that of a plain array"),
        ({"label": np.array([0, 1j])}, "expected one row of numbers"),
        ({"label": np.array([True, False])}, "expected one row of numbers"),
        ({"label": np.array([[0], [1]])}, "label.npy is int64 of shape (2, 1), expected one row"),
        ({"label": np.array(1)}, "of shape (), expected one row"),
        ({"label": np.array([], int)}, "has no samples"),
        ({"label": np.array([0, 10**18])}, "label 1000000000000000000 is not one of 0..1048575 (number 1)"),
        ({"label": np.array([0, 2**64 - 1], np.uint64)}, "label 18446744073709551615 is not one of"),
        ({"label": np.array([-1, 1])}, "label -1 is not one of"),
        ({"label": np.array([0, 1], ">i4"), "offset": np.array([0, 9, 8])}, "offset 9 is not one of 0..8"),
        ({"offset": np.array([0.0, 4.0, 8.0])}, "offset is float64, expected whole numbers"),
        ({"offset": np.array(["0", "4", "8"])}, "offset is <U1"),
        ({"offset": np.array([[0, 4, 8]])}, "expected one row"),
        ({"offset": np.array(8)}, "expected one row"),
        ({"offset": np.array([], int)}, "0 offsets up to 0 for 2 labels and 8 bytes"),
        ({"offset": np.array([0, -4, 8])}, "offset -4 is not one of 0..8"),
        ({"offset": np.array([0, 2**63, 8], np.uint64)}, "offset 9223372036854775808 is not one of"),
        ({"offset": np.array([5, 4, 8])}, "rising to the last byte"),
        ({"offset": np.array([0, 4, 7])}, "rising to the last byte"),
        ({"blob": np.zeros(8)}, "blob is float64, expected uint8"),
        ({"blob": np.zeros((2, 4), np.uint8)}, "expected one row"),
        ({"classes": np.array(["a", "b\ud800"])}, "classes b\\ud800 (number 1) has half of a letter"),
        ({"classes": np.array([b"a", b"\xff"])}, "classes cannot be read as text"),
        ({"classes": np.array([0x110000, 97], "<u4").view("<U1")}, "classes cannot be read as text"),
        ({"classes": np.array("ab")}, "expected one row"),
        ({"classes": np.array([1.0, 2.0])}, "classes is float64, expected text"),
    ],
)
def test_arrays_of_something_else_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    """Types, shapes and ranges of each array, before anything is made of it."""
    message = refusal(npz_items, npz(tmp_path / "val.npz", **changes), Told())
    assert said in message and "val.npz" in message
    refusal(pack_originals, tmp_path / "val.npz")


def test_names_may_be_bytes_or_numbers(tmp_path: Path) -> None:
    """As text; the archive of this file's tests is a good one."""
    for classes in (np.array([b"a", b"b"]), np.array(["a", "b"])):
        items, names = npz_items(npz(tmp_path / "a.npz", classes=classes), Told())
        assert names == ["a", "b"] and [(item.label, item.read()) for item in items] == [
            (0, b"\x89PNG"),
            (1, b"\x89PNG"),
        ]
    assert npz_items(npz(tmp_path / "a.npz", classes=np.array([7, 8])), Told())[1] == ["7", "8"]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, a flipped byte anywhere, empty, something else: zipfile, zlib and numpy raise nine types."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **GOOD)
    data = path.read_bytes()
    for cut in range(0, len(data), 5):
        path.write_bytes(data[:cut])
        assert "a.npz: not an archive of images (arrays blob, offset, label)" in refusal(npz_items, path, Told())
    for place in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            npz_items(path, Told())
        except UserError as error:
            assert "\n" not in str(error)
    for other in (b"\x89PNG\r\n\x1a\n" + bytes(4096), gzip.compress(data), bytes(10_240), b"[1, 2]"):  # renamed
        path.write_bytes(other)
        assert "a.npz: not an archive of images" in refusal(npz_items, path, Told())
    path.write_bytes(b"PK\5\6" + bytes(18))
    assert "no array 'blob'" in refusal(npz_items, path, Told())


@pytest.mark.parametrize(
    "member, said",
    [
        (npy(b"{'descr': (\n"), "Error"),
        (npy(b"{'descr': '<i8"), "Error"),
        (npy(b"(" * 5000), "Error"),
        (npy(b"[" * 9000 + b"]" * 900), "Error"),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2,), }"), "Error"),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }"), "has 2 bytes for uint8"),
        (npy(b"{'descr': '|V0', 'fortran_order': False, 'shape': (2,), }"), "whose values have no bytes"),
        (npy(b"{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,), }"), "no bytes"),
        (npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"), "expected one row of numbers"),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2.0,), }"), "Error"),
        (npy(b" " * 20_000), "label.npy has a header of 20,000 bytes, expected at most 10,000"),
        (npy(b" " * (30 << 20), b"\x02\x00"), "a header of 31,457,280 bytes, expected at most"),
        (npy(b" " * (70 << 20), b"\x02\x00"), "at most 67,108,864"),
        (npy(b"{}", b"\x03\x00"), "expected that of a plain array"),
        (npy(b"{}", b"\x09\x09"), "no array of numpy's, of version 1 to 3"),
        (b"no array", "Error"),
        (b"", "Error"),
    ],
    ids=range(17),
)
def test_headers_of_arrays_are_refused_unread(member: bytes, said: str, tmp_path: Path) -> None:
    """Whatever a parser of headers could stumble over, and lengths that would be read before they are looked at."""
    assert said in refusal(npz_items, raw_npz(tmp_path / "a.npz", member), Told())


def test_zips_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Encrypted, or packed by a method that nobody has."""
    path = npz(tmp_path / "a.npz")
    for place, value in ((6, 1), (8, 77)):  # flags, method of the first member, there and in the directory
        data = bytearray(path.read_bytes())
        data[place] = value
        data[data.index(b"PK\1\2") + place + 2] = value
        (tmp_path / "b.npz").write_bytes(data)
        assert "not an archive of images" in refusal(npz_items, tmp_path / "b.npz", Told())


def matlab_file(path: Path, **arrays: Any) -> Path:
    """A Matlab file."""
    savemat(path, arrays)
    return path


@pytest.mark.parametrize(
    "labels, said",
    [
        ([1.0, np.inf], "inf is not a whole number"),
        (np.zeros((1, 2_000_000), np.uint8), "more than 1048576 values"),
    ],
)
def test_matlab_files_of_something_else_are_refused(labels: Any, said: str, tmp_path: Path) -> None:
    """Labels and numbers of images are whole numbers, and not very many."""
    (tmp_path / "jpg").mkdir()
    (tmp_path / "jpg/image_00001.jpg").touch()
    matlab_file(tmp_path / "imagelabels.mat", labels=labels)
    matlab_file(tmp_path / "setid.mat", trnid=[1], valid=[1], tstid=[1])
    assert said in refusal(flowers, tmp_path)


@pytest.mark.parametrize("value", [np.nan, 1.5, 1e300, "1", True, None, [1], 10**30])
def test_numbers_of_matlab_files_are_whole(value: object) -> None:
    """A float that is one counts; nothing else does."""
    assert matlab.whole(3.0) == matlab.whole(3) == 3
    with pytest.raises(ValueError, match="is not a whole number"):
        matlab.whole(value)


def test_a_matlab_file_of_many_bytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of 1 GB; and a devkit whose numbers are none."""
    (tmp_path / "jpg").mkdir()
    with (tmp_path / "imagelabels.mat").open("wb") as file:
        file.truncate(1 << 30)
    assert "1073741824 bytes, at most 67108864" in refusal(flowers, tmp_path)
    monkeypatch.setattr("pretrain.shards.imagenet.read_matlab", lambda data: {"synsets": [{"ILSVRC2012_ID": 1e999}]})
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    folder.mkdir()
    (folder / "meta.mat").touch()
    assert "holds no ILSVRC2012_validation_ground_truth.txt" in refusal(val_labels, tmp_path)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    assert "cannot be used" in (message := refusal(val_labels, tmp_path)) and "inf is not a whole" in message
    monkeypatch.setattr(matlab, "_MAX_OUTPUT_BYTES", 3)
    with pytest.raises(ValueError, match="more than 3 bytes as text"):
        matlab.read_matlab(matlab_file(tmp_path / "a.mat", a=[1]).read_bytes())


def test_lists_of_something_else_are_refused(tmp_path: Path) -> None:
    """Pets, DTD, ImageNet: names that are not UTF-8, numbers that are digits to Unicode alone, endless ones."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pug_1.jpg").touch()
    (tmp_path / "annotations").mkdir()
    lists = tmp_path / "annotations/trainval.txt"
    for line, said in (
        (b"pug_1 \xb2\n", "is not a name and a class"),
        ("pug_1 ²\n".encode(), "is not a name and a class"),
        (b"pug_1 " + b"9" * 5000, "is not a name and a class"),
        (b"\xff\x1b[2J 1\n", "images hold no such file"),
    ):
        lists.write_bytes(line)
        assert said in refusal(pets, tmp_path)
    with lists.open("wb") as file:
        file.truncate(1 << 30)
    assert "1073741824 bytes, at most 16777216" in refusal(pets, tmp_path)
    (tmp_path / "dtd/images/banded").mkdir(parents=True)
    (tmp_path / "dtd/images/banded/banded_1.jpg").touch()
    (tmp_path / "dtd/labels").mkdir()
    (tmp_path / "dtd/labels/train1.txt").write_bytes(b"banded/\xff.jpg\n")
    assert "which has no file" in refusal(dtd, tmp_path)
    (tmp_path / "val").mkdir()
    for text, said in ((b"\xff\n", "not a list of labels"), (b"9" * 5000, "from 99999"), (b"", "0 validation labels")):
        (tmp_path / "val_labels.txt").write_bytes(text)
        assert said in refusal(imagenet, tmp_path)
    (tmp_path / "val_labels.txt").unlink()
    np.savez(tmp_path / "imagenet_val_labels.npz", label=np.array([np.nan]))
    assert "label is float64" in refusal(imagenet, tmp_path)
    (tmp_path / "imagenet_val_labels.npz").write_bytes(b"PK\3\4")
    assert "not an archive" in refusal(imagenet, tmp_path)
    (tmp_path / DEVKIT).write_bytes(b"\x1f\x8b")
    assert "not a readable tar" in refusal(imagenet, tmp_path)


def test_labels_of_packs_have_a_limit(tmp_path: Path) -> None:
    """A class has at most nine digits, its member few bytes."""
    for label, said in ((b"9" * 5000, "expected a.cls with digits"), (b" " * 20_000 + b"1", "20001 bytes, at most")):
        with tarfile.open(tmp_path / "val.tar", "w") as tar:
            for name, data in (("a.jpg", b"x"), ("a.cls", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert said in refusal(pack_originals, tmp_path / "val.tar")


def test_an_image_of_gigabytes_is_left_out_unread(tmp_path: Path) -> None:
    """As one of a folder: by its size alone."""
    with (tmp_path / "val.tar").open("wb") as file:
        for name, size in (("a.cls", 1), ("a.jpg", 3 << 30)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.seek(-(-size // 512) * 512, 1)
            if size == 1:
                file.seek(-512, 1)
                file.write(b"1".ljust(512, b"\0"))
        file.write(bytes(1024))
    (original,) = pack_originals(tmp_path / "val.tar")
    with pytest.raises(BadSample, match="3221225472 bytes, at most"):
        original.item.read()


def framed(data: bytes, length: int | None = None) -> bytes:
    """A record in its frame; length: what the frame claims."""
    size = struct.pack("<Q", len(data) if length is None else length)
    return size + struct.pack("<I", masked(size)) + data + struct.pack("<I", masked(data))


def field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, rest = b"", len(data)
    while rest > 127:
        length, rest = length + bytes([rest & 127 | 128]), rest >> 7
    return bytes([number << 3 | 2]) + length + bytes([rest]) + data


def example(kind: int, data: bytes) -> bytes:
    """A tf.train.Example of one feature."""
    return field(1, field(1, field(1, b"label") + field(2, field(kind, data))))


@pytest.mark.parametrize(
    "data, said",
    [
        (example(3, field(1, b"\1" * (1 << 20) + b"\1")), "a list of numbers of more than 1048576 bytes"),
        (example(2, field(1, b"\1" * (4 << 20))), "a list of numbers of more than"),
        (example(1, b"\x0a\x00" * 200_000), "more than 100000 fields"),
        (example(1, b"\x08\x00" * 200_000), "more than 100000 fields"),
        (example(3, field(1, b"\xff" * 12)), "more than 64 bits"),
    ],
    ids=range(5),
)
def test_records_have_limits(data: bytes, said: str, tmp_path: Path) -> None:
    """A byte becomes a number of 36 bytes: what no feature needs is refused before that."""
    path = tmp_path / "a"
    path.write_bytes(framed(data))
    (record,) = file_records(path)
    assert said in refusal(read_features, record)
    assert parse_example(example(3, field(1, b"\1" * 1000))) == {"label": [1] * 1000}


def test_a_record_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """Its frame is right; nothing of it is read."""
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(framed(b"", 3 << 30)[:12])
        file.truncate(4 << 30)
    assert "a record of 3221225472 bytes, at most 67108864" in refusal(lambda: list(file_records(path)))
    assert crc32c(b"123456789") == 0xE3069283 and isinstance(Record(path, 0, 0, 0).id, str)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 200_000, "is nested more than"),
        ("[]", "expected an object"),
        ('{"splits": {}}', "splits is {}, expected a list"),
        ('{"splits": [1]}', "splits[0]: is 1, expected an object"),
        ('{"splits": [{"name": null}]}', "name is null"),
        ('{"splits": [{"name": "train", "shardLengths": 3}]}', "shardLengths is 3, expected a list of whole numbers"),
        ('{"splits": [{"name": "train", "shardLengths": [1e400]}]}', "expected a list of whole numbers"),
        ('{"splits": [{"name": "train", "shardLengths": ["9999999999999999"]}]}', "expected a list of whole numbers"),
        ('{"configName": ["a"]}', "configName is ['a'], expected a text"),
        ("\xff", "not a description of a TFDS data set"),
        ("{" + " " * (65 << 20), "more than 67,108,864 bytes"),
    ],
    ids=range(11),
)
def test_descriptions_of_records_are_checked(text: str, said: str, tmp_path: Path) -> None:
    """dataset_info.json by type, with the key."""
    (tmp_path / "x-train.tfrecord-00000-of-00001").write_bytes(framed(b"1"))
    (tmp_path / "dataset_info.json").write_text(text, encoding="latin-1")
    if "configName" in text:
        message = refusal(tfds_folder, tmp_path, "x/a:1.*.*")
    else:
        message = refusal(split_records, tmp_path, "x", "train")
    assert said in message and "dataset_info.json" in message


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    """The names of the folder OUT and of tars stand in manifest.json, which is UTF-8."""
    tar = tmp_path / "a\udcff.tar"
    with tarfile.open(tar, "w") as file:
        for name in ("a.jpg", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"1"))
    assert "a\\udcff.tar: the tar's name is not UTF-8" in refusal(index_existing, [tar], [], tmp_path / "out")
    items = [Item(bytes, "png", 0, "")]
    out = tmp_path / "out\udcff"
    said = "the folder's name is not UTF-8"
    assert said in refusal(build, items, [], out, samples_per_shard=1, seed=0)
    good = tar.rename(tmp_path / "a.tar")
    assert said in refusal(make_shards, [good], None, out, Options())
    with tarfile.open(tmp_path / "val.tar", "w") as file:
        file.addfile(tarfile.TarInfo("k\udcff.jpg"))
        info = tarfile.TarInfo("k\udcff.cls")
        info.size = 1
        file.addfile(info, io.BytesIO(b"1"))
    assert "val.tar[k\\udcff.jpg]: the name is not UTF-8" in refusal(pack_originals, tmp_path / "val.tar")


@pytest.mark.parametrize("count, size", [(1001, 0), (21_841, 0), (2, 20_000)])
def test_labels_of_an_image_have_a_limit(count: int, size: int) -> None:
    """All rows of a batch are as long as the longest: 4,096 slots of 21,841 labels would take gigabytes."""
    raw = b"[" + b",".join(b"%d" % label for label in range(count)) + b" " * size + b"]"
    with pytest.raises(BadSample, match=f"at most {MAX_LABELS} labels in 16384 bytes"):
        parse_labels(raw, 21_841, multi_label=True)
    most = b"[" + b", ".join(b"%d" % label for label in range(1000)) + b"]"
    assert parse_labels(most, 21_841, multi_label=True) == list(range(1000))


def test_labels_beyond_the_limit_are_not_written(tmp_path: Path) -> None:
    """What every reader would refuse is not built."""
    items = [Item(bytes, "png", list(range(1001)), "first")]
    assert "first: 1001 labels, at most 1000" in refusal(build, items, [], tmp_path, samples_per_shard=1, seed=0)


@pytest.mark.parametrize(
    "images", [[], [10**400], [True], [1.0], [-1], ["1"], {}, 1], ids=lambda images: str(images)[:9]
)
def test_counts_of_something_else_are_refused(images: Any, tmp_path: Path) -> None:
    """Numbers of images of each class, of one class or more, each of which a data set can have."""
    (tmp_path / COUNTS).write_text(json.dumps({"images": images, "classes": []}))
    with pytest.raises(UserError, match=f"{COUNTS}: images"):
        table_of(*read_counts(tmp_path))
