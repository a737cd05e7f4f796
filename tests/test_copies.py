"""Copies of checkpoints in a second place: complete and verified, or warned of; a run goes on from them."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from ranks import run_ranks, start_ranks
from test_checkpoint import expect_whole, save
from test_resume import finish
from tiny import changed, make_shards, tiny_config
from web import s3_server

from pretrain.checkpoint import copies
from pretrain.checkpoint.copies import Copier, restore
from pretrain.checkpoint.layout import DamagedError, manifest_text, step_folders, step_of
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.second_place import SecondPlace
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.errors import ConfigError, StorageError, UserError
from pretrain.train import save as saving
from pretrain.train.run import train

KEEP = {"keep_last": 2, "keep_every_steps": 0, "keep_best": False}
RUN = {"output": "/runs", "seed": 0, "init_from": None, "branch_from": None}
SECRET = "a part of a key"
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def place(tmp_path: Path) -> SecondPlace:
    """A store in memory, of this test alone."""
    return SecondPlace(f"memory://{tmp_path}", "tiny")


def copy_all(place: SecondPlace, folder: Path, keep: dict[str, Any] = KEEP, run: dict[str, Any] = RUN) -> Copier:
    copier = Copier(lambda: place, folder, keep, run)
    copier.begin()
    wait_for(lambda: copier.done)
    return copier


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_copy_comes_back_byte_by_byte(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the run's folder keeps is there too, and no more; the newest is fetched where the run's folder has none."""
    first, again = tmp_path / "first", tmp_path / "again"
    (tmp_path / "second").mkdir()
    place = SecondPlace(f"memory://{tmp_path}" if kind == "memory" else str(tmp_path / "second"), "tiny")
    assert place.steps() == []
    restore(lambda: place, again, RUN)
    assert not again.exists()  # the first start of a run
    for step in (10, 20, 30):
        assert save(first, step)
        copy_all(place, first)
    assert place.steps() == [30, 20]
    restore(lambda: place, again, RUN)
    assert [step_of(path) for path in step_folders(again)] == [30] and len(list(again.iterdir())) == 1
    expect_whole(again / "step-0000000030")
    assert files_of(again / "step-0000000030") == files_of(first / "step-0000000030")
    restore(lambda: place, first, RUN)  # has its own
    told = capfd.readouterr()
    assert told.out.splitlines() == [f"restored from {place.url}: {again}/step-0000000030"] and not told.err


