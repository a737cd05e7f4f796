"""A run's folder: no locks, full disks, unreadable versions, links that others made."""

import errno
import fcntl
import hashlib
import json
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain import provenance
from pretrain.cluster.jobs import PART_OF
from pretrain.config import Config, config_to_dict
from pretrain.data.order import Order
from pretrain.errors import LostProcessError, StorageError, TakenOverError, UserError
from pretrain.train import folder as run_folder
from pretrain.train import resuming
from pretrain.train.folder import claim, is_done, mark_done, record_start
from pretrain.train.resuming import fingerprint, refuse_changes
from pretrain.train.run import train
from pretrain.train.save import Saver
from pretrain.train.state import TrainState, resumed


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is no other run: training goes on at once, warned with the reason."""
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: pytest.fail("waits for a lock that nobody has"))
    lock = claim(tmp_path / "run").lock
    assert lock is not None
    lock.close()
    assert f"does not support locks ({os.strerror(number)})" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_somebody_holds_is_another_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some seconds of waiting."""
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="another process trains in this folder; wait for it, or choose another name="):
        claim(tmp_path / "run")
    monkeypatch.setenv(PART_OF, "1")
    with pytest.raises(UserError, match="wait for it, or choose another folder$"):
        claim(tmp_path / "run")


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "PRETRAIN_RESTARTS"])
def test_a_start_that_came_again_and_finds_the_lock_comes_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start before it may still hold it, on a node that is cut off or without power: nothing for a person yet."""
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EAGAIN))
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: None)
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="another process trains in this folder"):
        claim(tmp_path / "run")
    monkeypatch.setenv(name, "1")
    with pytest.raises(LostProcessError, match="run: is still locked, perhaps by the start before this one"):
        claim(tmp_path / "run")


def test_other_nodes_may_see_the_lock_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: rank 0 brings it to the server, the others look again for a while."""
    synced, looks = [], []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    lock = claim(tmp_path / "run").lock
    assert lock is not None and str(tmp_path / "run" / "lock") in synced
    token = (tmp_path / "run" / "lock").read_text()
    monkeypatch.setattr(run_folder.agreement, "from_main", lambda _: token)
    monkeypatch.setattr(run_folder.ranks, "is_main", lambda: False)
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: looks.append(late.rename(tmp_path / "run")))
    late = (tmp_path / "run").rename(tmp_path / "late")
    assert claim(tmp_path / "run").lock is None and len(looks) == 1
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 0.0)
    (tmp_path / "run" / "lock").write_text("another run's")
    with pytest.raises(UserError, match="run: rank 0 does not see it; give output= on a disk that all share"):
        claim(tmp_path / "run")
    lock.close()


def taken_over(config: Config) -> tuple[str, int]:
    """Trains; once step 5 is saved, another start that knows of no lock claims the folder. Returns the error."""
    save = Saver.save

    def taken_after_it(self: Saver, state: TrainState, *args: Any, **options: Any) -> None:
        save(self, state, *args, **options)
        self.finish()
        (config.output / config.name / "lock").write_text("0" * 32)

    Saver.save = taken_after_it
    with pytest.raises(TakenOverError) as refusal:
        train(config)
    return str(refusal.value), refusal.value.exit_code


def test_a_start_that_another_has_taken_over_saves_no_more(tmp_path: Path) -> None:
    """Two that save in one folder remove each other's. What it leaves there is the other's: it writes no STOP.json."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path)
    (told, code), folder = run_ranks(taken_over, 1, config)[0], tmp_path / "tiny"
    assert told.startswith(f"{folder}: another start of this run has taken it over") and code == 2
    assert os.listdir(folder / "checkpoints") == ["step-0000000005"] and not (folder / "STOP.json").exists()


def start(folder: Path, step: int = 0, recipe: Path | None = None, *, branched: bool = False) -> None:
    """Records a start of a tiny run."""
    record_start(folder, tiny_config(folder, folder), {}, step, recipe, branched=branched, facts={})


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Of a folder that somebody else made: the lock, the config, the recipe, DONE."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("precious")
    (run / "lock").symlink_to(other)
    with pytest.raises(UserError, match="run: cannot be written"):
        claim(run)
    for name in ("config.yaml", "deepspeed.json", "recipe.yaml", "DONE", ".room-for-DONE", "starts.jsonl"):
        (run / name).symlink_to(other)
        (run / f".tmp-{name}").symlink_to(other)
    (tmp_path / "recipe.yaml").write_text("# score: 1")
    start(run, recipe=tmp_path / "recipe.yaml")
    mark_done(run, 3, {})
    assert other.read_text() == "precious"
    assert (run / "recipe.yaml").read_text() == "# score: 1" and json.loads((run / "DONE").read_text()) == {"step": 3}


def test_done_has_its_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block is taken before logs fill the disk: the file of the start becomes DONE, in place, and never empty."""
    config = tiny_config(tmp_path, tmp_path)
    start(tmp_path)
    room = tmp_path / ".room-for-DONE"
    number, size = room.stat().st_ino, room.stat().st_size
    real, flags = run_folder.not_a_link, []
    monkeypatch.setattr(run_folder, "not_a_link", lambda path, how: flags.append(how) or real(path, how))
    with room.open("rb"):  # open, so that no other file gets its number
        mark_done(tmp_path, 20, {"val/top1": 0.5})
    assert len(flags) == 1 and not flags[0] & os.O_TRUNC
    done = tmp_path / "DONE"
    assert done.read_text() == '{"step": 20, "val/top1": 0.5}\n' and done.stat().st_ino == number and size >= 4096
    assert not room.exists() and is_done(tmp_path, config)
    assert [is_done(tmp_path, replace(config, total_steps=steps)) for steps in (19, 21)] == [True, False]
    mark_done(tmp_path, 20, {})  # also where nobody made room
    assert done.read_text() == '{"step": 20}\n'
    record_start(tmp_path, replace(config, total_steps=30), {}, 20, None, branched=False, facts={})
    assert not done.exists()  # a longer run is not done before its end


