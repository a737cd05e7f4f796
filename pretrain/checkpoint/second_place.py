"""A second place for a run's checkpoints, `checkpoint.copy_to`: its owner, its content, copying to it and back.

    URL/NAME/checkpoints/run.json            whose copies these are; the same file is copies.json in the run's folder
    URL/NAME/checkpoints/step-0000001000/    the files of layout.py, MANIFEST.json last: with it the copy is complete

The place is whatever fsspec reads and writes: a folder on another disk, s3://, gs://. Nothing there is renamed, which
object stores cannot do. Credentials come from the environment. Only rank 0 accesses it.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from pretrain.checkpoint.find import validate
from pretrain.checkpoint.layout import DamagedError, read_manifest
from pretrain.checkpoint.retention import kept_steps, validation_score
from pretrain.errors import StorageError, UserError
from pretrain.json_files import MAX_BYTES, Fields, brief
from pretrain.storage import crc32c, fsync_path, remove, write_text

_PIECE_BYTES = 4 << 20  # of a transfer, in pieces because training runs beside it
_MANIFEST = "MANIFEST.json"
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_RUN, _OWN_RUN = "run.json", "copies.json"  # in the second place, and in the run's folder


class SecondPlace:
    """Where the copies of a run are. Its methods raise OSError, or an error of the store's own package."""

    def __init__(self, url: str, name: str) -> None:
        """Raises UserError when no package knows such a URL, StorageError when that cannot open it."""
        import fsspec  # takes 0.1 s: only for runs with a second place
        from fsspec.implementations.local import LocalFileSystem

        self.url = f"{url.rstrip('/')}/{name}/checkpoints"
        try:
            self._store, self._root = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"checkpoint.copy_to: {url}: {error}; s3:// and gs:// need pip install -e '.[remote]'"
            ) from None
        except Exception as error:
            raise StorageError(
                f"checkpoint.copy_to: {url}: cannot be opened ({told(error)}); the same command goes on when it can"
            ) from None
        self._base = self._root.removesuffix(f"/{name}/checkpoints")
        self._is_folder = isinstance(self._store, LocalFileSystem)
        if self._is_folder:
            self._store.auto_mkdir = True  # object stores have no folders
        self._scores: dict[int, float | None] = {}  # of copies, for `delete_old`

    def check(self, folder: Path, run: Mapping[str, Any]) -> tuple[Fields | None, Fields | None]:
        """Returns what the run's folder and the place say of the run they belong to; None for one without that yet.

        folder: of the run's own checkpoints. run: what identifies it when its folder, and with it its id, is gone.
        Raises UserError when the place is another run's or the run's own folder, StorageError when it is a folder that
        is not there.
        """
        if self._is_folder and not os.path.isdir(self._base):
            raise StorageError(
                f"checkpoint.copy_to: {self._base}: is not there; make that folder, or mount its disk, and the same "
                "command goes on"
            )
        if self._is_folder and os.path.isdir(self._root) and folder.is_dir() and os.path.samefile(self._root, folder):
            raise UserError(f"checkpoint.copy_to: {self.url}: is the run's own folder; give another place")
        ours, theirs = _own_run(folder), self._run()
        if theirs is not None:
            known = run if ours is None else {"id": ours.text("id")}
            if any(theirs.values.get(key) != value for key, value in known.items()):
                known = [f"{key} {brief(theirs.values.get(key))}" for key in run]
                raise UserError(
                    f"checkpoint.copy_to: {self.url}: holds copies of another run ({', '.join(known)}); give another "
                    f"place or name=, or, when it is the same run, delete {_RUN} there"
                )
        return ours, theirs

    def claim(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Claims the place for a run, by an id that the run's folder keeps too. Arguments and errors as in `check`."""
        ours, theirs = self.check(folder, run)
        values = (theirs or ours or Fields({"id": uuid.uuid4().hex, **run}, "")).values
        text = json.dumps(values, indent=1) + "\n"
        if ours is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_text(folder.parent / _OWN_RUN, text)
            except OSError as error:
                raise _not_written(folder.parent, error) from None
        if theirs is None:
            self._write(f"{self._root}/{_RUN}", [text.encode()])

    def steps(self) -> list[int]:
        """Returns the steps of all complete copies, newest first."""
        return [step for step in self.all_steps() if self._is_complete(step)]

    def holds(self, step: int, checkpoint: Path) -> bool:
        """Returns whether the copy of a step is complete, and of this very checkpoint."""
        with suppress(FileNotFoundError):
            return self._read(self._path(step, _MANIFEST)) == (checkpoint / _MANIFEST).read_bytes()
        return False

    def copy(self, step: int, checkpoint: Path) -> None:
        """Copies a checkpoint, and reads the copy back before it counts. Raises DamagedError when it differs."""
        manifest, files = (checkpoint / _MANIFEST).read_bytes(), read_manifest(checkpoint)
        if (checkpoint / _MANIFEST).read_bytes() != manifest:
            raise DamagedError("is being saved again")
        there = self._path(step, _MANIFEST)
        self._scores.pop(step, None)
        with suppress(FileNotFoundError):
            self._store.rm_file(there)  # of the same step, saved before
        for name, num_bytes, checksum in files:
            with open(checkpoint / name, "rb") as ours:
                self._write(self._path(step, name), iter(lambda file=ours: file.read(_PIECE_BYTES), b""))
            if (found := _summed(self._pieces(self._path(step, name)))) != (num_bytes, checksum):
                raise DamagedError(
                    f"{name} has {found[0]} bytes and CRC {found[1]} there, {_MANIFEST} says {num_bytes} and {checksum}"
                )
        try:
            self._write(there, [manifest])
            if self._read(there) != manifest:
                raise DamagedError(f"{_MANIFEST} reads back as something else")
        except Exception:
            with suppress(Exception):  # if it cannot be removed, its own checksum shows the damage
                self._store.rm_file(there)
            raise

    def delete_old(self, newest: int, *, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
        """Deletes copies as retention.py does, and the remains of interrupted uploads.

        newest: the run's newest step; copies of later steps, which it reached before, neither count nor are deleted.
        Deletes nothing when it is not known which are complete; goes on with the others when one cannot be deleted.
        """
        steps = [step for step in self.steps() if step <= newest]
        kept = kept_steps(steps, keep_last, keep_every_steps, self._score if keep_best else None)
        failed = None
        for step in self.all_steps():
            if step <= newest and step not in kept:
                try:
                    with suppress(FileNotFoundError):
                        self._store.rm_file(self._path(step, _MANIFEST))  # first: a half-deleted copy must not count
                    self._store.rm(self._path(step), recursive=True)
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed

    def fetch(self, step: int, folder: Path) -> Path | None:
        """Downloads a copy to folder/step-N; returns None when it is not complete.

        Whole files that a download which was cut off has brought of the same copy are kept: otherwise one that takes
        longer than it may would begin anew each time. Raises DamagedError when the copy is not what its manifest says
        or a file of it cannot be read, StorageError when `folder` cannot be written.
        """
        target = folder / f"step-{step:010d}"
        temporary = folder / f".tmp-{target.name}"
        if not self._is_complete(step):
            return None
        try:
            manifest = b"".join(self._pieces(self._path(step, _MANIFEST), MAX_BYTES))
            if temporary.is_symlink() or not _holds(temporary / _MANIFEST, *_summed([manifest])):
                remove(temporary)
                temporary.mkdir(parents=True)
                _save([manifest], temporary / _MANIFEST)
            for name, num_bytes, checksum in read_manifest(temporary):
                if name != Path(name).name:
                    raise DamagedError(f"{self.url}/{target.name}: {name!r} is not the name of a file in it")
                if not _holds(temporary / name, num_bytes, checksum):
                    remove(temporary / name)
                    _save(self._pieces(self._path(step, name), num_bytes), temporary / name)
            validate(temporary)
            fsync_path(temporary)
            os.replace(temporary, target)
            fsync_path(folder)
        except (UserError, OSError) as error:  # not when the store is away: the next try goes on
            with suppress(OSError):
                remove(temporary)
            if isinstance(error, OSError):  # never the store's, see `_pieces`
                raise _not_written(folder, error) from None
            raise
        return target

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/step-{step:010d}" + (f"/{name}" if name else "")

    def all_steps(self) -> list[int]:
        """Returns the steps of all copies, newest first, including incomplete ones."""
        self._store.invalidate_cache()
        try:
            names = [path.rstrip("/").rpartition("/")[2] for path in self._store.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted((int(number) for number in numbers if len(number) == 10 and number.isdecimal()), reverse=True)

    def _read(self, path: str) -> bytes:
        with self._store.open(path, "rb") as file:
            return file.read(MAX_BYTES)

    def _is_complete(self, step: int) -> bool:
        try:
            self._store.info(self._path(step, _MANIFEST))  # exists() would take any error for "no"
        except _NOT_THERE:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedError(f"step {step}: {_MANIFEST} cannot be read ({told(error)})") from None
        return True

    def _pieces(self, path: str, most: int | None = None) -> Iterator[bytes]:
        """Yields a file's bytes in pieces; ends with the piece that exceeds `most`.

        Raises DamagedError when this file cannot be read, _AwayError when the store cannot.
        """
        size = 0
        try:
            with self._store.open(path, "rb") as file:
                while (most is None or size <= most) and (piece := file.read(_PIECE_BYTES)):
                    size += len(piece)
                    yield piece
        except Exception as error:
            if isinstance(error, (*_NOT_THERE, IsADirectoryError)) or getattr(error, "errno", None) == errno.EIO:
                raise DamagedError(f"{path.rpartition('/')[2]} cannot be read ({told(error)})") from None
            raise _AwayError(error) from None

    def _write(self, path: str, pieces: Iterable[bytes]) -> None:
        with self._store.open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
            if self._is_folder:
                file.flush()
                os.fsync(file.fileno())

    def _run(self) -> Fields | None:
        """Returns whose copies these are; None if nothing says so yet."""
        path = f"{self._root}/{_RUN}"
        try:
            return Fields.parse(self._read(path), f"{self.url}/{_RUN}")
        except FileNotFoundError:
            return None
        except UserError:
            if self.all_steps():
                raise
            return None  # a start that was killed left half of it

    def _score(self, step: int) -> float | None:
        if step not in self._scores:  # read once: each save asks for those of all copies
            path = self._path(step, "state.json")
            try:
                self._scores[step] = validation_score(Fields.parse(self._read(path), path))
            except (FileNotFoundError, UserError):
                return None
        return self._scores[step]


class _AwayError(Exception):
    """The second place cannot be read for now."""

    def __init__(self, error: Exception) -> None:
        self.strerror = told(error)
        super().__init__(self.strerror)


def _own_run(folder: Path) -> Fields | None:
    path = folder.parent / _OWN_RUN
    try:
        return Fields.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); the same command goes on when it can") from None


def _not_written(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: cannot be written ({told(error)}); make room, and the same command goes on")


def _holds(path: Path, num_bytes: int, checksum: str) -> bool:
    with suppress(OSError):
        return not path.is_symlink() and path.stat().st_size == num_bytes and crc32c(path) == checksum
    return False


def _save(pieces: Iterable[bytes], path: Path) -> None:
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _summed(pieces: Iterable[bytes]) -> tuple[int, str]:
    """Returns the number of bytes and their CRC-32C."""
    size, checksum = 0, google_crc32c.Checksum()
    for piece in pieces:
        size += len(piece)
        checksum.update(piece)
    return size, checksum.hexdigest().decode()


def told(error: Exception) -> str:
    """Returns an error in a few words, without a store package's own message, which may contain parts of a key."""
    if isinstance(error, (UserError, StorageError)):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
