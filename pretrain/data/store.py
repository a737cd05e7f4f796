"""The node's store: blocks of remote shards as files, shared by all processes of a node, bounded, safe against kills.

A block is downloaded to NAME.part and renamed to NAME. The partial file is the lock: whoever holds its flock appends to
it, the kernel releases it when that process dies, and the next one resumes at the byte reached. There are no lock
files, process ids or time-outs. The folder must not lie on a network file system, where flock may have no effect.
"""

import errno
import fcntl
import os
import random
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from pretrain.config import DataConfig
from pretrain.data.remote import download
from pretrain.errors import StorageError, UserError

_PART = ".part"
_BLOCK_FILE = re.compile(rf"[0-9a-f]{{64}}-\d+-\d+({re.escape(_PART)})?")  # no other file is ever removed
_OWN = os.O_CLOEXEC | os.O_NOFOLLOW  # a link in the folder is never a block
_TOUCH_S = 60  # between updates of the last-use time of a block that is being read
_ABANDONED_S = 3600  # an unfinished block that nobody has written to for this long is removed when room is needed
_CHECKS = 64  # a process checks the bound once for each 1/64 of it that it has downloaded
_KEPT = 15 / 16  # of the bound, after blocks have been removed


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of a remote shard: some samples."""

    url: str
    sha256: str  # of the shard
    shard_bytes: int
    start: int  # first byte
    end: int  # first byte after it

    @cached_property  # used once for each of the block's samples
    def name(self) -> str:
        """Its file's name, which identifies the bytes wherever the shard lies."""
        return f"{self.sha256}-{self.start}-{self.end}"


@dataclass(frozen=True)
class Store:
    """A folder of blocks, and how many bytes they may take."""

    folder: Path
    max_bytes: int

    def read(self, block: Block, start: int, end: int) -> bytes:
        """Returns bytes start .. end-1 of a shard, which lie in `block`; fewer when its file is truncated.

        Downloads the block if it is missing. Raises StorageError, and UserError for a shard that cannot be fetched.
        """
        descriptor = self._opened(block)
        try:
            return os.pread(descriptor, end - start, start - block.start)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def ensure(self, block: Block) -> None:
        """Downloads a block if it is missing. Raises as `read`."""
        os.close(self._opened(block))

    def discard(self, block: Block) -> None:
        """Removes a block whose bytes are wrong."""
        with _store_errors(self.folder), suppress(FileNotFoundError):
            os.unlink(self.folder / block.name)

    def _opened(self, block: Block) -> int:
        """A descriptor of a block's file, marked as used."""
        _check_once(self.folder)
        place = f"{self.folder}/{block.name}"  # str, not Path: faster, and this runs for each sample
        with _store_errors(self.folder):
            while True:
                try:
                    descriptor = os.open(place, os.O_RDONLY | _OWN)
                except FileNotFoundError:
                    self._download(block, Path(place))
                    continue
                if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_S:
                    os.utime(descriptor)
                return descriptor

    def _download(self, block: Block, path: Path) -> None:
        """Downloads a block's file; may return without it, when another process was faster or a new try is needed."""
        if (num_bytes := block.end - block.start) > self.max_bytes:
            raise UserError(
                f"{block.url}: a block of {num_bytes / 1e9:.2f} GB does not fit data.store_gb "
                f"({self.max_bytes / 1e9:g}); raise it"
            )
        part = path.with_name(path.name + _PART)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | _OWN, 0o600)
        except FileNotFoundError:  # the folder was removed meanwhile, or never made
            return make_folder(self.folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, part):
                return  # finished or removed while we waited
            if path.exists():
                return os.unlink(part)
            reached = os.fstat(descriptor).st_size
            if reached > num_bytes:
                os.ftruncate(descriptor, reached := 0)
            self._make_room(num_bytes)
            write = partial(_append, self.folder, descriptor)
            download(block.url, block.start + reached, block.end, block.shard_bytes, write)
            os.rename(part, path)
        finally:
            os.close(descriptor)

    def _make_room(self, needed: int) -> None:
        """Now and then removes the least recently used blocks, if all would take more than the bound.

        A process checks at its first block, and then at a random point: if processes that begin together all checked at
        the same time, 64 of them could take twice the bound before the next check.
        """
        every = max(1, self.max_bytes // _CHECKS)
        unchecked = _unchecked.get(self.folder, self.max_bytes) + needed
        if unchecked < every:
            _unchecked[self.folder] = unchecked
            return
        _unchecked[self.folder] = 0 if self.folder in _unchecked else _random.randrange(every)
        guard = os.open(self.folder / ".evict", os.O_RDWR | os.O_CREAT | _OWN, 0o600)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_oldest(self.folder, self.max_bytes - needed)
        except BlockingIOError:
            pass  # another process is removing blocks
        finally:
            os.close(guard)


_unchecked: dict[Path, int] = {}  # bytes that this process has downloaded since it last looked at the bound
os.register_at_fork(after_in_child=_unchecked.clear)  # otherwise a rank's loader processes would be in step
_random = random.SystemRandom()  # differs between processes, whatever seeds they share


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the least recently used blocks if all take more than `max_bytes`, and a few more (`_KEPT`) to gain time.

    Open files stay readable. Unfinished blocks are removed only if a process that died has left them.
    """
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if _BLOCK_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    if total <= max_bytes:
        return
    for used, size, path in sorted(files):
        if total <= max_bytes * _KEPT:
            return
        with suppress(FileNotFoundError):
            if not path.endswith(_PART):
                os.unlink(path)
                total -= size
            elif time.time() - used > _ABANDONED_S and _remove_unlocked(path):
                total -= size


def _remove_unlocked(path: str) -> bool:
    descriptor = os.open(path, os.O_RDWR | _OWN)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, Path(path)):
            os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _append(folder: Path, descriptor: int, piece: bytes) -> None:
    """Appends a piece to a block's file; an error counts as the store's, never as the network's."""
    with _store_errors(folder):
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]


@contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    """Blames the store, not the shard, for what fails within: StorageError, with the way out when the disk is full."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        out = "; lower data.store_gb, or let data.store name a folder with room" if full else ""
        raise StorageError(f"{folder}: the store of remote blocks fails ({error.strerror}{out})") from None


def make_folder(folder: Path) -> None:
    """Makes a store's folder. Raises UserError when it cannot be one, or when another user could change the blocks.

    The default one lies where everybody may write, so it must be this user's own, no link, and closed to others.
    """
    is_default = folder == default_folder()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder) if is_default else os.stat(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be the store ({error.strerror}); let data.store name another one") from None
    own = found.st_uid == os.geteuid() or (os.geteuid() == 0 and not is_default)
    if not stat.S_ISDIR(found.st_mode) or not own or (is_default and found.st_mode & 0o022):
        raise UserError(f"{folder}: another user could change the blocks in it; set data.store, or TMPDIR for a tool")


@cache
def _check_once(folder: Path) -> None:
    make_folder(folder)


def default_folder() -> Path:
    """Returns where blocks are kept unless data.store says otherwise: the user's own folder in $TMPDIR, or /tmp."""
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"pretrain-store-{os.geteuid()}"


def store_at(folder: Path | None, num_gb: float = DataConfig.store_gb) -> Store:
    """Returns the store in a folder, None: the default one, of at most `num_gb` (10^9 bytes)."""
    return Store(folder or default_folder(), int(num_gb * 1e9))
