"""Saving: every rank writes what it owns; rank 0 publishes all of it by one rename, or nothing."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.behind import FileCopy, HostCopies, NoRoomError, in_background, wait_for_copies
from pretrain.checkpoint.layout import FORMAT, KINDS, VERSION, Slice, file_name, manifest_text, set_aside, step_folders
from pretrain.cluster import agreement, ranks
from pretrain.errors import StorageError
from pretrain.log import warn
from pretrain.storage import crc32c, fsync_path, remove, write_text

_SLOW_S = 3600.0  # a save that takes longer counts as hanging
_LOOK_EVERY_S = 0.05


class Save:
    """Saves `folder`/step-N with what every rank owns, in two parts: every rank writes; then rank 0 publishes.

    On failure (a full disk) the temporary folder is removed, rank 0 warns, and no earlier checkpoint is touched. All
    ranks construct it and call its methods together; `done` is local. With `copies` the caller waits only for a copy of
    the tensors, and may then change them: each part runs in the background, and when it is `done` on all ranks,
    `advance` starts the next. At most one save of a folder may be in progress. `before_published` and `when_published`
    are called on rank 0 in the second part, before and after the rename.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        weights: list[Slice],
        optimizer: list[Slice],
        generators: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        average: Sequence[Slice] = (),
        *,
        copies: HostCopies | None = None,
        before_published: Callable[[], None] = lambda: None,
        when_published: Callable[[], None] = lambda: None,
    ) -> None:
        rank, self._world = ranks.rank(), ranks.world_size()
        self._folder, self._step = folder, step
        self._before_published, self._when_published = before_published, when_published
        self._temporary = folder / f".tmp-step-{step:010d}"
        self._behind = copies is not None
        # As text now, because training goes on and changes its parts.
        self._state = json.dumps(state, indent=1, sort_keys=True) + "\n" if ranks.is_main() else ""
        slices = {kind: part for kind, part in zip(KINDS, (weights, optimizer, average)) if part or kind != "average"}
        files = {file_name(kind, rank, self._world): {s.name: s.values for s in part} for kind, part in slices.items()}
        files[f"generators-{rank:05d}.safetensors"] = dict(generators)
        rows = [(s.name, s.shape, s.offset, s.values.numel(), k) for k, part in slices.items() for s in part]
        # Before any rank writes, rank 0 removes what is in the way and makes the folder.
        problem = agreement.from_main(lambda: attempt(_make_temporary, self._temporary))
        contents: Iterable[tuple[str, FileCopy]] = _one_by_one(files)
        if problem:
            contents, problem = (), problem if ranks.is_main() else None  # reported once
        elif copies is not None:
            try:
                contents = copies.take(files).items()
            except StorageError as lack:
                self._behind = False
                if ranks.is_main() or not isinstance(lack, NoRoomError):  # all ranks meet that one
                    warn(f"step {step}: {lack}; files are written while training waits")
        self._writing = in_background(lambda: _written(self._temporary, contents, problem, rows), behind=self._behind)
        self._publishing: Future[bool] | None = None
        self.published: bool | None = None  # None: in progress

    @property
    def done(self) -> bool:
        """Whether this rank's share of the current part is done; when it is on all ranks, `advance` is due."""
        return (self._publishing or self._writing).done()

    def advance(self) -> None:
        """Waits for the current part and begins the next one; after the second part, `published` is set."""
        if self._publishing is None:
            gathered = agreement.to_main(self._writing.result())
            main = ranks.is_main()
            self._publishing = in_background(lambda: main and self._publish(gathered), behind=main and self._behind)
        else:
            self.published = agreement.from_main(self._publishing.result)

    def finish(self) -> bool:
        """Waits for the rest of the save; returns whether it was published.

        Ranks wait for each other with heartbeats, as a disk may be slow; after an hour without, so that the watchdog
        decides. Without `copies` this rank has written already, and the others wait for it at most engine.timeout_s.
        """
        until = time.monotonic() + _SLOW_S
        while self.published is None:
            while agreement.any_rank(not self.done and time.monotonic() < until):
                time.sleep(_LOOK_EVERY_S)
            self.advance()
        return self.published

    def _publish(self, packed: list[bytes]) -> bool:
        """The second part, on rank 0: what all ranks wrote becomes a checkpoint, or is removed."""
        gathered = list(map(json.loads, packed))
        problems = [f"rank {r}: {p}" for r, (p, _, _) in enumerate(gathered) if p]
        if not problems:
            self._before_published()
            files = [entry for _, of_rank, _ in gathered for entry in of_rank]
            header = {"format": FORMAT, "version": VERSION, "step": self._step, "world_size": self._world}
            index = _index_text(_tensor_index([rows for _, _, rows in gathered], self._world))
            texts = {"index.json": index, "state.json": [self._state]}
            published = self._folder / f"step-{self._step:010d}"
            problem = attempt(_publish, self._temporary, published, header, files, texts)
            problems = [problem] if problem else []
        if problems:
            attempt(remove, self._temporary)
            warn(
                f"CHECKPOINT NOT SAVED at step {self._step}: {'; '.join(problems)}. "
                f"Newest checkpoint: {_newest_name(self._folder)}"
            )
        else:
            self._when_published()
        return not problems


