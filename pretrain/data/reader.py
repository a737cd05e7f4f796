"""Reads raw samples by index, and reports every one that is lost. All but plain image-label pairs go to webdataset.

A sample is read by its byte range in the shard's index, so a damaged tar header costs that one sample and never the
rest of the shard (plain tar reading ends there silently).
"""

import io
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

os.environ["WDS_SECURE"] = "1"  # before the import: no pickles, no `pipe:`
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.index_rows import Descriptor, IndexRows, read_at
from pretrain.data.manifest import (
    BLOCK,
    IMAGE_ENDINGS,
    LABEL_ENDING,
    Manifest,
    Shard,
    ShardIndex,
    key_crc32,
    load_index,
)
from pretrain.data.store import Block, store_at
from pretrain.data.tar_headers import MAX_SAMPLE_MEMBERS, members
from pretrain.errors import PASSING_ERRORS, RETRY_AFTER_S, StorageError, UserError

MAX_SAMPLE_BYTES = 64 << 20  # a larger one is refused unread
MAX_IMAGE_BYTES = MAX_SAMPLE_BYTES - (64 << 10)  # what remains for the image beside its headers and its label
MAX_LABELS = 1000  # of one image: all rows of a batch are padded to the longest, and 4096 of 1000 labels take 50 MB
MAX_LABEL_BYTES = 16 << 10  # of their list
MAX_TRYING_S = 60.0  # no further try after that: one may itself last for minutes
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's rule
_OCTAL = re.compile(rb"[0-7]{11}[ \0]")
_OWNER, _DEVICE = re.compile(rb"(?:[0-7]{7}[ \0]){3}"), re.compile(rb"(?:[0-7]{7}\0|\0{8}){2}")
_CHECKSUM = re.compile(rb"[0-7]{6}(?:\0 | \0)")
# A name without a folder, a second dot or webdataset's `__`, ended by a zero byte within its field.
_PLAIN_NAME = re.compile(
    rb"(?=[^\0]{1,99}\0)((?:[A-Za-z0-9-]|_(?!_))+)\.(%s)\0" % "|".join((*IMAGE_ENDINGS, LABEL_ENDING)).encode()
)
_LIST = re.compile(rb"\[\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)\s*\]")


class BadSample(Exception):
    """A sample cannot be used. `reason`: tar, missing, decode, label or damaged (docs/data.md)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class RawSample(NamedTuple):
    """A sample as stored."""

    key: str
    image: bytes  # an encoded image
    label: bytes  # ASCII digits, or a JSON list of integers


def read_sample(manifest: Manifest, index: int) -> RawSample:
    """Returns sample `index` of the data set.

    In a remote shard it is read from the store, which first downloads its block if it is missing. Raises BadSample when
    the bytes are not the indexed sample, StorageError when they cannot be read for now.
    """
    shard, number = manifest.locate(index)
    try:
        return _far_sample(manifest, shard, number, index) if shard.url else _near_sample(shard, number)
    except BadSample as bad:
        if bad.reason == "tar":  # or is the index at fault? Only some of its rows were checked
            _patiently(shard, "cannot be opened", lambda: load_index(shard))
        raise


def _near_sample(shard: Shard, number: int) -> RawSample:
    start, end, key = _from_index(shard, lambda rows: (*rows.byte_range(number), rows.key_crc32(number)))
    _check_size(end - start)
    data = _patiently(shard, f"bytes {start} to {end} cannot be read", lambda: _pread(shard, start, end))
    if len(data) != end - start:
        raise BadSample("tar", f"the shard ends at byte {start + len(data)}")
    return _parse(data, key)


def _far_sample(manifest: Manifest, shard: Shard, number: int, index: int) -> RawSample:
    """A remote shard's sample, from the store. A block with other bytes than indexed is downloaded again, once."""
    rows = _block_rows(shard, *_block_numbers(manifest, shard, number, index))
    row = number - rows.first
    start, end = rows.index.byte_range(row)
    _check_size(end - start)
    store = manifest.store or store_at(None)
    for tries in (1, 2):
        data = store.read(rows.block, start, end)
        if len(data) == end - start and is_intact(data, rows.index, row):
            return _parse(data, int(rows.index.key_crc32[row]))
        if tries == 1:
            store.discard(rows.block)
    raise BadSample("tar", f"bytes {start} to {end} of {shard.url} are not those that were indexed")


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_SAMPLE_BYTES:
        raise BadSample("tar", f"{num_bytes} bytes in one sample")


def _from_index(shard: Shard, read: Callable[[IndexRows], Any]) -> Any:
    """Returns `read` of a shard's index rows. Raises UserError, saying what is wrong, when these are impossible."""

    def attempt() -> Any:
        rows = _open_shard(shard)[1]
        try:
            return read(rows)
        except ValueError as error:
            load_index(shard)
            path = shard.path.with_suffix(".idx")
            raise UserError(f"{path}: does not fit its shard ({error}); index it again") from None

    return _patiently(shard, "cannot be opened", attempt)


