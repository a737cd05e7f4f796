"""Records of TensorFlow Datasets."""

import json
import struct
from functools import partial
from pathlib import Path
from random import Random

from tfds_records import example, field, varint

from fuzz.harness import Target
from fuzz.mutate import changed_bytes, changed_json, json_seeds
from pretrain.shards.tfrecord import masked_crc32c, read_features, split_records, tfds_folder

NAME = "a-train.tfrecord-00000-of-00001"


def framed(data: bytes, length: int | None = None) -> bytes:
    """A record with its checksums."""
    size = struct.pack("<Q", len(data) if length is None else length)
    return size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))


def tfrecord(folder: Path) -> Target:
    """A file of records, of which each is read."""
    records = [example(image=b"abc", label=3, name="é".encode()), example(boxes=[0.5, 1.0], numbers=[1, -1, 1 << 40])]
    records.append(example(packed=False, boxes=[0.5, 1.0], numbers=[1, -1]))

    def call(data: bytes, own: Path) -> None:
        (own / NAME).write_bytes(data)
        for record in split_records(own, "a", "train"):
            read_features(record)

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.3:
            return changed_bytes(data, random)
        chosen = [changed_bytes(random.choice(records), random) for _ in range(random.choice((1, 1, 2, 3)))]
        lengths = (None, None, None, None, 0, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
        return b"".join(framed(one, random.choice(lengths)) for one in chosen)

    seeds = [framed(data) for data in _examples()]
    seeds += [
        framed(records[0], length)
        for length in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1, (1 << 64) - 16, len(records[0]) + 1)
    ]
    seeds += [
        b"",
        b"\0",
        bytes(12),
        bytes(1000),
        framed(b"") * 50_000,
        framed(records[0])[:-1],
        framed(records[0]) + b"\0",
    ]
    good = [b"".join(map(framed, records)), framed(records[0])]
    slow = [framed(b"") * 60_000, framed(field(1, field(1, b"")) * 200_000)]
    slow += [framed(field(1, b"".join(field(1, field(1, b"%d" % n)) for n in range(100_000))))]
    slow += [framed(field(1, field(1, field(1, b"a") + field(2, field(3, field(1, b"\1" * 1_000_000))))))]
    return Target(good, seeds, slow, mutate, call)


def _examples() -> list[bytes]:
    """Messages that are no Example, or hardly one."""
    entry = partial(field, 1)
    kinds = [field(kind, field(1, b"\x80" * 12)) for kind in (1, 2, 3, 4)] + [
        varint(1 << 3) + varint(5),
        varint(2 << 3 | 2) + varint(1 << 40),
    ]
    found = [entry(entry(field(1, b"a") + field(2, kind))) for kind in kinds]
    found += [
        entry(entry(field(2, b"a"))),
        entry(entry(field(1, b"\xff"))),
        entry(entry(varint(1 << 3) + varint(5))),
        varint(1 << 3) + varint(5),
    ]
    found += [bytes([wire]) for wire in range(16)] + [
        b"\xff" * 20,
        varint(1 << 63),
        entry(b"\x0a"),
        entry(entry(b"\x0a\xff\xff\xff\xff\x0f")),
    ]
    nested = b""
    for _ in range(500):
        nested = field(1, nested)
    return [*found, nested, entry(entry(field(1, b"a") + field(2, field(2, field(1, b"abc"))))), entry(entry(b"")) * 3]


def tfds_info(folder: Path) -> Target:
    """dataset_info.json beside records."""
    values = {
        "name": "a",
        "configName": "c",
        "splits": [{"name": "train", "shardLengths": ["1"], "numBytes": "5"}],
        "version": "1.0.0",
    }

    def call(data: bytes, own: Path) -> None:
        place = own / "a" / "c" / "1.0.0"
        place.mkdir(parents=True)
        (place / NAME).write_bytes(framed(example(label=3)))
        (place / "dataset_info.json").write_bytes(data)
        split_records(tfds_folder(own, "a/c:1.*.*"), "a", "train[:50%]")

    return Target([json.dumps(values).encode()], json_seeds(values), [], changed_json, call)
