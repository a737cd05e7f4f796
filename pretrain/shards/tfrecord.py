"""Records that TensorFlow Datasets (TFDS) prepared, read without TensorFlow: files, slices of splits, features.

A TFDS folder holds `NAME-SPLIT.tfrecord-00003-of-00016`. A record is framed by its length and two checksums and holds a
tf.train.Example: a map from a feature's path (`objects/location`) to a flat list of bytes, floats or integers.
"""

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from pretrain.data.index_rows import read_at
from pretrain.errors import UserError
from pretrain.json_files import Fields

Features = dict[str, list[Any]]  # bytes, float or int, by the feature's path

MAX_RECORD_BYTES = 64 << 20  # as of a sample in a shard
MAX_NUMBER_BYTES = 1 << 20  # of a feature that is a list of numbers, each becomes 36 bytes
MAX_FIELDS = 100_000  # of a message; an Example has one for each feature, an unpacked list one for each number

_INFO = "dataset_info.json"
_FRAME_BYTES = 8 + 4 + 4  # around a record: its length, the length's checksum, and the record's checksum behind it
_MASK = 0xA282EAD8  # added to a rotated CRC-32C, so that the checksum of data with checksums inside stays meaningful
FILE = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d{5})-of-(?P<count>\d{5})")
_SLICE = re.compile(r"(?P<split>\w+)(?:\[(?P<start>-?\d*)(?P<start_unit>%?):(?P<stop>-?\d*)(?P<stop_unit>%?)\])?")


class Record(NamedTuple):
    """Where a record lies."""

    path: Path
    number: int  # in its file, from 0
    offset: int  # of its first byte, behind the length
    num_bytes: int

    @property
    def id(self) -> str:
        """The name TFDS gives it (`tfds_id`): cifar10-train.tfrecord-00000-of-00001__17."""
        return f"{self.path.name}__{self.number}"


# --- splits and slices -----------------------------------------------------------------------------------------------


def split_records(folder: Path, dataset: str, spec: str) -> list[Record]:
    """Returns the records of a TFDS slice in storage order: `train[:800]+train[45000:45200]`, `test[50%:]`.

    A percentage is rounded to the closest record, a half to the even one, as TFDS does by default (`ReadInstruction`,
    rounding "closest"). TFDS may interleave files when it reads; the set of records is the same. Raises UserError when
    a file or a record is missing, or the split is shorter than the slice says.
    """
    chosen: list[Record] = []
    for part in spec.split("+"):
        match = _SLICE.fullmatch(part.strip())
        if not match:
            raise UserError(f"{part!r}: not a slice of a split; expected SPLIT, SPLIT[FROM:TO] or SPLIT[FROM%:TO%]")
        records = _records_of_split(folder, dataset, match["split"])
        start = _bound(match["start"], match["start_unit"] or match["stop_unit"], len(records), 0)
        stop = _bound(match["stop"], match["start_unit"] or match["stop_unit"], len(records), len(records))
        if not 0 <= start <= stop <= len(records):
            raise UserError(f"{folder}: {part.strip()} asks for more than the {len(records)} records of {dataset}")
        chosen += records[start:stop]
    return chosen


def _bound(text: str | None, unit: str, size: int, default: int) -> int:
    if not text:
        return default
    value = round(int(text) * size / 100) if unit else int(text)
    return value + size if value < 0 else value


@lru_cache(maxsize=8)  # the slices of a task ask for the same splits again
def _records_of_split(folder: Path, dataset: str, split: str) -> list[Record]:
    files = split_files(folder, dataset, split)
    expected = shard_lengths(folder, split)
    if expected and len(expected) != len(files):
        raise UserError(f"{folder}: {split} has {len(files)} files, dataset_info.json says {len(expected)}")
    records: list[Record] = []
    for number, path in enumerate(files):
        found = list(file_records(path))
        if expected and len(found) != expected[number]:
            raise UserError(f"{path}: has {len(found)} records, dataset_info.json says {expected[number]}; cut?")
        records += found
    return records