def _patiently(shard: Shard, what: str, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns, reopening the file after each wait of RETRY_AFTER_S. Raises StorageError.

    Where a try itself lasts for minutes, as on an unreachable mount, there are fewer: the watchdog's time is shorter.
    """
    began = time.monotonic()
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            return read()
        except StorageError:
            raise
        except OSError as error:
            late = time.monotonic() - began > MAX_TRYING_S
            if wait_s is None or late or error.errno not in PASSING_ERRORS:
                tries = f", {len(RETRY_AFTER_S) + 1} times in {sum(RETRY_AFTER_S):g} s" if wait_s is None else ""
                raise StorageError(f"{shard.path}: {what} ({error.strerror}{tries})") from None
            _open_shard.cache_clear()  # a descriptor stays stale after its server was away
            time.sleep(wait_s)


def block_of(manifest: Manifest, index: int) -> Block | None:
    """Returns the block of a remote shard that holds a sample, None when it lies in a local shard.

    Blocks are `Manifest.block_samples` consecutive samples; one across two shards is split into one for each.
    """
    shard, number = manifest.locate(index)
    return _block_rows(shard, *_block_numbers(manifest, shard, number, index)).block if shard.url else None


def _block_numbers(manifest: Manifest, shard: Shard, number: int, index: int) -> tuple[int, int]:
    """The numbers, within the shard, of the first sample of a sample's block and of the first sample after it."""
    size = manifest.block_samples
    return number - min(number, index % size), min(shard.num_samples, number + size - index % size)


class _BlockRows(NamedTuple):
    """A block of a remote shard, and its samples' rows of the shard's index."""

    block: Block
    first: int  # number in the shard of its first sample
    index: ShardIndex  # of the block's samples alone


@lru_cache(maxsize=256)  # blocks; a step takes several samples of each. At most 48 KB: 4,096 rows of 12 bytes
def _block_rows(shard: Shard, first: int, end: int) -> _BlockRows:
    index = ShardIndex(*_from_index(shard, lambda rows: rows.part(first, end)))
    start, behind = index.byte_range(0)[0], index.byte_range(end - first - 1)[1]
    return _BlockRows(Block(shard.url, shard.sha256, shard.num_bytes, start, behind), first, index)


def is_intact(data: bytes, shard_index: ShardIndex, number: int) -> bool:
    """Returns whether a sample's bytes are those that were indexed; an index of version 1 cannot tell."""
    sums = shard_index.sample_crc32
    return sums is None or zlib.crc32(data) == int(sums[number])


def _parse(data: bytes, wanted_key: int) -> RawSample:
    if (sample := _parse_plain(data, wanted_key)) is not None:
        return sample
    if _expands(data):
        raise BadSample("tar", "a compressed tar, which is not unpacked")
    try:
        if not _has_plain_headers(data):
            _check_headers(data)
        files = list(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}], handler=_raise))
        own = [file for file in files if member_passed_over(file.get("fname", "a.b")) is None]  # {} ends a stream
        # An index of an earlier version may list samples below a hidden folder; their bytes hold nothing else.
        samples = list(group_by_keys(own if any(own) else files, handler=_raise))
    except Exception as error:  # tarfile and webdataset raise many types on damaged headers
        raise BadSample("tar", str(error)) from None
    complete = [sample for sample in samples if not is_stranger(sample.keys())]
    wanted = [sample for sample in complete if key_crc32(sample["__key__"]) == wanted_key]
    if len(wanted) != 1 or complete != wanted:
        raise BadSample("tar", "the members are not those of the index")
    sample = wanted[0]
    image = next((sample[ending] for ending in IMAGE_ENDINGS if ending in sample), None)
    if image is None or LABEL_ENDING not in sample:
        raise BadSample("missing", "no image" if image is None else "no label")
    return RawSample(sample["__key__"], image, sample[LABEL_ENDING])


def _parse_plain(data: bytes, wanted_key: int) -> RawSample | None:
    """Fast path for the usual sample, one image and one label under plain names; None: webdataset has to decide.

    A quarter of the time that tarfile and webdataset take. Whatever is unusual, or damaged, is left to them.
    """
    found: dict[str, tuple[str, bytes]] = {}
    at = 0
    for _ in range(2):
        header = data[at : at + BLOCK]
        name = _PLAIN_NAME.match(header)
        # A regular file without a name prefix, in ustar or GNU format
        if name is None or header[156:157] != b"0" or header[257:262] != b"ustar" or header[345:346] != b"\0":
            return None
        if not (_OCTAL.fullmatch(size := header[124:136]) and _CHECKSUM.fullmatch(checksum := header[148:156])):
            return None
        if not (_OWNER.fullmatch(header, 100, 124) and _OCTAL.fullmatch(header, 136, 148)):
            return None
        if not _DEVICE.fullmatch(header, 329, 345):
            return None
        if sum(header) - sum(checksum) + 8 * 0x20 != int(checksum[:6], 8):
            return None
        end = at + BLOCK + int(size[:11], 8)
        key, ending = name[1].decode("ascii"), name[2].decode("ascii")
        found["label" if ending == LABEL_ENDING else "image"] = key, data[at + BLOCK : end]
        at = end + -end % BLOCK
    if at != len(data) or len(found) != 2 or found["image"][0] != found["label"][0]:
        return None
    key, image = found["image"]
    return RawSample(key, image, found["label"][1]) if key_crc32(key) == wanted_key else None


