"""TFDS records without TensorFlow: what others write is read, slices are TFDS's, damage is told with its place."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter
from tfds_records import crc32c, example, framed, write_split

from pretrain.errors import UserError
from pretrain.shards.tfrecord import (
    file_records,
    masked_crc32c,
    parse_example,
    read_features,
    read_record,
    split_files,
    split_records,
    tfds_folder,
)


def refusal(function: Any, *arguments: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def numbered(folder: Path, counts: dict[str, int], num_files: int = 3) -> Path:
    """A data set `toy` whose records hold their number in their split."""
    for split, count in counts.items():
        write_split(folder, "toy", split, [example(label=i) for i in range(count)], num_files)
    return folder


def labels(folder: Path, spec: str) -> list[int]:
    """The numbers of a slice's records."""
    return [read_features(record)["label"][0] for record in split_records(folder, "toy", spec)]


def example_class() -> Any:
    """tf.train.Example as protobuf makes it from its definition (tensorflow/core/example/{example,feature}.proto)."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        added = file.message_type.add(name=name)
        for title, number, label, kind, of in fields:
            added.field.add(name=title, number=number, label=label, type=kind, type_name=of or None)
        return added

    one, many, of_message = field.LABEL_OPTIONAL, field.LABEL_REPEATED, field.TYPE_MESSAGE
    message("BytesList", ("value", 1, many, field.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, field.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, field.TYPE_INT64, ""))
    kinds = [("bytes_list", 1, "BytesList"), ("float_list", 2, "FloatList"), ("int64_list", 3, "Int64List")]
    message("Feature", *((name, number, one, of_message, f".{of}") for name, number, of in kinds))
    features = message("Features", ("feature", 1, many, of_message, ".Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=of_message, type_name=".Feature")
    message("Example", ("features", 1, one, of_message, ".Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def test_examples_are_read_as_protobuf_writes_them() -> None:
    """Bytes, floats and integers of every size and sign, empty lists, names beyond ASCII: against protobuf itself."""
    written = example_class()()
    integers = [0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)]
    floats = np.array([0.0, -1.5, 3.4e38, 1e-45, 8.5], np.float32).tolist()
    written.features.feature["objects/type"].int64_list.value.extend(integers)
    written.features.feature["objects/location"].float_list.value.extend(floats)
    written.features.feature["image"].bytes_list.value.append(bytes(range(256)) * 3)
    written.features.feature["größe"].bytes_list.value.extend([b"", b"two"])
    written.features.feature["none"].int64_list.SetInParent()
    assert parse_example(written.SerializeToString()) == {
        "objects/type": integers,
        "objects/location": floats,
        "image": [bytes(range(256)) * 3],
        "größe": [b"", b"two"],
        "none": [],
    }


@pytest.mark.parametrize("packed", [True, False])
def test_lists_are_read_packed_or_not(packed: bool) -> None:
    """A writer may give a list as one field or as one field for each number."""
    written = example(packed, a=[5, -7, 1 << 40], b=[1.5, -0.25], c=[b"x", b"y"], d=[])
    assert parse_example(written) == {"a": [5, -7, 1 << 40], "b": [1.5, -0.25], "c": [b"x", b"y"], "d": []}


def test_files_are_read_as_tensorboard_writes_them(tmp_path: Path) -> None:
    """Framing and checksums against another program's writer, and against the bytes of an empty record."""
    contents = [b"", b"one", bytes(1000)]
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for content in contents:
        writer.write(content)
    path = tmp_path / "toy-train.tfrecord-00000-of-00001"
    path.write_bytes(stream.getvalue())
    assert [read_record(record) for record in file_records(path)] == contents
    assert stream.getvalue()[:16].hex() == "000000000000000029039807d8ea82a2"
    assert crc32c(b"123456789") == 0xE3069283  # the published check value, of the tests' own writer
    assert framed(b"one") == stream.getvalue()[16 : 16 + 19]
    assert masked_crc32c(b"one") == struct.unpack("<I", framed(b"one")[-4:])[0]


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("train", list(range(11))),
        ("train[:4]", [0, 1, 2, 3]),
        ("train[9:]", [9, 10]),
        ("train[3:9]", [3, 4, 5, 6, 7, 8]),  # over the border of two files: 4, 4 and 3 records
        ("train[:3]+test[2:4]", [0, 1, 2, 2, 3]),
        ("train[-2:]", [9, 10]),
        ("test[50%:]", [2, 3, 4]),  # 2.5 records: to the even 2
        ("train[50%:]", [6, 7, 8, 9, 10]),  # 5.5 records: to the even 6
        ("train[:25%]", [0, 1, 2]),  # 2.75
        ("train[-10%:]", [10]),
    ],
)
def test_slices_are_those_of_tfds(spec: str, expected: list[int], tmp_path: Path) -> None:
    """Storage order over files, sums, and percentages rounded to the closest record with halves to the even one."""
    assert labels(numbered(tmp_path, {"train": 11, "test": 5}), spec) == expected


