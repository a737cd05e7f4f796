"""Tars from strangers: what headers claim is refused within limits, at every door; what tar programs write is read."""

import errno
import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import reader
from pretrain.data.manifest import key_crc32
from pretrain.data.reader import BadSample
from pretrain.data.tar_headers import BadHeader, end_of, members
from pretrain.errors import StorageError, UserError
from pretrain.shards.archives import files_of
from pretrain.shards.class_tars import class_tar_items, tar_of_tars_items
from pretrain.shards.existing import index_existing
from pretrain.shards.imagenet import TRAIN_TAR, imagenet, wnids
from pretrain.shards.packs import pack_originals
from pretrain.shards.passes import Work
from pretrain.shards.sources import Told
from pretrain.shards.tars import index_tar


def header(name: str, size: int, kind: bytes = b"0", field: bytes | None = None, prefix: bytes = b"") -> bytes:
    """A header; field: what stands where the size belongs."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = field or block[124:136]
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    """A header and its data, filled up to whole blocks."""
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """An extended header of PAX records, KEY=VALUE."""
    text = b""
    for record in records:
        length = len(record) + 3
        while length != len(record) + 2 + len(str(length)):
            length += 1
        text += b"%d %s\n" % (length, record)
    return member("pax", text, kind)


def base_256(number: int) -> bytes:
    """A number field as GNU tar writes what octal digits cannot say."""
    return (b"\xff" if number < 0 else b"\x80") + (number % 256**11).to_bytes(11, "big")


SAMPLE = member("a.png", b"x") + member("a.cls", b"1")
END = bytes(1024)
LONG = member("././@LongLink", b"b\0", b"L")
HOSTILE = {  # after a good sample: what comes next, and what is said
    "a negative size": (header("a.txt", 0, field=base_256(-512)), "a size of -512 bytes, expected at least 0"),
    "a very negative size": (header("a.txt", 0, field=base_256(-(1 << 70))), "expected at least 0"),
    "a negative size in octal": (header("a.txt", 0, field=b"-0000001000\0"), "a size of -512 bytes"),
    "a negative long name": (header("l", 0, b"L", base_256(-512)), "a size of -512 bytes"),
    "a negative folder": (header("d/", 0, b"5", base_256(-1024)), "a size of -1024 bytes"),
    "a size of 2^80": (header("a.txt", 0, field=base_256(1 << 80)), f"a member of {1 << 80} bytes, but"),
    "a negative size in PAX": (pax(b"size=-512") + member("a.txt", b""), "a size of b'-512', expected digits"),
    "a huge size in PAX": (pax(b"size=" + b"9" * 18) + member("a.txt", b""), f"a member of {'9' * 18} bytes, but"),
    "a size for all": (pax(b"size=512", kind=b"g") + member("a.txt", b""), "a path or size for all members"),
    "records in the filling": (
        header("pax", 6, b"x") + b"6 a=b\n13 size=-512\n".ljust(512, b"\0") + member("a.txt", b""),
        "a size of b'-512'",
    ),
    "3 MB of digits": (member("pax", b"1" * 3_000_000, b"x"), "an extended header of 3000000 bytes, at most 65536"),
    "a long name of 1 MB": (member("l", b"b" * 1_000_000, b"L"), "of 1000000 bytes, at most 65536"),
    "30 kB of digits": (pax(b"comment=" + b"1" * 30_000) + member("a.txt", b""), "more than 255 digits in a row"),
    "records that are none": (member("pax", b"5 " * 2000, b"x") + member("a.txt", b""), "not LENGTH KEY=VALUE"),
    "a record without an end": (member("pax", b"30000 a=" + b"b" * 100, b"x") + member("a.txt", b""), "not LENGTH"),
    "a record of length 0": (member("pax", b"0 a=b\n", b"x") + member("a.txt", b""), "not LENGTH KEY=VALUE"),
    "3000 long names": (LONG * 3000 + member("a.txt", b""), "more than 8 extended headers before a member"),
    "3000 PAX headers": (pax(b"comment=") * 3000 + member("a.txt", b""), "more than 8 extended headers"),
    "3000 global headers": (pax(b"comment=", kind=b"g") * 3000 + member("a.txt", b""), "more than 8 extended headers"),
    "a name of 5000": (
        member("l", b"b/" * 2500 + b"\0", b"L") + member("a", b""),
        "a name of 5000 bytes, at most 4096",
    ),
    "a path of 5000": (pax(b"path=" + b"b/" * 2500 + b"c") + member("a", b""), "a name of 5001 bytes, at most 4096"),
    "an old sparse file": (header("a.txt", 0, b"S"), "a sparse member"),
    "a new sparse file": (
        pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + member("a.txt", b"99999999\n" + b"0\n" * 999),
        "a sparse member",
    ),
    "nothing behind a long name": (LONG, "an extended header without its member"),
}


def from_sample(data: bytes, _: Path) -> None:
    """The door of training."""
    reader._parse(data, key_crc32("a"))


def from_index(data: bytes, folder: Path) -> None:
    """The door of make_shards."""
    (folder / "a.tar").write_bytes(data)
    index_tar(folder / "a.tar")


def from_packed_index(data: bytes, folder: Path) -> None:
    """The door of make_shards for compressed tars, which leaves nothing in OUT."""
    (folder / "a.tar.gz").write_bytes(gzip.compress(data, 1))
    try:
        index_existing([folder / "a.tar.gz"], [], folder / "out")
    finally:
        assert list((folder / "out").iterdir()) == []


def from_archive(data: bytes, folder: Path) -> None:
    """The door of make_shards --task for downloads."""
    (folder / "a.tar").write_bytes(data)
    files_of(folder / "a.tar")


def from_packed_archive(data: bytes, folder: Path) -> None:
    """The same, compressed."""
    (folder / "val.tar.gz").write_bytes(gzip.compress(data, 1))
    pack_originals(folder / "val.tar.gz")


def from_imagenet(data: bytes, folder: Path) -> None:
    """A tar of tars."""
    (folder / TRAIN_TAR).write_bytes(member("n01440764.tar", data) + END)
    imagenet(folder)


def from_tar_elsewhere(data: bytes, folder: Path) -> None:
    """The door of make_shards for a tar that is copied to OUT."""
    (folder / "a.tar").write_bytes(data)
    index_existing([folder / "a.tar"], [], folder / "out")


def from_class_tars(data: bytes, folder: Path) -> None:
    """The door of make_shards for a tar of each class, whose images have no labels beside them."""
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes(data.replace(SAMPLE, SAMPLE[:1024], 1))
    class_tar_items(folder, Told())


def from_tar_of_tars(data: bytes, folder: Path) -> None:
    """The door for a tar that holds a tar of each class."""
    (folder / "a.tar").write_bytes(member("a.tar", data.replace(SAMPLE, SAMPLE[:1024], 1)) + END)
    tar_of_tars_items(folder / "a.tar", Told(), Work(folder / "out"))


READERS = (from_tar_of_tars, from_index, from_archive, from_imagenet, from_tar_elsewhere, from_class_tars)
DOORS = (from_sample, from_packed_index, from_packed_archive, *READERS)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_hostile_headers_are_refused(door: Callable[[bytes, Path], None], tmp_path: Path) -> None:
    """Each is one line that names the limit, and is found before anything is read that the header claims."""
    wnids()  # imports timm, which takes seconds
    for name, (data, said) in HOSTILE.items():
        start = time.monotonic()
        data = SAMPLE + data + (b"" if "nothing behind" in name else END)
        with pytest.raises(BadSample if door is from_sample else UserError) as error:
            door(data, tmp_path)
        message = str(error.value)
        assert said in message or (said.endswith("but") and "more than 4 GiB unpacked" in message), (name, message)
        assert "\n" not in message and (door is from_sample or str(tmp_path) in message), name
        assert time.monotonic() - start < 10, name


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("door", READERS, ids=lambda door: door.__name__)
def test_a_disk_that_fails_for_now_is_no_damaged_tar(
    door: Callable[[bytes, Path], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 75, by which a job is tried again; what only the user can mend is exit 2. One line, which names the tar."""
    wnids()
    real = Path.open

    def failing(path: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if path.suffix == ".tar" and mode == "rb":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, mode, *arguments, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(UserError if number == errno.EACCES else StorageError, match=r"\.tar: ") as caught:
        door(SAMPLE + END, tmp_path)
    assert "\n" not in str(caught.value) and os.strerror(number) in str(caught.value)


@pytest.mark.parametrize(
    "data, said",
    [
        (SAMPLE + b"".join(member(f"a.{number}", b"") for number in range(64_000)), "more than 1000 members"),
        (SAMPLE + member("a.txt", b"", b"5") * 64_000, "more than 10000 headers"),
        (SAMPLE + (pax(b"comment=" + b"c" * 1000) + member("a.txt", b"")) * 60, "more than 32768 bytes of extended"),
        (SAMPLE + (LONG * 7 + member("a.txt", b"")) * 900, "more than 1000 extended headers"),
    ],
)
def test_a_sample_has_limits_of_its_own(data: bytes, said: str) -> None:
    """Each epoch reads it again: too many members, of the plainest kind too, and too much beside them."""
    start = time.monotonic()
    with pytest.raises(BadSample, match=said):
        reader._parse(data, key_crc32("z"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "strangers",
    [
        [("folder/", b"5")] * 1200,
        [(f"folder/README{number}", b"0") for number in range(1200)],
        [(f"folder/.{number}.jpg", b"0") for number in range(1200)],
        [("a/" * 49, b"5"), ("a/" * 49 + "b", b"0")] * 4900,
    ],
    ids=["folders", "files without an ending", "hidden files", "as many as may be"],
)
def test_strangers_between_samples_are_many(strangers: list[tuple[str, bytes]]) -> None:
    """They lie in the range of the sample before them, which is read, in a bounded time."""
    data = SAMPLE + b"".join(member(name, b"", kind) for name, kind in strangers)
    start = time.process_time()
    assert reader._parse(data, key_crc32("a")) == ("a", b"x", b"1")
    assert time.process_time() - start < 4


def written(form: int, seed: int) -> bytes:
    """A tar of random members of every kind, as Python's tarfile writes it."""
    random = np.random.default_rng(seed)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "of all"}) as tar:
        for number in range(12):
            long = "/".join(["f" * 60] * int(random.integers(1, 5 if form != tarfile.USTAR_FORMAT else 3)))
            info = tarfile.TarInfo(f"{long}/{number}é.jpg")
            info.type = bytes(random.choice([b"0", b"0", b"0", b"\0", b"7", b"5", b"2", b"1", b"6", b"V"]))
            info.linkname = "l" * 150 if form != tarfile.USTAR_FORMAT else "l"
            info.mtime = float(random.integers(1 << 30)) + (0.5 if form == tarfile.PAX_FORMAT else 0)
            info.size = int(random.integers(2000)) if info.isreg() or info.type == b"V" else 0
            if form == tarfile.PAX_FORMAT and number % 2:
                info.pax_headers = {"SCHILY.xattr.user.x": "y" * 300}
            tar.addfile(info, io.BytesIO(bytes(2000)))
    return file.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tar_programs_write_is_read_as_tarfile_reads_it(form: int) -> None:
    """Long names and links, folders, links, devices, unknown kinds, times, attributes, a header for all members."""
    for seed in range(10):
        data = written(form, seed)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            expected = [(m.name, m.type, m.size, m.offset_data, tar.fileobj and m.isreg()) for m in tar]
        for start, padded in ((0, data), (1024, bytes(1024) + data)):
            found = list(members(io.BytesIO(padded), start, len(padded)))
            assert [(m.name, m.type, m.size, m.offset_data - start, m.isreg()) for m in found] == expected
            assert [m.offset for m in found[1:]] == [end_of(m) for m in found[:-1]]  # each byte belongs to a member


