"""Checks of a run's disks by a rank: locks, renames, room for checkpoints, the rate of reading shards."""

import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pretrain.config import Config
from pretrain.data.index_rows import IndexRows
from pretrain.data.manifest import Manifest, Shard, ShardIndex, check_shards, load_index, load_manifest
from pretrain.data.reader import block_of, is_intact
from pretrain.data.remote import download
from pretrain.data.store import make_folder, store_at
from pretrain.doctor.findings import AWAY, OK, RED, WARN, Finding, size
from pretrain.doctor.machine import images_per_s
from pretrain.errors import PASSING_ERRORS, StorageError, UserError
from pretrain.plan.report import checkpoint_bytes, kept_checkpoints
from pretrain.sizes import is_plain
from pretrain.storage import network_file_system, write_text

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HELD = (errno.EAGAIN, errno.EACCES)  # the two errors for a lock that another process holds
READ_S, READ_BYTES = 2.0, 256 << 20  # of random samples: read until either is reached
RANGE_BYTES = 8 << 20  # at most, of a remote shard: what training requests at a time
_SLOW_SYNC_S = 0.5  # to sync a small file; a save syncs at least one per rank
# The lock of the run's folder, across nodes, is an lockf; that of the store, on one node, a flock.
_TRY = "import fcntl, sys; fcntl.{}(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
_MOUNT = "mount it with locks (Lustre: -o flock; NFS: without nolock and local_lock)"


class Probe:
    """A folder that rank 0 makes on the run's disk, with a lock that it holds, for the other nodes to examine."""

    def __init__(self, run: Path, token: str) -> None:
        """Makes it in the run's folder, or in the nearest parent that exists. Raises OSError."""
        parent = nearest(run)
        self.path = parent / f".doctor-{token}"
        self.token = token
        self._lock: TextIO | None = None
        self.path.mkdir()
        try:
            self._fill()
        except BaseException:
            self.remove()
            raise

    def _fill(self) -> None:
        lock = self._lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until `remove`
        started = time.monotonic()
        write_text(self.path / "token", "old")
        with open(self.path / "token") as before:
            write_text(self.path / "token", self.token)
            self.keeps_old = before.read() == "old"
        self.sync_s = (time.monotonic() - started) / 2
        self.no_locks = ""
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.no_locks = error.strerror or str(error)

    def remove(self) -> None:
        """Removes it, as far as possible."""
        if self._lock is not None:
            self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def nearest(path: Path) -> Path:
    """Returns the path if it is a folder, or its nearest parent that is."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def told_of(error: Exception, check: str, remedy: str = "") -> Finding:
    """Returns the finding of a check that raised an error."""
    if isinstance(error, StorageError):
        return Finding(check, AWAY, str(error), remedy)
    if isinstance(error, OSError):
        away = error.errno in (*PASSING_ERRORS, *_FULL)
        return Finding(check, AWAY if away else RED, f"{error.filename or 'disk'}: {error.strerror or error}", remedy)
    told, _, way_out = str(error).partition("; ")
    return Finding(check, RED, told, way_out or remedy)


def check_own_probe(probe: Probe) -> Iterator[Finding]:
    """On rank 0: the lock is refused to another process, a rename is atomic, syncing a small file is not slow."""
    where = str(probe.path.parent)
    if probe.no_locks:
        told = f"{where}: gives none ({probe.no_locks}); a second run there would not be noticed"
        yield Finding("locks", WARN, told, _MOUNT)
    elif _second_gets_it(probe.path / "lock", "lockf"):
        yield Finding("locks", RED, f"{where}: a lock is given to two processes at once", _MOUNT)
    else:
        yield Finding("locks", OK, f"{where}: one process at a time")
    told = f"{where}: a file written, synced and renamed in {1000 * probe.sync_s:,.0f} ms"
    if not probe.keeps_old:
        told = f"{where}: whoever reads a file while it is replaced sees neither old nor new"
        yield Finding("rename", RED, told, "another output=")
    elif probe.sync_s > _SLOW_SYNC_S:
        yield Finding("rename", WARN, told, "saves wait for it: another output=")
    else:
        yield Finding("rename", OK, told)


def _second_gets_it(path: Path, call: str) -> bool:
    words = [sys.executable, "-c", _TRY.format(call), str(path)]
    return subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0


def check_seen_probe(path: Path, token: str, locks: bool) -> Iterator[Finding]:
    """On another node: rank 0's folder is visible here, and its lock is refused. locks: whether rank 0 holds one."""
    try:
        seen = (path / "token").read_text()
    except FileNotFoundError:
        seen = ""
    except OSError as error:
        return (yield told_of(error, "shared disk", "give output= on a disk that all nodes share"))
    if seen != token:
        told = f"{path.parent}: is not the folder of rank 0"
        return (yield Finding("shared disk", RED, told, "give output= on a disk that all nodes share"))
    yield Finding("shared disk", OK, f"{path.parent}: the same folder on every node")
    if not locks:
        return
    try:
        with open(path / "lock", "a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return (yield Finding("locks over nodes", OK, "rank 0's lock is refused elsewhere"))
        told = f"{path.parent}: gives none here ({error.strerror}), a second run would not be noticed"
        return (yield Finding("locks over nodes", WARN, told, _MOUNT))
    yield Finding("locks over nodes", RED, f"{path.parent}: rank 0's lock does not hold here", _MOUNT)


def check_free_disk(config: Config, num_classes: int | None) -> Iterator[Finding]:
    """Compares the free bytes with what the run's checkpoints will take, less those that exist already."""
    run = config.output / config.name
    free = shutil.disk_usage(nearest(run)).free
    told = f"{nearest(run)}: {size(free)} free"
    if not is_plain(config.model) or num_classes is None:
        return (yield Finding("room on disk", OK, f"{told}; no formula for this model's checkpoints"))
    number, each = kept_checkpoints(config), checkpoint_bytes(config, num_classes)
    there = _bytes_in(run / "checkpoints")
    needed = max(each, number * each - there)  # a new one is written before an old one goes
    told += f"; {size(needed)} needed: {number} checkpoints of {size(each)}" + (f", {size(there)} there" * bool(there))
    remedy = "make room, another output=, or lower checkpoint.keep_last, raise keep_every_steps"
    enough = free >= needed
    yield Finding("room on disk", OK if enough else AWAY, told, "" if enough else remedy)


def _bytes_in(folder: Path) -> int:
    """Returns the bytes of all files in a folder, of which a run or a fetcher may delete some meanwhile."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    total = 0
    for parent, _, names in os.walk(folder, onerror=fail):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def sets_of(config: Config) -> dict[str, Path]:
    """Returns the paths of a run's data sets by their config keys, each path once."""
    sources = [source.path for source in config.data.sources]
    named = {
        **{"data.train" + f"[{number}]" * (len(sources) > 1): path for number, path in enumerate(sources)},
        "data.val": config.data.val,
        "evaluation.fewshot_train": config.evaluation.fewshot_train,
        "evaluation.fewshot_test": config.evaluation.fewshot_test,
    }
    once = {path: key for key, path in reversed(named.items()) if path}
    return {key: path for path, key in reversed(once.items())}


def check_set(key: str, path: Path, config: Config) -> Iterator[Finding]:
    """A data set: all shards exist with the right size; the rate of reading random samples, or a remote range."""
    check = key.rpartition(".")[2]
    try:
        manifest = load_manifest(path)
        check_shards(manifest)
        remote = next((number for number, shard in enumerate(manifest.shards) if shard.url), None)
        count, seconds, images, what = _read_local(manifest) if remote is None else _read_remote(manifest, remote)
        rate = count / 1e6 / max(seconds, 1e-6)
        told = f"{manifest.num_samples:,} images in {len(manifest.shards):,} shards; {what}: {rate:,.0f} MB/s"
        told += f", {images:,.0f}/s" if images else ""
        slow = _slow_reads(manifest, images, config) if key.startswith("data.train") and remote is None else ""
        remedy = "data.order=lanes takes neighbours together, more data.workers read more at a time" if slow else ""
        yield Finding(check, WARN if slow else OK, told + slow, remedy, value=rate)
        if remote is not None:
            yield from _check_store(config)
    except (UserError, OSError) as error:
        yield told_of(error, check, f"look at {path}; tools/make_shards.py checks and makes sets")


def _slow_reads(manifest: Manifest, images: float, config: Config) -> str:
    """Returns why reading image by image, as order=permuted does, is slow; "" where it is not, or with lanes."""
    if config.data.order == "lanes":
        return ""
    needed, readers = images_per_s(config, manifest.num_classes), max(1, config.data.workers)
    if needed is not None and readers * images < needed:
        return f"; {needed:,.0f}/s needed by a rank of {readers} readers"
    system = network_file_system(manifest.path.parent) if config.data.order == "auto" else None
    return f"; on {system}, which is asked for each image at another place" if system else ""


def _read_local(manifest: Manifest) -> tuple[int, float, float, str]:
    """Reads random samples with one reader, past the page cache if possible: bytes, seconds, images/s, label."""
    count = images = 0
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < READ_S and count < READ_BYTES and images < manifest.num_samples:
        shard, number = manifest.locate(random.randrange(manifest.num_samples))
        row = _row(shard, number)
        start, end = row.byte_range(0)
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
            data = os.pread(descriptor, end - start, start)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(shard.path)) from None
        finally:
            os.close(descriptor)
        if not is_intact(data, row, 0):
            raise UserError(f"{shard.path}: sample {number} is not what was indexed; make or copy the set again")
        count, images = count + len(data), images + 1
    return count, seconds, images / max(seconds, 1e-6), "random, one reader"


