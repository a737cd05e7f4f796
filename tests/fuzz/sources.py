"""What make_shards is given beside shards and archives: lists of images, a tar for each class, tars on a server."""

import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from fuzz.harness import Target
from fuzz.mutate import ODD_VALUES, changed_bytes, changed_lines, changed_tar, line_seeds, member
from fuzz.sets import END, good_tars, hostile_tars, picture, slow_tars
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.shards import elsewhere
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
    return Target([images(b"b.png", b"x/c.PNG", b"d.txt")], attacks, slow_tars(), changed_tar, call)


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
