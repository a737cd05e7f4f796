"""Reading raw samples: what plain tar reading gives, and damage costs only the sample that it hits."""

import errno
import gzip
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pretrain.data import reader
from pretrain.data.manifest import BLOCK, Manifest, Shard, ShardIndex, key_crc32, load_index, load_manifest, write_index
from pretrain.data.reader import BadSample, RawSample, parse_label, parse_labels, read_sample
from pretrain.errors import StorageError, UserError
from pretrain.shards.tars import index_tar


class Member(NamedTuple):
    """A file of a tar that a test writes."""

    name: str
    data: bytes
    pax_headers: dict[str, str] = {}


@pytest.fixture(autouse=True)
def no_open_shards() -> None:
    """Each test opens its shards anew: descriptors and indexes are kept per process."""
    reader._open_shard.cache_clear()


def outcome(manifest: Manifest, index: int) -> RawSample | str:
    """The sample, or the reason why it is bad."""
    try:
        return read_sample(manifest, index)
    except BadSample as bad:
        return bad.reason


def tar_bytes(*members: Member, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of the members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.pax_headers = len(member.data), member.pax_headers
            tar.addfile(info, io.BytesIO(member.data))
    return file.getvalue()


def set_of(path: Path, data: bytes, key: str, end: int | None = None) -> Manifest:
    """A set of one shard with one sample, indexed by hand, as whoever makes a hostile set would."""
    path.write_bytes(data)
    shard = Shard(str(path), 1, max(len(data), end or 0), "")
    offsets = np.array([0, (end or len(data)) // 512])
    write_index(shard, ShardIndex(offsets, np.array([zlib.crc32(key.encode())])))
    return Manifest(path, "hostile", "", 1, 5, (), (shard,))


def test_samples_equal_what_tarfile_reads(manifest: Manifest) -> None:
    """Key, image and label of every sample are the bytes that plain tar reading finds in that place."""
    expected: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        with tarfile.open(shard.path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                expected.setdefault(key, {})[ending] = file.read()
    read = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    assert read == [RawSample(key, files["jpg"], files["cls"]) for key, files in expected.items()]


def test_samples_may_be_read_in_any_order(manifest: Manifest) -> None:
    """Reading by index has no position: backwards gives the same."""
    forward = [read_sample(manifest, index) for index in range(103)]
    assert [read_sample(manifest, index) for index in reversed(range(103))] == forward[::-1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_other_members_and_all_image_endings_are_read(form: int, tmp_path: Path) -> None:
    """Extended headers belong to their sample, folders to the key; members that nobody asked for are passed over."""
    key = "folder/" + "k" * (80 if form == tarfile.USTAR_FORMAT else 300)
    members = [Member(f"{key}.json", b"{}"), Member(f"{key}.WEBP", b"picture"), Member(f"{key}.cls", b"3\n")]
    others = [Member("b.png", b"second"), Member("b.cls", b"4"), Member("c.cls", b"0"), Member("c.seg.png", b"x")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(*members, *others, Member("c.jpeg", b"third"), form=form))
    shard = index_tar(path)
    manifest = Manifest(path, "", "", 3, 5, (), (shard,))
    assert [read_sample(manifest, i) for i in range(3)] == [
        RawSample(key, b"picture", b"3\n"),
        RawSample("b", b"second", b"4"),
        RawSample("c", b"third", b"0"),
    ]


def test_keys_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    """A key is a file's name and may be in any encoding."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(Member("k\udcff.jpg", b"x"), Member("k\udcff.cls", b"1"), form=tarfile.GNU_FORMAT))
    manifest = Manifest(path, "", "", 1, 5, (), (index_tar(path),))
    assert read_sample(manifest, 0) == RawSample("k\udcff", b"x", b"1")


def test_a_flipped_header_bit_costs_only_that_sample(own_shards: Path) -> None:
    """200 flips over the headers of a shard: the sample that is hit is bad or unharmed, all others are untouched.

    Plain tar reading would end at the first of them and lose the rest without a word.
    """
    manifest = load_manifest(own_shards)
    shard, index = manifest.shards[0], load_index(manifest.shards[0])
    good = [read_sample(manifest, i) for i in range(manifest.num_samples)]
    whole = shard.path.read_bytes()
    with tarfile.open(shard.path) as tar:
        headers = [member.offset for member in tar]
    random = np.random.default_rng(0)
    bad = 0
    with shard.path.open("r+b", buffering=0) as file:
        for _ in range(200):
            position = int(random.choice(headers) + random.integers(512))
            os.pwrite(file.fileno(), bytes([whole[position] ^ 1 << random.integers(8)]), position)
            hit = int(np.searchsorted(index.offsets * 512, position, side="right")) - 1
            found = outcome(manifest, hit)
            assert found in (good[hit], "tar", "missing")
            bad += isinstance(found, str)
            others = [i for i in (hit - 1, hit + 1, int(random.integers(103))) if 0 <= i < 103 and i != hit]
            assert [outcome(manifest, i) for i in others] == [good[i] for i in others]
            os.pwrite(file.fileno(), whole[position : position + 1], position)
    assert bad > 150  # almost every flip breaks the header's checksum
    assert [read_sample(manifest, i) for i in range(manifest.num_samples)] == good


def test_many_damaged_headers_cost_exactly_their_samples(own_shards: Path) -> None:
    """Half of a shard's first headers destroyed at once: the other half, and the other shards, are read as before."""
    manifest = load_manifest(own_shards)
    good = [read_sample(manifest, i) for i in range(manifest.num_samples)]
    index = load_index(manifest.shards[1])
    with manifest.shards[1].path.open("r+b") as file:
        for number in range(0, 40, 2):
            file.seek(index.byte_range(number)[0])
            file.write(b"\xaa" * 512)
    damaged = set(range(40, 80, 2))
    assert [outcome(manifest, i) for i in range(103)] == ["tar" if i in damaged else good[i] for i in range(103)]


@pytest.mark.parametrize("part", [0.3, 0.7, 0.999])
def test_a_cut_shard_costs_only_what_is_behind_the_cut(part: float, own_shards: Path) -> None:
    """Samples that end before the cut are whole, all behind are bad, none is delivered half."""
    manifest = load_manifest(own_shards)
    good = [read_sample(manifest, i) for i in range(manifest.num_samples)]
    index = load_index(manifest.shards[0])
    cut = int(int(index.offsets[-1]) * 512 * part)
    os.truncate(manifest.shards[0].path, cut)
    whole = {number for number in range(40) if index.byte_range(number)[1] <= cut}
    assert 0 < len(whole) < 40
    expected = [good[i] if i in whole or i >= 40 else "tar" for i in range(103)]
    assert [outcome(manifest, i) for i in range(103)] == expected


def test_a_shard_cut_at_any_block_loses_what_is_behind_and_nothing_else(own_shards: Path) -> None:
    """At each multiple of 512 bytes, from the end to the beginning."""
    manifest = load_manifest(own_shards)
    shard, index = manifest.shards[2], load_index(manifest.shards[2])
    good = [read_sample(manifest, 80 + number) for number in range(shard.num_samples)]
    for cut in range(int(index.offsets[-1]) * BLOCK, -1, -BLOCK):
        os.truncate(shard.path, cut)
        for number, sample in enumerate(good):
            expected = sample if index.byte_range(number)[1] <= cut else "tar"
            assert outcome(manifest, 80 + number) == expected, (cut, number)


def damaged(sample: bytes) -> Iterator[bytes]:
    """A sample with each third bit of its headers flipped, and with bytes changed so that sums stay what they were."""
    with tarfile.open(fileobj=io.BytesIO(sample)) as tar:
        headers = [member.offset for member in tar]
    for header in headers:
        for bit in range(0, 8 * BLOCK, 3):
            changed = bytearray(sample)
            changed[header + bit // 8] ^= 1 << bit % 8
            yield bytes(changed)
    random = np.random.default_rng(1)
    for _ in range(700):
        changed = bytearray(sample)
        header = int(random.choice(headers))
        one, other = (header + int(at) for at in random.integers(0, 360, 2))
        if changed[one] < 255 and changed[other] > 0:
            changed[one] += 1
            changed[other] -= 1
        yield bytes(changed)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_the_short_way_reads_nothing_that_webdataset_reads_otherwise(form: int) -> None:
    """Usual samples go that way; what it reads of damaged ones is what tarfile and webdataset make of them."""
    members = Member("00_0a-7.jpg", b"image" * 300), Member("00_0a-7.cls", b"3")
    key, taken = key_crc32("00_0a-7"), 0
    sample = without_end(tar_bytes(*(members if form == tarfile.GNU_FORMAT else members[::-1]), form=form))
    expected = RawSample("00_0a-7", members[0].data, b"3")
    assert reader._parse_plain(sample, key) == slowly(sample, key) == expected
    for changed in damaged(sample):
        if (found := reader._parse_plain(changed, key)) is not None:
            taken += 1
            assert found == slowly(changed, key)
    assert taken > 20  # with other owners or times


def slowly(data: bytes, key: int) -> RawSample:
    """What tarfile and webdataset make of a sample."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reader, "_parse_plain", lambda *_: None)
        return reader._parse(data, key)


UNUSUAL = {
    "a folder": [Member("x/a.jpg", b"i"), Member("x/a.cls", b"1")],
    "two dots": [Member("a.b.jpg", b"i"), Member("a.b.cls", b"1")],
    "large letters": [Member("a.JPG", b"i"), Member("a.cls", b"1")],
    "another member": [Member("a.jpg", b"i"), Member("a.cls", b"1"), Member("a.json", b"{}")],
    "two images": [Member("a.jpg", b"i"), Member("a.png", b"i")],
    "two keys": [Member("a.jpg", b"i"), Member("b.cls", b"1")],
    "webdataset's": [Member("__a__.jpg", b"i"), Member("__a__.cls", b"1")],
    "a long name": [Member("a" * 98 + ".jpg", b"i"), Member("a" * 98 + ".cls", b"1")],
    "no label": [Member("a.jpg", b"i")],
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_left_to_webdataset(case: str) -> None:
    """Whatever it then makes of it."""
    sample = without_end(tar_bytes(*UNUSUAL[case], form=tarfile.GNU_FORMAT))
    assert reader._parse_plain(sample, key_crc32(UNUSUAL[case][0].name.rpartition(".")[0])) is None


def test_an_index_that_is_off_by_one_sample_is_noticed(own_shards: Path) -> None:
    """Each sample's key is compared with the index: another sample in its place is bad, never taken for it."""
    manifest = load_manifest(own_shards)
    shard, index = manifest.shards[2], load_index(manifest.shards[2])
    write_index(shard, ShardIndex(index.offsets, np.roll(index.key_crc32, 1)))
    assert [outcome(manifest, i) for i in range(80, 103)] == ["tar"] * 23


def test_missing_members_are_told(tmp_path: Path) -> None:
    """A sample without image or label is bad for the reason `missing`; two images of one ending make it `tar`."""
    image, label = Member("a.jpg", b"x"), Member("a.cls", b"1")
    for number, (members, reason) in enumerate(
        [
            ((image,), "missing"),
            ((label,), "missing"),
            ((image, image, label), "tar"),
            ((image, Member("b.cls", b"1")), "tar"),
        ]
    ):
        assert outcome(set_of(tmp_path / f"{number}.tar", tar_bytes(*members), "a"), 0) == reason


def without_end(tar: bytes) -> bytes:
    """The members alone, as a sample's range in a shard."""
    return tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512]


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """Sparse files, in GNU's header or in PAX headers, would become gigabytes in memory; they are refused unread."""
    block = b"x" * 512
    gnu = bytearray(tar_bytes(Member("a.jpg", block), Member("a.cls", b"1"), form=tarfile.GNU_FORMAT))
    gnu[156:157] = b"S"
    gnu[386:398], gnu[398:410] = b"00000000000\0", b"00000001000\0"  # the first 512 bytes
    gnu[483:495] = b"30000000000\0"  # of 3 GB
    gnu[148:156] = b" " * 8
    gnu[148:156] = b"%06o\0 " % sum(gnu[:512])
    with tarfile.open(fileobj=io.BytesIO(gnu)) as tar:
        assert tar.getmembers()[0].issparse() and tar.getmembers()[0].size == 3 << 30
    pax = {"GNU.sparse.map": "0,512", "GNU.sparse.size": str(3 << 30), "GNU.sparse.name": "a.jpg"}
    pax_tar = tar_bytes(Member("a.jpg", block, pax), Member("a.cls", b"1"), form=tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(pax_tar)) as tar:
        assert tar.getmembers()[0].size == 3 << 30
    gnu, pax_tar, before = map(without_end, (bytes(gnu), pax_tar, tar_bytes(Member("a.txt", b"1"))))
    for name, data in (("gnu", gnu), ("pax", pax_tar), ("gnu2", before + gnu), ("pax2", before + pax_tar)):
        with pytest.raises(BadSample, match="sparse"):
            read_sample(set_of(tmp_path / f"{name}.tar", data, "a"), 0)


def test_compressed_samples_are_refused(tmp_path: Path) -> None:
    """A compressed tar inside a shard could become a thousand times its size; tar's guessing is not reached."""
    import bz2
    import lzma

    plain = tar_bytes(Member("a.jpg", bytes(1 << 20)), Member("a.cls", b"1"))
    assert outcome(set_of(tmp_path / "plain.tar", plain, "a"), 0) == RawSample("a", bytes(1 << 20), b"1")
    for name, data in (("gz", gzip.compress(plain)), ("bz2", bz2.compress(plain)), ("xz", lzma.compress(plain))):
        padded = data + bytes(-len(data) % 512)
        with pytest.raises(BadSample, match="compressed"):
            read_sample(set_of(tmp_path / f"{name}.tar", padded, "a"), 0)


def test_a_huge_sample_is_refused_unread(tmp_path: Path) -> None:
    """A sample beyond 64 MB is refused by the index, without allocating it."""
    manifest = set_of(tmp_path / "a.tar", bytes(1024), "a", end=65 << 20)
    with pytest.raises(BadSample, match="68157440 bytes in one sample"):
        read_sample(manifest, 0)


def test_hostile_members_are_never_executed(tmp_path: Path) -> None:
    """Pickles under every ending that webdataset would decode are carried along as bytes, or not at all."""
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(canary),)

    payload = pickle.dumps(Payload())
    endings = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "json", "jpg")
    members = [Member(f"a.{ending}", payload) for ending in endings]
    manifest = set_of(tmp_path / "a.tar", tar_bytes(*members, Member("a.cls", b"1")), "a")
    assert read_sample(manifest, 0) == RawSample("a", payload, b"1")
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists()  # the payload would have worked
    assert os.environ["WDS_SECURE"] == "1"


def test_names_that_leave_the_folder_are_only_names(tmp_path: Path) -> None:
    """Nothing is ever extracted: `../x` and links stay members of a tar."""
    manifest = set_of(tmp_path / "a.tar", tar_bytes(Member("../a.jpg", b"x"), Member("../a.cls", b"1")), "../a")
    outcome(manifest, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.tar"]
    assert not (tmp_path.parent / "a.jpg").exists()


def test_a_vanished_shard_is_a_storage_error(own_shards: Path) -> None:
    """A file system that is gone must stop the run (exit 75, try again), never turn samples into bad ones."""
    manifest = load_manifest(own_shards)
    manifest.shards[0].path.unlink()
    with pytest.raises(StorageError, match=manifest.shards[0].path.name):
        read_sample(manifest, 0)
    assert isinstance(read_sample(manifest, 50), RawSample)


@pytest.mark.parametrize(
    ("number", "failures", "tries"),
    [(errno.EIO, 4, 5), (errno.ESTALE, 1, 2), (errno.ETIMEDOUT, 99, 5), (errno.EIO, 99, 5), (errno.EACCES, 99, 1)],
)
@pytest.mark.parametrize("call", ["pread", "open"])
def test_a_read_that_fails_is_tried_again(
    call: str, number: int, failures: int, tries: int, own_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the back-off lasts, the file reopened each time; then StorageError with the place, no bad sample."""
    manifest, waited, tried = load_manifest(own_shards), list[float](), list[int]()
    whole, real = read_sample(manifest, 0), getattr(os, call)
    of_index = (4, 8, manifest.shards[0].path.with_suffix(".idx").stat().st_size)
    reader._open_shard.cache_clear()

    def broken(*arguments: Any, **named: Any) -> Any:
        if call == "pread" and arguments[1] in of_index:
            return real(*arguments, **named)
        tried.append(1)
        if len(tried) <= failures:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    monkeypatch.setattr(reader.time, "sleep", waited.append)
    monkeypatch.setattr(reader.os, call, broken)
    if failures < tries:
        assert read_sample(manifest, 0) == whole
    else:
        what = r"bytes 0 to \d+ cannot be read" if call == "pread" else "cannot be opened"
        with pytest.raises(StorageError, match=rf"{what} \({os.strerror(number)}"):
            read_sample(manifest, 0)
    monkeypatch.undo()
    assert waited == list(reader.RETRY_AFTER_S[: tries - 1])
    assert len(tried) >= tries if call == "open" else len(tried) == tries


@pytest.mark.parametrize("most", [1, 1000])
def test_a_short_read_is_read_on(most: int, own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounts of FUSE and networks may give fewer bytes than there are; only none at all is the end of a cut shard."""
    manifest, real = load_manifest(own_shards), os.pread
    whole = [read_sample(manifest, index) for index in range(40)]
    os.truncate(manifest.shards[0].path, manifest.shards[0].num_bytes // 2)
    monkeypatch.setattr(os, "pread", lambda file, count, start: real(file, min(count, most), start))
    reader._open_shard.cache_clear()
    found = [outcome(manifest, index) for index in range(0, 40, 4)]
    assert found[:4] == whole[:16:4] and found[6:] == ["tar"] * 4


@pytest.mark.parametrize("at", [-1, 60, 4, 12])
def test_a_damaged_index_is_told_where_a_sample_is_not_what_it_says(at: int, own_shards: Path) -> None:
    """Rows are read one by one; a sample that does not fit has the whole index checked: it is not called a bad sample.

    at: a byte of the arrays; the checksums of keys begin behind 41 offsets.
    """
    manifest = load_manifest(own_shards)
    path = manifest.shards[0].path.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    start, row = data.index(b"\n") + 1, 4 * (41 + 0)
    place = {-1: len(data) - 1, 60: start + row + 1, 4: start + 5, 12: start + 12}[at]
    data[place] ^= 0x10
    path.write_bytes(data)
    found = []
    for index in range(40):
        try:
            found.append(read_sample(manifest, index))
        except UserError as error:
            assert "does not fit its shard (payload_crc32" in str(error)
    assert len(found) in ((40,) if at == -1 else (38, 39))  # a local sample's own checksum is for remote shards
    path.write_bytes(data[:-4])
    reader._open_shard.cache_clear()
    with pytest.raises(UserError, match="bytes of offsets"):
        read_sample(manifest, 0)


def test_a_missing_index_is_the_users_error(own_shards: Path) -> None:
    """Waiting cannot help where the index was never copied: the message names the tool."""
    manifest = load_manifest(own_shards)
    manifest.shards[0].path.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match="make it with tools/make_shards.py"):
        read_sample(manifest, 0)


def test_more_shards_than_descriptors(own_shards: Path) -> None:
    """Open files are limited and closed again: 400 shards are read within a limit that they would exceed."""
    manifest = load_manifest(own_shards)
    shard = manifest.shards[2]
    copies = []
    for number in range(400):
        path = own_shards / f"copy-{number}.tar"
        os.link(shard.path, path)
        os.link(shard.path.with_suffix(".idx"), path.with_suffix(".idx"))
        copies.append(Shard(str(path), shard.num_samples, shard.num_bytes, shard.sha256))
    many = Manifest(own_shards, "", "", 400 * 23, 5, (), tuple(copies))
    before = len(os.listdir("/proc/self/fd"))
    assert all(read_sample(many, 23 * i) == read_sample(manifest, 80) for i in range(400))
    assert len(os.listdir("/proc/self/fd")) <= before + 128


@pytest.mark.parametrize("raw, label", [(b"0", 0), (b"4", 4), (b" 3\n", 3), (b"004", 4)])
def test_labels_are_read(raw: bytes, label: int) -> None:
    """ASCII digits, with white space around them as editors leave it."""
    assert parse_label(raw, 5) == label


@pytest.mark.parametrize(
    "raw", [b"5", b"-1", b"", b"x", b"1.0", b"1 2", b"+1", b"1_0", "²".encode(), b"9" * 5000, b"0x1"]
)
def test_labels_out_of_range_are_bad(raw: bytes) -> None:
    """Anything but an integer in 0..num_classes-1 is bad for the reason `label`, at once and with a short message."""
    with pytest.raises(BadSample) as bad:
        parse_label(raw, 5)
    assert bad.value.reason == "label"
    assert len(str(bad.value)) < 200


@pytest.mark.parametrize("raw, labels", [(b"[0]", [0]), (b"[3, 1]", [3, 1]), (b" [ 4 ,0,\n2 ]\n", [4, 0, 2])])
def test_lists_of_labels_are_read(raw: bytes, labels: list[int]) -> None:
    """A JSON list of different integers, in its order; a set of single classes has lists of one."""
    assert parse_labels(raw, 5, multi_label=True) == labels
    assert parse_labels(b"4", 5, multi_label=False) == [4]


@pytest.mark.parametrize(
    "raw", [b"[5]", b"[]", b"3", b"[1, 1]", b"[1,]", b"[-1]", b"[1.0]", b"[[1]]", b"[1", b'["1"]', b"[" * 50_000, b""]
)
def test_wrong_lists_of_labels_are_bad(raw: bytes) -> None:
    """Classes that do not exist, empty lists, repetitions and other things: reason `label`, no RecursionError."""
    with pytest.raises(BadSample) as bad:
        parse_labels(raw, 5, multi_label=True)
    assert bad.value.reason == "label" and len(str(bad.value)) < 200
    with pytest.raises(BadSample):
        parse_labels(b"[1]", 5, multi_label=False)
