"""Copies of a run's checkpoints in a second place, `checkpoint.copy_to`; restored from there when the first is gone.

    URL/NAME/checkpoints/step-0000001000/    the files of layout.py, MANIFEST.json last: with it the copy is complete

The place is whatever fsspec reads and writes: a folder on another disk, s3://, gs://. Nothing there is renamed, which
object stores cannot do. Credentials are the environment's. Only rank 0 goes there.
"""

import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from pretrain.checkpoint.find import validate
from pretrain.checkpoint.layout import DamagedError, read_manifest, step_folders, step_of
from pretrain.checkpoint.retention import kept_steps, validation_score
from pretrain.errors import StorageError, UserError
from pretrain.json_files import MAX_BYTES, Fields, parse_json
from pretrain.log import say, warn
from pretrain.storage import fsync_path, remove

_PIECE_BYTES = 4 << 20  # of a transfer: the training runs beside it
_MANIFEST = "MANIFEST.json"


class SecondPlace:
    """Where the copies of a run are. Its methods raise OSError, or an error of the store's own package."""

    def __init__(self, url: str, name: str) -> None:
        """Raises UserError when no package knows such a URL."""
        import fsspec  # 0.1 s, which runs without a second place need not wait
        from fsspec.implementations.local import LocalFileSystem

        self.url = f"{url.rstrip('/')}/{name}/checkpoints"
        try:
            self._store, self._root = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"checkpoint.copy_to: {url}: {error}; s3:// and gs:// need pip install 'vit-pretrain[remote]'"
            ) from None
        self._is_folder = isinstance(self._store, LocalFileSystem)
        if self._is_folder:
            self._store.auto_mkdir = True  # object stores have no folders

    def steps(self) -> list[int]:
        """Returns the steps of all complete copies, newest first."""
        return [step for step in self._all_steps() if self._store.exists(self._path(step, _MANIFEST))]

    def holds(self, step: int, checkpoint: Path) -> bool:
        """Returns whether the copy of a step is complete, and of this very checkpoint."""
        with suppress(FileNotFoundError):
            return self._read(self._path(step, _MANIFEST)) == (checkpoint / _MANIFEST).read_bytes()
        return False

    def copy(self, step: int, checkpoint: Path) -> None:
        """Copies a checkpoint, and reads the copy back before it counts. Raises DamagedError when it is another."""
        files, manifest = read_manifest(checkpoint), (checkpoint / _MANIFEST).read_bytes()
        with suppress(FileNotFoundError):
            self._store.rm_file(self._path(step, _MANIFEST))  # of the same step, saved before
        for name, num_bytes, checksum in files:
            with open(checkpoint / name, "rb") as ours:
                self._write(self._path(step, name), ours)
            with self._store.open(self._path(step, name), "rb") as theirs:
                if (found := _transferred(theirs)) != (num_bytes, checksum):
                    raise DamagedError(
                        f"{name} has {found[0]} bytes and CRC {found[1]} there, {_MANIFEST} says {num_bytes} and "
                        f"{checksum}"
                    )
        with open(checkpoint / _MANIFEST, "rb") as ours:
            self._write(self._path(step, _MANIFEST), ours)
        if self._read(self._path(step, _MANIFEST)) != manifest:
            raise DamagedError(f"{_MANIFEST} reads back as something else")

    def delete_old(self, newest: int, *, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
        """Deletes copies as retention.py does, and what uploads that were cut have left.

        newest: the run's newest step; later ones, of a run that was further on, neither count nor are they deleted.
        """
        steps = [step for step in self.steps() if step <= newest]
        kept = kept_steps(steps, keep_last, keep_every_steps, self._score if keep_best else None)
        for step in self._all_steps():
            if step <= newest and step not in kept:
                with suppress(FileNotFoundError):
                    self._store.rm_file(self._path(step, _MANIFEST))  # first: what is half deleted is no copy
                self._store.rm(self._path(step), recursive=True)

    def fetch(self, step: int, folder: Path) -> Path:
        """Downloads a copy to folder/step-N. Raises DamagedError when it is not what its manifest says."""
        target = folder / f"step-{step:010d}"
        temporary = folder / f".tmp-{target.name}"
        remove(temporary)
        temporary.mkdir(parents=True)
        try:
            (temporary / _MANIFEST).write_bytes(self._read(self._path(step, _MANIFEST)))
            for name, num_bytes, _ in read_manifest(temporary):
                if name != Path(name).name:
                    raise DamagedError(f"{self.url}/{target.name}: {name!r} is not the name of a file in it")
                with self._store.open(self._path(step, name), "rb") as theirs, open(temporary / name, "wb") as ours:
                    _transferred(theirs, ours, most=num_bytes)
                    ours.flush()
                    os.fsync(ours.fileno())
            validate(temporary)
            os.replace(temporary, target)
        except BaseException:
            remove(temporary)
            raise
        fsync_path(folder)
        return target

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/step-{step:010d}" + (f"/{name}" if name else "")

    def _all_steps(self) -> list[int]:
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

    def _write(self, path: str, source: BinaryIO) -> None:
        with self._store.open(path, "wb") as file:
            while piece := source.read(_PIECE_BYTES):
                file.write(piece)
            if self._is_folder:
                file.flush()
                os.fsync(file.fileno())

    def _score(self, step: int) -> float | None:
        with suppress(OSError, UserError):
            path = self._path(step, "state.json")
            return validation_score(Fields.of(parse_json(self._read(path), path), path))
        return None


def _transferred(source: Any, target: BinaryIO | None = None, most: int | None = None) -> tuple[int, str]:
    """Reads a file to its end, at most so many bytes and a piece, into `target`; returns its bytes and CRC-32C."""
    size, checksum = 0, google_crc32c.Checksum()
    while (most is None or size <= most) and (piece := source.read(_PIECE_BYTES)):
        size += len(piece)
        checksum.update(piece)
        if target is not None:
            target.write(piece)
    return size, checksum.hexdigest().decode()


def restore(place: SecondPlace, folder: Path) -> None:
    """Fetches the newest undamaged copy where the run's own folder has no checkpoint; nothing to fetch is fine.

    Raises StorageError when the second place cannot be asked, DamagedError when it has copies, but no undamaged one: a
    silent fresh start would lose the run.
    """
    try:
        if step_folders(folder):
            return
    except OSError:  # told by who looks for the newest
        return
    try:
        steps = place.steps()
        for step in steps:
            try:
                say(f"restored from {place.url}: {place.fetch(step, folder)}")
                return
            except UserError as error:
                warn(f"{place.url}: the copy of step {step} cannot be used ({error}); trying the one before it")
    except Exception as error:
        raise StorageError(
            f"checkpoint.copy_to: {place.url}: cannot be read ({_told(error)}), and {folder} has no checkpoint; the "
            "same command goes on when it can, or starts afresh with checkpoint.copy_to=null"
        ) from None
    if steps:
        raise DamagedError(
            f"checkpoint.copy_to: {place.url}: none of its {len(steps)} copies is undamaged, and {folder} has no "
            "checkpoint; start afresh with another name="
        )


class Copier:
    """Keeps the second place like the first, in a thread of its own. A copy that fails is a warning."""

    def __init__(self, place: SecondPlace, folder: Path, keep: Mapping[str, Any]) -> None:
        """keep: the arguments of `apply_retention`, which hold for the copies too."""
        self._place, self._folder, self._keep = place, folder, keep
        self._asked: queue.Queue[None] = queue.Queue()
        self.reading: Path | None = None  # which the first place's retention must leave alone
        threading.Thread(target=self._run, name="copying", daemon=True).start()

    def begin(self) -> None:
        """Has the thread look for what is to be copied."""
        self._asked.put(None)

    @property
    def done(self) -> bool:
        """Whether nothing is under way."""
        return not self._asked.unfinished_tasks

    def _run(self) -> None:
        while True:
            self._asked.get()
            try:
                self._copy_all()
            except Exception as error:
                self._warn(error)
            self.reading = None
            self._asked.task_done()

    def _copy_all(self) -> None:
        steps = step_folders(self._folder)
        for path in steps:
            if not self._asked.empty():  # there is a newer one, which the next turn begins with
                return
            self.reading = path
            try:
                if path.exists() and not self._place.holds(step_of(path), path):
                    self._place.copy(step_of(path), path)
            except UserError as error:  # of this one
                self._warn(error)
        self.reading = None
        if steps:
            self._place.delete_old(step_of(steps[0]), **self._keep)

    def _warn(self, error: Exception) -> None:
        what = f"{self.reading}: " if self.reading else ""
        warn(f"COPY NOT MADE: {what}{self._place.url}: {_told(error)}; tried again at the next save")


def _told(error: Exception) -> str:
    """An error in a few words; those of a store's own package may hold parts of a key."""
    if isinstance(error, UserError):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
