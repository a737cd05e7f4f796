"""What make_shards is given beside shards and archives: lists of images, a tar for each class, tars on a server."""

import csv
import gzip
import http.client
import io
import json
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random

import numpy as np

from fuzz.harness import Target
from fuzz.mutate import ODD_NUMBERS, ODD_VALUES, changed_bytes, changed_lines, changed_tar, line_seeds, member
from fuzz.sets import END, good_tars, hostile_tars, picture, slow_tars
from pretrain.data import remote
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.shards import elsewhere, imagenet, originals
from pretrain.shards.make import Options, make_shards
from pretrain.shards.plain_pickles import read_plain_pickle

_ODD_CELLS = [str(value) for value in ODD_VALUES] + ["a.png\0", "b/../a.png", "./a.png", "a.png/", "b", '"', "\r", ","]
_ROWS = [["a.png", "ash"], ["b/c.png", "birch"], ["b/d.jpg", "ash"]]


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _listed(name: str) -> Callable[[bytes, Path], None]:
    """A function that makes a set of a list called `name`, beside whose images other files lie."""
    images = {"a.png": picture(), "b/c.png": picture(), "b/d.jpg": picture("jpeg"), "b/notes.txt": b"x"}

    def call(data: bytes, own: Path) -> None:
        folder = own / "set"
        for file, content in images.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        (folder / "out.png").symlink_to("/etc/passwd")
        (folder / name).write_bytes(data)
        path, _ = make_shards([folder / name], None, own / "out", Options(workers=1))
        load_manifest(path)

    return call


def source_csv(folder: Path) -> Target:
    """A CSV of paths and labels."""
    head = ["path", "label"]
    good = [_csv([head, *_ROWS]), _csv([["label", "note", "file"], *([label, "x", file] for file, label in _ROWS)])]
    seeds = [_csv([head, _ROWS[0], row]) for odd in _ODD_CELLS for row in ([odd, "ash"], ["b/c.png", odd], [odd])]
    seeds += [_csv([row, *_ROWS]) for row in ([], ["path"], ["path", "path", "label"], ["label"] * 2000, ["", ""])]
    seeds += [_csv([head, ["out.png", "ash"]]), _csv([head, *_ROWS[:1] * 2]), _csv([head, ["b/notes.txt", "ash"]])]
    seeds += [b"", b"\0", b"\xff\n", b"\n" * 5000, good[0].decode().encode("utf-16"), b"path,label\n" + b"a" * 100_000]
    seeds += [b'path,label\n"a.png,ash\n', b"path,label\n" + b'""' * 30_000 + b",ash\n", b"path,label\r" + b"a.png,1\r"]
    seeds += [b"path,label\n" + b"," * 60_000 + b"\n", b"\xef\xbb\xbf" + good[0], good[0].replace(b"\n", b"\r\n")]

    def mutate(data: bytes, random: Random) -> bytes:
        rows = [line.split(",") for line in data.decode("utf-8", "replace").splitlines()]
        for _ in range(random.choice((1, 1, 2, 3)) if rows else 0):
            row = random.choice(rows)
            row[random.randrange(len(row))] = random.choice(_ODD_CELLS)
        return changed_bytes(data, random) if random.random() < 0.4 else _csv(rows)

    return Target(good, seeds, [], mutate, _listed("list.csv"))


def source_jsonl(folder: Path) -> Target:
    """JSON lines of paths and labels."""
    lines = [json.dumps({"path": file, "label": label}) for file, label in _ROWS]
    good = "".join(line + "\n" for line in lines).encode()
    seeds = line_seeds(good) + [json.dumps({"path": "out.png", "label": 1}).encode(), b'{"path": "a.png", "file": "b"}']
    return Target(
        [good, good.replace(b'"ash"', b"1").replace(b'"birch"', b"0")], seeds, [], changed_lines, _listed("l.jsonl")
    )


def source_idx(folder: Path) -> Target:
    """MNIST's file of images, beside which the labels lie; packed or not."""

    def call(data: bytes, own: Path) -> None:
        (own / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + struct.pack(">I", 3) + bytes(3))
        images = own / "train-images-idx3-ubyte"
        images.write_bytes(data)
        path, _ = make_shards([images], None, own / "out", Options(workers=1))
        load_manifest(path)

    head = b"\0\0\x08\3"
    good = head + struct.pack(">3I", 3, 5, 4) + bytes(60)
    seeds = [head + struct.pack(">3I", *sizes) + bytes(60) for sizes in product(ODD_NUMBERS[:13], repeat=3)]
    seeds += [head, b"", good[:15], gzip.compress(good)[:-9], gzip.compress(head + b"\xff" * 12), b"\x1f\x8b"]
    return Target([good, gzip.compress(good)], seeds, [], changed_bytes, call)


