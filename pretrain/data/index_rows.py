"""A shard's index on the disk: its first line, and rows that are read one by one, or those of a block at once.

The indexes of 30,000 shards of 10,000 samples take 3.6 GB, so a process has rarely cached the one it needs next, and
reading it whole takes a tenth of the time of decoding a photo. So a reader checks the first line and the size, then
reads 12 bytes for a sample, or for each sample of a block; `manifest.load_index` reads and checks everything.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.json_files import Fields, brief

INDEX_FORMAT, INDEX_VERSION = "pretrain-index", 2  # version 1 has no checksums of samples, and is still read
BLOCK = 512  # bytes; every tar member begins at a multiple of it
MAX_LINE_BYTES = 4096  # of an index's first line; ours have 300


def read_line(data: bytes, shard_bytes: int, shard_sha256: str, num_samples: int) -> tuple[int, int, Any]:
    """Returns an index's version, the byte at which its arrays begin, and their checksum, from its first bytes.

    Raises ValueError when it is no index, or another shard's.
    """
    line = data[:MAX_LINE_BYTES].partition(b"\n")[0]
    header = Fields.parse(line, "its first line").values
    version = 1 if header.get("version") == 1 else INDEX_VERSION
    expected = {"format": INDEX_FORMAT, "version": version, "keys": "crc32", "unit_bytes": BLOCK, "offsets": "<u4"}
    expected |= {"shard_bytes": shard_bytes, "shard_sha256": shard_sha256, "num_samples": num_samples}
    wrong = {key: value for key, value in expected.items() if header.get(key) != value}
    if wrong:
        raise ValueError("; ".join(f"{key} is {brief(header.get(key))}, expected {wrong[key]!r}" for key in wrong))
    return version, len(line) + 1, header.get("payload_crc32")


def num_arrays_bytes(version: int, num_samples: int) -> int:
    """Returns the bytes behind the first line: offsets and the end, checksums of keys, and in version 2 of samples."""
    return 4 * ((1 + version) * num_samples + 1)


def read_at(file: int, start: int, end: int) -> bytes:
    """Returns the bytes of an open file from `start` to `end`, fewer where it ends before. Raises OSError.

    FUSE and network mounts may return short reads: only an empty read is the end.
    """
    data = os.pread(file, end - start, start)
    if not data or len(data) == end - start:  # nearly always
        return data
    parts = [data]
    while data and (start := start + len(data)) < end:
        parts.append(data := os.pread(file, end - start, start))
    return b"".join(parts)


class Descriptor:
    """An open file descriptor, closed when the last reference to it goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class IndexRows:
    """An open index."""

    def __init__(self, path: Path, shard_bytes: int, shard_sha256: str, num_samples: int) -> None:
        """Raises ValueError when the file is no index of that shard; OSError passes through."""
        self._shard_bytes, self._num_samples = shard_bytes, num_samples
        self._file = Descriptor(os.open(path, os.O_RDONLY))
        all_bytes = os.fstat(self._file.number).st_size
        beginning = read_at(self._file.number, 0, min(MAX_LINE_BYTES, all_bytes))
        self._version, self._start, _ = read_line(beginning, shard_bytes, shard_sha256, num_samples)
        num_bytes = all_bytes - self._start
        if num_bytes != num_arrays_bytes(self._version, num_samples):
            raise ValueError(f"{num_bytes} bytes of offsets")

    def byte_range(self, number: int) -> tuple[int, int]:
        """Returns the first byte of a sample and the first byte after it. Raises ValueError for an impossible range."""
        start, end = (block * BLOCK for block in struct.unpack("<2I", self._read(number, 2)))
        if not start < end <= self._shard_bytes:
            raise ValueError(f"sample {number} lies at bytes {start} to {end} of {self._shard_bytes}")
        return start, end

    def key_crc32(self, number: int) -> int:
        """Returns the checksum of a sample's key."""
        return struct.unpack("<I", self._read(self._num_samples + 1 + number, 1))[0]

    def part(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns offsets, checksums of keys and of samples first .. end-1, as `manifest.ShardIndex` has them.

        Raises ValueError for impossible offsets.
        """
        count, keys = end - first, self._num_samples + 1
        offsets = self._array(first, count + 1)
        if (offsets[1:] <= offsets[:-1]).any() or int(offsets[-1]) * BLOCK > self._shard_bytes:
            raise ValueError(f"samples {first} to {end - 1} lie where they cannot")
        sums = self._array(keys + self._num_samples + first, count) if self._version > 1 else None
        return offsets, self._array(keys + first, count), sums

    def _array(self, at: int, count: int) -> np.ndarray:
        return np.frombuffer(self._read(at, count), "<u4")

    def _read(self, at: int, count: int) -> bytes:
        """The bytes of `count` numbers."""
        begin = self._start + 4 * at
        data = read_at(self._file.number, begin, begin + 4 * count)
        if len(data) < 4 * count:
            raise ValueError("it has become shorter")
        return data