@pytest.mark.parametrize("in_pax", [False, True])
def test_files_above_8_gb_are_read(in_pax: bool, tmp_path: Path) -> None:
    """Their size is in base 256, or in PAX records: where the next one begins is right."""
    size = 9 << 30
    first = (
        pax(b"size=%d" % size) + header("big.bin", 0) if in_pax else header("big.bin", 0, field=base_256(size))
    )  # tarfile's own limit of octal digits is 8 GB
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(first)
        file.seek(len(first) + size)  # a hole
        file.write(member("small.txt", b"here") + END)
    big, small = files_of(tmp_path / "a.tar")
    assert (big.name, small.name, small.read(100)) == ("big.bin", "small.txt", b"here")
    with pytest.raises(BadSample, match=f"{size} bytes, at most 100"):
        big.read(100)


def test_an_archive_of_zeros_is_not_unpacked(tmp_path: Path) -> None:
    """1 GB in 1 MB: neither in OUT nor in memory; nothing of it stays in OUT. What was done before it is kept."""
    zeros = tmp_path / "zeros.tar.gz"
    with gzip.open(zeros, "wb", 1) as file:
        file.write(header("a.jpg", 400 << 20))
        for _ in range(100):
            file.write(bytes(1 << 20))
    good, out = tmp_path / "good.tar", tmp_path / "out"
    good.write_bytes(SAMPLE + END)
    out.mkdir()
    (out / "zeros.idx").write_text("another tool's")
    with pytest.raises(UserError, match=r"zeros.tar.gz: becomes [\d,]+ bytes or more, at most 67,108,864"):
        index_existing([good, zeros], [], out)
    assert {path.name for path in out.rglob("*")} == {
        *("zeros.idx", "good.tar", "good.idx", ".indexing", "good.tar.json", "good.tar.copy")
    }
    for door in (files_of, pack_originals):
        with pytest.raises(UserError, match=r"zeros.tar.gz: becomes 419,430,912 bytes or more, at most 67,108,864"):
            door(zeros)
    assert index_existing([good], [], out).exists() and not (out / ".indexing").exists()


