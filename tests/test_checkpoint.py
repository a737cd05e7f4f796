"""Checkpoints: complete or absent, whatever kills the writer; damage is found, named, and the one before is used."""

import errno
import json
import os
import random
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, start_ranks
from safetensors.torch import save_file
from weights_on_disk import save_checkpoint

from pretrain import log
from pretrain.checkpoint import behind, find, read, retention, write
from pretrain.checkpoint.behind import HostCopies
from pretrain.checkpoint.find import find_checkpoint, newest_valid, validate
from pretrain.checkpoint.layout import DamagedError, Slice, manifest_text, step_folders, step_of
from pretrain.checkpoint.read import CheckpointReader, check_names, read_state
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.write import Save
from pretrain.cluster import ranks
from pretrain.config import MAX_STEP
from pretrain.errors import StorageError, UserError


def slices_of(step: int, rank: int, world_size: int, elements: int) -> list[Slice]:
    """A tensor whose every element says (step, position), cut into equal pieces."""
    values = torch.arange(elements, dtype=torch.float32) + step
    piece = range(rank * elements // world_size, (rank + 1) * elements // world_size)
    return [Slice("weight", (elements,), piece.start, values[piece.start : piece.stop])]


def save(folder: Path, step: int, elements: int = 1000, copies: HostCopies | None = None) -> bool:
    """Saves; behind the caller when there are `copies`, who changes the tensors while it is under way."""
    rank, world = ranks.rank(), ranks.world_size()
    weights = slices_of(step, rank, world, elements)
    moments = [Slice(f"exp_avg/{s.name}", s.shape, s.offset, s.values) for s in weights]
    contents = weights, moments, {"cpu": torch.get_rng_state()}, {"step": step, "metrics": {}}
    if copies is None:
        return save_checkpoint(folder, step, *contents)
    under_way = Save(folder, step, *contents, copies=copies)
    weights[0].values.fill_(-1)
    return under_way.finish()


def expect_whole(path: Path, elements: int = 1000) -> None:
    step = step_of(path)
    reader = CheckpointReader(path)
    for kind, name in (("weights", "weight"), ("optimizer", "exp_avg/weight")):
        assert torch.equal(reader.tensor(name, kind), torch.arange(elements, dtype=torch.float32) + step)
    assert read_state(path)["step"] == step


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def save_on_ranks(folder: Path, step: int) -> bool:
    ranks.start(60)
    return save(folder, step)


def save_for_ever(folder: Path, elements: int, first: int) -> None:
    """Saves without pause, behind itself, and tells, after each save, that it was published."""
    ranks.start(60)
    copies = HostCopies()
    for step in range(first, 1_000_000):
        assert save(folder, step, elements, copies)
        apply_retention(folder, keep_last=2, keep_every_steps=0, keep_best=False)
        if ranks.is_main():
            (folder / "now.txt").write_text(str(step))
            os.replace(folder / "now.txt", folder / "published.txt")


def test_the_last_step_that_a_run_may_have_is_found(tmp_path: Path) -> None:
    """The name of a folder has as many digits; a longer one would be saved, and nobody would find it."""
    (tmp_path / f"step-{MAX_STEP:010d}").mkdir()
    assert [step_of(path) for path in step_folders(tmp_path)] == [MAX_STEP]
    (tmp_path / f"step-{MAX_STEP + 1:010d}").mkdir()
    assert len(step_folders(tmp_path)) == 1


def test_round_trip_on_any_number_of_ranks(tmp_path: Path) -> None:
    """What 3 ranks wrote is read whole, and in the parts that 2 other ranks would own."""
    assert run_ranks(save_on_ranks, 3, tmp_path, 7) == [True] * 3
    path = newest_valid(tmp_path)
    assert path is not None and path.name == "step-0000000007"
    expect_whole(path)
    for rank in range(2):
        (part,) = slices_of(0, rank, 2, 1000)
        wanted = part.values + 7
        CheckpointReader(path).read_into(part)
        assert torch.equal(part.values, wanted)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kill_during_saving_100_of_100(tmp_path: Path) -> None:
    """SIGKILL of both ranks at 100 random moments of saving without pause: the newest checkpoint is readable, and
    never older than the last one that was reported as published."""
    interrupted = _kill_during_saving(tmp_path, kills=100, seed=0)
    assert interrupted >= 20, f"only {interrupted} of 100 kills hit a save"


def test_kill_during_saving_quick(tmp_path: Path) -> None:
    """The same with 5 kills, which on a disk that costs no time may all fall between saves."""
    _kill_during_saving(tmp_path, kills=5, seed=1)


def _kill_during_saving(folder: Path, kills: int, seed: int) -> int:
    """Returns how many of the kills hit a save."""
    chance, elements, interrupted = random.Random(seed), 200_000, 0
    for _ in range(kills):
        newest = step_folders(folder)
        first = step_of(newest[0]) + 1 if newest else 1
        (folder / "published.txt").write_text("0")  # by the test, before the ranks start
        processes = start_ranks(save_for_ever, 2, folder, elements, first)
        deadline = time.monotonic() + 60
        while (folder / "published.txt").read_text() == "0" and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        chance.shuffle(processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        published = int((folder / "published.txt").read_text())
        interrupted += any(folder.glob(".tmp-step-*"))
        assert published, "the ranks never saved"
        path = newest_valid(folder)
        assert path == step_folders(folder)[0], "the newest one is unreadable"
        assert step_of(path) >= published
        expect_whole(path, elements)
    return interrupted


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", ["weights", "optimizer", "generators", "index", "state", "MANIFEST"])
def test_damage_is_named_and_the_one_before_is_used(
    file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped bit, a cut or a missing file, in any file of the newest checkpoint."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    (victim,) = (tmp_path / "step-0000000002").glob(f"{file}*")
    content = victim.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif damage == "truncate":
        victim.write_bytes(content[:-7])
    else:
        victim.unlink()
    assert newest_valid(tmp_path) == tmp_path / "step-0000000001"
    warning = capsys.readouterr().err
    assert victim.name in warning and "step-0000000002" in warning and warning.count("\n") == 1
    with pytest.raises(DamagedError, match=victim.name):
        validate(tmp_path / "step-0000000002")


def test_every_bit_counts(tmp_path: Path) -> None:
    """20 random bits in each file, one at a time: all are found."""
    save(tmp_path, 1, elements=100)
    chance = random.Random(0)
    for file in sorted((tmp_path / "step-0000000001").iterdir()):
        content = bytearray(file.read_bytes())
        for _ in range(20):
            bit = chance.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            with pytest.raises(DamagedError):
                validate(file.parent)
            content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    validate(tmp_path / "step-0000000001")


def test_a_rank_that_looks_alone_reads_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`validate` shares nothing out: each rank that opens weights finds the damage, in whichever file it is."""
    save(tmp_path, 1)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for file in sorted((tmp_path / "step-0000000001").iterdir()):
            content = file.read_bytes()
            file.write_bytes(content[:-1])
            with pytest.raises(DamagedError, match=file.name):
                validate(file.parent)
            file.write_bytes(content)


def test_an_unreadable_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector under the newest checkpoint costs an interval, not the run."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = find.crc32c

    def failing(path: Path) -> str:
        if "step-0000000002" in str(path) and path.name.startswith("weights"):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(find, "crc32c", failing)
    monkeypatch.setattr(find.time, "sleep", lambda _: None)
    assert newest_valid(tmp_path) == tmp_path / "step-0000000001"


def test_a_read_that_fails_for_now_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is away, or does not know who asks: tried again, then an error that may pass, not the step before."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    real, left, numbers, waits = find.crc32c, [0], [], []

    def failing(path: Path) -> str:
        if left[0] and path.name.startswith("weights"):
            left[0] -= 1
            raise OSError(numbers[-1], os.strerror(numbers[-1]))
        return real(path)

    monkeypatch.setattr(find, "crc32c", failing)
    monkeypatch.setattr(find.time, "sleep", waits.append)
    for number in (errno.ETIMEDOUT, errno.ESTALE, errno.EIO):
        left[0] = 4
        numbers.append(number)
        assert newest_valid(tmp_path) == tmp_path / "step-0000000002" and left == [0]
    for number in (errno.ETIMEDOUT, errno.EACCES):
        left[0] = 1000
        numbers.append(number)
        for look in (lambda: newest_valid(tmp_path), lambda: validate(tmp_path / "step-0000000002")):
            with pytest.raises(
                StorageError, match=f"weights-0.*for now .{os.strerror(number)}.*is no damage; the same"
            ):
                look()
    assert waits == [0.5, 2.0, 8.0, 20.0] * 5  # and not where a right is missing


def read_while_one_rank_cannot(folder: Path) -> str:
    """Rank 1 has lost its mount of the disk."""
    ranks.start(60)
    find.RETRY_AFTER_S = ()
    if ranks.rank() == 1:

        def away(path: Path) -> list:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        find.read_manifest = away
    try:
        return str(newest_valid(folder))
    except StorageError as error:
        return str(error)


def test_what_one_rank_cannot_read_for_now_sets_nothing_aside(tmp_path: Path) -> None:
    """All ranks hear of it, and end alike."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    told = f"{tmp_path}/step-0000000002/MANIFEST.json: rank 1 cannot read it for now (Stale file handle), which is no "
    for answer in run_ranks(read_while_one_rank_cannot, 2, tmp_path):
        assert answer.startswith(told)


def test_an_average_is_a_third_kind_that_may_be_missing(tmp_path: Path) -> None:
    """It has files of its own and is read like weights; checkpoints without one, the earliest included, have none."""
    (weights,), (average,) = slices_of(1, 0, 1, 100), slices_of(5, 0, 1, 100)
    assert save_checkpoint(tmp_path, 1, [weights], [], {"cpu": torch.get_rng_state()}, {}, [average])
    path = tmp_path / "step-0000000001"
    assert (path / "average-00000-of-00001.safetensors").is_file()
    assert torch.equal(CheckpointReader(path).tensor("weight", "average"), average.values)
    validate(path)
    save(tmp_path, 2)
    path = tmp_path / "step-0000000002"
    assert not list(path.glob("average*")) and CheckpointReader(path).shapes("average") == {}
    index = json.loads((path / "index.json").read_text())
    del index["average"]
    (path / "index.json").write_text(json.dumps(index))
    reader = CheckpointReader(path)
    assert reader.shapes("average") == {} and reader.shapes() == {"weight": (1000,)}
    with pytest.raises(UserError, match="average tensors missing"):
        check_names(reader, ["weight"], "average")


def test_a_checkpoint_is_found_by_its_run_or_by_its_folder(tmp_path: Path) -> None:
    """A run's folder means its newest valid one; a folder named outright must itself be undamaged."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        find_checkpoint(tmp_path)
    save(folder, 1)
    save(folder, 2)
    assert find_checkpoint(tmp_path) == find_checkpoint(folder / "step-0000000002") == folder / "step-0000000002"
    (folder / "step-0000000002" / "state.json").write_text("{}")
    assert find_checkpoint(tmp_path) == find_checkpoint(folder / "step-0000000001") == folder / "step-0000000001"
    with pytest.raises(DamagedError, match="step-0000000002: state.json has"):
        find_checkpoint(folder / "step-0000000002")


def test_none_valid_is_no_silent_fresh_start(tmp_path: Path) -> None:
    """All checkpoints damaged: an error, not a new run over the old one."""
    save(tmp_path, 1)
    (tmp_path / "step-0000000001" / "state.json").unlink()
    with pytest.raises(DamagedError, match="none of the 1 checkpoints is valid"):
        newest_valid(tmp_path)


def test_missing_and_overlapping_slices_are_refused(tmp_path: Path) -> None:
    """Slices that do not tile a tensor exactly are refused before anything is read."""
    save(tmp_path, 1)
    path = tmp_path / "step-0000000001"
    index = json.loads((path / "index.json").read_text())
    for change in (500, 1500):
        index["weights"]["weight"]["slices"][0][1] = change
        (path / "index.json").write_text(json.dumps(index))
        with pytest.raises(DamagedError, match="slices end at"):
            CheckpointReader(path)


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    """A tensor of another shape or name is the user's mistake, told by name."""
    save(tmp_path, 1)
    reader = CheckpointReader(tmp_path / "step-0000000001")
    with pytest.raises(UserError, match=r"weight has shape \(1000,\), expected \(10, 100\)"):
        reader.read_into(Slice("weight", (10, 100), 0, torch.empty(5)))
    with pytest.raises(UserError, match="bias"):
        check_names(reader, ["weight", "bias"])


def fill_the_disk(folder: Path, later: bool) -> list[bool]:
    """Rank 1 may write files of 1 kB at most, as if its disk were full."""
    import signal

    ranks.start(60)
    copies = HostCopies() if later else None
    outcomes = [save(folder, 1, copies=copies)]
    if ranks.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    outcomes.append(save(folder, 2, copies=copies))
    if ranks.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [*outcomes, save(folder, 3, copies=copies)]


@pytest.mark.parametrize("later", [False, True])
def test_full_disk_on_one_rank(later: bool, tmp_path: Path) -> None:
    """A rank that cannot write: nobody publishes, the earlier checkpoint stays, the next save works."""
    assert run_ranks(fill_the_disk, 2, tmp_path, later) == [[True, False, True]] * 2
    assert [path.name for path in step_folders(tmp_path)] == ["step-0000000003", "step-0000000001"]
    assert not list(tmp_path.glob(".tmp-*"))
    expect_whole(newest_valid(tmp_path) or tmp_path)


MANY_TYPES = {
    "b": torch.arange(3.0),
    "a": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.arange(7, dtype=torch.uint8),
    'é "\n': torch.arange(3),
    "d": torch.ones(2, 3, dtype=torch.float64),
    "h": torch.ones(1, dtype=torch.float16),
    "scalar": torch.tensor(2.0),
    "B": torch.arange(6.0)[::2],
}


@pytest.mark.parametrize("names", ["", "b", "b a", "bacdh", [*MANY_TYPES]])
def test_files_are_those_of_safetensors(names: Any, tmp_path: Path) -> None:
    """Byte for byte, whatever types, names and shapes, also when the copy is taken again and larger than a piece."""
    tensors = {name: MANY_TYPES[name].contiguous() for name in MANY_TYPES if name in names}
    tensors |= {"large": torch.arange(3_000_001.0)} if len(names) > 1 else {}
    copy = behind.FileCopy({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert copy.fits(tensors) and not copy.fits({"other": torch.ones(1)})
    copy.take({name: MANY_TYPES.get(name, tensor) for name, tensor in tensors.items()})
    copy.write(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, random states and state change while the writer waits; the memory of copies is taken once."""
    go, real = threading.Event(), write._sealed
    monkeypatch.setattr(write, "_sealed", lambda path: go.wait(60) and real(path))
    copies, memory = HostCopies(), []
    for step in (1, 2):
        go.clear()
        (weights,) = slices_of(step, 0, 1, 1000)
        moments = [Slice("exp_avg/weight", (1000,), 0, weights.values.clone())]
        generators, state = (
            {"cpu": torch.full((16,), step, dtype=torch.uint8)},
            {"step": step, "metrics": {"top1": 0.5}},
        )
        under_way = Save(tmp_path, step, [weights], moments, generators, state, copies=copies)
        assert not under_way.done
        for tensor in (weights.values, moments[0].values, generators["cpu"]):
            tensor.fill_(77)
        state["step"] = 77
        state["metrics"].clear()
        go.set()
        assert under_way.finish() and under_way.done
        path = tmp_path / f"step-{step:010d}"
        expect_whole(path)
        validate(path)
        assert read_state(path)["metrics"] == {"top1": 0.5}
        assert CheckpointReader(path).generators(0)["cpu"].tolist() == [step] * 16
        memory.append([copy._bytes.data_ptr() for copy in copies._kept.values()])
    assert memory[0] == memory[1]


def test_no_memory_for_the_copy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the bytes and the way out. The files are written at once; where there is not even room for one, not saved,
    and the training goes on.
    """

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't allocate memory\n at somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(behind.torch, "empty", full)
        assert not save(tmp_path, 1, copies=HostCopies())
    told = capsys.readouterr().err
    assert "NOT SAVED at step 1: rank 0" in told and "checkpoint.behind=false" in told and told.count("\n") == 2
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(behind, "free_memory_bytes", lambda: 1000)
    assert save(tmp_path, 1, copies=HostCopies())
    told = capsys.readouterr().err
    assert "0.0 GB of host memory are free" in told and "written while training waits" in told


def test_training_waits_neither_for_rows_nor_for_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the index go to rank 0 as bytes; the logs come to the disk in the thread that publishes, before anybody
    sees the checkpoint. The index is what it was: sorted, each tensor in one call of the encoder."""
    sent, synced = [], []
    monkeypatch.setattr(write.agreement, "to_main", lambda value: sent.append(type(value)) or [value])
    values = {name: torch.arange(6.0) for name in ("b", "a", 'é "')}
    weights = [Slice(name, (2, 3), 0, value) for name, value in values.items()]

    def before() -> None:
        synced.append((threading.current_thread() is threading.main_thread(), step_folders(tmp_path)))

    under_way = Save(tmp_path, 1, weights, [], {}, {}, copies=HostCopies(), before_published=before)
    assert under_way.finish() and synced == [(False, [])] and sent == [bytes]
    text = (tmp_path / "step-0000000001" / "index.json").read_text()
    file = "weights-00000-of-00001.safetensors"
    entry = {"shape": [2, 3], "slices": [[0, 6, file]]}
    expected = {"weights": dict.fromkeys(sorted(values), entry), "optimizer": {}, "average": {}}
    assert json.loads(text) == expected and list(json.loads(text)["weights"]) == sorted(values)
    assert len(text.splitlines()) == 1 + len(values)


def test_a_fault_of_ours_in_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither lost nor called a full disk."""
    monkeypatch.setattr(write, "_sealed", lambda path: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        save(tmp_path, 1, copies=HostCopies())
    monkeypatch.undo()
    assert save(tmp_path, 1)


def test_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep_last, pinned steps and the best one stay; incomplete folders do not count. Each score is read once."""
    for step, score in [(10, 0.1), (20, 0.9), (30, 0.9), (40, 0.3), (50, None), (60, 0.2)]:
        weights = slices_of(step, 0, 1, 10)
        metrics = {} if score is None else {"val/top1": score}
        save_checkpoint(tmp_path, step, weights, [], {"cpu": torch.get_rng_state()}, {"metrics": metrics})
    (tmp_path / ".tmp-step-0000000070").mkdir()
    apply_retention(tmp_path, keep_last=2, keep_every_steps=40, keep_best=True)
    assert [step_of(path) for path in step_folders(tmp_path)] == [60, 50, 40, 20]
    assert not list(tmp_path.glob(".trash-*"))
    seen: list[int] = []
    monkeypatch.setattr(retention, "read_state", lambda path: seen.append(step_of(path)) or read_state(path))
    apply_retention(tmp_path, keep_last=2, keep_every_steps=40, keep_best=True)
    assert seen == []
    weights, state = slices_of(60, 0, 1, 10), {"metrics": {"val/top1": 0.95}}
    save_checkpoint(tmp_path, 60, weights, [], {"cpu": torch.get_rng_state()}, state)
    apply_retention(tmp_path, keep_last=1, keep_every_steps=40, keep_best=True)
    assert [step_of(path) for path in step_folders(tmp_path)] == [60, 40] and seen == [60]  # which is another now


def test_a_killed_save_is_cleaned_up(tmp_path: Path) -> None:
    """What a killed save left is removed by the next one, which may have the same step."""
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-0000000001", tmp_path / ".tmp-step-0000000002")
    (tmp_path / "step-0000000001" / "state.json").unlink()
    assert save(tmp_path, 1) and save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-0000000001", "step-0000000002"]
    expect_whole(tmp_path / "step-0000000001")


def test_no_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    """Every file is JSON or safetensors."""
    save(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "step-0000000001").iterdir()} == {".json", ".safetensors"}


def no_listing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on this folder cannot be listed, by whatever function."""
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def failing(path: Any = ".", real: Any = real) -> Any:
            if str(path) == str(folder):
                raise OSError(5, "Input/output error", str(path))
            return real(path)

        monkeypatch.setattr(os, name, failing)


def test_a_listing_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a save, before one, and when a failed save tells the newest one; at a start it is no fresh start."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        no_listing(patch, tmp_path)
        apply_retention(tmp_path, keep_last=2, keep_every_steps=0, keep_best=True)
        assert "old checkpoints could not be looked for" in capsys.readouterr().err
        assert save(tmp_path, 2)
        log.sync(tmp_path)
        assert "may not be on the disk yet" in capsys.readouterr().err
        patch.setattr(write, "write_text", fail)
        assert not save(tmp_path, 3)
        assert "NOT SAVED at step 3" in (told := capsys.readouterr().err) and "checkpoint: not known" in told
        with pytest.raises(StorageError, match="cannot be listed"):
            newest_valid(tmp_path)
    expect_whole(newest_valid(tmp_path) or tmp_path)
    assert newest_valid(tmp_path / "none") is None


def fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


LINKED = ["weights-00000-of-00001.safetensors", "generators-00000.safetensors", "index.json", "state.json"]


@pytest.mark.parametrize("kind", ["link", "link inside", "pipe", "folder"])
@pytest.mark.parametrize("name", [*LINKED, "MANIFEST.json"])
def test_what_is_no_file_of_the_checkpoint_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    """A link, even to the same bytes, a pipe or a folder in a file's place: named, and nothing waits for it."""
    save(tmp_path, 1)
    path = tmp_path / "step-0000000001" / name
    outside = path.with_name("moved") if kind == "link inside" else tmp_path / "outside"
    path.rename(outside)
    {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda path: path.symlink_to(outside))(path)
    with pytest.raises(DamagedError, match=f"{name} is (a link|not a file)"):
        validate(path.parent)
    if name.endswith(".json"):
        with pytest.raises(DamagedError, match=f"{name} is (a link|not a file)"):
            read_state(path.parent) if name == "state.json" else CheckpointReader(path.parent)
            find.read_manifest(path.parent)
    elif name.startswith("weights"):
        with pytest.raises(DamagedError, match=f"{name} is (a link|not a file)"):
            CheckpointReader(path.parent).tensor("weight")


def test_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    """In the manifest and in the index, although the checksums are right; what is not listed is not read."""
    save(tmp_path, 1)
    path = tmp_path / "step-0000000001"
    (path / "evil.pkl").write_bytes(b"not read")
    validate(path)
    index = json.loads((path / "index.json").read_text())
    shutil.copy(path / "weights-00000-of-00001.safetensors", tmp_path / "outside")
    index["weights"]["weight"]["slices"][0][2] = "../outside"
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedError, match="'../outside' is not the name of a file in it"):
        CheckpointReader(path).tensor("weight")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][0]["path"] = "../outside"
    del manifest["crc32c"]
    (path / "MANIFEST.json").write_text(manifest_text(manifest))
    with pytest.raises(DamagedError, match="'../outside' is not the name of a file in it"):
        validate(path)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("state.json", "[]", "expected an object"),
        ("state.json", "[" * 200_000, "nested"),
        ("state.json", "nonsense", "is not JSON"),
        ("index.json", '{"weights": []}', "weights: is"),
        ("index.json", '{"weights": {"weight": {"shape": [2.0], "slices": []}}, "optimizer": {}}', "expected"),
        ("index.json", '{"weights": {"weight": {"shape": [-1], "slices": []}}, "optimizer": {}}', "expected"),
        (
            "index.json",
            '{"weights": {"weight": {"shape": [1], "slices": [[0, true, 3]]}}, "optimizer": {}}',
            "expected",
        ),
        ("index.json", '{"weights": {"weight": null}, "optimizer": {}}', "expected"),
        ("MANIFEST.json", "{}", "MANIFEST.json cannot be used"),
        ("MANIFEST.json", '{"files": 1e400, "crc32c": 3}', "MANIFEST.json cannot be used"),
        ("MANIFEST.json", "[" * 200_000, "nested"),
    ],
)
def test_json_of_another_kind_is_one_line(file: str, text: str, told: str, tmp_path: Path) -> None:
    """Types and nesting are checked where the file is read: one line, which names it."""
    save(tmp_path, 1)
    path = tmp_path / "step-0000000001"
    (path / file).write_text(text)
    reader = {"state.json": read_state, "index.json": CheckpointReader, "MANIFEST.json": validate}[file]
    with pytest.raises(UserError, match=told) as caught:
        reader(path)
    assert file in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_types_in_a_signed_manifest(tmp_path: Path) -> None:
    """Whoever writes a manifest can give it the right checksum: the types of its entries are checked all the same."""
    save(tmp_path, 1)
    path = tmp_path / "step-0000000001"
    good = {key: value for key, value in json.loads((path / "MANIFEST.json").read_text()).items() if key != "crc32c"}
    for change in ({"files": None}, {"files": [3]}, {"files": [{"path": 1}]}, {"version": True}, {"format": ["x"]}):
        (path / "MANIFEST.json").write_text(manifest_text({**good, **change}))
        with pytest.raises(DamagedError, match="MANIFEST.json cannot be used"):
            validate(path)


@pytest.mark.parametrize("name", [".tmp-step-0000000002", ".trash-step-0000000001", ".old-step-0000000002"])
@pytest.mark.parametrize("kind", ["link", "dead link", "file", "folder"])
def test_whatever_is_in_the_way_of_a_save_is_removed(kind: str, name: str, tmp_path: Path) -> None:
    """A link, never what it leads to; a file; a folder with files in it."""
    folder, target = tmp_path / "checkpoints", tmp_path / "target"
    target.mkdir()
    (target / "kept.txt").write_text("kept")
    save(folder, 1)
    save(folder, 2)
    if kind == "file":
        (folder / name).write_text("x")
    elif kind == "folder":
        shutil.copytree(target, folder / name)
    else:
        (folder / name).symlink_to(target if kind == "link" else tmp_path / "nowhere")
    assert save(folder, 2)
    apply_retention(folder, keep_last=1, keep_every_steps=0, keep_best=False)
    assert os.listdir(folder) == ["step-0000000002"] and os.listdir(target) == ["kept.txt"]
    expect_whole(folder / "step-0000000002")


def test_retention_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """An old step that somebody keeps elsewhere and linked."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2, 3):
        save(folder, step)
    (folder / "step-0000000001").rename(elsewhere)
    (folder / "step-0000000001").symlink_to(elsewhere)
    apply_retention(folder, keep_last=2, keep_every_steps=0, keep_best=False)
    assert sorted(os.listdir(folder)) == ["step-0000000002", "step-0000000003"]
    assert (elsewhere / "MANIFEST.json").is_file()


def test_a_step_that_is_being_replaced_counts(tmp_path: Path) -> None:
    """Dead between the two renames: the old one is found, read and resumed from, and the next save puts it back."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-0000000002").rename(tmp_path / ".old-step-0000000002")
    shutil.copytree(tmp_path / "step-0000000001", tmp_path / ".tmp-step-0000000002")
    found = newest_valid(tmp_path)
    assert found == tmp_path / ".old-step-0000000002"
    expect_whole(found)
    find.set_aside_newer(found)
    assert save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == [f"step-000000000{step}" for step in (1, 2, 3)]
    expect_whole(tmp_path / "step-0000000002")
    (tmp_path / "step-0000000002").rename(tmp_path / ".old-step-0000000002")
    shutil.copytree(tmp_path / ".old-step-0000000002", tmp_path / "step-0000000002")
    assert [step_of(path) for path in step_folders(tmp_path)] == [3, 2, 1]


def test_what_was_being_replaced_does_not_come_back_ahead_of_the_run(tmp_path: Path) -> None:
    """Killed behind the second rename, and the new one is damaged: the run goes on from before both."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "step-0000000002", tmp_path / ".old-step-0000000002")
    (tmp_path / "step-0000000002" / "state.json").write_text("{}")
    found = newest_valid(tmp_path)
    assert found == tmp_path / "step-0000000001"
    find.set_aside_newer(found)
    assert step_folders(tmp_path) == [found] and save(tmp_path, 1)
    assert step_folders(tmp_path) == [found]


def test_a_step_that_cannot_be_replaced_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename of the new one fails: the old one is where it was."""
    save(tmp_path, 1)
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if source.name == ".tmp-step-0000000001":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert not save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-0000000001"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, synced: list[str]) -> None:
    """Each file and the list of them, then the rename, then that: after a power cut the name tells the truth."""
    save(tmp_path / "run", 1)
    at = synced.index("now step-0000000001")
    files = set(os.listdir(tmp_path / "run" / "step-0000000001")) - {"MANIFEST.json"}
    assert {*files, ".tmp-MANIFEST.json", ".tmp-step-0000000001"} <= set(synced[:at])
    assert synced[at + 1 :] == ["run"]


def vanishing(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A training deletes the newest checkpoint while its files are being read, and has saved the next one before."""
    real, left = find.crc32c, [times]

    def reading(path: Path) -> str:
        if left[0] and path.name.startswith("weights"):
            left[0] -= 1
            newest = step_of(step_folders(folder)[0])
            save(folder, newest + 1)
            apply_retention(folder, keep_last=1, keep_every_steps=0, keep_best=False)
        return real(path)

    monkeypatch.setattr(find, "crc32c", reading)


def test_the_next_newest_is_taken_when_the_chosen_one_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it is being checked or read; no warning of damage. A step named outright is told to be gone."""
    save(tmp_path, 1)
    vanishing(tmp_path, monkeypatch, times=3)
    assert newest_valid(tmp_path) == tmp_path / "step-0000000004"
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    taken = []

    def read(path: Path) -> dict:
        taken.append(step_of(path))
        if len(taken) < 3:
            save(tmp_path, taken[-1] + 1)
            apply_retention(tmp_path, keep_last=1, keep_every_steps=0, keep_best=False)
        return read_state(path)

    assert find.read_newest(tmp_path, read)["step"] == 6 and taken == [4, 5, 6]
    vanishing(tmp_path, monkeypatch, times=1)
    with pytest.raises(StorageError, match="was deleted while it was read"):
        validate(tmp_path / "step-0000000006")
    vanishing(tmp_path, monkeypatch, times=1000)
    with pytest.raises(StorageError, match="deleted faster than they can be read; raise checkpoint.keep_last"):
        newest_valid(tmp_path)


def test_a_step_replaced_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved again in the meantime, with other bytes: it is looked at again."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    real, replaced = find.crc32c, []

    def reading(path: Path) -> str:
        if not replaced:
            replaced.append(save(tmp_path, 2, elements=2000))
        return real(path)

    monkeypatch.setattr(find, "crc32c", reading)
    assert newest_valid(tmp_path) == tmp_path / "step-0000000002"
    assert replaced == [True] and capsys.readouterr().err == ""


def test_each_file_of_many_ranks_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer ranks a tensor lies in more files than may be open: they are read one after the other, not the tensors.

    Also pieces from the midst of files; one rank has checked the index for all.
    """
    world, opened, real = 90, [], read.safe_open
    names = [f"weights-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)]
    for rank, name in enumerate(names):
        save_file({key: torch.arange(4.0) + 4 * rank for key in "abc"}, tmp_path / name)
    slices = [[4 * rank, 4, name] for rank, name in enumerate(names)]
    entries = {key: {"shape": [4 * world], "slices": slices} for key in "abc"}
    (tmp_path / "index.json").write_text(json.dumps({"weights": entries, "optimizer": {}}))
    monkeypatch.setattr(read, "safe_open", lambda path, **named: opened.append(path.name) or real(path, **named))
    parts = [Slice(key, (4 * world,), 7, torch.empty(4 * world - 9)) for key in "abc"]
    CheckpointReader(tmp_path).read_into(*parts)
    assert all(torch.equal(part.values, torch.arange(7.0, 4 * world - 2)) for part in parts)
    assert opened == names[1:]
    entries["a"]["slices"] = slices[1:]
    (tmp_path / "index.json").write_text(json.dumps({"weights": entries, "optimizer": {}}))
    with pytest.raises(DamagedError, match="slices end at 0, the next one starts at 4"):
        CheckpointReader(tmp_path)
    CheckpointReader(tmp_path, checked=True)


def test_an_index_of_hundreds_of_ranks_is_read(tmp_path: Path) -> None:
    """ZeRO-3 has a slice of every tensor on every rank: more values than any other JSON file may hold."""
    slices = ",".join(f'[{number},1,"weights-{number:05d}-of-00800.safetensors"]' for number in range(800))
    entries = ",".join(f'"block{number}":{{"shape":[800],"slices":[{slices}]}}' for number in range(1000))
    (tmp_path / "index.json").write_text(f'{{"weights":{{{entries}}},"optimizer":{{}}}}')
    assert len(CheckpointReader(tmp_path).shapes()) == 1000