def test_a_record_knows_its_tfds_id(tmp_path: Path) -> None:
    """File and number in the file, as TFDS's tfds_id has it, and the files in the order of their numbers."""
    records = split_records(numbered(tmp_path, {"train": 11}), "toy", "train[3:5]")
    assert [record.id for record in records] == [
        "toy-train.tfrecord-00000-of-00003__3",
        "toy-train.tfrecord-00001-of-00003__0",
    ]
    assert [path.name[-14:] for path in split_files(tmp_path, "toy", "train")] == [
        f"0000{i}-of-00003" for i in range(3)
    ]


@pytest.mark.parametrize(
    "spec, said",
    [
        ("train[:12]", "asks for more than the 11 records"),
        ("train[8:3]", "asks for more"),
        ("val", "has no toy-val.tfrecord-* files"),
        ("train[1:2", "not a slice of a split"),
        ("train[::2]", "not a slice of a split"),
    ],
)
def test_impossible_slices_are_refused(spec: str, said: str, tmp_path: Path) -> None:
    """More records than there are, a split that is not there, text that is no slice."""
    assert said in refusal(split_records, numbered(tmp_path, {"train": 11}), "toy", spec)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A split without one of its files would be another set, with every later slice moved."""
    (numbered(tmp_path, {"train": 11}) / "toy-train.tfrecord-00001-of-00003").unlink()
    assert "toy-train.tfrecord-00001-of-00003 is missing" in refusal(split_records, tmp_path, "toy", "train")


def test_a_file_cut_between_records_is_found_by_its_count(tmp_path: Path) -> None:
    """Nothing in the file tells, dataset_info.json does."""
    numbered(tmp_path, {"train": 11}, num_files=1)
    path = tmp_path / "toy-train.tfrecord-00000-of-00001"
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"splits": [{"name": "train", "shardLengths": ["11"]}, {"name": "test", "shardLengths": ["3"]}]})
    )
    assert len(split_records(tmp_path, "toy", "train")) == 11
    other = tmp_path / "cut"
    other.mkdir()
    (other / path.name).write_bytes(path.read_bytes()[: -len(framed(example(label=10)))])
    (other / "dataset_info.json").write_bytes((tmp_path / "dataset_info.json").read_bytes())
    message = refusal(split_records, other, "toy", "train")
    assert path.name in message and "has 10 records, dataset_info.json says 11" in message


def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    """Each byte of a file is covered by a checksum; a cut anywhere but between records is told with file and offset."""
    (path,) = write_split(tmp_path, "toy", "train", [example(label=3), example(label=4)])
    data = path.read_bytes()
    border = len(framed(example(label=3)))

    def read() -> list[bytes]:
        return [read_record(record) for record in file_records(path)]

    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        message = refusal(read)
        assert path.name in message and "byte" in message and ("CRC" in message or "cut" in message)
    for length in set(range(1, len(data))) - {border}:
        path.write_bytes(data[:length])
        assert f"cut at byte {length}" in refusal(read)


def test_a_record_that_is_no_example_is_refused(tmp_path: Path) -> None:
    """Undamaged bytes of something else: told with file, offset and number, whatever they are."""
    random = np.random.default_rng(0)
    good = example(label=3, image=b"x" * 40, objects__z=[1.0, 2.0])
    bad = [good[:length] for length in range(1, len(good))] + [
        good[:at] + random.bytes(3) + good[at + 3 :] for at in range(len(good) - 3) for _ in range(20)
    ]
    (path,) = write_split(tmp_path, "toy", "train", bad)
    assert len(bad) > 1000
    refused = 0  # a changed number or letter is still an Example
    for record in file_records(path):
        try:
            read_features(record)
        except UserError as error:
            refused += 1
            assert f"{path}: byte {record.offset}: record {record.number} is not a tf.train.Example" in str(error)
    assert refused > len(bad) / 3


def test_the_folder_of_a_version_is_found(tmp_path: Path) -> None:
    """From TFDS's data folder, the set's or the version's; another config or version is not taken for it."""
    for place in ("eurosat/rgb/2.0.0", "eurosat/all/2.0.0", "toy/3.1.0"):
        write_split(tmp_path / place, place.split("/")[0], "train", [example(label=0)])
    rgb = tmp_path / "eurosat/rgb/2.0.0"
    for start in (tmp_path, tmp_path / "eurosat", tmp_path / "eurosat/rgb", rgb):
        assert tfds_folder(start, "eurosat/rgb:2.*.*") == rgb
    assert tfds_folder(tmp_path, "toy:*.*.*") == tmp_path / "toy/3.1.0"
    assert "no records of toy:2.*.* below it" in refusal(tfds_folder, tmp_path, "toy:2.*.*")
    assert str(tmp_path / "toy/3.1.0") in refusal(tfds_folder, tmp_path, "toy:3.0.0")
    write_split(tmp_path / "toy/3.2.0", "toy", "train", [example(label=0)])
    assert "is there 2 times" in refusal(tfds_folder, tmp_path, "toy:3.*.*")
    (tmp_path / "new/1.0.0").mkdir(parents=True)
    (tmp_path / "new/1.0.0/new-train.array_record-00000-of-00001").write_bytes(b"")
    assert "array_record files are not read" in refusal(tfds_folder, tmp_path, "new:1.*.*")


