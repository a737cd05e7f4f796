"""Downloads files once, and prints what is downloaded, from where, how much, and under which licence.

A file gets its final name only when complete and verified. The partial file is the lock; after a kill, the next call
resumes at the byte reached. This module imports no torch.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain import cli
from pretrain.cluster.slurm import rank_so_far
from pretrain.data import remote
from pretrain.errors import StorageError, UserError
from pretrain.storage import crc32c, fsync_path, sha256

_FIRST_TRIES = 3  # for a server's first answer: a user without a network is told soon


class Download(NamedTuple):
    """A file on a server, and what is known of it."""

    name: str  # for messages
    url: str
    path: Path  # where it will lie
    licence: str
    sha256: str | None = None  # None: not published. A CRC-32C that the server sends is always compared
    md5: str | None = None
    num_bytes: int | None = None
    told: str = ""  # what messages tell the user to download: an address, with the size where it is known only roughly


def fetch(file: Download) -> Path:
    """Returns a file's path, after downloading it if it is missing. Several processes may call this at once.

    Raises UserError when the bytes do not match the published size or checksums, or the folder cannot be written, and
    StorageError, which says what to download and where to put it, when the server cannot be reached.
    """
    path = file.path
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, file.name) as part:
            if part is not None:
                _download(file, part)
        return path
    except StorageError as error:
        what = file.told or file.url + (f" ({told_size(file.num_bytes)})" if file.num_bytes else "")
        way_out = f"download {what} where there is a network, and put it at {path}"
        raise StorageError(f"{file.name}: {error}; {way_out}") from None
    except UserError as error:
        raise UserError(f"{file.name}: {error}") from None
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror}); set PRETRAIN_CACHE to a folder"
        ) from None


def cache_folder() -> Path:
    """Returns where fetched files lie."""
    if own := os.environ.get("PRETRAIN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit-pretrain"


def tell(line: str) -> None:
    if rank_so_far(os.environ) == 0:
        cli.tell(line, sys.stderr)  # a tool's stdout may be read by a program


@contextmanager
def progress(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes that have just arrived."""
    shown = nullcontext(lambda _: None) if rank_so_far(os.environ) else cli.progress(title, num_bytes >> 20, "MiB")
    with shown as advance:
        arrived = 0

        def add(more: int) -> None:
            nonlocal arrived
            arrived, before = arrived + more, arrived
            advance((arrived >> 20) - (before >> 20))

        yield add


def told_size(num_bytes: int | None) -> str:
    return "size not told" if num_bytes is None else f"{num_bytes / (1 << 20):,.1f} MiB"


@contextmanager
def locked(path: Path, name: str) -> Iterator[BinaryIO | None]:
    """Yields the partial file, locked and open for appending; None if `path` exists."""
    part = path.with_name(f"{path.name}.part")
    while True:
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"{name}: another process is fetching it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
                continue  # that process has renamed or removed it
            try:
                yield None if path.is_file() else file
            finally:
                if not os.fstat(file.fileno()).st_size:
                    part.unlink(missing_ok=True)
            return


def _download(file: Download, part: BinaryIO) -> None:
    facts = remote.facts_of(file.url, _FIRST_TRIES)
    if file.num_bytes and facts.num_bytes != file.num_bytes:
        raise UserError(f"{file.url}: has {facts.num_bytes} bytes, the published file {file.num_bytes}: is another one")
    begun = part.tell()
    if begun > facts.num_bytes:
        part.truncate(0)
        begun = 0
    goes_on = f", going on at {told_size(begun)}" if begun else ""
    tell(f"{file.name}: fetching {file.url} ({told_size(facts.num_bytes)}, {file.licence}) to {file.path}{goes_on}")
    with progress(file.name, facts.num_bytes) as advance:
        advance(begun)

        def write(piece: bytes) -> None:
            part.write(piece)
            advance(len(piece))

        remote.download(file.url, begun, facts.num_bytes, facts.num_bytes, write)
    part.flush()
    here = Path(part.name)
    for promised, found in ((file.sha256, sha256), (file.md5, _md5), (facts.crc32c, crc32c)):
        if promised and promised != (got := found(here)):
            here.unlink()
            raise UserError(
                f"{file.url}: has {found.__name__.lstrip('_')} {got}, expected {promised}: damaged on the way, or not "
                "the file that was published; removed, the same command fetches it anew"
            )
    fsync_path(here)
    os.replace(here, file.path)


def _md5(path: Path) -> str:
    """For sets without a better published checksum: MD5 detects damage, not tampering."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