def member_passed_over(name: str) -> str | None:
    """Returns why a member of a tar is skipped, None when it is part of a sample.

    Skipped are what webdataset skips (no ending, its own `__NAME__`) and hidden or system files, which it does not.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if not parts:
        return "files without an ending"
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "hidden and system files"
    if _META.match(name):
        return "webdataset's own files"
    return None if "." in parts[-1] else "files without an ending"


def is_stranger(endings: Iterable[str]) -> bool:
    """Returns whether the members of one key are no sample: no image and no label, as for a README."""
    return not {*IMAGE_ENDINGS, LABEL_ENDING} & set(endings)


def parse_label(raw: bytes, num_classes: int) -> int:
    """Returns the class of a `.cls` member. Raises BadSample unless it is an integer in 0..num_classes-1."""
    text = raw.strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= num_classes:
        raise BadSample("label", f"{raw[:20]!r} is not an integer in 0..{num_classes - 1}")
    return int(text)


def parse_labels(raw: bytes, num_classes: int, multi_label: bool) -> list[int]:
    """Returns the classes of a `.cls` member: one, or as many different ones as its JSON list names, at least one.

    Raises BadSample when it is something else.
    """
    if not multi_label:
        return [parse_label(raw, num_classes)]
    if len(raw) > MAX_LABEL_BYTES or raw.count(b",") >= MAX_LABELS:
        raise BadSample("label", f"a list of {len(raw)} bytes, at most {MAX_LABELS} labels in {MAX_LABEL_BYTES} bytes")
    match = _LIST.fullmatch(raw.strip())
    labels = [int(text) for text in match[1].split(b",")] if match else []
    if not labels or max(labels) >= num_classes or len(set(labels)) < len(labels):
        raise BadSample("label", f"{raw[:20]!r} is not a list of different integers in 0..{num_classes - 1}")
    return labels


def _expands(data: bytes) -> bool:
    """Whether tarfile would decompress it for webdataset, maybe to gigabytes: gzip, xz, lzma, zstd, bzip2."""
    return data.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"]\0\0\x80", b"(\xb5/\xfd")) or data[4:10] == b"1AY&SY"


def _check_headers(data: bytes) -> None:
    """Raises BadHeader for headers that tarfile must not see, BadSample for more members than a sample may have."""
    own = 0
    for member in members(io.BytesIO(data), 0, len(data), of_sample=True):
        own += not member.isdir() and member_passed_over(member.name) is None
        if own > MAX_SAMPLE_MEMBERS:
            raise BadSample("tar", f"more than {MAX_SAMPLE_MEMBERS} members in one sample")


def _has_plain_headers(data: bytes) -> bool:
    """Whether all members are regular files with octal sizes, and not too many: nearly always so.

    Then no limit of `tar_headers` can be exceeded; checking there takes as long as decoding a small image.
    """
    at = 0
    for _ in range(MAX_SAMPLE_MEMBERS):
        if data[at + 156 : at + 157] != b"0" or not _OCTAL.fullmatch(size := data[at + 124 : at + 136]):
            return False
        at += 512 + -(-int(size[:11], 8) // 512) * 512
        if at >= len(data):
            return True
    return False


def _raise(error: Exception) -> bool:
    raise error


@lru_cache(maxsize=64)  # per process, two descriptors each; a limit of 1024 is common
def _open_shard(shard: Shard) -> tuple[Descriptor | None, IndexRows]:
    """An open shard, None where it is remote, and its index. Raises OSError, UserError when that is not its index."""
    opened = None if shard.url else Descriptor(os.open(shard.path, os.O_RDONLY))
    path = shard.path.with_suffix(".idx")
    try:
        return opened, IndexRows(path, shard.num_bytes, shard.sha256, shard.num_samples)
    except (FileNotFoundError, ValueError):
        load_index(shard)  # says what is wrong
        raise


def _pread(shard: Shard, start: int, end: int) -> bytes:
    opened = _open_shard(shard)[0]  # referenced until it is read: another thread may empty the cache meanwhile
    assert opened is not None
    return read_at(opened.number, start, end)


def forget_shards() -> None:
    """Closes all open shards: a removed file's space is freed only then."""
    _open_shard.cache_clear()
    _block_rows.cache_clear()
