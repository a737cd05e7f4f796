"""Finds the newest checkpoint that is complete and undamaged."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import DamagedError, flaw_of_file, read_manifest, step_folders, step_of
from pretrain.cluster import agreement, ranks
from pretrain.errors import PASSING_ERRORS, RETRY_AFTER_S, StorageError, UserError
from pretrain.log import warn
from pretrain.storage import crc32c, remove

_LOOKS = 10  # tries, when training deletes or replaces the very checkpoint that is being read
# Errors of a disk that is away or refuses access, not of a damaged file. EIO may be a bad sector: it counts as damage.
_NO_DAMAGE = PASSING_ERRORS - {errno.EIO} | {errno.EACCES, errno.EPERM}
_TOO_FAST = "{}: its checkpoints are deleted faster than they can be read; raise checkpoint.keep_last"


def newest_valid(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is complete and undamaged, None when there is none. Called by all ranks.

    Each damaged one is passed over with a warning that names the file at fault; ranks share the reading. When training
    deletes or replaces the one being read, the search starts again. Raises DamagedError when there are checkpoints but
    none is valid: a silent fresh start would lose the run. Raises StorageError when the folder cannot be listed, a rank
    cannot read a file for now, or checkpoints vanish at every try.
    """
    for _look in range(_LOOKS):
        folders = agreement.from_main(lambda: _listed(folder))
        newest, vanished = _first_valid(folders)
        if newest is not None or not folders:
            return newest
        if not vanished:
            count = len(folders)
            raise DamagedError(f"{folder}: none of the {count} checkpoints is valid; move them away to start afresh")
    raise StorageError(_TOO_FAST.format(folder))


