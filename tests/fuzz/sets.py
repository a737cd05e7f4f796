"""Data sets: samples, indexes, manifests, labels, and what make_shards makes them of."""

import gzip
import io
import json
import os
import tarfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tiny import make_shards as tiny_shards
from tiny import tiny_config

from fuzz.harness import Target
from fuzz.mutate import (
    ODD_VALUES,
    bomb,
    changed_bytes,
    changed_json,
    changed_tar,
    changed_zip,
    gzip_bomb,
    json_seeds,
    member,
    npy,
    tar_header,
    zipped,
)
from pretrain.data.manifest import Shard, ShardIndex, key_crc32, load_manifest, write_index
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.models.build import build_model
from pretrain.shards.archives import files_of
from pretrain.shards.class_list import read_class_list
from pretrain.shards.make import Options, make_shards
from pretrain.shards.tars import alone, index_tar
from pretrain.train.datasets import open_data

END = bytes(1024)
NEGATIVE = b"\xff" + (256**11 - 512).to_bytes(11, "big")


def picture(kind: str = "png", side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(file, kind)
    return file.getvalue()


def sample(key: bytes = b"a", label: bytes = b"1") -> bytes:
    return member(key + b".png", picture()) + member(key + b".cls", label)


def by_tarfile(form: int, names: tuple[str, ...] = ("a", "b")) -> bytes:
    """A tar that Python wrote, in one of its formats, with a long name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name in names:
            for ending, data in ((".png", picture()), (".cls", b"1")):
                info = tarfile.TarInfo(name + ending)
                info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def hostile_tars() -> list[bytes]:
    """Attacks on readers of tars; the first sample, where it is whole, is `a`."""
    long_name = tar_header(b"././@LongLink", 2, b"L") + b"b\0" + bytes(510)
    records = b"1" * 100_000
    found = [
        sample() + tar_header(b"a.txt", 0, field=NEGATIVE) + bytes(512),
        tar_header(b"a.png", 0, field=NEGATIVE) + bytes(512),
        sample() + tar_header(b"p", 0, b"x", NEGATIVE) + bytes(512) + sample(b"b"),
        sample() + tar_header(b"p", 0, b"L", b"\xff" * 12) + bytes(512) + sample(b"b"),
        sample() + tar_header(b"p", 0, b"x", b"\x80" + (1 << 62).to_bytes(11, "big")) + bytes(512),
        member(b"p", records, b"x") + sample(),
        member(b"p", b"1" * 100_000 + b" a=b\n", b"x") + sample(),
        member(b"p", b" " * 100_000, b"g") + sample(),
        long_name * 3000 + sample(),
        member(b"p", b"9 a=bcd\n\n", b"x") * 3000 + sample(),
        member(b"p", b"8 a=bcd\n", b"g") * 3000 + sample(),
        sample() + member(b"a.txt", b"") * 3000,
        member(b"p", b"8 a=bcd\n" * 10_000, b"x") + sample(),
        member(b"p", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", b"x") + member(b"a.png",
        b"1\n0\n1000000000\n") + END,
        member(b"p", b"23 GNU.sparse.size=1000\n18 GNU.sparse.map=\n", b"x") + sample(),
        member(b"p", b"26 GNU.sparse.numblocks=1\n", b"x") + sample(),
        member(b"a.png", b"", b"S") + sample(),
        member(b"a.png", b"", b"1") + sample(),
        member(b"a.png", b"", b"2") + sample(),
        member(b"a.png", b"", b"3") + sample(),
        sample() * 2,
        b"", bytes(512), END * 10, b"\x1f\x8b" + bytes(510), gzip.compress(sample()), sample()[:700], sample()[:-512],
    ]  # fmt: skip
    return found + [one + END for one in found]


def tar_sample(folder: Path) -> Target:
    """The bytes of one sample, as an index names them."""

    def call(data: bytes, own: Path) -> None:
        data += bytes(-len(data) % 512)
        (own / "a.tar").write_bytes(data)
        shard = Shard(str(own / "a.tar"), 1, len(data), "0" * 64)
        offsets, keys = np.array([0, len(data) // 512], np.uint32), np.array([key_crc32("a")], np.uint32)
        write_index(shard, ShardIndex(offsets, keys))
        raw = read_sample(alone(shard, 1000), 0)
        parse_labels(raw.label, 1000, multi_label=False)

    good = [sample(), sample() + member(b"a.txt", b"caption")]
    good += [
        by_tarfile(form, ("a",))[:-1024] for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    ]
    slow = [
        tar_header(b"p", 3_000_000, b"x") + b"1" * 3_000_000 + bytes(192) + sample(),
        sample() + member(b"a.txt", b"") * 119_000,
        member(b"p", b"8 a=bcd\n" * 200_000, b"x") + sample(),
        sample() + tar_header(b"a.txt", 67_000_000) + bytes(67_000_064),
        tar_header(b"a.png", 60_000_000) + bytes(60_000_256) + member(b"a.cls", b"1"),
    ]
    return Target(good, hostile_tars(), slow, changed_tar, call)


def tar_index(folder: Path) -> Target:
    """A tar that is to become a shard."""

    def call(data: bytes, own: Path) -> None:
        (own / "a.tar").write_bytes(data)
        index_tar(own / "a.tar")

    return Target(good_tars(), hostile_tars(), slow_tars(), changed_tar, call)


def good_tars() -> list[bytes]:
    good = [sample() + sample(b"b") + sample(b"c") + END, sample(label=b"[1, 2]") + sample(b"b", b"[3]") + END]
    long = ("a" * 150, "folder/" + "b" * 80)
    good += [
        by_tarfile(form, names) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT) for names in (("a", "b"), long)
    ]
    return good


def slow_tars() -> list[bytes]:
    return [
        tar_header(b"p", 5_000_000, b"x") + b"1" * 5_000_000 + bytes(320) + sample() + END,
        member(b"p", b"8 a=bcd\n" * 200_000, b"x") + sample() + END,
        sample() + tar_header(b"b.png", 0, field=b"\x80" + (1 << 50).to_bytes(11, "big")) + END,
    ]


def index(folder: Path) -> Target:
    """A shard's index, its shard in order."""
    made = tiny_shards(folder / "set", num_samples=6)
    (shard,) = load_manifest(made).shards
    good = shard.path.with_suffix(".idx").read_bytes()
    header, _, payload = good.partition(b"\n")

    def call(data: bytes, own: Path) -> None:
        os.link(shard.path, own / shard.path.name)
        (own / shard.path.name).with_suffix(".idx").write_bytes(data)
        manifest = alone(Shard(str(own / shard.path.name), shard.num_samples, shard.num_bytes, shard.sha256), 7)
        for number in range(manifest.num_samples):
            with suppress(BadSample):
                read_sample(manifest, number)

    def mutate(data: bytes, random: Random) -> bytes:
        line, _, arrays = data.partition(b"\n")
        if random.random() < 0.6:
            arrays = changed_bytes(arrays, random)
            if random.random() < 0.7:  # of the length that it had: numbers that fall, overlap, lead out of the shard
                arrays = arrays[: len(payload)].ljust(len(payload), b"\0")
        if random.random() < 0.4:
            line = changed_json(line, random)
        return _index_of(line, arrays) if random.random() < 0.7 else line + b"\n" + arrays

    offsets = np.frombuffer(payload[: 4 * (shard.num_samples + 1)], "<u4")
    attacks = [offsets[::-1], offsets * 0, offsets * 0 + 0xFFFFFFFF, offsets + 1, offsets * 1000, offsets - offsets[-1]]
    attacks += [np.concatenate([offsets[:1], offsets[-1:], offsets[2:]]), np.concatenate([offsets[:-1], offsets[:1]])]
    seeds = [_index_of(header, one.astype("<u4").tobytes() + payload[4 * len(offsets) :]) for one in attacks]
    seeds += [b"\n" + payload, header, header + b"\n", payload, good + b"\0" * 4, b"[" * 200_000 + b"\n" + payload]
    seeds += [_index_of(text, payload) for text in json_seeds(json.loads(header))]
    # Of the disk nothing was wrong: trying again cannot help.
    return Target([good], seeds, [], mutate, call, errors=(UserError, BadSample))


def _index_of(line: bytes, payload: bytes) -> bytes:
    """An index whose checksum is right, if its header is an object."""
    with suppress(ValueError, RecursionError):
        values = json.loads(line)
        if isinstance(values, dict) and "payload_crc32" in values:
            line = json.dumps(values | {"payload_crc32": f"{zlib.crc32(payload):08x}"}).encode()
    return line + b"\n" + payload


def _set_with(folder: Path, name: str) -> tuple[Path, Any]:
    """A set, and a function that opens it for training with its file `name` replaced."""
    made = tiny_shards(folder / "set", num_samples=6)
    config = tiny_config(made, folder / "out", data__global_batch=4)  # once: it takes 50 times as long as the rest

    def call(data: bytes, own: Path) -> None:
        for path in made.iterdir():
            if path.name != name:
                os.link(path, own / path.name)
        (own / name).write_bytes(data)
        opened = open_data(replace(config, data=replace(config.data, train=own)))
        opened.order.samples(0)
        build_model(config.model, opened.num_classes)
        with suppress(BadSample):
            read_sample(opened.train, 0)

    return made, call


def manifest(folder: Path) -> Target:
    """manifest.json, as a training opens it."""
    made, call = _set_with(folder, "manifest.json")
    good = (made / "manifest.json").read_bytes()
    values = json.loads(good)
    (shard,) = values["shards"]
    seeds = []
    for odd in (0, -1, 6.0, True, 5, 10**30, 1 << 63, (1 << 63) - 1, "6", None, float("inf"), float("nan"), 10**9):
        seeds.append(values | {"num_samples": odd, "shards": [shard | {"num_samples": odd}]})
        seeds.append(values | {"num_bytes": odd, "shards": [shard | {"num_bytes": odd}]})
        seeds.append(values | {"label": values["label"] | {"num_classes": odd}})
    four = {"num_samples": 24, "num_shards": 4, "num_bytes": 4 * values["num_bytes"]}
    seeds += [
        values | {"shards": [], "num_shards": 0, "num_samples": 0, "num_bytes": 0},
        values | four | {"shards": [shard] * 4},
    ]
    seeds += [values | {"label": odd} for odd in ODD_VALUES]
    first = [json.dumps(one).encode() for one in seeds]
    Random(1).shuffle(first)
    return Target([good], first[:40] + json_seeds(values) + first[40:], [], changed_json, call)


def classes(folder: Path) -> Target:
    """classes.json beside a manifest."""
    made, call = _set_with(folder, "classes.json")
    good = (made / "classes.json").read_bytes()
    return Target([good], json_seeds(json.loads(good)), [], changed_json, call)


def class_list(folder: Path) -> Target:
    """A list of classes that a user gives."""
    values = [["ash", "birch"], {"names": ["ash", "birch"], "wnids": ["n1", "n2"]}]
    values += [{"0": ["n1", "ash"], "1": ["n2", "birch"]}, {"0": "ash", "1": "birch"}]
    seeds = [seed for value in values for seed in json_seeds(value)]
    Random(0).shuffle(seeds)

    def call(data: bytes, own: Path) -> None:
        (own / "a.json").write_bytes(data)
        read_class_list(own / "a.json")

    return Target([json.dumps(value).encode() for value in values], seeds, [], changed_json, call)


def labels(folder: Path) -> Target:
    """A `.cls` member, of one class and of several."""

    def call(data: bytes, own: Path) -> None:
        for num_classes in (1, 10, 21_841):
            for multi_label in (False, True):
                with suppress(BadSample):
                    parse_labels(data, num_classes, multi_label)
        parse_labels(data, 21_841, data.strip().startswith(b"["))

    good = [b"7", b"0\n", b"[1, 2, 3]", b"[5]"]
    seeds = [
        b"", b" ", b"-1", b"+1", b"1.0", b"1e3", b"0x1", b"01", b"1_0", "٣".encode(), b"1" * 10_000, b"1 2", b"\0",
        b"[", b"[]", b"[1,]",
        b"[1, 1]", b"[-1]", b"[1.0]", b"[[1]]", b"[" * 5000, b"[true]", b"[" + b"1, " * 5000 + b"1]", b"null",
        b"21841", b"999999999",
        b"9999999999", b"[999999999]", b"\xff", b"\xef\xbb\xbf1", b"1\0", b"1\n\n", b" " * 100_000 + b"1",
        b"[ " + b" " * 100_000 + b"x",
        b"[" + b"1 " * 50_000 + b"]", b"[" + b"1 ," * 50_000, json.dumps(list(range(21_841))).encode(),
    ]  # fmt: skip
    slow = [
        b"[" + b"1, " * 3_000_000 + b"1]",
        b"1" * 10_000_000,
        b"[1" + b" " * 10_000_000 + b"x",
        b"[" + b"1234, " * 1_500_000,
    ]
    return Target(good, seeds, slow, changed_bytes, call)


# --- what make_shards is given ---------------------------------------------------------------------------------------


def _made(data: bytes, own: Path, name: str) -> None:
    (own / name).write_bytes(data)
    path, _ = make_shards([own / name], None, own / "out", Options())
    load_manifest(path)


def source_npz(folder: Path) -> Target:
    """An archive of encoded images, as make_shards takes it."""
    image, names = picture(), np.array(["ash", "birch"])
    arrays = {"blob": np.frombuffer(image * 2, np.uint8), "offset": np.arange(3) * len(image), "label": np.arange(2)}
    first, text = _npz(**arrays), _npz(**arrays, classes=names)
    kinds: list[Any] = [
        {"label": value}
        for value in (
            np.array([0.0, np.nan]), np.array([0, np.inf]), np.array(["a", "b"]), np.array(["2020-01-01"] * 2,
            "M8[D]"), np.eye(2),
            np.array(0), np.array([0, 10**18]), np.array([-1, 0]), np.array([True, False]), np.array([0, 1],
            "u8") + (1 << 63),
            np.array([1j, 0]), np.array([b"\xff", b"a"]), np.zeros(2, "V0"), np.zeros(2, "V2"), np.array([]), np.eye(2,
            dtype=int),
            np.array([0, 1], "m8[s]"), np.zeros((2, 0), int), np.zeros(2, [("a", int)]),
        )
    ]  # fmt: skip
    kinds += [
        {"offset": value}
        for value in (
            arrays["offset"] * 1.0, arrays["offset"].astype(str), np.eye(3), np.array(3), np.array([]),
            arrays["offset"][::-1].copy(),
            np.array([0, -5, 2 * len(image)]), np.array([0, 10**18, 2 * len(image)]),
            arrays["offset"].astype("u8") + (1 << 63),
            arrays["offset"][:2], np.zeros(3, "V2"), np.array([True] * 3), np.array([0, np.nan, 2 * len(image)]),
            np.zeros(3, "M8[s]"),
        )
    ]  # fmt: skip
    kinds += [
        {"blob": value}
        for value in (np.zeros(0, np.uint8), np.zeros(len(image) * 2), np.array(5), np.eye(2), np.array(["a"]))
    ]
    kinds += [
        {"classes": np.array(value)}
        for value in ([], ["a"], [["a", "b"]], [1, 2], [b"\xff", b"a"], ["a", "a"], "a", ["", "b"])
    ]
    kinds += [{"classes": np.array(["a\ud800", "b"])}, {"label": arrays["label"][:0], "offset": arrays["offset"][:1]}]
    seeds = [_npz(**(arrays | kind)) for kind in kinds]
    seeds += [b"", b"PK\5\6" + bytes(18), first[:300], first[:-30], gzip.compress(first), np_bytes(arrays["label"])]
    slow = [bomb(b" " * (1 << 20), 1000, b"\x93NUMPY\x02\0" + (1000 << 20).to_bytes(4, "little"), "blob.npy")]
    slow += [
        bomb(
            bytes(1 << 20),
            1000,
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1048576000,), }", b""),
            "blob.npy",
        )
    ]
    return Target([text, first], seeds, slow, changed_zip, lambda data, own: _made(data, own, "a.npz"))