def class_tars(folder: Path) -> Target:
    """A folder with a tar for each class, of which one is damaged."""

    def images(*names: bytes) -> bytes:
        return b"".join(member(name, picture()) for name in names) + END

    def call(data: bytes, own: Path) -> None:
        (own / "set").mkdir()
        (own / "set" / "ash.tar").write_bytes(images(b"a.png"))
        (own / "set" / "birch.tar").write_bytes(data)
        path, _ = make_shards([own / "set"], None, own / "out", Options(workers=1))
        load_manifest(path)

    attacks = [tar.replace(member(b"a.cls", b"1"), b"") for tar in hostile_tars()]
    return Target([images(b"x/b.png", b"x/c.PNG", b"d.txt")], attacks, slow_tars(), changed_tar, call)


def remote_tar(folder: Path) -> Target:
    """A tar on a server, indexed where it is; here a file stands for the server."""
    kept: list[bytes] = []

    def download(url: str, start: int, end: int, num_bytes: int, write: Callable, *_: object) -> None:
        if num_bytes != len(kept[0]):
            raise UserError(f"{url}: has {len(kept[0])} bytes")
        write(kept[0][start:end])

    elsewhere.download, elsewhere.num_bytes_of = download, lambda url, *_: len(kept[0])

    def call(data: bytes, own: Path) -> None:
        kept[:] = [data]
        load_manifest(elsewhere.index_urls(["http://h/a.tar"], (), own / "out"))

    return Target(good_tars(), hostile_tars(), slow_tars(), changed_tar, call)


_ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-7/8\r\nContent-Length: 8\r\n\r\nabcdefgh"
_FACTS = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/8\r\nx-goog-hash: crc32c=AAAAAA==\r\n\r\na"
_HEADERS = (
    b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: x", b"Content-Range: bytes */8",
    b"Content-Range: bytes 0-7/99999999999999999999999", b"Content-Range: bytes 0-7/*", b"Content-Encoding: gzip",
    b"Content-Range: bytes 0-7/8, 0-7/8", b"Transfer-Encoding: chunked", b"Location: http://h/b", b"Location:",
    b"Location: file:///etc/passwd", b"Location: //[", b"Location: https://a:b@h/c", b"Location: http://h:99999/",
    b"Location: \xff", b"x-goog-hash: crc32c=====", b"x-goog-hash: crc32c=AA==, md5=A", b"a: " + b"b" * 60_000,
    b"a: b", b": b", b"a",
)  # fmt: skip
_STATUS = tuple(
    b"200 OK,301 Moved,302 Found,308 Moved,400 Bad,401 No,404 No,416 No,429 Many,500 No,503 Later,100 Continue,204 No,"
    b"304 No,999 x,-1 x,x,,206".split(b",")
)