def _listed(folder: Path) -> list[Path]:
    try:
        return step_folders(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be listed ({error.strerror})") from None


def _first_valid(folders: list[Path]) -> tuple[Path | None, bool]:
    """Returns the first undamaged one, or None; and whether one was deleted or replaced while it was read."""
    for path in folders:
        before = agreement.from_main(lambda path=path: _identity(path))
        problems = _damages_shared(path)
        if not problems:
            return path, False
        if agreement.from_main(lambda path=path, before=before: before is None or _identity(path) != before):
            return None, True
        if ranks.is_main():
            warn(f"{path}: {problems[0]}; trying the checkpoint before it")
    return None, False


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns what tells a folder from another one of the same name: device, inode; () if unknown, None if gone."""
    try:
        status = path.stat()
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ESTALE) else ()
    return status.st_dev, status.st_ino


def _refuse_if_vanished(path: Path) -> None:
    """Raises StorageError when a checkpoint is gone that was there: training deletes old ones as it saves."""
    if _identity(path) is None:
        raise StorageError(f"{path}: was deleted while it was read; give the run's folder for its newest checkpoint")


def read_newest(folder: Path, read: Callable[[Path], Any]) -> Any:
    """Returns what `read` makes of the newest valid checkpoint, None when there is none. Called by all ranks.

    If training deletes that checkpoint meanwhile, `read` is called again with the then newest one.
    """
    for _look in range(_LOOKS):
        checkpoint = newest_valid(folder)
        if checkpoint is None:
            return None
        result, met = None, None
        try:
            with refusing_vanished(checkpoint):
                result = read(checkpoint)
        except (UserError, StorageError) as error:
            met = error
        if not agreement.any_rank(isinstance(met, StorageError)):
            agreement.raise_together(met)
            return result
    raise StorageError(_TOO_FAST.format(folder))


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint at `path`: a step folder, or the newest valid one of a run. Called by all ranks.

    Raises UserError when there is none, DamagedError when it cannot be used, StorageError when it cannot be read now.
    """
    if agreement.from_main(lambda: (path / "MANIFEST.json").is_file()):
        if problems := _damages_shared(path):
            agreement.from_main(lambda: _refuse(path, problems[0]))
        return path
    if agreement.from_main(lambda: (path / "checkpoints").is_dir()):
        newest = newest_valid(path / "checkpoints")
        if newest is not None:
            return newest
    raise UserError(f"{path}: has no checkpoint; expected a run's folder or one of its checkpoints/step-N")


def set_aside_newer(checkpoint: Path) -> None:
    """Renames the checkpoints newer than the one in use, which are damaged, to damaged-step-N. Raises OSError.

    The run resumes from before their step: they must not count among the checkpoints kept. For rank 0 alone.
    """
    for path in step_folders(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"damaged-{path.name}")
            remove(aside)
            os.replace(path, aside)
            warn(f"{path} is now {aside.name}: delete it when you have looked at it")
    olds = [path for path in checkpoint.parent.iterdir() if path.name.startswith(".old-step-")]
    for path in olds:  # otherwise the next save would put it back, ahead of the run
        if step_of(path) > step_of(checkpoint):
            os.replace(path, path.with_name(f"damaged-{path.name.removeprefix('.')}-{os.getpid()}"))


@contextmanager
def refusing_vanished(path: Path) -> Iterator[None]:
    """Wraps the reading of a checkpoint: an error becomes a StorageError if training has deleted it meanwhile."""
    try:
        yield
    except (OSError, UserError):
        _refuse_if_vanished(path)
        raise


def validate(path: Path) -> None:
    """Checks a checkpoint folder. Raises DamagedError, naming the file and what is wrong with it, and StorageError."""
    if problem := next(_damages(path, share=False), None):
        _refuse(path, problem)


def _refuse(path: Path, problem: str) -> None:
    _refuse_if_vanished(path)
    raise DamagedError(f"{path}: {problem}")


def _damages_shared(path: Path) -> list[str]:
    """Returns what is wrong with a checkpoint, the same on all ranks; each reads a share of it, up to the first damage.

    Raises StorageError, on all ranks, if one cannot read its share for now: an intact checkpoint must not be set aside.
    """
    found = agreement.together(lambda: next(_damages(path), None))
    return [problem for problem in agreement.gather(found) if problem]


def _damages(path: Path, share: bool = True) -> Iterator[str]:
    """Yields what is wrong, over this rank's share of the files. Raises StorageError."""
    try:
        files = _tried(path / "MANIFEST.json", partial(read_manifest, path))
    except UserError as error:
        reason = str(error).removeprefix(f"{path / 'MANIFEST.json'}: ").removeprefix(f"{path}: ")
        yield f"MANIFEST.json cannot be used ({reason})"
        return
    rank, world = (ranks.rank(), ranks.world_size()) if share else (0, 1)
    for name, num_bytes, checksum in files[rank::world]:
        try:
            flaw = _tried(path / name, partial(_flaw, path, name, num_bytes, checksum))
        except DamagedError as error:
            flaw = str(error)
        if flaw:
            yield flaw


def _tried(file: Path, read: Callable[[], Any]) -> Any:
    """Returns what `read` makes of a file, after a few tries where its disk hiccups.

    Raises StorageError where the disk, not the file, is at fault, and DamagedError otherwise.
    """
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            return read()
        except OSError as error:
            if wait_s is not None and error.errno in PASSING_ERRORS:
                time.sleep(wait_s)
                continue
            if error.errno in _NO_DAMAGE:
                told = f"rank {ranks.rank()} cannot read it for now ({error.strerror}), which is no damage"
                raise StorageError(f"{file}: {told}; the same command goes on when it can") from None
            raise DamagedError(f"{file.name} cannot be read ({error.strerror})") from None


def _flaw(path: Path, name: str, num_bytes: int, checksum: str) -> str | None:
    """What is wrong with a file of a checkpoint. Raises OSError."""
    if flaw := flaw_of_file(path, name):
        return flaw
    if (size := (path / name).stat().st_size) != num_bytes:
        return f"{name} has {size} bytes, MANIFEST.json says {num_bytes}"
    if (found := crc32c(path / name)) != checksum:
        return f"{name} has CRC {found}, MANIFEST.json says {checksum}"
    return None