@pytest.mark.parametrize(
    "text", ["", "[20]", "20", '{"step": "20"}', '{"step": 1e400}', '{"step": NaN}', "[" * 100_000, '{"step": true}']
)
def test_a_damaged_done_is_none(text: str, tmp_path: Path) -> None:
    """The run goes on from its checkpoint and writes another."""
    (tmp_path / "DONE").write_text(text)
    assert not is_done(tmp_path, tiny_config(tmp_path, tmp_path))


@pytest.mark.parametrize("place", ["write_text", "mark_done"])
def test_a_full_disk_names_the_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A StorageError, so that the same command is tried again."""
    if place == "write_text":
        monkeypatch.setattr(run_folder, "write_text", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="config.yaml: cannot be written .No space left"):
            start(tmp_path)
        return
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match="DONE: cannot be written .No space left"):
        mark_done(tmp_path, 1, {})


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), metadata.PackageNotFoundError("x"), KeyError("Version")])
def test_versions_that_cannot_be_read_are_unknown(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning at the start, once; they are not read again."""

    def version(name: str) -> str:
        if name == "timm":
            raise error
        return "1"

    provenance._versions.cache_clear()
    monkeypatch.setattr(metadata, "version", version)
    try:
        start(tmp_path)
        monkeypatch.setattr(metadata, "version", lambda _: pytest.fail("read again"))
        assert provenance.versions()["torch"] == "1"
    finally:
        provenance._versions.cache_clear()
    assert "the versions of timm cannot be read" in capsys.readouterr().err
    assert json.loads((tmp_path / "starts.jsonl").read_text())["versions"]["timm"] == "unknown"


def test_damaged_logs_do_not_keep_a_run_from_its_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines without a step, lists, halves; each file is told."""
    for name in ("metrics.jsonl", "bad_samples.jsonl", "samples-00000.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n{"loss": 1}\n[1]\n{"st')
    start(tmp_path, 5)
    assert (tmp_path / "samples-00000.jsonl").read_text() == '{"step": 1}\n'
    assert capsys.readouterr().err.count("2 damaged lines left out") == 3


def test_a_torn_start_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a power loss: the next start has a line of its own, and knows the whole lines before it."""
    starts, whole = tmp_path / "starts.jsonl", b'{"step": 0}\n'
    starts.write_bytes(whole + b'{"step": 4, "ti\0\0')
    start(tmp_path, 8, branched=True)
    start(tmp_path, 12)
    lines = starts.read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], row.get("branched")) for row in rows] == [(0, None), (8, True), (12, None)]
    assert rows[1]["starts_before"] == hashlib.sha256(whole).hexdigest()
    assert rows[2]["starts_before"] == hashlib.sha256(whole + lines[1]).hexdigest()
    assert (
        capsys.readouterr().err.count("starts.jsonl: removed 17 bytes, the incomplete record of an earlier start") == 1
    )


def test_a_recipe_that_cannot_be_copied_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It decides nothing."""
    start(tmp_path, recipe=tmp_path / "gone.yaml")
    assert "gone.yaml: could not be copied" in capsys.readouterr().err
    assert json.loads((tmp_path / "starts.jsonl").read_text())["recipe"] == str(tmp_path / "gone.yaml")


@pytest.mark.parametrize("change", [{"config": 1}, {"data": []}, {"data": {"order": 3, "pixels": {}}}, {"data": None}])
def test_a_checkpoint_of_another_kind_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: Any
) -> None:
    """In one line that names the key."""
    config = tiny_config(tmp_path, tmp_path)
    state = {"config": config_to_dict(config), "data": fingerprint(manifest, Order(1, 0, 1, 0)), **change}
    monkeypatch.setattr(resuming, "read_state", lambda _: state)
    with pytest.raises(UserError, match="state.json: "):
        refuse_changes(tmp_path, config, manifest)


_SAVED = {"engine": {"optimizer_step": 5.0, "loss_scaler": None}, "train": {"bad_samples": {}, "metrics": {}}}
_SAVED |= {"world_size": 2}


@pytest.mark.parametrize("where", ["engine", "engine.optimizer_step", "engine.loss_scaler", "train", "world_size"])
@pytest.mark.parametrize(
    "value", [[1], "a", float("nan"), 10**400, {"cur_scale": "a"}, False], ids=lambda v: repr(v)[:9]
)
def test_what_a_run_goes_on_from_has_its_types(where: str, value: Any, tmp_path: Path) -> None:
    """A checkpoint that others made, from which a run branches off: each wrong value is one line that names the key."""
    values = json.loads(json.dumps(_SAVED))
    part, _, key = where.rpartition(".")
    (values[part] if part else values)[key] = value
    (tmp_path / "state.json").write_text(json.dumps(values))
    if where == "engine.loss_scaler" and value is False:
        assert resumed(tmp_path).world_size == 2
        return
    with pytest.raises(UserError, match=rf"state.json: .*{key}|cur_scale"):
        resumed(tmp_path)


@pytest.mark.parametrize("key", ["engine", "train", "world_size"])
def test_what_a_run_goes_on_from_is_there(key: str, tmp_path: Path) -> None:
    """Else one line names what is missing."""
    (tmp_path / "state.json").write_text(json.dumps({name: value for name, value in _SAVED.items() if name != key}))
    with pytest.raises(UserError, match=f"state.json: {key} is missing"):
        resumed(tmp_path)