def test_another_config_is_never_taken(tmp_path: Path) -> None:
    """ImageNet-V2 has three configs of 10,000 images: the only one that is there is not the one asked for."""
    only = tmp_path / "imagenet_v2/topimages/3.0.0"
    write_split(only, "imagenet_v2", "test", [example(label=0)])
    wanted = "imagenet_v2/matched-frequency:*.*.*"
    for start in (tmp_path, tmp_path / "imagenet_v2", only.parent, only):
        message = refusal(tfds_folder, start, wanted)
        assert f"no records of {wanted}" in message and str(only) in message and "configName" in message
    (only / "dataset_info.json").write_text(json.dumps({"configName": "topimages"}))
    assert "no records of" in refusal(tfds_folder, tmp_path, wanted)
    assert tfds_folder(tmp_path, "imagenet_v2/topimages:3.*.*") == only


def test_the_config_is_in_the_description_or_the_folder(tmp_path: Path) -> None:
    """A folder that was moved is known by dataset_info.json, which counts for more than the folder's name."""
    moved = tmp_path / "retina"
    write_split(moved, "diabetic", "train", [example(label=0)])
    builder = "diabetic/btgraham-300:3.*.*"
    assert "no records of" in refusal(tfds_folder, tmp_path, builder)
    (moved / "dataset_info.json").write_text(json.dumps({"configName": "btgraham-300"}))
    assert tfds_folder(tmp_path, builder) == tfds_folder(moved, builder) == moved
    renamed = moved.rename(tmp_path / "btgraham-300")
    assert tfds_folder(tmp_path, builder) == renamed
    (renamed / "dataset_info.json").write_text(json.dumps({"configName": "original"}))
    assert "no records of" in refusal(tfds_folder, tmp_path, builder)
    (renamed / "dataset_info.json").write_text("[]")
    assert "not a description of a TFDS data set" in refusal(tfds_folder, tmp_path, builder)