def np_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def _npz(**arrays: Any) -> bytes:
    return zipped([(f"{name}.npy", np_bytes(array)) for name, array in arrays.items()])


def source_tar(folder: Path) -> Target:
    """A tar that make_shards indexes."""
    return Target(good_tars(), hostile_tars(), slow_tars(), changed_tar, lambda data, own: _made(data, own, "a.tar"))


def source_targz(folder: Path) -> Target:
    """A compressed tar that make_shards unpacks and indexes."""
    return Target(
        [gzip.compress(tar) for tar in good_tars()],
        [gzip.compress(tar) for tar in hostile_tars()] + _damaged_gzips(),
        [gzip_bomb(bytes(1 << 20), 1000), gzip_bomb(bytes(1 << 20), 900, tar_header(b"a.png", 900 << 20))],
        _changed_gzip,
        lambda data, own: _made(data, own, "a.tar.gz"),
    )


def task_tar(folder: Path) -> Target:
    """An original download of an evaluation task: each of its files is read."""

    def call(data: bytes, own: Path) -> None:
        (own / "a.tar.gz").write_bytes(data)
        for file in files_of(own / "a.tar.gz"):
            file.read(MAX_IMAGE_BYTES)

    made = source_targz(folder)
    return Target(made.good, made.seeds, made.slow, _changed_gzip, call)


def _damaged_gzips() -> list[bytes]:
    whole = gzip.compress(sample() + END)
    return [
        b"",
        whole[:-9],
        whole[: len(whole) // 2],
        whole[:10],
        whole + b"\0" * 100,
        whole + b"junk",
        whole * 2,
        whole[:-8] + bytes(8),
    ]


def _changed_gzip(data: bytes, random: Random) -> bytes:
    with suppress(Exception):  # of one that is damaged already, the bytes are changed
        if random.random() < 0.8:
            return gzip.compress(changed_tar(gzip.decompress(data), random), 1)
    return changed_bytes(data, random)