def _make_temporary(temporary: Path) -> None:
    temporary.parent.mkdir(exist_ok=True)  # not parents: with the run's disk away, another one would fill up
    attempt(_clean_up, temporary.parent)  # what fails is tried again at the next save
    remove(temporary)
    temporary.mkdir()


def _clean_up(folder: Path) -> None:
    """Removes what killed saves left, links included, and puts back a step that was being replaced."""
    names = os.listdir(folder)
    for path in [folder / name for name in names if name.startswith((".tmp-step-", ".trash-"))]:
        attempt(remove, path)
    for published in [folder / name.removeprefix(".old-") for name in names if name.startswith(".old-step-")]:
        if published.name in names:
            attempt(remove, set_aside(published))
        else:
            os.replace(set_aside(published), published)


def _one_by_one(files: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, FileCopy]]:
    """Yields a copy of each file in turn, so that only one is in memory at a time."""
    for name, tensors in files.items():
        copy = FileCopy(tensors, pinned=False)  # pinned memory is never given back
        copy.take(tensors)
        wait_for_copies()
        yield name, copy


def _written(
    temporary: Path, contents: Iterable[tuple[str, FileCopy]], problem: str | None, rows: list[tuple]
) -> bytes:
    """Writes this rank's files unless there is a problem already; returns what rank 0 needs to publish them.

    That is what went wrong, the manifest's entries (incomplete in that case) and the index's rows. As bytes, because
    sending thousands of rows as objects would delay training on both sides.
    """
    entries: list[dict[str, Any]] = []

    def write() -> None:
        for name, copy in contents:
            copy.write(temporary / name)
            entries.append(_sealed(temporary / name))

    problem = problem or attempt(write)
    return json.dumps([problem, entries, rows]).encode()


def _index_text(tensors: dict[str, Any]) -> Iterator[str]:
    """Yields index.json tensor by tensor: the JSON encoder holds the GIL, for a second if called once for all."""
    yield "{"
    for number, kind in enumerate(KINDS):
        yield f"{', ' if number else ''}{json.dumps(kind)}: {{"
        for place, name in enumerate(sorted(tensors[kind])):
            yield f"{',' if place else ''}\n{json.dumps(name)}: {json.dumps(tensors[kind][name])}"
        yield "}"
    yield "}\n"


def _sealed(path: Path) -> dict[str, Any]:
    """Syncs a file to disk and returns its entry in the manifest, computed from what reads back."""
    fsync_path(path)
    return {"path": path.name, "bytes": path.stat().st_size, "crc32c": crc32c(path)}


def _publish(
    temporary: Path,
    published: Path,
    header: dict[str, Any],
    files: list[dict[str, Any]],
    texts: Mapping[str, Iterable[str]],
) -> None:
    for name, pieces in texts.items():
        with (temporary / name).open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        files.append(_sealed(temporary / name))
    manifest = {**header, "files": sorted(files, key=lambda entry: entry["path"])}
    write_text(temporary / "MANIFEST.json", manifest_text(manifest))
    old = set_aside(published)
    again = os.path.lexists(published)  # it is damaged and unused, or lacks the validation that this save has
    if again:
        remove(old)
        os.replace(published, old)  # readers know this name, so a kill before the next rename loses nothing
    try:
        os.replace(temporary, published)
    except OSError:
        if again:
            os.replace(old, published)
        raise
    fsync_path(published.parent)
    attempt(remove, old)


def _tensor_index(rows_of_ranks: list[list[tuple]], world: int) -> dict[str, Any]:
    """{kind: {name: {"shape": [...], "slices": [[offset, elements, file], ...]}}}, slices in order of offset."""
    tensors: dict[str, Any] = {kind: {} for kind in KINDS}
    for rank, rows in enumerate(rows_of_ranks):
        for name, shape, offset, numel, kind in rows:
            entry = tensors[kind].setdefault(name, {"shape": shape, "slices": []})
            entry["slices"].append([offset, numel, file_name(kind, rank, world)])
    for entry in (entry for kind in KINDS for entry in tensors[kind].values()):
        entry["slices"].sort(key=lambda part: part[0])
    return tensors


def attempt(action: Callable[..., Any], *arguments: Any) -> str | None:
    """Calls `action`; returns what went wrong, None when nothing did. Catches OSError only."""
    try:
        action(*arguments)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _newest_name(folder: Path) -> str:
    try:
        folders = step_folders(folder)
    except OSError as error:
        return f"not known ({error.strerror})"
    return folders[0].name if folders else "none"