def split_files(folder: Path, dataset: str, split: str) -> list[Path]:
    """Returns a split's files in shard order. Raises UserError when the split or one of its files is not there."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = FILE.fullmatch(path.name)
        if match and (match["dataset"], match["split"]) == (dataset, split):
            found[int(match["number"])] = path, int(match["count"])
    if not found:
        raise UserError(f"{folder}: has no {dataset}-{split}.tfrecord-* files")
    count = next(iter(found.values()))[1]
    missing = sorted(set(range(count)) ^ set(found))
    if missing:
        raise UserError(f"{folder}: {dataset}-{split}.tfrecord-{missing[0]:05d}-of-{count:05d} is missing, or too many")
    return [found[number][0] for number in range(count)]


def shard_lengths(folder: Path, split: str) -> list[int]:
    """The number of records in each of a split's files by dataset_info.json; empty without that file."""
    of_split = [entry for entry in _dataset_info(folder).parts("splits", ()) if entry.text("name") == split]
    return [int(length) for entry in of_split for length in _lengths(entry)]


def _lengths(entry: Fields) -> list[str]:
    """protobuf writes 64-bit integers as texts, people as numbers."""
    values = entry.values.get("shardLengths", [])
    lengths = [str(value) for value in values] if isinstance(values, list) else ["?"]
    if not all(re.fullmatch(r"[0-9]{1,12}", length) for length in lengths):
        entry.wrong("shardLengths", "a list of whole numbers")
    return lengths


def _dataset_info(folder: Path) -> Fields:
    """TFDS's description of a set; empty when it is not there."""
    path = folder / _INFO
    try:
        return Fields.read(path)
    except FileNotFoundError:
        return Fields({}, str(path))
    except (OSError, UserError) as error:
        raise UserError(f"{path}: not a description of a TFDS data set ({error})") from None


def tfds_folder(source: Path, builder: str) -> Path:
    """Returns the folder below `source` that holds a data set's records.

    builder: NAME[/CONFIG]:VERSION, the version with stars where any number will do, as `caltech101:3.*.*`. `source`
    may be the TFDS data directory, the set's folder or the version's. Raises UserError when none or several fit;
    another config of the set (other images, or another size) never does.
    """
    name, _, version = builder.partition(":")
    dataset, _, config = name.partition("/")
    folders = {
        path.parent
        for pattern in (f"{dataset}-*.tfrecord-*", f"{dataset}-*.array_record-*")
        for path in source.rglob(pattern)
    }
    wanted = re.compile(re.escape(version).replace(r"\*", r"\d+"))
    fitting = sorted(
        path
        for path in folders
        if (not config or _config_of(path) == config) and (not _is_version(path.name) or wanted.fullmatch(path.name))
    )
    if not fitting:
        others = f"; found {', '.join(sorted(map(str, folders)))}" if folders else ""
        if folders and config:
            others += f"; a config is told by configName in dataset_info.json, or by its folder {config}/VERSION"
        raise UserError(f"{source}: no records of {builder} below it ({dataset}-SPLIT.tfrecord-*){others}")
    if len(fitting) > 1:
        raise UserError(f"{source}: {builder} is there {len(fitting)} times; give one: {', '.join(map(str, fitting))}")
    if not any(fitting[0].glob("*.tfrecord-*")):
        raise UserError(f"{fitting[0]}: array_record files are not read; prepare with file_format='tfrecord'")
    return fitting[0]


def _config_of(folder: Path) -> str:
    """What dataset_info.json says, or without it the folder: eurosat/rgb/2.0.0, next to eurosat/all/2.0.0."""
    name = _dataset_info(folder).text("configName", "")
    return name if name else (folder.parent if _is_version(folder.name) else folder).name


def _is_version(name: str) -> bool:
    return bool(re.fullmatch(r"\d+\.\d+\.\d+", name))