def test_a_download_that_was_cut_off_goes_on(
    place: SecondPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are whole are not fetched again; half ones are, and all where the step was saved again since."""
    first, again = tmp_path / "first", tmp_path / "again"
    half = again / ".tmp-step-0000000010"
    plain, opened, most = place._store.open, [], 0

    def counted(path: str, mode: str = "rb", **given: Any) -> Any:
        if mode == "rb" and "/step-" in path:
            opened.append(Path(path).name)
            if len(opened) > most:
                raise OSError(errno.EHOSTUNREACH, "away")
        return plain(path, mode, **given)

    def fetched(allowed: int) -> list[str]:
        nonlocal most
        opened.clear()
        most = allowed
        with monkeypatch.context() as patch:
            patch.setattr(place._store, "open", counted)
            if allowed < 100:
                with pytest.raises(StorageError, match="cannot be read"):
                    restore(lambda: place, again, RUN)
            else:
                restore(lambda: place, again, RUN)
        return list(opened)

    assert save(first, 10)
    copy_all(place, first)
    manifest, one, two, _ = fetched(3)
    assert manifest == "MANIFEST.json" and {path.name for path in half.iterdir()} >= {manifest, one, two}
    (half / one).write_bytes(b"half")
    later = fetched(100)
    assert one in later and two not in later
    assert files_of(again / "step-0000000010") == files_of(first / "step-0000000010")

    os.rename(again / "step-0000000010", half)  # a whole download, of a copy that is another by now
    assert save(first, 10, elements=1001)
    copy_all(place, first)
    assert {one, two} <= set(fetched(100))
    assert files_of(again / "step-0000000010") == files_of(first / "step-0000000010")


def test_pinned_steps_stay_and_those_of_a_run_further_on(place: SecondPlace, tmp_path: Path) -> None:
    """The rule of the run's folder holds for copies; what is newer than the run is somebody's, and no copy of it."""
    for step in (10, 15, 20, 25):
        assert save(tmp_path / "one", step)
    copy_all(place, tmp_path / "one", {**KEEP, "keep_last": 1, "keep_every_steps": 10})
    assert place.steps() == [25, 20, 10]
    for step in (11, 12, 13):
        assert save(tmp_path / "other", step)
    copy_all(place, tmp_path / "other")
    assert place.steps() == [25, 20, 13, 12]


class _Disturbed:
    """A file of the store in memory that goes wrong when so many bytes have been written."""

    def __init__(self, file: Any, how: str) -> None:
        self._file, self._how = file, how

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Disturbed":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        if self._how == "flipped":
            return self._file.write(piece[:-1] + bytes([piece[-1] ^ 1]))
        self._file.write(piece[: len(piece) // 2])
        if self._how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._how == "cut":
            raise RuntimeError(SECRET)


@pytest.mark.parametrize("victim", ["weights", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("full", "No space left on device"),
        ("cut", "RuntimeError"),  # as the packages of stores raise them; their texts may hold secrets
        ("short", "there, MANIFEST.json says"),
        ("flipped", "there, MANIFEST.json says"),
    ],
)
def test_a_copy_that_fails_is_a_warning(
    how: str,
    told: str,
    victim: str,
    place: SecondPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It does not count as a copy, the one before stays, and the next turn makes it good."""
    assert save(tmp_path / "run", 10)
    copy_all(place, tmp_path / "run")
    assert save(tmp_path / "run", 20)
    opened = MemoryFileSystem.open

    def disturbed(self: Any, path: str, mode: str = "rb", **named: Any) -> Any:
        file = opened(self, path, mode, **named)
        return _Disturbed(file, how) if mode == "wb" and victim in path else file

    monkeypatch.setattr(MemoryFileSystem, "open", disturbed)
    copier = copy_all(place, tmp_path / "run")
    warning = capfd.readouterr().err
    assert f"COPY NOT MADE: {tmp_path}/run/step-0000000020: {place.url}: " in warning and warning.count("\n") == 1
    assert (told in warning or victim == "MANIFEST.json" in warning) and SECRET not in warning
    assert place.steps() == [10], "a copy that failed counts"
    restore(lambda: place, tmp_path / "again", RUN)
    newest = step_of(step_folders(tmp_path / "again")[0])
    assert newest == 10, "a copy that failed counts"
    monkeypatch.undo()
    copier.begin()
    wait_for(lambda: copier.done)
    assert place.steps() == [20, 10] and not capfd.readouterr().err.count("NOT MADE")


def test_what_is_being_copied_is_not_deleted(
    place: SecondPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A slow upload of a step that the run's folder would have deleted meanwhile; nobody waits for it.

    A place that hangs would look like that for weeks: each save says so.
    """
    began, go = threading.Event(), threading.Event()
    inner = place._write

    def slow(path: str, pieces: Any) -> None:
        if "step-" in path:  # not whose copies they are
            began.set()
            assert go.wait(60)
        inner(path, pieces)

    place._write = slow
    assert save(tmp_path / "run", 10)
    copier = Copier(lambda: place, tmp_path / "run", KEEP, RUN)
    copier.begin()
    assert began.wait(60)
    for step in (20, 30):
        assert save(tmp_path / "run", step)
        apply_retention(tmp_path / "run", **KEEP, spare=copier.reading)
        copier.begin()
    assert [step_of(path) for path in step_folders(tmp_path / "run")] == [30, 20, 10] and not copier.done
    assert "NOT MADE" not in capfd.readouterr().err
    monkeypatch.setattr(copies, "LATE_MINUTES", 0.0)
    copier.begin()
    assert f"COPY NOT MADE: {tmp_path}/run/step-0000000010: not complete after 0 minutes" in capfd.readouterr().err
    go.set()
    wait_for(lambda: copier.done)
    assert place.steps() == [30, 20]


def test_a_damaged_copy_is_refused(place: SecondPlace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The one before it is fetched, with a warning; where none is left, or none can be read, nothing begins anew."""
    for step in (10, 20):
        assert save(tmp_path / "first", step)
    copy_all(place, tmp_path / "first")
    store, root = fsspec.filesystem("memory"), place._root
    flip(store, next(path for path in store.ls(f"{root}/step-0000000020", detail=False) if "weights" in path))
    restore(lambda: place, tmp_path / "again", RUN)
    assert [step_of(path) for path in step_folders(tmp_path / "again")] == [10]
    warning = capfd.readouterr().err
    assert "the copy of step 20 cannot be used" in warning and "weights-00000-of-00001.safetensors has CRC" in warning
    manifest = json.loads(store.cat_file(f"{root}/step-0000000010/MANIFEST.json"))
    manifest["files"][0]["path"] = "../../outside"  # a stranger's
    unsigned = {key: value for key, value in manifest.items() if key != "crc32c"}
    store.pipe_file(f"{root}/step-0000000010/MANIFEST.json", manifest_text(unsigned).encode())
    store.pipe_file(f"{root}/outside", b"bytes")
    with pytest.raises(DamagedError, match="all of its 2 copies are damaged"):
        restore(lambda: place, tmp_path / "more" / "checkpoints", RUN)
    assert not list((tmp_path / "more").rglob("*/*"))
    place._store = fsspec.filesystem("file")  # nothing there
    place._root = "/dev/null/nothing"
    with pytest.raises(StorageError, match="cannot be read .*and .* has no checkpoint"):
        restore(lambda: place, tmp_path / "more" / "checkpoints", RUN)


@pytest.mark.parametrize("key", [None, *RUN])
def test_copies_of_another_run_are_refused(
    key: str | None, place: SecondPlace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run of the same name: told by its number while it has its folder, by what it starts from when that is gone."""
    first, other = tmp_path / "first" / "checkpoints", tmp_path / "other" / "checkpoints"
    for folder in (first, other):
        folder.mkdir(parents=True)
    assert save(first, 10)
    copy_all(place, first)
    run = RUN
    if key is None:
        assert save(other, 30)
        copy_all(SecondPlace(f"memory://{tmp_path}/elsewhere", "tiny"), other)
    else:
        run = {**RUN, key: "another"}
    with pytest.raises(UserError, match="holds copies of another run .output '/runs', seed 0, .* run.json there"):
        restore(lambda: place, other, run)
    assert save(other, 40)
    copy_all(place, other, run=run)
    assert "COPY NOT MADE" in (warning := capfd.readouterr().err) and "another run" in warning
    assert place.steps() == [10]
    restore(lambda: place, first, {**RUN, "output": "moved"})  # the number counts
    copy_all(place, first, run={**RUN, "output": "moved"})
    assert not capfd.readouterr().err


def test_the_runs_own_folder_is_no_second_place(tmp_path: Path) -> None:
    """By another name, too; and half of a run.json without copies, from a start that was killed, is nobody's."""
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(UserError, match="is the run's own folder"):
        restore(lambda: SecondPlace(str(tmp_path / "link"), "tiny"), folder, RUN)
    place = SecondPlace(f"memory://{tmp_path}", "tiny")
    place._write(f"{place._root}/run.json", [b"{"])
    restore(lambda: place, folder, RUN)
    assert json.loads(place._read(f"{place._root}/run.json")) == json.loads((folder.parent / "copies.json").read_text())


def test_a_place_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A disk that is not mounted: nothing is made in its stead, and nothing begins anew; an empty one is a start."""
    folder, away = tmp_path / "run" / "checkpoints", tmp_path / "away"
    place = SecondPlace(str(away), "tiny")
    with pytest.raises(StorageError, match="away: is not there; make that folder, or mount"):
        restore(lambda: place, folder, RUN)
    folder.parent.mkdir(exist_ok=True)
    assert save(folder, 10)
    restore(lambda: place, folder, RUN)  # goes on
    copy_all(place, folder)
    assert not away.exists() and "COPY NOT MADE" in capfd.readouterr().err
    away.mkdir()
    restore(lambda: place, tmp_path / "new" / "checkpoints", RUN)
    copy_all(place, tmp_path / "new" / "checkpoints")
    assert not step_folders(tmp_path / "new" / "checkpoints") and not capfd.readouterr().err


@pytest.mark.parametrize("victim", ["MANIFEST.json", "state.json"])
def test_an_error_is_no_answer(victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be told whether copies are complete, or how good, none is deleted and no run begins anew."""
    (tmp_path / "second").mkdir()
    place = SecondPlace(str(tmp_path / "second"), "tiny")
    for step in (10, 20, 30):
        assert save(tmp_path / "run", step)
    copy_all(place, tmp_path / "run", {**KEEP, "keep_last": 3})

    def fail(inner: Callable[..., Any]) -> Callable[..., Any]:
        def failing(self: Any, path: Any, *args: Any, **named: Any) -> Any:
            if str(path).endswith(f"step-0000000010/{victim}") or (victim in str(path) and keep_best):
                raise PermissionError(errno.EACCES, "Permission denied")
            return inner(self, path, *args, **named)

        return failing

    keep_best = victim == "state.json"
    for name in ("info", "open"):
        monkeypatch.setattr(LocalFileSystem, name, fail(getattr(LocalFileSystem, name)))
    with pytest.raises(PermissionError):
        place.delete_old(30, keep_last=1, keep_every_steps=0, keep_best=keep_best)
    for path in (tmp_path / "second" / "tiny" / "checkpoints").glob("step-*[23]0"):
        (path / "MANIFEST.json").unlink()
    with pytest.raises(StorageError, match="cannot be read .Permission denied.*starts afresh"):
        restore(lambda: place, tmp_path / "again" / "checkpoints", RUN)
    monkeypatch.undo()
    assert place.steps() == [10]
    assert len(place.all_steps()) == 3


def test_a_step_saved_again_while_it_is_copied(place: SecondPlace, tmp_path: Path) -> None:
    """The copy's manifest is that of the files copied, not the one that the run's folder has at the end."""
    assert save(tmp_path, 10)
    manifest, inner = (tmp_path / "step-0000000010" / "MANIFEST.json").read_bytes(), place._write

    def write(path: str, pieces: Any) -> None:
        inner(path, pieces)
        if path.endswith("state.json"):
            (tmp_path / "step-0000000010" / "MANIFEST.json").write_bytes(b"another")

    place._write = write
    place.copy(10, tmp_path / "step-0000000010")
    assert place._read(place._path(10, "MANIFEST.json")) == manifest
    assert not place.holds(10, tmp_path / "step-0000000010")


def test_one_that_fails_keeps_nothing_else_away(
    place: SecondPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The newest copy fails each time: the others are made, old ones deleted, before copying too, which is slow."""
    for step in (5, 6):
        assert save(tmp_path / "old", step)
    copy_all(place, tmp_path / "old")
    for step in (20, 30):
        assert save(tmp_path / "run", step)
    inner, delete, calls = place._write, place.delete_old, []

    def write(path: str, pieces: Any) -> None:
        calls.append("copy")
        if "step-0000000030" in path:
            raise RuntimeError(SECRET)
        inner(path, pieces)

    place._write = write
    monkeypatch.setattr(place, "delete_old", lambda *args, **named: (calls.append("delete"), delete(*args, **named)))
    copy_all(place, tmp_path / "run")
    assert place.steps() == [20, 6] and calls[0] == calls[-1] == "delete"
    assert (warning := capfd.readouterr().err).count("COPY NOT MADE") == 1 and "step-0000000030" in warning
    store, removed = place._store, place._store.rm
    monkeypatch.undo()
    place._write = inner

    def rm(path: str, **named: Any) -> None:
        if "step-0000000020" in path:
            raise OSError(errno.EIO, "Input/output error")
        removed(path, **named)

    monkeypatch.setattr(store, "rm", rm)
    with pytest.raises(OSError, match="Input/output error"):
        place.delete_old(40, keep_last=0, keep_every_steps=0, keep_best=False)
    assert place.all_steps() == [20]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("victim", ["MANIFEST.json", "weights"])
def test_an_unreadable_copy_is_passed_over(
    victim: str,
    error: OSError,
    place: SecondPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Named, and the one before it is fetched, all of it on the disk before it has its name."""
    for step in (10, 20):
        assert save(tmp_path / "run", step)
    copy_all(place, tmp_path / "run")
    opened, synced, fsync = MemoryFileSystem.open, set[int](), os.fsync

    def failing(self: Any, path: str, *args: Any, **named: Any) -> Any:
        if "step-0000000020" in path and victim in path:
            raise error
        return opened(self, path, *args, **named)

    monkeypatch.setattr(MemoryFileSystem, "open", failing)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    folder = tmp_path / "again" / "checkpoints"
    restore(lambda: place, folder, RUN)
    assert [step_of(path) for path in step_folders(folder)] == [10]
    assert f"the copy of step 20 cannot be used ({victim}" in capfd.readouterr().err
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= synced
    full = tmp_path / "full" / "checkpoints"
    full.parent.mkdir()
    full.symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises(StorageError, match="full/checkpoints: cannot be written .*make room"):
        restore(lambda: place, full, RUN)


def test_a_store_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line without what the store's package says; a run that has its checkpoints goes on, warned."""
    monkeypatch.setattr(fsspec, "url_to_fs", broken)
    with pytest.raises(StorageError, match="checkpoint.copy_to: s3://x: cannot be opened .RuntimeError") as met:
        restore(lambda: SecondPlace("s3://x", "tiny"), tmp_path / "empty", RUN)
    assert SECRET not in str(met.value)
    assert save(tmp_path / "run", 10)
    restore(lambda: SecondPlace("s3://x", "tiny"), tmp_path / "run", RUN)
    copier = Copier(lambda: SecondPlace("s3://x", "tiny"), tmp_path / "run", KEEP, RUN)
    copier.begin()
    wait_for(lambda: copier.done)
    assert "COPY NOT MADE: checkpoint.copy_to: s3://x: cannot be opened" in capfd.readouterr().err


def broken(*_: object, **__: object) -> None:
    raise RuntimeError(SECRET)


def give_up(folder: Path) -> list[str]:
    """Waits for a copy, and for one to come back, that take for ever; rank 1 alone is asked to stop."""
    ranks.start(60)
    config = tiny_config(folder, folder, checkpoint__copy_to=str(folder / "second"))
    asked: Any = SimpleNamespace(signal_name="SIGTERM" if ranks.rank() else None)
    saver: Any = object.__new__(saving.Saver)
    saver._config, saver._under_way = config, None
    saver._copier = None if ranks.rank() else SimpleNamespace(done=False)
    saving.COPIED_AFTER_STOP_S = saving.RESTORED_S = 0.2
    saver.end(asked)
    real, saving.restore = saving.restore, lambda *_: threading.Event().wait()
    saving.restore_copy(config, asked)
    told = []
    asked.signal_name = None
    for restoring in (saving.restore, real):  # too slow; its place is not there
        saving.restore = restoring
        try:
            saving.restore_copy(config, asked)
        except StorageError as error:
            told.append(str(error))
    return told


@pytest.mark.slow
def test_all_ranks_give_up_together(tmp_path: Path) -> None:
    """A signal to one rank, a limit, an error on rank 0: all ranks stop waiting, with the same error."""
    ours, theirs = run_ranks(give_up, 2, tmp_path, timeout_s=100)
    assert ours == theirs and "was downloaded in 0 s" in ours[0] and "is not there" in ours[1] and len(ours) == 2


def flip(store: Any, path: str) -> None:
    content = bytearray(store.cat_file(path))
    content[-1] ^= 1
    store.pipe_file(path, bytes(content))


@pytest.mark.parametrize("url", ["", "/", "s3://key:secret@bucket/x", "s3://bucket/x?token=1", "gs://bucket/x#y"])
def test_secrets_are_refused_in_the_config(url: str, tmp_path: Path) -> None:
    """The config is written into the run's folder, checkpoints and reports."""
    with pytest.raises(ConfigError, match="checkpoint.copy_to is empty or contains one of @ ") as met:
        tiny_config(tmp_path, tmp_path, checkpoint__copy_to=url)
    assert "secret" not in str(met.value).replace("set off secrets", "")


def test_a_url_that_no_package_knows(tmp_path: Path) -> None:
    """One line with the way out."""
    with pytest.raises(UserError, match="checkpoint.copy_to: nosuch://x: .*pip install"):
        SecondPlace("nosuch://x", "tiny")


def kill_when_copied(config: Config, step: int) -> None:
    """Trains on two ranks until the copy of a step is complete, and kills them."""
    processes = start_ranks(train, 2, config)
    copy = Path(str(config.checkpoint.copy_to)) / config.name / "checkpoints" / f"step-{step:010d}"
    wait_for(lambda: (copy / "MANIFEST.json").exists() or not any(process.is_alive() for process in processes))
    for process in processes:
        process.kill()
        process.join()


def test_a_run_whose_folder_is_gone_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Both ranks killed, all of the run's folder deleted: the same command goes on from the copy. At the end the last
    checkpoint has been copied, too; an error of the second place does not end it."""
    shards = make_shards(tmp_path / "squares")
    undisturbed = tiny_config(shards, tmp_path / "undisturbed", model__dropout=0.1)
    run_ranks(finish, 2, undisturbed)
    (second := tmp_path / "second").mkdir()
    config = changed(undisturbed, output=str(tmp_path / "runs"), checkpoint__copy_to=str(second))
    kill_when_copied(config, 10)
    os.rename(config.output, tmp_path / "lost")
    run_ranks(finish, 2, config)
    starts = [json.loads(line) for line in (config.output / "tiny" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] >= 10 for start in starts] == [True]
    ours, theirs, copied = (
        folder / "checkpoints" / "step-0000000020"
        for folder in (config.output / "tiny", undisturbed.output / "tiny", second / "tiny")
    )
    for path in theirs.glob("*.safetensors"):
        assert path.read_bytes() == (ours / path.name).read_bytes() == (copied / path.name).read_bytes(), path.name
    in_the_way = second / "other" / "checkpoints" / "step-0000000005"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    run_ranks(finish, 1, changed(config, name="other", total_steps=10))
    assert (config.output / "other" / "DONE").exists()


def train_in(environment: dict[str, str], config: Config) -> None:
    """Trains with the variables of the test: the process that ranks are forked from may be older than they are."""
    os.environ.update(environment)
    train(config)


@pytest.mark.slow
def test_a_bucket_is_a_second_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3-compatible server keeps what the run keeps. A run whose folder is gone goes on from there, from the newest
    copy that is whole, and ends with the same bits."""
    config = tiny_config(
        make_shards(tmp_path / "squares"), tmp_path / "runs", model__dropout=0.1, checkpoint__copy_to="s3://copies/all"
    )
    with s3_server(monkeypatch):
        client = pytest.importorskip("boto3").client("s3")
        client.create_bucket(Bucket="copies")
        access = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        run_ranks(train_in, 1, access, config)
        there = {row["Key"].split("/")[3] for row in client.list_objects_v2(Bucket="copies")["Contents"]}
        assert there == {"run.json", *(f"step-{step:010d}" for step in (10, 15, 20))}
        os.rename(config.output, tmp_path / "lost")
        client.delete_object(Bucket="copies", Key="all/tiny/checkpoints/step-0000000020/state.json")
        run_ranks(train_in, 1, access, config)
    (start,) = (json.loads(line) for line in (config.output / "tiny" / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 15
    ours, theirs = (
        folder / "tiny" / "checkpoints" / "step-0000000020" for folder in (config.output, tmp_path / "lost")
    )
    for path in theirs.glob("*.safetensors"):
        assert path.read_bytes() == (ours / path.name).read_bytes(), path.name
