"""Indexes existing tars as they are: a task each, for any number of processes. Finished tars are recorded."""

import errno
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.inside import file_inside
from pretrain.data.reader import forget_shards
from pretrain.errors import PASSING_ERRORS, StorageError, UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards import walks
from pretrain.shards.build import start_folder
from pretrain.shards.pool import Progress, results
from pretrain.shards.tars import unreadable
from pretrain.shards.unpacking import copy_unpacked
from pretrain.shards.walks import Origin, Walk, finish_walks
from pretrain.storage import remove, replacing


def index_existing(
    tars: Sequence[Path],
    classes: Sequence[str],
    out: Path,
    *,
    progress: Progress = lambda _: None,
    passed_over: Counter[str] | None = None,
    workers: int = 1,
) -> Path:
    """Indexes existing tars and returns the manifest's path. `.tar.gz` are decompressed; tars outside OUT are copied.

    workers: processes; 1: this one. The bytes do not depend on them. After a kill or an error, the same call resumes
    with the tars that are not done. passed_over: counts of members that belong to no sample are added, by kind. Raises
    UserError naming the shard, when one is damaged, holds a sample twice or without image or label, and naming a file
    that a copy would replace.
    """
    if not all(path.resolve().parent == out.resolve() for path in tars):
        start_folder(out, classes)  # otherwise they are indexed again in place
    names = [path.name.removesuffix(".gz") for path in tars]
    if len(set(names)) < len(names):
        raise UserError(f"two tars have the same name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    if foreign := next((name for name in names if not is_text(name)), None):
        raise UserError(f"{shown(foreign)}: the tar's name is not UTF-8, and the manifest names it; rename it")
    if long := next((name for name in names if not walks.is_file_name(name)), None):
        raise UserError(f"{long}: the tar's name is too long for the files made of it; rename it")
    _refuse_to_replace([out / name for path, name in zip(tars, names) if not _is_here(path, out / name)])
    work = walks.begin(out)
    tasks = (_Tar(number, path, out / name) for number, (path, name) in enumerate(zip(tars, names)))
    try:
        indexed = results(partial(_indexed, work, len(classes)), tasks, min(workers, len(tars)), lambda _: None)
        path = finish_walks(indexed, classes, out, progress, passed_over)
    except BaseException:
        with suppress(OSError):  # not empty: records of what is done, for a later start
            work.rmdir()
        raise
    with suppress(OSError):  # a process whose parent was killed may still write there
        remove(work)
    return path


def _is_here(source: Path, target: Path) -> bool:
    return source.resolve() == target.resolve()


def _refuse_to_replace(copies: Sequence[Path]) -> None:
    """Raises UserError where a copy would replace a file that was not copied there by an unfinished indexing."""
    for path in copies:
        mark = _mark_of_copy(path)
        if os.path.lexists(path) and (mark.parent.is_symlink() or not mark.is_file()):
            raise UserError(f"{path}: is there already, and would be replaced; choose another folder, or move it away")


def _mark_of_copy(target: Path) -> Path:
    """The marker, made before a tar is copied to OUT, that the file there is our copy."""
    return target.parent / walks.FOLDER / f"{target.name}.copy"


class _Tar(NamedTuple):
    """A tar to be indexed."""

    number: int
    source: Path
    target: Path  # in OUT; the source itself if it lies there already


def _indexed(work: Path, num_classes: int, tar: _Tar, _: Progress) -> tuple[int, Walk]:
    """Brings a tar to its place, writes its index and a record, and returns its number and its contents."""
    record = work / f"{tar.target.name}.json"
    is_here = _is_here(tar.source, tar.target)
    if is_here:
        file_inside(tar.target.parent, tar.target)
    origin = _origin(tar.source, is_here)
    if found := walks.known(record, origin, tar.target, num_classes):
        return tar.number, found
    index = tar.target.with_suffix(".idx")
    had_index = index.exists()  # an index beside a copy may be another tool's
    mark = _mark_of_copy(tar.target)
    if not is_here:
        mark.touch()
        try:
            _bring(tar.source, tar.target)
        finally:
            if not os.path.lexists(tar.target):
                mark.unlink(missing_ok=True)
    try:
        found = walks.walk(tar.target, num_classes)
    except UserError as error:
        if is_here:
            raise
        tar.target.unlink(missing_ok=True)  # nobody can use it, and the user has never seen it
        mark.unlink(missing_ok=True)
        if not had_index:
            index.unlink(missing_ok=True)
        raise UserError(str(error).replace(str(tar.target), str(tar.source))) from None
    finally:
        forget_shards()
    walks.keep(record, origin, found)
    return tar.number, found


def _origin(source: Path, is_here: bool) -> Origin:
    """What identifies an unchanged tar, and a copy as its copy: the size, and the ctime, which nobody can set."""
    try:
        status = source.stat()
    except OSError as error:
        raise unreadable(source, error) from None
    origin: dict[str, int | str] = {"num_bytes": status.st_size, "ctime_ns": status.st_ctime_ns}
    return origin | ({} if is_here else {"copy_of": shown(source.resolve())})


def _bring(source: Path, target: Path) -> None:
    """Copies or unpacks a tar to its place."""
    try:
        with replacing(target, shared=True) as temporary:
            copy_unpacked(source, temporary)
    except (OSError, EOFError, zlib.error) as error:
        passes = isinstance(error, OSError) and error.errno in PASSING_ERRORS | {errno.ENOSPC, errno.EDQUOT}
        kind = StorageError if passes else UserError
        raise kind(f"{source}: cannot be copied to {target} ({error})") from None