@pytest.mark.parametrize("data", [SAMPLE + END, SAMPLE + b"junk".ljust(512) + END], ids=["good", "damaged"])
def test_an_index_of_another_tool_stays(data: bytes, tmp_path: Path) -> None:
    """An .idx that is in the way ends the indexing, of a good tar too: it stays, the copy of the tar goes."""
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.idx").write_text("another tool's")
    with pytest.raises(UserError, match=r"a\.(idx: is in the way and no index of ours|tar: not a readable tar)"):
        index_existing([tmp_path / "a.tar"], [], tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a.idx": "another tool's"}


def test_what_a_killed_indexing_left_is_removed(tmp_path: Path) -> None:
    """Half an index under a temporary name: the next call takes it away."""
    program = (
        "import os, sys; from pathlib import Path; from pretrain.storage import replacing\n"
        "with replacing(Path(sys.argv[1]), shared=True) as temporary: temporary.touch(); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "a.tar").write_bytes(SAMPLE + END)
    subprocess.run([sys.executable, "-c", program, tmp_path / "a.idx"], cwd=Path(__file__).parents[1])
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    index_existing([tmp_path / "a.tar"], [], tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cut_or_damaged_archive_is_refused(tmp_path: Path) -> None:
    """Whatever is cut or flipped in a .tar.gz or a header: one line, and no file is silently left out."""
    data = SAMPLE + END
    packed = gzip.compress(data)
    for cut in range(1, len(packed), 7):
        (tmp_path / "val.tar.gz").write_bytes(packed[:cut])
        with pytest.raises(UserError, match="not a readable tar"):
            pack_originals(tmp_path / "val.tar.gz")
    for place in range(0, 512, 37):
        damaged = bytearray(data)
        damaged[1024 + place] ^= 1
        (tmp_path / "val.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="byte 1024: no tar header"):
            files_of(tmp_path / "val.tar")
    with pytest.raises(BadHeader, match="byte 1024: a member of 1 bytes, but 0 are left"):
        list(members(io.BytesIO(data), 0, 1536))
