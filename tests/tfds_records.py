"""Writes TFRecord files as TFDS does, independently of what reads them: own checksums, own protobuf."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_REMAINDERS = [_remainder(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _REMAINDERS[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """The checksum as a file holds it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % (1 << 32))


def varint(value: int) -> bytes:
    """A number in groups of 7 bits; negative ones as 64-bit two's complement."""
    value %= 1 << 64
    groups = []
    while value > 127:
        groups.append(value % 128 + 128)
        value //= 128
    return bytes([*groups, value])


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: Sequence[Any], packed: bool = True) -> bytes:
    """A tf.train.Feature of bytes, floats or integers."""
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if isinstance(values[0], float):
        parts = [struct.pack("<f", value) for value in values]
        return field(2, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3 | 5) + part for part in parts))
    parts = [varint(value) for value in values]
    return field(3, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3) + part for part in parts))


def example(packed: bool = True, **features: Any) -> bytes:
    """A tf.train.Example; `__` in a name stands for `/`, a single value for a list of one."""
    entries = []
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        body = feature(values, packed) if values else b""
        entries.append(field(1, field(1, name.replace("__", "/").encode()) + field(2, body)))
    return field(1, b"".join(entries))


def framed(data: bytes) -> bytes:
    """A record with its length and checksums."""
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_split(folder: Path, dataset: str, split: str, records: Sequence[bytes], num_files: int = 1) -> list[Path]:
    """Writes a split's files, the first ones with one record more where they do not divide."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, start = [], 0
    for number in range(num_files):
        count = (len(records) - number + num_files - 1) // num_files
        path = folder / f"{dataset}-{split}.tfrecord-{number:05d}-of-{num_files:05d}"
        path.write_bytes(b"".join(framed(record) for record in records[start : start + count]))
        start += count
        paths.append(path)
    return paths