def _row(shard: Shard, number: int) -> ShardIndex:
    """Reads one sample's row of the index, as training does: the whole index may take longer than the timed sample."""
    rows = shard.path.with_suffix(".idx"), shard.num_bytes, shard.sha256, shard.num_samples
    try:
        return ShardIndex(*IndexRows(*rows).part(number, number + 1))
    except (FileNotFoundError, ValueError):
        load_index(shard)  # its error says what is wrong
        raise


def _read_remote(manifest: Manifest, shard: int) -> tuple[int, float, float, str]:
    """Reads one range of the first remote shard, as `_read_local` does samples; keeps nothing."""
    block = block_of(manifest, int(manifest.first_indices[shard]))
    assert block is not None
    end = min(block.end, block.start + RANGE_BYTES)
    pieces: list[bytes] = []
    started = time.monotonic()
    download(block.url, block.start, end, block.shard_bytes, pieces.append)
    return sum(map(len, pieces)), time.monotonic() - started, 0.0, "one range"


def _check_store(config: Config) -> Iterator[Finding]:
    """The node's store of remote blocks: its folder, its lock, room for data.store_gb."""
    store = store_at(config.data.store, config.data.store_gb)
    make_folder(store.folder)
    path = store.folder / f".doctor-{os.getpid()}"
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            twice = _second_gets_it(path, "flock")
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(store.folder).free
    there = _bytes_in(store.folder)
    told = f"{store.folder}: {size(free + there)} for data.store_gb={config.data.store_gb:g}"
    if twice:
        yield Finding("store", RED, f"{store.folder}: a lock is given to two processes", "a local disk as data.store")
    elif free + there < store.max_bytes:
        yield Finding("store", AWAY, told, "lower data.store_gb, or let data.store name a folder with room")
    else:
        yield Finding("store", OK, told)