class _Server:
    """A connection to a server that answers everything alike."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def request(self, *_: object, **__: object) -> None: ...

    def getresponse(self) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(self)  # pyright: ignore[reportArgumentType]
        response.begin()
        return response

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.answer)


def http_answer(folder: Path) -> Target:
    """What a server answers that is asked for a part of a file."""
    remote.MAX_TRIES = 1

    def call(data: bytes, own: Path) -> None:
        remote._connection = lambda *_: _Server(data)
        if b" 0-0/" in data:
            remote.facts_of("http://h/a.tar", 1)
        else:
            remote.download("http://h/a.tar", 0, 8, 8, lambda piece: None)

    def mutate(data: bytes, random: Random) -> bytes:
        lines = data.split(b"\r\n")
        for _ in range(random.choice((1, 1, 2, 4))):
            match random.randrange(4):
                case 0:
                    lines[0] = b"HTTP/1.1 " + random.choice(_STATUS)
                case 1:
                    lines.insert(1, random.choice(_HEADERS))
                case 2 if len(lines) > 2:
                    del lines[random.randrange(1, len(lines))]
                case _:
                    lines[-1] = random.choice(
                        (b"", b"a" * 100_000, b"8\r\nabcdefgh\r\n0\r\n\r\n", b"ffffffffffffffffff\r\na")
                    )
        return changed_bytes(data, random) if random.random() < 0.3 else b"\r\n".join(lines)

    seeds = [good.replace(b"206 Partial Content", status) for status in _STATUS for good in (_ANSWER, _FACTS)]
    seeds += [good.replace(b"\r\n", b"\r\n" + header + b"\r\n", 1) for header in _HEADERS for good in (_ANSWER, _FACTS)]
    seeds += [b"HTTP/1.1 302 Found\r\n" + header + b"\r\n\r\n" for header in _HEADERS]
    seeds += [b"", b"HTTP/1.1", b"\r\n" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, _ANSWER[:-1], _ANSWER + b"a"]
    seeds += [
        _ANSWER.replace(b"\r\n", b"\r\na: b\r\n" * 200, 1),
        _ANSWER.replace(b"\r\n", b"\n"),
        b"ICY 200 OK\r\n\r\n",
    ]
    return Target([_ANSWER, _FACTS], seeds, [], mutate, call)


def task_lists(folder: Path) -> Target:
    """Lists of an original data set: names and classes of Pets, classes of ImageNet's validation images."""
    images = {"a_1": picture("jpeg"), "a_2": picture("jpeg"), "b_1": picture("jpeg")}
    line = b"a_1 1 1 1\n"
    good = [b"# a comment\n" + line + b"a_2 1 2 1\nb_1 2 1 1\n", b"n01440764\n" * 3, b"0\n1\n999\n"]

    def call(data: bytes, own: Path) -> None:
        for name, content in images.items():
            _written(own / "images" / f"{name}.jpg", content)
        _written(own / "annotations" / "test.txt", line)
        _written(own / "annotations" / "trainval.txt", data)
        with suppress(UserError):
            imagenet._label_list(own / "annotations" / "trainval.txt")
        if not data.startswith(tuple(good[1:])):
            originals.pets(own)

    words = (
        b"0",
        b"-1",
        b"1.0",
        b"99999999999",
        "٣".encode(),
        b"n01440764",
        b"n0",
        b"a_1",
        b"c_1",
        b"../a",
        b"a" * 5000,
    )
    seeds = (
        [b"a_1 " + word + b"\n" for word in words]
        + [word + b" 1\n" for word in words]
        + [word + b"\n" for word in words]
    )
    seeds += [
        b"",
        b"\n" * 5000,
        b"\xff\n",
        b"\0",
        line * 20_000,
        line.decode().encode("utf-16"),
        b"a_1",
        b"1 a_1\n",
        b"a_1\t1\r",
    ]

    def mutate(data: bytes, random: Random) -> bytes:
        rows = [row.split(b" ") for row in data.splitlines()]
        for _ in range(random.choice((1, 1, 2, 3)) if rows else 0):
            row = random.choice(rows)
            row[random.randrange(len(row))] = random.choice(words)
        return changed_bytes(data, random) if random.random() < 0.4 else b"\n".join(map(b" ".join, rows))

    return Target(good, seeds, [], mutate, call)


def _written(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def plain_pickle(folder: Path) -> Target:
    """A batch of CIFAR's python version: nothing in it is run, and no number or text in it costs more than its size."""
    values = {"filenames": [b"a.png"], "labels": [1, 2], "data": np.zeros((2, 12), np.uint8), "text": "a", "none": None}
    good = [pickle.dumps(values, protocol) for protocol in (2, 4)][::-1]
    made = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR(K\x01%b" + b"cnumpy\ndtype\n(U\x02u1tR\x89%btb"
    )
    huge, text = (
        b"\x8a\xff" + b"\x7f" * 255 + b"q\x02",
        b"T" + (1 << 16).to_bytes(4, "little") + bytes(1 << 16) + b"q\x01",
    )
    seeds = [made % (b"(" + huge + b"h\x02" * number + b"t", text) + b"." for number in (1, 10_000)]
    seeds += [b"](" + made % (b"J\0\0\1\0\x85", text) + made % (b"J\0\0\1\0\x85", b"h\x01") * 20_000 + b"e."]
    seeds += [
        b"})" + b"\x85" * 300_000 + b"Ns.",
        b")" + b"\x85" * 300_000 + b"\x8c\x01a\x93.",
        b"cos\nsystem\n(NtR.",
        b"]" * 99,
    ]
    return Target(good, seeds, [], changed_bytes, lambda data, own: read_plain_pickle(data, "a.pickle"))
