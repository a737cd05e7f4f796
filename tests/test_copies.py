"""Copies of checkpoints in a second place: complete and verified, or warned of; a run goes on from them."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from ranks import run_ranks, start_ranks
from test_checkpoint import expect_whole, save
from test_resume import finish
from tiny import changed, make_shards, tiny_config

from pretrain.checkpoint.copies import Copier, SecondPlace, restore
from pretrain.checkpoint.layout import DamagedError, manifest_text, step_folders, step_of
from pretrain.checkpoint.retention import apply_retention
from pretrain.config import Config
from pretrain.errors import ConfigError, StorageError, UserError
from pretrain.train.run import train

KEEP = {"keep_last": 2, "keep_every_steps": 0, "keep_best": False}
SECRET = "a part of a key"
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def place(tmp_path: Path) -> SecondPlace:
    """A store in memory, of this test alone."""
    return SecondPlace(f"memory://{tmp_path}", "tiny")


def copy_all(place: SecondPlace, folder: Path, keep: dict[str, Any] = KEEP) -> Copier:
    copier = Copier(place, folder, keep)
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
    place = SecondPlace(f"memory://{tmp_path}" if kind == "memory" else str(tmp_path / "second"), "tiny")
    assert place.steps() == []
    restore(place, again)
    assert not again.exists()  # the first start of a run
    for step in (10, 20, 30):
        assert save(first, step)
        copy_all(place, first)
    assert place.steps() == [30, 20]
    restore(place, again)
    assert [step_of(path) for path in step_folders(again)] == [30] and len(list(again.iterdir())) == 1
    expect_whole(again / "step-0000000030")
    assert files_of(again / "step-0000000030") == files_of(first / "step-0000000030")
    restore(place, first)  # has its own
    told = capfd.readouterr()
    assert told.out.splitlines() == [f"restored from {place.url}: {again}/step-0000000030"] and not told.err


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
    assert save(tmp_path, 10)
    copy_all(place, tmp_path)
    assert save(tmp_path, 20)
    opened = MemoryFileSystem.open

    def disturbed(self: Any, path: str, mode: str = "rb", **named: Any) -> Any:
        file = opened(self, path, mode, **named)
        return _Disturbed(file, how) if mode == "wb" and victim in path else file

    monkeypatch.setattr(MemoryFileSystem, "open", disturbed)
    copier = copy_all(place, tmp_path)
    warning = capfd.readouterr().err
    assert f"COPY NOT MADE: {tmp_path}/step-0000000020: {place.url}: " in warning and warning.count("\n") == 1
    assert (told in warning or victim == "MANIFEST.json" in warning) and SECRET not in warning
    restore(place, tmp_path / "again")
    newest = step_of(step_folders(tmp_path / "again")[0])
    assert newest == 10, "a copy that failed counts"
    monkeypatch.undo()
    copier.begin()
    wait_for(lambda: copier.done)
    assert place.steps() == [20, 10] and not capfd.readouterr().err.count("NOT MADE")


def test_what_is_being_copied_is_not_deleted(place: SecondPlace, tmp_path: Path) -> None:
    """A slow upload of a step that the run's folder would have deleted meanwhile; nobody waits for it."""
    began, go = threading.Event(), threading.Event()
    inner = place._write

    def slow(path: str, source: Any) -> None:
        began.set()
        assert go.wait(60)
        inner(path, source)

    place._write = slow
    assert save(tmp_path, 10)
    copier = Copier(place, tmp_path, KEEP)
    copier.begin()
    assert began.wait(60)
    for step in (20, 30):
        assert save(tmp_path, step)
        apply_retention(tmp_path, **KEEP, spare=copier.reading)
        copier.begin()
    assert [step_of(path) for path in step_folders(tmp_path)] == [30, 20, 10] and not copier.done
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
    restore(place, tmp_path / "again")
    assert [step_of(path) for path in step_folders(tmp_path / "again")] == [10]
    warning = capfd.readouterr().err
    assert "the copy of step 20 cannot be used" in warning and "weights-00000-of-00001.safetensors has CRC" in warning
    manifest = json.loads(store.cat_file(f"{root}/step-0000000010/MANIFEST.json"))
    manifest["files"][0]["path"] = "../../outside"  # a stranger's
    unsigned = {key: value for key, value in manifest.items() if key != "crc32c"}
    store.pipe_file(f"{root}/step-0000000010/MANIFEST.json", manifest_text(unsigned).encode())
    store.pipe_file(f"{root}/outside", b"bytes")
    with pytest.raises(DamagedError, match="none of its 2 copies is undamaged"):
        restore(place, tmp_path / "more" / "checkpoints")
    assert not list((tmp_path / "more").rglob("*/*"))
    place._store = fsspec.filesystem("file")  # nothing there
    place._root = "/dev/null/nothing"
    with pytest.raises(StorageError, match="cannot be read .*and .* has no checkpoint"):
        restore(place, tmp_path / "more" / "checkpoints")


def flip(store: Any, path: str) -> None:
    content = bytearray(store.cat_file(path))
    content[-1] ^= 1
    store.pipe_file(path, bytes(content))


@pytest.mark.parametrize("url", ["", "/", "s3://key:secret@bucket/x", "s3://bucket/x?token=1", "gs://bucket/x#y"])
def test_secrets_are_refused_in_the_config(url: str, tmp_path: Path) -> None:
    """The config is written into the run's folder, checkpoints and reports."""
    with pytest.raises(ConfigError, match="checkpoint.copy_to is empty or holds one of @ ") as met:
        tiny_config(tmp_path, tmp_path, checkpoint__copy_to=url)
    assert "secret" not in str(met.value).replace("secrets stand", "")


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
    second = tmp_path / "second"
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
