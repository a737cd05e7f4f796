"""Copies of a run's checkpoints in a second place, `checkpoint.copy_to`; restored from there if the first is lost."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import DamagedError, step_folders, step_of
from pretrain.checkpoint.second_place import SecondPlace, told
from pretrain.errors import StorageError, UserError
from pretrain.log import say, warn

LATE_MINUTES = 60.0  # after which each save warns that a copy is still not complete


def has_checkpoints(folder: Path) -> bool:
    """Returns whether a run's folder has checkpoints of its own, so that nothing is fetched."""
    try:
        return bool(step_folders(folder))
    except OSError:  # reported by the search for the newest
        return True


def restore(open_place: Callable[[], SecondPlace], folder: Path, run: Mapping[str, Any]) -> None:
    """Fetches the newest undamaged copy if the run's own folder has no checkpoint; there may be no copy.

    run: as in `SecondPlace.check`. Raises UserError when the place belongs to another run, StorageError when it cannot
    be read or the folder cannot be written, DamagedError when all copies are damaged: a silent fresh start would lose
    the run.
    """
    if has_checkpoints(folder):
        try:
            open_place().check(folder, run)
        except UserError:
            raise
        except Exception:  # the copying thread reports it
            pass
        return
    place, damaged = open_place(), 0
    try:
        place.claim(folder, run)
        for step in place.all_steps():
            try:
                if (fetched := place.fetch(step, folder)) is not None:
                    say(f"restored from {place.url}: {fetched}")
                    return
            except UserError as error:
                damaged += 1
                warn(f"{place.url}: the copy of step {step} cannot be used ({error}); trying the one before it")
    except (UserError, StorageError):
        raise
    except Exception as error:
        raise StorageError(
            f"checkpoint.copy_to: {place.url}: cannot be read ({told(error)}), and {folder} has no checkpoint; the "
            "same command goes on when it can, or starts afresh with checkpoint.copy_to=null"
        ) from None
    if damaged:
        raise DamagedError(
            f"checkpoint.copy_to: {place.url}: all of its {damaged} copies are damaged, and {folder} has no "
            "checkpoint; start afresh with another name="
        )


class Copier:
    """Copies new checkpoints to the second place, in a thread of its own. A copy that fails is a warning."""

    def __init__(
        self, open_place: Callable[[], SecondPlace], folder: Path, keep: Mapping[str, Any], run: Mapping[str, Any]
    ) -> None:
        """keep: arguments of `apply_retention`, which hold for the copies too. run: as in `SecondPlace.check`."""
        self._open_place, self._folder, self._keep, self._of_run = open_place, folder, keep, run
        self._asked: queue.Queue[None] = queue.Queue()
        self.reading: Path | None = None  # being copied: retention in the first place must spare it
        self._since = 0.0  # when that began
        threading.Thread(target=self._run, name="copying", daemon=True).start()

    def begin(self) -> None:
        """Makes the thread look for checkpoints to copy; warns if it is still busy with one from long ago."""
        path, minutes = self.reading, (time.monotonic() - self._since) / 60
        if path is not None and minutes > LATE_MINUTES:
            warn(
                f"COPY NOT MADE: {path}: not complete after {minutes:,.0f} minutes, and no newer one is copied "
                "meanwhile; the second place is slow, or hangs: then only another start tries again"
            )
        self._asked.put(None)

    @property
    def done(self) -> bool:
        """Whether no copying is pending."""
        return not self._asked.unfinished_tasks

    def _run(self) -> None:
        place = None
        while True:
            self._asked.get()
            try:
                place = place or self._open_place()
                place.claim(self._folder, self._of_run)  # its disk may be gone, or another run may use it
                self._copy_all(place, step_folders(self._folder))
            except Exception as error:
                self._warn(error, place)
            self.reading = None
            self._asked.task_done()

    def _copy_all(self, place: SecondPlace, steps: list[Path]) -> None:
        """Copies what is missing, newest first; deletes old copies even while copying is slow or fails."""
        self._delete_old(place, steps)
        for path in steps:
            if not self._asked.empty():  # there is a newer checkpoint; the next turn begins with it
                return
            self._since, self.reading = time.monotonic(), path
            try:
                if path.exists() and not place.holds(step_of(path), path):
                    place.copy(step_of(path), path)
                    self._delete_old(place, steps)
            except Exception as error:  # a failed copy does not stop the others
                self._warn(error, place)

    def _delete_old(self, place: SecondPlace, steps: list[Path]) -> None:
        try:
            if steps:
                place.delete_old(step_of(steps[0]), **self._keep)
        except Exception as error:
            warn(f"{place.url}: old copies could not be deleted ({told(error)}); tried again at the next save")

    def _warn(self, error: Exception, place: SecondPlace | None) -> None:
        what = [str(part) for part in (self.reading, place and place.url) if part]
        warn(f"COPY NOT MADE: {': '.join([*what, told(error)])}; tried again at the next save")
