"""The index of a tar: where each sample begins, and whether it can be read at all."""

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data.manifest import (
    BLOCK,
    IMAGE_ENDINGS,
    LABEL_ENDING,
    Manifest,
    Shard,
    ShardIndex,
    key_crc32,
    write_index,
)
from pretrain.data.reader import is_stranger, member_passed_over
from pretrain.data.tar_headers import BadHeader, end_of, members
from pretrain.errors import PASSING_ERRORS, StorageError, UserError
from pretrain.escape import shown

_PIECE_BYTES = 1 << 20  # of a file, read at a time


class Sample(NamedTuple):
    """Consecutive members with the same key."""

    key: str
    start: int  # byte of the first one's header
    member: str  # the first one's name
    endings: set[str]


def index_tar(path: Path, passed_over: Counter[str] | None = None) -> Shard:
    """Walks a tar's headers, writes its index beside it, and returns the shard.

    What belongs to no sample is skipped, as webdataset does, and counted by kind. Raises UserError when the tar ends
    early (plain tar reading would lose the rest silently), when a sample comes twice, or when a sample has no image or
    no label, and StorageError when the disk fails for now.
    """
    samples, end = samples_in(path, Counter() if passed_over is None else passed_over)
    for first, again in repeated(samples):
        raise UserError(
            f"{path}: key {shown(again.key)} occurs twice (bytes {first.start} and {again.start}); members of a sample "
            "must follow each other: make the tar with tar --sort=name"
        )
    for sample in samples:
        _check_members(path, sample)
    check_end(path, end)
    offsets = np.array([*(sample.start for sample in samples), end], dtype=np.uint64) // BLOCK
    if int(offsets[-1]) >> 32:
        raise UserError(f"{path}: larger than 2 TiB; use smaller shards")
    keys = np.array([key_crc32(sample.key) for sample in samples], dtype=np.uint32)
    digest, sums = _checksums(path, [*(sample.start for sample in samples), end])
    shard = Shard(str(path), len(samples), path.stat().st_size, digest)
    write_index(shard, ShardIndex(offsets.astype(np.uint32), keys, sums))
    return shard


def samples_in(path: Path, told: Counter[str]) -> tuple[list[Sample], int]:
    """Returns the samples of a tar in order, and the byte behind its last member. told: `index_tar`'s `passed_over`.

    Raises UserError when a header is damaged, StorageError when the disk fails for now.
    """
    try:
        samples, end = _walk(path, told)
    except (BadHeader, OSError) as error:
        raise unreadable(path, error) from None
    told["files of no sample"] += sum(len(sample.endings) for sample in samples if is_stranger(sample.endings))
    return [sample for sample in samples if not is_stranger(sample.endings)], end


def repeated(samples: Iterable[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Yields (first, again) for each sample whose key an earlier one has."""
    seen: dict[str, Sample] = {}
    for sample in samples:
        if (first := seen.setdefault(sample.key, sample)) is not sample:
            yield first, sample


def unreadable(path: Path, error: Exception, *, what: str = "tar", way_out: str = "") -> UserError | StorageError:
    """Returns the error for a tar that cannot be read: StorageError where the disk fails and a later try may help."""
    if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
        return StorageError(f"{path}: cannot be read for now ({error.strerror}); the same command tries again")
    return UserError(f"{path}: not a readable {what} ({error}){way_out}")


def _checksums(path: Path, borders: list[int]) -> tuple[str, np.ndarray]:
    """A file's SHA-256, and the CRC-32 of each range between two of `borders`, uint32; all read once."""
    digest, sums = hashlib.sha256(), np.zeros(len(borders) - 1, dtype=np.uint32)
    with path.open("rb") as file:
        for number, (start, end) in enumerate(zip([0, *borders], [*borders, None])):
            left, crc = math.inf if end is None else end - start, 0
            while left and (piece := file.read(int(min(left, _PIECE_BYTES)))):
                digest.update(piece)
                crc = zlib.crc32(piece, crc)
                left -= len(piece)
            if 0 < number <= len(sums):  # the first range lies before the samples, the last one behind them
                sums[number - 1] = crc
    return digest.hexdigest(), sums


def _walk(path: Path, told: Counter[str]) -> tuple[list[Sample], int]:
    """A tar's members grouped by key, in order, and the byte behind its last member."""
    samples: list[Sample] = []
    end = 0
    with path.open("rb") as file:
        for member in members(file, 0, path.stat().st_size):
            end = end_of(member)
            if member.isdir():  # a folder's own entry
                continue
            key, ending = _key_and_ending(member.name)
            why = member_passed_over(member.name)
            if not why and not member.isreg():
                if not is_stranger({ending}):
                    packed = "pack with tar --dereference --hard-dereference"
                    raise UserError(f"{path}: {shown(member.name)} is not a plain file, and would be skipped; {packed}")
                why = "links and devices"
            if why:
                told[why] += 1
                continue
            if not samples or key != samples[-1].key:
                samples.append(Sample(key, member.offset, member.name, set()))
            samples[-1].endings.add(ending)
    return samples, end


def _key_and_ending(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _check_members(path: Path, sample: Sample) -> None:
    for wanted, endings in (("image", set(IMAGE_ENDINGS)), ("label (.cls)", {LABEL_ENDING})):
        if not sample.endings & endings:
            only = ", ".join(sorted(sample.endings))
            photos = wanted != "image" and "/" in sample.key.removeprefix("./")
            unpack = "; folders of photos in one tar: unpack it, and give the folder" if photos else ""
            raise UserError(f"{path}: sample {shown(sample.key)} has no {wanted}, only {only}{unpack}")


def check_end(path: Path, end: int, stop: int | None = None, named: str = "") -> None:
    """Raises UserError unless there is nothing but zeros behind a tar's last member, which ends at `end`.

    A cut, or a header that became zeros, would silently lose what comes behind it. stop, named: the end and the name of
    a tar inside another one.
    """
    stop = path.stat().st_size if stop is None else stop
    if end >= stop:
        raise UserError(f"{named or path}: ends without the empty block that ends a tar; it may have been cut there")
    with path.open("rb") as file:
        file.seek(end)
        while block := file.read(min(_PIECE_BYTES, stop - file.tell())):
            if block.count(0) != len(block):
                raise UserError(f"{named or path}: no tar header at byte {end}; the tar is damaged there")


def alone(shard: Shard, num_classes: int) -> Manifest:
    """Returns a data set of this one shard."""
    return Manifest(shard.path, "", "", shard.num_samples, num_classes, (), (shard,))
