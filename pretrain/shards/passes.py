"""Runs a pass over a source before its shards are written, in pieces whose outcomes are kept in OUT/.passes.

After a kill, the same command resumes with the missing pieces. Elements of a job array share them: each takes what is
not done yet, in its own random order. The folder is removed when the data set is complete.
"""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import cli
from pretrain.errors import UserError
from pretrain.shards import unfinished
from pretrain.shards.pool import Engine, Progress, results
from pretrain.storage import remove_left_over, replacing

FOLDER = ".passes"


class Work(NamedTuple):
    """Where and with what a pass runs."""

    out: Path  # the data set's folder
    workers: int = 1
    engine: Engine = results
    is_part: bool = False  # whether other calls work on the same set at the same time
    options: str = ""  # on which the outcomes depend, beside the pieces' own keys


class Piece(NamedTuple):
    """A part of a pass."""

    key: str  # all that its outcome depends on
    task: Callable[[], Any]  # made when the piece is run


# Returns the outcome of a task, to be kept at the path; further files may lie beside it, under longer names.
PieceOf = Callable[[Any, Path, Progress], bytes]


def run_pass(function: PieceOf, pieces: Sequence[Piece], work: Work, title: str, unit: str) -> list[Path]:
    """Returns the files with the outcome of each piece, made or found. function: of a module, or a `partial` of one.

    title, unit: for the progress display: "unpacking", "files". Raises what the function raises, and UserError where
    the folder holds a complete data set.
    """
    folder = work.out / FOLDER
    if is_complete(work.out):
        raise UserError(f"{work.out}: holds a data set already; remove it or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work.out}: cannot be made a folder ({error.strerror}); choose another one") from None
    remove_left_over(folder)
    paths = [outcome_of(piece, work) for piece in pieces]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    random.SystemRandom().shuffle(missing)

    def left() -> Iterator[tuple[Path, Any]]:
        for number in missing:
            if not paths[number].exists():  # else another element of the array has done it meanwhile
                yield paths[number], pieces[number].task()

    workers = min(work.workers, max(1, len(missing)))
    with cli.progress(title, len(pieces), unit) as advance:
        advance(len(pieces) - len(missing))
        for _ in work.engine(partial(_kept, function), left(), workers, lambda _: None):
            advance(1)
    return paths


def outcome_of(piece: Piece, work: Work) -> Path:
    """Returns the file in which a piece's outcome is kept."""
    key = f"{work.options} {piece.key}".encode("utf-8", "surrogateescape")
    return work.out / FOLDER / hashlib.sha256(key).hexdigest()


def _kept(function: PieceOf, task: tuple[Path, Any], progress: Progress) -> None:
    path, own = task
    try:
        data = function(own, path, progress)
        with replacing(path, shared=True) as temporary:
            temporary.write_bytes(data)
    except FileNotFoundError:
        if path.parent.exists():  # what the function reads is missing
            raise
        raise unfinished.gone(path.parent) from None


def clear(out: Path) -> None:
    """Removes what passes have kept, if the data set in a folder is complete."""
    if is_complete(out):
        shutil.rmtree(out / FOLDER, ignore_errors=True)


def is_complete(out: Path) -> bool:
    """Returns whether a folder holds a finished data set."""
    return (out / "manifest.json").exists() and not (out / unfinished.FOLDER).exists()
