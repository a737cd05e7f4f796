"""Unpacks compressed files within a limit: a megabyte of zeros must not fill a disk or the memory."""

import gzip
from pathlib import Path

from pretrain.errors import UserError

MAX_UNPACKED_RATIO = 100  # to the packed bytes: images have 1 to 2, tars of very small ones 15, zeros 1000
FREE_UNPACKED_BYTES = 64 << 20  # whatever the ratio


def max_unpacked_bytes(path: Path) -> int:
    """Returns how many bytes a compressed file may become."""
    return max(FREE_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)


def copy_unpacked(source: Path, target: Path) -> None:
    """Copies a file, a .gz decompressed. Raises UserError when it becomes too large, and OSError or gzip's own."""
    limit = max_unpacked_bytes(source)
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            num_bytes = writer.tell() + len(block)
            if num_bytes > limit:
                raise UserError(f"{source}: {too_large(num_bytes, limit)}")
            writer.write(block)


def too_large(num_bytes: int, limit: int) -> str:
    """Returns the message about a file that unpacks to more."""
    return f"becomes {num_bytes:,} bytes or more, at most {limit:,} (the larger of 64 MB and 100 times its own size)"