# --- framing ---------------------------------------------------------------------------------------------------------


def file_records(path: Path) -> Iterator[Record]:
    """Yields where a file's records lie, from their lengths alone. Raises UserError where it is damaged or cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = number = 0
        while offset < size:
            file.seek(offset)
            header = file.read(12)
            if len(header) < 12:
                raise UserError(f"{path}: cut at byte {size}, in the length of record {number}")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise UserError(f"{path}: byte {offset}: the length of record {number} is damaged (CRC differs)")
            if length > MAX_RECORD_BYTES:
                raise UserError(f"{path}: byte {offset}: a record of {length} bytes, at most {MAX_RECORD_BYTES}")
            if offset + length + _FRAME_BYTES > size:
                raise UserError(f"{path}: cut at byte {size}, in record {number} of {length} bytes")
            yield Record(path, number, offset + 12, length)
            offset += length + _FRAME_BYTES
            number += 1


def read_record(record: Record) -> bytes:
    """Returns a record's bytes. Raises UserError naming file and offset when its checksum differs."""
    with record.path.open("rb") as file:
        data = read_at(file.fileno(), record.offset, record.offset + record.num_bytes + 4)
    if len(data) < record.num_bytes + 4 or masked_crc32c(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise UserError(f"{record.path}: byte {record.offset}: record {record.number} is damaged (CRC differs)")
    return data[:-4]


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum of TFRecord files: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


# --- tf.train.Example ------------------------------------------------------------------------------------------------


def read_features(record: Record) -> Features:
    """Returns a record's features. Raises UserError naming file and offset when it is damaged or no Example."""
    data = read_record(record)
    try:
        return parse_example(data)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:  # whatever stray bytes lead to
        raise UserError(
            f"{record.path}: byte {record.offset}: record {record.number} is not a tf.train.Example ({error})"
        ) from None


def parse_example(data: bytes) -> Features:
    """Returns the features of a serialized tf.train.Example. Bytes of something else raise any error."""
    features: Features = {}
    for entry in (entry for part in _messages(data) for entry in _messages(part)):
        fields = dict(_fields(entry))  # of a map's entry: 1 its key, 2 its value
        value = fields.get(2, b"")
        features[fields[1].decode()] = [item for kind, part in _fields(value) for item in _items(kind, part)]
    return features


def _messages(data: bytes) -> Iterator[bytes]:
    """Yields the embedded messages of field 1."""
    for number, value in _fields(data):
        if number == 1:
            if not isinstance(value, bytes):
                raise ValueError("field 1 is a number")
            yield value


def _items(kind: int, data: bytes) -> list[Any]:
    """Returns the values of a BytesList (kind 1), a FloatList (2) or an Int64List (3), packed or not."""
    values = [value for number, value in _fields(data) if number == 1]
    if kind == 1:
        return values
    if sum(len(value) for value in values if isinstance(value, bytes)) > MAX_NUMBER_BYTES:
        raise ValueError(f"a list of numbers of more than {MAX_NUMBER_BYTES} bytes")
    if kind == 2:
        packed = b"".join(values)
        return list(struct.unpack(f"<{len(packed) // 4}f", packed))
    if kind == 3:
        numbers = [number for value in values for number in (_varints(value) if isinstance(value, bytes) else [value])]
        return [number - (1 << 64) if number >> 63 else number for number in numbers]
    raise ValueError(f"list of kind {kind}")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields a protobuf message's fields: (number, int for varints, else the bytes)."""
    position = count = 0
    while position < len(data):
        count += 1
        if count > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields in a message")
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
        elif wire in (1, 2, 5):
            length, position = _varint(data, position) if wire == 2 else (8 if wire == 1 else 4, position)
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError(f"a field ends {position - len(data)} bytes behind its message")
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _varints(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a number of 7 bits per byte, the low ones first, and the position behind it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return value | data[position] << shift, position + 1
