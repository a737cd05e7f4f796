"""The index of a tar: where each sample begins, and whether it can be read at all."""

import tarfile
from pathlib import Path

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
from pretrain.errors import UserError
from pretrain.storage import sha256


def index_tar(path: Path) -> Shard:
    """Walks a tar's headers, writes its index beside it, and returns the shard.

    Raises UserError when the tar ends early (plain tar reading would lose the rest without a word), when a sample comes
    twice, or when a sample has no image or no label.
    """
    starts, keys, end = [], [], 0
    endings: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path}: {member.name} is not a plain file")
                key, ending = _key_and_ending(member.name)
                if not keys or key != keys[-1]:
                    _check_members(path, keys, endings)
                    starts.append(member.offset)
                    keys.append(key)
                    endings = set()
                endings.add(ending)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    _check_members(path, keys, endings)
    _check_end(path, end)
    if len(set(keys)) < len(keys):
        raise UserError(f"{path}: key {_first_repeated(keys)} occurs twice; members of a sample must follow each other")
    shard = Shard(path, len(keys), path.stat().st_size, sha256(path))
    offsets = np.array([*starts, end], dtype=np.uint64) // BLOCK
    if int(offsets[-1]) >> 32:
        raise UserError(f"{path}: larger than 2 TiB; use smaller shards")
    crcs = np.array([key_crc32(key) for key in keys], dtype=np.uint32)
    write_index(shard, ShardIndex(offsets.astype(np.uint32), crcs))
    return shard


def _key_and_ending(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _check_members(path: Path, keys: list[str], endings: set[str]) -> None:
    if not keys:
        return
    for wanted, found in (("image", endings & set(IMAGE_ENDINGS)), ("label (.cls)", endings & {LABEL_ENDING})):
        if not found:
            raise UserError(f"{path}: sample {keys[-1]} has no {wanted}, only {', '.join(sorted(endings))}")


def _check_end(path: Path, end: int) -> None:
    with path.open("rb") as file:
        file.seek(end)
        if not file.read(1):
            raise UserError(f"{path}: ends without the empty block that ends a tar; it may have been cut there")
        file.seek(end)
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise UserError(f"{path}: no tar header at byte {end}; the shard is damaged there")


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def alone(shard: Shard, num_classes: int) -> Manifest:
    return Manifest(shard.path, "", "", shard.num_samples, num_classes, (), (shard,))
