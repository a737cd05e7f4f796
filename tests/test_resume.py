"""A run that is killed, stopped or moved to other ranks is the same run. Real kills of real training processes."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks, start_ranks
from scores import classification_scores
from tiny import changed, make_shards, tiny_config
from torch._inductor.async_compile import get_compile_threads
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pretrain import storage
from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_folders, step_of
from pretrain.checkpoint.read import CheckpointReader, read_state
from pretrain.cluster import monitor
from pretrain.cluster.ranks import rank as own_rank
from pretrain.config import Config, load_config
from pretrain.data import loader, reader
from pretrain.data.images import to_float
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.engine import compiling
from pretrain.engine.compiling import keep_compiled
from pretrain.errors import ConfigError, NonFiniteError, StorageError, UserError
from pretrain.train import run
from pretrain.train.resuming import refuse_changes
from pretrain.train.run import train

LAYOUTS = [("fp32", 1), ("bf16", 1), ("bf16", 3)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def long_run(shards: Path, output: Path, precision: str, stage: int) -> Config:
    """40 steps with dropout and drop path, so that random states count, and a loader process."""
    changes: dict[str, Any] = {"engine__precision": precision, "engine__zero_stage": stage}
    random_model = {"model__dropout": 0.1, "model__drop_path": 0.2, "data__workers": 1}
    every = {"checkpoint__every_steps": 4, "log__every_steps": 3, "total_steps": 40}
    return tiny_config(shards, output, **changes, **random_model, **every)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished `long_run` in fp32 on two ranks, that disturbed ones are compared with."""
    config = long_run(shards, tmp_path_factory.mktemp("undisturbed"), "fp32", 1)
    run_ranks(finish, 2, config)
    return config


def finish(config: Config) -> None:
    train(config)


def expect_same_run(config: Config, other: Config) -> None:
    """Asserts that the final weights, moments, random states and sample logs of two finished runs are bit-identical."""
    ours, theirs = config.output / config.name, other.output / other.name
    for folder in (ours, theirs):
        assert json.loads((folder / "DONE").read_text())["step"] == config.total_steps
    first, second = (newest_valid(folder / "checkpoints") for folder in (ours, theirs))
    assert first and second and first.name == second.name
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    logs = sorted(path.name for path in ours.glob("samples-*.jsonl"))
    assert logs == sorted(path.name for path in theirs.glob("samples-*.jsonl")) and logs
    for name in logs:
        rows = (ours / name).read_text()
        assert rows == (theirs / name).read_text(), name
        assert [json.loads(row)["step"] for row in rows.splitlines()] == list(range(1, config.total_steps + 1))
    assert _losses(ours) == pytest.approx(_losses(theirs), rel=1e-12)


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def steps_logged(config: Config) -> int:
    path = config.output / config.name / "samples-00000.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(config: Config, processes: list[Any], steps: int) -> None:
    deadline = time.monotonic() + 120
    while steps_logged(config) < steps and any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("precision", "stage"), LAYOUTS)
def test_kill_9_at_random_steps_5_of_5(precision: str, stage: int, shards: Path, tmp_path: Path) -> None:
    """Both ranks killed at 5 random moments, the same run started again each time: the end is bit-identical."""
    _kill_at_random_steps(shards, tmp_path, precision, stage, kills=5, seed=stage)


def test_kill_9_at_a_random_step(shards: Path, tmp_path: Path) -> None:
    """The same with one kill."""
    _kill_at_random_steps(shards, tmp_path, "bf16", 1, kills=1, seed=9)


def test_kill_9_with_averages_and_bf16_momenta(shards: Path, tmp_path: Path) -> None:
    """The same with a Polyak average that is validated on the way, a momentum in bf16, and the order lanes."""
    optim = {"name": "lion", "lr": 1e-3, "betas": [0.9, 0.99], "moment_dtype": "bf16", "average_decay": 0.9}
    changes = {"optim": optim, "data__held_out": 23, "evaluation__every_steps": 6, "data__order": "lanes"}
    _kill_at_random_steps(shards, tmp_path, "bf16", 1, kills=1, seed=4, changes=changes)


def _kill_at_random_steps(
    shards: Path,
    tmp_path: Path,
    precision: str,
    stage: int,
    kills: int,
    seed: int,
    changes: dict[str, Any] | None = None,
) -> None:
    undisturbed = changed(long_run(shards, tmp_path / "undisturbed", precision, stage), **(changes or {}))
    run_ranks(finish, 2, undisturbed)
    killed = changed(long_run(shards, tmp_path / "killed", precision, stage), **(changes or {}))
    chance = random.Random(seed)
    for step in sorted(chance.sample(range(2, 32), kills)):
        processes = start_ranks(train, 2, killed)
        wait_for_steps(killed, processes, step)
        time.sleep(chance.uniform(0, 0.03))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        assert not (killed.output / killed.name / "DONE").exists(), "killed too late"
    run_ranks(finish, 2, killed)
    expect_same_run(killed, undisturbed)


@pytest.mark.parametrize(
    ("ranks", "order"),
    [
        (1, "lanes"),
        (3, "permuted"),
        pytest.param(1, "permuted", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(3, "lanes", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_another_number_of_ranks_sees_the_same_global_batches(
    ranks: int, order: str, shards: Path, tmp_path: Path
) -> None:
    """2 ranks, then 1 or 3: the samples of every step, in order, and the loss of every log line are the same, that of
    the steps around the stop too.
    """
    options: dict[str, Any] = {"checkpoint__every_steps": 8, "log__every_steps": 5, "data__order": order}
    whole = tiny_config(shards, tmp_path / "whole", **options)
    run_ranks(finish, 2, whole)
    moved = tiny_config(shards, tmp_path / "moved", **options)
    _stop_after(moved, 2, step=6)
    run_ranks(finish, ranks, changed(moved, engine__zero_stage=3, engine__max_micro_batch_size=3))
    assert _global_samples(moved) == _global_samples(whole)
    assert _losses(moved.output / "tiny") == pytest.approx(_losses(whole.output / "tiny"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["lanes", pytest.param("permuted", marks=pytest.mark.long)])
def test_kill_9_and_another_number_of_ranks(order: str, shards: Path, tmp_path: Path) -> None:
    """Killed on 2 ranks at a random step, then on 3: each step's samples are those of one undisturbed rank."""
    whole = tiny_config(shards, tmp_path / "whole", data__order=order, total_steps=40)
    run_ranks(finish, 1, whole)
    killed = changed(whole, output=str(tmp_path / "killed"))
    for ranks, step in ((2, 7), (3, random.Random(0).randrange(12, 25))):
        processes = start_ranks(train, ranks, killed)
        wait_for_steps(killed, processes, step)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    assert not (killed.output / "tiny" / "DONE").exists(), "killed too late"
    run_ranks(finish, 1, killed)
    # The logs of ranks that the last start no longer has were rewound to its checkpoint.
    assert _global_samples(killed) == _global_samples(whole)
    assert len(_global_samples(whole)) == 40


def _stop_after(config: Config, ranks: int, step: int, number: int = signal.SIGTERM, to_rank: int = 1) -> int:
    """Starts a run, asks one rank to stop after `step` steps, and returns the step at which all stopped."""
    processes = start_ranks(train, ranks, config)
    try:
        wait_for_steps(config, processes, step)
        os.kill(processes[to_rank].pid, number)
        for process in processes:
            error, _ = process.results.recv() if process.results.poll(60) else ("timeout", None)
            assert error is None, error
    finally:
        for process in processes:
            process.kill()
            process.join()
    return steps_logged(config)


def _global_samples(config: Config) -> dict[int, list]:
    """The (epoch, index) pairs of each step, in slot order: ranks hold consecutive runs of slots."""
    steps: dict[int, list] = {}
    for path in sorted((config.output / config.name).glob("samples-*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(row["step"], []).extend(row["samples"])
    return {step: sorted(samples) for step, samples in steps.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_all_after_a_save(
    number: int, undisturbed: Config, shards: Path, tmp_path: Path
) -> None:
    """All ranks stop at the same step, saved, without DONE; the next start ends with the undisturbed run's weights."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"signal {number} is ignored here, as SIGHUP under nohup")
    config = long_run(shards, tmp_path / "stopped", "fp32", 1)
    step = _stop_after(config, 2, step=7, number=number)
    folder = config.output / config.name
    assert 7 <= step < 40 and not (folder / "DONE").exists()
    assert step_folders(folder / "checkpoints")[0].name == f"step-{step:010d}"
    run_ranks(finish, 2, config)
    expect_same_run(config, undisturbed)


def test_a_damaged_newest_checkpoint_costs_an_interval_not_the_run(
    undisturbed: Config, shards: Path, tmp_path: Path
) -> None:
    """One bit of the newest checkpoint flips between stop and start: the run goes on from the one before, same end."""
    config = long_run(shards, tmp_path / "damaged", "fp32", 1)
    _stop_after(config, 2, step=13)
    newest = step_folders(config.output / config.name / "checkpoints")[0]
    victim = next(newest.glob("weights-00001*"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    run_ranks(finish, 2, config)
    expect_same_run(config, undisturbed)


def _with_a_broken_disk(config: Config) -> str:
    """Trains; one shard cannot be read any more from some step on."""
    real, calls = os.pread, [0]

    def pread(file: int, num_bytes: int, start: int) -> bytes:
        calls[0] += num_bytes > 8  # less is a row of its index
        if calls[0] > 60 and num_bytes > 8 and own_rank() == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, num_bytes, start)

    reader.RETRY_AFTER_S = (0.0, 0.0)
    os.pread = pread
    try:
        train(config)
    except StorageError as error:
        return str(error)
    return ""


def test_a_failing_disk_costs_no_step(undisturbed: Config, shards: Path, tmp_path: Path) -> None:
    """Shards that cannot be read any more on one rank: saved at the last whole step, 75 on all, the same end."""
    config = changed(long_run(shards, tmp_path / "broken", "fp32", 1), data__workers=0, checkpoint__every_steps=1000)
    told = run_ranks(_with_a_broken_disk, 2, config)
    assert told[0] == told[1] and "cannot be read (Input/output error, 3 times in 0 s)" in told[0]
    folder = config.output / config.name
    step = steps_logged(config)
    assert 5 <= step < 40 and [step_of(path) for path in step_folders(folder / "checkpoints")] == [step]
    assert json.loads((folder / "STOP.json").read_text())["exit_code"] == 75
    shutil.move(shards, away := shards.with_name("away"))
    try:
        assert run_ranks(_storage_error, 1, config)[0].count("an earlier start of this run found its data") == 1
    finally:
        shutil.move(away, shards)
    run_ranks(finish, 2, config)
    expect_same_run(config, undisturbed)


def _with_broken_validation(config: Config) -> str:
    """Trains; the validation set cannot be read on one rank."""
    real = os.pread

    def pread(file: int, num_bytes: int, start: int) -> bytes:
        if num_bytes > 8 and own_rank() == 1 and "/val/" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, num_bytes, start)

    reader.RETRY_AFTER_S = (0.0, 0.0)
    os.pread = pread
    return _storage_error(config)


def test_a_validation_that_cannot_be_read_costs_no_step(shards: Path, tmp_path: Path) -> None:
    """Its step is saved, with the trained weights and the validation still due, and 75 on all; the same end."""
    options: dict[str, Any] = {"data__val": str(make_shards(tmp_path / "val", seed=1)), "data__workers": 0}
    options |= {"evaluation__every_steps": 7, "checkpoint__every_steps": 1000, "optim__average_decay": 0.9}
    config = tiny_config(shards, tmp_path / "broken", total_steps=10, **options)
    whole = changed(config, output=str(tmp_path / "whole"))
    run_ranks(finish, 2, whole)
    assert all("Input/output error" in told for told in run_ranks(_with_broken_validation, 2, config))
    folder = config.output / config.name
    (saved,) = step_folders(folder / "checkpoints")
    assert step_of(saved) == 7 and read_state(saved)["train"]["validation_due"]
    assert json.loads((folder / "STOP.json").read_text())["exit_code"] == 75
    run_ranks(finish, 2, config)
    expect_same_run(config, whole)


def _with_a_stuck_loader(config: Config, at: int) -> None:
    """Trains; on one rank no loader process comes back from a step's samples, as from a disk that hangs."""
    real = loader._TrainSteps.__getitem__

    def read(steps: loader._TrainSteps, step: int) -> loader.Batch:
        if step == at and own_rank() == 1:
            time.sleep(10_000)
        return real(steps, step)

    loader._TrainSteps.__getitem__ = read
    train(config)


@pytest.mark.parametrize("at", [0, 8])
def test_a_stop_is_heard_while_no_data_comes(at: int, undisturbed: Config, shards: Path, tmp_path: Path) -> None:
    """The step whose data all ranks have is taken and saved, soon; the next start goes on behind it."""
    config = changed(long_run(shards, tmp_path / "stuck", "fp32", 1), checkpoint__every_steps=1000)
    processes = start_ranks(_with_a_stuck_loader, 2, config, at)
    try:
        wait_for_steps(config, processes, max(0, at - 1))
        starts = config.output / config.name / "starts.jsonl"
        while not starts.exists() and all(process.is_alive() for process in processes):
            time.sleep(0.01)
        time.sleep(0.5)
        asked = time.monotonic()
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        for process in processes:
            assert process.results.poll(60) and process.results.recv() == (None, None)
        assert time.monotonic() < asked + 25
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [step_of(path) for path in step_folders(config.output / config.name / "checkpoints")] == [at] * (at > 0)
    assert steps_logged(config) == at
    run_ranks(finish, 2, config)
    expect_same_run(config, undisturbed)


def _storage_error(config: Config) -> str:
    try:
        train(config)
    except StorageError as error:
        return str(error)
    return ""


# --- what a resumed run may change -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of one rank that stopped half-way."""
    config = tiny_config(shards, tmp_path_factory.mktemp("stopped"), optim__schedule="rsqrt", total_steps=400)
    _stop_after(config, 1, step=3, to_rank=0)
    return config


def refusal(config: Config) -> str:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optim__lr": 1.0}, "optim.lr: was 0.002, is 1.0"),
        ({"data__global_batch": 13}, "data.global_batch: was 12, is 13"),
        ({"seed": 5}, "seed: was 0, is 5"),
        ({"engine__precision": "bf16"}, "engine.precision: was fp32, is bf16"),
        ({"data__held_out": 3}, "data.held_out: was 0, is 3"),
        ({"data__subset": 3}, "data.subset: was None, is 3"),
        ({"data__repeats": 3}, "data.repeats: was 1, is 3"),
        ({"total_steps": 300}, "total_steps: was 400, is 300"),
        ({"data__order": "lanes"}, "data.order: was 'permuted', is 'lanes'"),
    ],
)
def test_a_changed_config_is_refused_with_the_difference(change: dict, told: str, stopped: Config) -> None:
    """Another recipe is another run: one line names what differs."""
    assert told in run_ranks(refusal, 1, changed(stopped, **change))[0]


def refusal_of_rank_1(config: Config) -> str:
    """Rank 1 alone cannot read the checkpoint as it should."""
    if own_rank() == 1:
        run.refuse_changes = lambda *_: (_ for _ in ()).throw(UserError("state.json: is not JSON"))
    return refusal(config)


def test_what_one_rank_refuses_ends_all(stopped: Config) -> None:
    """With its message: the others would wait for it until engine.timeout_s."""
    assert run_ranks(refusal_of_rank_1, 2, stopped) == ["state.json: is not JSON"] * 2


def test_a_checkpoint_from_before_a_key_was_added_goes_on(stopped: Config, tmp_path: Path) -> None:
    """Its config lacks keys of today: they had their defaults' effect, and are no difference."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped.output / stopped.name, folder)
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    del state["config"]["label_smoothing"], state["config"]["model"]["trunk_width"], state["config"]["data"]["crop"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    refuse_changes(checkpoint, stopped, load_manifest(stopped.data.train))
    with pytest.raises(ConfigError, match="label_smoothing: was 0.0, is 0.1"):
        refuse_changes(checkpoint, changed(stopped, label_smoothing=0.1), load_manifest(stopped.data.train))


def test_other_data_is_refused(stopped: Config, tmp_path: Path) -> None:
    """The same path keys with other shards: the manifest's SHA-256 tells."""
    other = make_shards(tmp_path / "squares", num_samples=60, seed=1)
    assert "manifest_sha256" in run_ranks(refusal, 1, changed(stopped, data__train=str(other)))[0]


def test_other_names_of_the_classes_are_refused(stopped: Config, shards: Path, tmp_path: Path) -> None:
    """In the same data set: a name changed in its place is no part of the manifest."""
    renamed = Path(shutil.copytree(shards, tmp_path / shards.name))
    names = json.loads((renamed / "classes.json").read_text())
    (renamed / "classes.json").write_text(json.dumps([*names[:2], "other", *names[3:]]))
    message = run_ranks(refusal, 1, changed(stopped, data__train=str(renamed)))[0]
    assert "data class 2: was 'shade 2', is 'other'" in message


def test_what_may_change_may_change(stopped: Config, shards: Path, tmp_path: Path) -> None:
    """Intervals, workers, ZeRO stage, micro-batch, the data's place and a longer rsqrt run are no other run."""
    moved = tmp_path / "moved"
    moved.symlink_to(shards)
    newest = newest_valid(stopped.output / "tiny" / "checkpoints")
    assert newest
    changes: dict[str, Any] = {"data__train": str(moved), "data__workers": 2, "engine__zero_stage": 2}
    changes |= {"engine__max_micro_batch_size": 5, "log__every_steps": 1, "checkpoint__every_steps": 1000}
    config = changed(stopped, total_steps=500, **changes)
    before = read_state(newest)["step"]
    assert _stop_after(config, 1, step=before + 2, to_rank=0) >= before + 2


def test_done_is_done(shards: Path, tmp_path: Path) -> None:
    """The same command after the end changes nothing, and says so."""
    config = tiny_config(shards, tmp_path)
    run_ranks(finish, 1, config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    run_ranks(finish, 1, config)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_processes_cannot_train_in_one_folder(shards: Path, tmp_path: Path) -> None:
    """The second one is refused while the first one lives."""
    config = tiny_config(shards, tmp_path, total_steps=100_000)
    (first,) = start_ranks(train, 1, config)
    try:
        wait_for_steps(config, [first], 2)
        assert "another process trains in this folder" in run_ranks(refusal, 1, config)[0]
    finally:
        first.kill()
        first.join()


# --- what ends a run -------------------------------------------------------------------------------------------------


def explode(config: Config) -> tuple[str, int]:
    """A run whose loss is NaN from the 7th step on, on a slow disk."""
    import pretrain.checkpoint.write
    import pretrain.engine.step

    write = pretrain.checkpoint.write._written

    def slowly(*arguments: Any) -> Any:
        time.sleep(1)
        return write(*arguments)

    pretrain.checkpoint.write._written = slowly
    real, calls = pretrain.engine.step.per_image_loss, [0]

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return real(*arguments) * (float("nan") if calls[0] > 6 else 1.0)

    pretrain.engine.step.per_image_loss = poisoned
    try:
        train(config)
    except NonFiniteError as error:
        return str(error), error.exit_code
    return "", 0


@pytest.mark.parametrize("stage", [1, 3])
def test_three_steps_in_a_row_that_are_not_finite_end_the_run(stage: int, shards: Path, tmp_path: Path) -> None:
    """It stops with the step and exit code 77; the checkpoint of step 5, though it was under way, and the skipped
    samples are there."""
    config = tiny_config(shards, tmp_path, engine__zero_stage=stage)
    for message, code in run_ranks(explode, 2, config):
        assert message.startswith("step 9: loss or gradients not finite in 3 steps in a row") and code == 77
    skipped = [json.loads(line) for line in (tmp_path / "tiny" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [7, 8, 9] and all(len(row["indices"]) == 12 for row in skipped)
    path = newest_valid(tmp_path / "tiny" / "checkpoints")
    assert path and path.name == "step-0000000005"
    reader = CheckpointReader(path)
    assert all(bool(reader.tensor(name).isfinite().all()) for name in reader.shapes())


def vanishing_shard(config: Config) -> tuple[str, int]:
    """Rank 1 loses its view of the shards after some steps."""
    import pretrain.data.loader
    from pretrain.cluster import ranks
    from pretrain.errors import StorageError

    real, reads = pretrain.data.loader.read_sample, [0]

    def read(manifest: Any, index: int) -> Any:
        reads[0] += 1
        if ranks.rank() == 1 and reads[0] > 40:
            raise StorageError("the shard is gone")
        return real(manifest, index)

    pretrain.data.loader.read_sample = read
    try:
        train(config)
    except StorageError as error:
        return str(error), error.exit_code
    return "", 0


def test_a_storage_error_of_one_rank_ends_all_with_its_message(shards: Path, tmp_path: Path) -> None:
    """No rank is left in a collective, no exit code is left to chance; the step before that one is saved."""
    config = tiny_config(shards, tmp_path)
    assert run_ranks(vanishing_shard, 2, config) == [("the shard is gone", 75)] * 2
    path = newest_valid(tmp_path / "tiny" / "checkpoints")
    assert path and path.name == "step-0000000006"


def unusable(config: Config, usable: int) -> tuple[str, int]:
    """Trains on images of which only the first `usable` ones that a rank reads can be decoded."""
    import pretrain.data.loader
    from pretrain.data.reader import BadSample
    from pretrain.errors import BadSamplesError

    real, reads = pretrain.data.loader.decode, [0]

    def decode(data: bytes, *told: Any) -> Any:
        reads[0] += 1
        if reads[0] > usable:
            raise BadSample("decode", "not a JPEG, PNG or WebP")
        return real(data, *told)

    pretrain.data.loader.decode = decode
    try:
        train(config)
    except BadSamplesError as error:
        return str(error), error.exit_code
    return "", 0


@pytest.mark.parametrize("usable, step", [(0, 1), (6 * 5 + 1, 7)])
def test_a_step_without_a_usable_image_ends_the_run(usable: int, step: int, shards: Path, tmp_path: Path) -> None:
    """Small sets never reach max_bad_fraction: such a run was DONE with a loss of 0. One image on one rank will do."""
    config = tiny_config(shards, tmp_path)
    for message, code in run_ranks(unusable, 2, config, usable):
        assert message.startswith(f"step {step}: none of its 12 images can be used") and code == 78
    assert not (tmp_path / "tiny" / "DONE").exists()
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12 * step - 2 * usable and {row["reason"] for row in rows} == {"decode"}


def stop_in_validation(config: Config) -> None:
    """Is asked to stop while the last validation runs."""
    import pretrain.evaluation.subject

    real = pretrain.evaluation.subject.eval_batches

    def batches(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*arguments, **options)

    pretrain.evaluation.subject.eval_batches = batches
    train(config)


def test_a_validation_cut_short_is_made_up_for(shards: Path, tmp_path: Path) -> None:
    """SIGTERM during the last validation: no DONE; the next start validates, saves the score, and is done.

    The checkpoint saved then is the undisturbed run's: the averages that were being scored are not left in the weights.
    """
    options: dict[str, Any] = {"data__held_out": 23, "evaluation__every_steps": 20, "optim__average_decay": 0.9}
    config = tiny_config(shards, tmp_path, **options)
    run_ranks(stop_in_validation, 2, config)
    assert not (tmp_path / "tiny" / "DONE").exists()
    undisturbed = changed(config, output=str(tmp_path / "undisturbed"))
    run_ranks(finish, 2, undisturbed)
    folders = [newest_valid(path / "tiny" / "checkpoints") for path in (tmp_path, tmp_path / "undisturbed")]
    assert folders[0] and folders[1] and folders[0].name == folders[1].name
    for path in folders[0].glob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    shutil.rmtree(tmp_path / "undisturbed")
    shutil.copytree(tmp_path, tmp_path / "copy")
    without = changed(config, output=str(tmp_path / "copy"), evaluation__every_steps=0)
    run_ranks(finish, 2, without)
    assert json.loads((tmp_path / "copy" / "tiny" / "DONE").read_text()) == {"step": 20}
    run_ranks(finish, 2, config)
    done = json.loads((tmp_path / "tiny" / "DONE").read_text())
    path = newest_valid(tmp_path / "tiny" / "checkpoints")
    assert path and done["step"] == 20 and done["val/images"] == 23
    assert read_state(path)["metrics"]["val/top1"] == done["val/top1"]


def evaluate_slowly(config: Config) -> None:
    """Trains; by the meter's clock each evaluation takes a thousand seconds."""
    from pretrain.train import loop, meter

    real, later_s = loop.evaluate, [0.0]

    def evaluate(*arguments: Any) -> bool:
        later_s[0] += 1000
        return real(*arguments)

    loop.evaluate = evaluate
    meter.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + later_s[0])  # type: ignore[assignment]
    train(config)


def test_what_a_start_makes_up_for_is_not_in_its_rate(shards: Path, tmp_path: Path) -> None:
    """The report adds up rates: a validation before the first step would be taken for training."""
    options: dict[str, Any] = {"data__held_out": 23, "evaluation__every_steps": 5, "total_steps": 10}
    config = tiny_config(shards, tmp_path, **options)
    run_ranks(stop_in_validation, 1, config)
    run_ranks(evaluate_slowly, 1, config)
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 5, 10, 10]
    assert lines[2]["train/images_per_s"] > 1  # of 60; with the evaluation 0.06


def test_more_ranks_than_samples_in_a_batch_is_refused(shards: Path, tmp_path: Path) -> None:
    """13 slots would be needed: told before anything is built."""
    config = tiny_config(shards, tmp_path, data__global_batch=1)
    told = run_ranks(refusal, 2, config)
    assert "data.global_batch (1) is smaller than the 2 ranks" in told[0] and told[0] == told[1]


def test_init_from_starts_from_the_weights(shards: Path, tmp_path: Path) -> None:
    """init_from: the first loss of the new run is the loss of the trained weights, not of random ones."""
    first = tiny_config(shards, tmp_path / "first", log__every_steps=1, data__flip=0.0, optim__lr=5e-3)
    run_ranks(finish, 2, first)
    source = str(tmp_path / "first" / "tiny")
    second = tiny_config(shards, tmp_path / "second", log__every_steps=1, init_from=source, optim__lr=5e-3)
    run_ranks(finish, 2, second)
    random_start, trained_start = _losses(tmp_path / "first" / "tiny")[1], _losses(tmp_path / "second" / "tiny")[1]
    assert trained_start < 0.8 * random_start
    fresh_head = changed(second, output=str(tmp_path / "third"), init_new_head=True)
    run_ranks(finish, 2, fresh_head)
    assert _losses(tmp_path / "third" / "tiny")[1] == pytest.approx(random_start, rel=1e-3)


def test_batch_norm_without_statistics_to_keep_is_refused(shards: Path, tmp_path: Path) -> None:
    """Statistics are not trained: a model that has some starts from weights, or is refused at the start."""
    config = changed(tiny_config(shards, tmp_path), model={"name": "timm:resnet18", "image_size": 32})
    assert "resnet18 has batch norm (bn1.running_mean" in run_ranks(refusal, 1, config)[0]


@pytest.mark.parametrize(
    ("precision", "stage", "decay"), [("fp32", 1, 0.0), pytest.param("bf16", 3, 0.5, marks=pytest.mark.long)]
)
def test_batch_norm_keeps_the_statistics_of_its_weights(
    precision: str, stage: int, decay: float, shards: Path, tmp_path: Path
) -> None:
    """Bit for bit, also where the model is rounded and after a resume; the same losses on one rank as on two."""
    import timm
    from timm.models import save_for_hf

    from pretrain.models.weights import read_weights

    source = timm.create_model("test_resnet", num_classes=7)
    with torch.no_grad():
        for name, tensor in source.state_dict().items():
            if "running" in name:
                tensor.uniform_(0.5, 1.5)
    source.default_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    save_for_hf(source, tmp_path / "timm", safe_serialization=True)
    layout = {"engine__zero_stage": stage, "engine__precision": precision, "optim__average_decay": decay}
    whole = tiny_config(shards, tmp_path / "whole", init_from=tmp_path / "timm", **layout, log__every_steps=1)
    whole = changed(whole, model={"name": "timm:test_resnet", "image_size": 32})
    run_ranks(finish, 2, whole)
    stopped = changed(whole, output=str(tmp_path / "stopped"))
    _stop_after(stopped, 2, step=4)
    run_ranks(finish, 2, stopped)
    expect_same_run(stopped, whole)
    found, given = (read_weights(path).tensors for path in (whole.output / "tiny", tmp_path / "timm"))
    kept = [name for name in given if "running" in name]
    assert found.keys() == given.keys() and kept
    assert all(torch.equal(found[name].read(), given[name].read()) for name in kept)
    trained = [name for name in given if name.endswith("conv1.weight")]
    assert trained and not any(torch.equal(found[name].read(), given[name].read()) for name in trained)
    if precision == "fp32":
        alone = changed(whole, output=str(tmp_path / "alone"))
        run_ranks(finish, 1, alone)
        assert _losses(alone.output / "tiny") == pytest.approx(_losses(whole.output / "tiny"), rel=1e-5)


# --- averages --------------------------------------------------------------------------------------------------------


def scored(config: Config, kind: str) -> dict[str, float]:
    """Scores the held-out samples with the checkpoint's averages, as load_model reads it, or with its weights."""
    from pretrain.models import load_model
    from pretrain.train.datasets import open_data

    run = config.output / config.name
    model = load_model(run)
    checkpoint = newest_valid(run / "checkpoints")
    assert checkpoint
    reader = CheckpointReader(checkpoint)
    for name, parameter in model.named_parameters():
        if kind == "weights":
            parameter.data.copy_(reader.tensor(name))
        else:
            assert torch.equal(parameter, reader.tensor(name, "average")), name
    data = open_data(config)
    assert data.val is not None
    batches = eval_batches(data.val, data.val_indices, batch_size=16, image_size=16, config=config.data)
    with torch.no_grad():
        scores = classification_scores(
            lambda images: model(to_float(images, torch.float32)),
            batches,
            loss=config.loss,
            device=torch.device("cpu"),
        )
    return {f"val/{score.metric}": score.value for score in scores}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_average_is_what_is_validated_and_loaded(stage: int, shards: Path, tmp_path: Path) -> None:
    """The run's val/loss is that of the weights that load_model returns, which are the averages, not the weights."""
    changes: dict[str, Any] = {"data__held_out": 23, "evaluation__every_steps": 10, "engine__zero_stage": stage}
    config = tiny_config(shards, tmp_path, optim__average_decay=0.95, **changes)
    run_ranks(finish, 2, config)
    done = json.loads((tmp_path / "tiny" / "DONE").read_text())
    of_average, of_weights = (run_ranks(scored, 1, config, kind)[0] for kind in ("average", "weights"))
    assert done["val/loss"] == pytest.approx(of_average["val/loss"], rel=1e-5)
    assert done["val/top1"] == of_average["val/top1"]
    assert abs(of_weights["val/loss"] - of_average["val/loss"]) > 1e-2


# --- branches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trunk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of 20 steps at a constant rate, with averages, dropout and checkpoints at steps 10 and 20."""
    optim = {"lr": 2e-3, "schedule": "constant", "warmup_steps": 3, "weight_decay": 0.1, "average_decay": 0.9}
    options: dict[str, Any] = {"model__dropout": 0.1, "log__every_steps": 1, "checkpoint__every_steps": 10}
    config = tiny_config(shards, tmp_path_factory.mktemp("trunk"), **options)
    config = changed(config, name="trunk", optim=optim)
    run_ranks(finish, 2, config)
    return config


def test_a_branch_that_changes_nothing_is_the_same_run(trunk: Config, tmp_path: Path) -> None:
    """From step 10 on, under another name: weights, moments, averages, random states, samples and losses of step 20."""
    ours = trunk.output / "trunk"
    origin = ours / "checkpoints" / "step-0000000010"
    branch = changed(trunk, name="twig", output=str(tmp_path), branch_from=str(origin))
    run_ranks(finish, 2, branch)
    theirs = tmp_path / "twig"
    assert [path.name for path in step_folders(theirs / "checkpoints")] == ["step-0000000020", "step-0000000010"]
    for step in (20, 10):
        first, second = (folder / "checkpoints" / f"step-{step:010d}" for folder in (ours, theirs))
        names = {path.name for path in first.glob("*.safetensors")}
        assert names == {path.name for path in second.glob("*.safetensors")} and len(names) == 2 * 4
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), (step, name)
    later = {step: loss for step, loss in _losses(ours).items() if step > 10}
    assert _losses(theirs) == later and len(later) == 10
    later_samples = {step: samples for step, samples in _global_samples(trunk).items() if step > 10}
    assert _global_samples(branch) == later_samples


def test_a_branch_cools_down_and_resumes(trunk: Config, tmp_path: Path) -> None:
    """From the newest checkpoint of a run's folder: ten steps whose rate falls from another peak to a tenth; stopped on
    the way, without the other run's folder, the same command ends as the undisturbed branch."""
    ours = trunk.output / "trunk"
    moved = tmp_path / "moved"
    shutil.copytree(ours, moved)
    changes = {"total_steps": 30, "optim__cooldown_steps": 10, "optim__lr": 1e-3, "checkpoint__every_steps": 4}
    whole = changed(trunk, name="cooled", output=str(tmp_path / "whole"), branch_from=str(ours), **changes)
    run_ranks(finish, 2, whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "cooled" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert rates == pytest.approx({21 + i: 1e-3 * (10 - i) / 10 for i in range(10)})
    stopped = changed(whole, output=str(tmp_path / "stopped"), branch_from=str(moved))
    assert _stop_after(stopped, 2, step=3) < 10
    shutil.rmtree(moved)
    run_ranks(finish, 2, stopped)
    first, second = (newest_valid(config.output / "cooled" / "checkpoints") for config in (whole, stopped))
    assert first and second and first.name == second.name == "step-0000000030"
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optim__betas": [0.8, 0.9], "optim__lr": 1.0, "seed": 5}, "(seed: was 0, is 5; optim.betas: was"),
        ({"optim__average_decay": 0.0}, "optim.average_decay: was 0.9, is 0.0"),
        ({"total_steps": 20}, "is at step 20, but total_steps is 20"),
        ({"branch_from": "nowhere"}, "nowhere: has no checkpoint; expected a run's folder"),
    ],
)
def test_a_branch_with_another_recipe_is_refused(change: dict, told: str, trunk: Config, tmp_path: Path) -> None:
    """One line names what differs, or what is missing, before anything is built."""
    branch = changed(trunk, name="twig", output=str(tmp_path), branch_from=str(trunk.output / "trunk"), total_steps=40)
    message = run_ranks(refusal, 1, changed(branch, **change))[0]
    assert told in message and "\n" not in message


def test_a_refused_resume_offers_the_branch_that_would_be_taken(trunk: Config, tmp_path: Path) -> None:
    """For another rate or length, not beside what a branch would be refused for: other classes, another order."""
    (told,) = run_ranks(refusal, 1, changed(trunk, optim__lr=1e-3, total_steps=40))
    assert f"name=... (and branch_from={trunk.output / 'trunk'} to go on from here)" in told
    for other in ({"seed": 5}, {"data__order": "lanes"}):
        (told,) = run_ranks(refusal, 1, changed(trunk, optim__lr=1e-3, **other))
        assert "other settings" in told and "branch_from" not in told, told


def same_logits(run: Path, name: str) -> float:
    """Loads a run's weights and compares with timm's model filled from the checkpoint's tensors."""
    import timm

    from pretrain.models import load_model
    from pretrain.models.weights import read_weights

    model = timm.create_model(name, num_classes=7, img_size=32).eval()
    model.load_state_dict({name: t.read() for name, t in read_weights(run).tensors.items()})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return (model(images) - load_model(run)(images)).abs().max().item()


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_model_of_timm_trains_and_resumes(stage: int, shards: Path, tmp_path: Path) -> None:
    """timm:NAME through ZeRO 1 and 3: stop, resume, equal weights; its weights load into timm."""
    name = "test_vit"
    model = {"name": f"timm:{name}", "image_size": 32}
    whole = changed(tiny_config(shards, tmp_path / "whole", engine__zero_stage=stage), model=model)
    run_ranks(finish, 2, whole)
    stopped = changed(whole, output=str(tmp_path / "stopped"))
    _stop_after(stopped, 2, step=4)
    run_ranks(finish, 2, stopped)
    expect_same_run(stopped, whole)
    assert run_ranks(same_logits, 1, whole.output / "tiny", name) == [0.0]


def compiled_run(config: Config, cache: Path | None) -> Counter[str]:
    """Trains; returns how often torch found compiled code, and how often it did not. None: where other tests left it.

    As a run does it, whose torch has named its own place when the engine is built.
    """
    os.environ["PRETRAIN_CACHE"] = str(cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = default_cache_dir() + ("_of_tests" if cache is None else "")
    train(config)
    return torch._dynamo.utils.counters["inductor"]


HAS_COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs g++ and Python.h on CPUs")


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_train_alike(shards: Path, tmp_path: Path) -> None:
    """engine.compile changes rounding only, and no name in the checkpoint; it may be switched on in a resumed run."""
    eager = tiny_config(shards, tmp_path / "eager", log__every_steps=1)
    run_ranks(finish, 1, eager)
    compiled = tiny_config(shards, tmp_path / "compiled", log__every_steps=1, engine__compile=True)
    run_ranks(compiled_run, 1, compiled, None)
    assert _losses(compiled.output / "tiny") == pytest.approx(_losses(eager.output / "tiny"), rel=1e-5)
    first, second = (newest_valid(c.output / "tiny" / "checkpoints") for c in (eager, compiled))
    assert first and second and CheckpointReader(first).shapes() == CheckpointReader(second).shapes()


@pytest.mark.long
@needs_compiler
def test_the_next_start_finds_what_was_compiled(shards: Path, tmp_path: Path) -> None:
    """Two ranks at once, then a start that compiles nothing."""
    options: dict[str, Any] = {"total_steps": 4, "engine__compile": True}
    first, second = (tiny_config(shards, tmp_path / name, **options) for name in ("first", "second"))
    made = run_ranks(compiled_run, 2, first, tmp_path)
    assert sum(counts["fxgraph_cache_miss"] for counts in made) > 0 and list(tmp_path.glob("compiled-*"))
    for counts in run_ranks(compiled_run, 2, second, tmp_path):
        assert counts["fxgraph_cache_hit"] > 0 and not counts["fxgraph_cache_miss"]


def test_a_resume_keeps_to_what_its_run_was_told(shards: Path, tmp_path: Path) -> None:
    """A run with engine.compile=false, of before there was a choice, is not compiled by a later default."""
    first = tiny_config(shards, tmp_path, total_steps=5, optim__schedule="constant", engine__compile=False)
    run_ranks(train, 1, first)
    run_ranks(train, 1, changed(first, total_steps=6, engine__compile="auto"))
    assert load_config(tmp_path / "tiny" / "config.yaml").engine.compile is False


@pytest.mark.parametrize("unusable", ["a file", "of all", "a link"])
def test_compiled_code_is_kept_where_nobody_else_writes(
    unusable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the user's cache, unless the user names a folder; one that cannot be trusted is told, and not used."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # torch does so, when it imports its compiler
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "good"))
    keep_compiled()
    (folder,) = (tmp_path / "good").iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    place = tmp_path / folder.name
    if unusable == "of all":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.write_text("") if unusable == "a file" else place.symlink_to(folder)
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert f"{place}: compiled code is not kept there" in capsys.readouterr().err


def compiled_under_signals() -> tuple[list[str], float]:
    """The states of what compiles, all of which was asked to stop, as SLURM asks every process of a job; and a sum."""
    compiling.start_compilers()
    compilers = compilers_of(os.getpid())
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        for compiler in compilers:
            os.kill(compiler, number)
    doubled = torch.compile(lambda values: values * 2 + 1)(torch.ones(3))
    return [monitor.state_of(number) for number in compilers], float(doubled.sum())


def compilers_of(parent: int) -> list[int]:
    """The processes in which torch compiles for that one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if f"--parent={parent}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiling needs a C compiler")
def test_what_compiles_does_not_hear_a_stop() -> None:
    """A run that is asked to stop in its first step, whose blocks are being compiled, goes on to its save."""
    states, total = run_ranks(compiled_under_signals, 1)[0]
    assert len(states) == (get_compile_threads() > 1) and total == 9  # one core compiles in the process itself
    assert not {"", "Z"} & set(states)


@pytest.mark.parametrize(
    ("mounted", "shared"),
    [
        ("overlay / overlay rw 0 0\n/dev/sda1 {home} ext4 rw 0 0", False),
        ("overlay / overlay rw 0 0\nserver:/export {home} nfs4 rw,vers=4.2 0 0", True),
        ("auto.home {home} autofs rw 0 0\nserver:/export {home} lustre rw 0 0\ntmpfs {home}x tmpfs rw 0 0\n", True),
        ("server:/ / nfs rw 0 0\n/dev/sda1 {home} xfs rw 0 0", False),
        ("server:/ / nfs rw 0 0\n/dev/sda1 {home}/compiled xfs rw 0 0", True),
        ("/dev/sda1 {home} xfs rw 0 0\nserver:/ / nfs rw 0 0", False),
        ("sshfs {home} fuse.sshfs rw 0 0", True),
        ("fuse-overlayfs / fuse.fuse-overlayfs rw 0 0", False),
        ("", False),
    ],
)
def test_compiled_code_is_kept_on_the_node(
    mounted: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user's cache is on a network file system: in a folder of the node, with the same care."""
    home, node, mounts = tmp_path / "my home", tmp_path / "node", tmp_path / "mounts"
    node.mkdir()
    mounts.write_text(mounted.format(home=str(home).replace(" ", "\\040")))
    monkeypatch.setattr(storage, "_MOUNTS", mounts)
    monkeypatch.setattr(compiling, "_OF_NODE", node)
    monkeypatch.setenv("PRETRAIN_CACHE", str(home))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled()
    (made,) = [*node.iterdir(), *(home.iterdir() if home.exists() else [])]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(made) and made.stat().st_mode & 0o777 == 0o700
    assert made.parent == (node if shared else home)
    made.rmdir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(compiling.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    keep_compiled()
    (made,) = home.iterdir()  # Triton's libraries would not load from /var/tmp
    assert made.name == f"compiled-{os.geteuid()}" + (f"-{socket.gethostname()}" if shared else "")


@pytest.mark.parametrize("stage", [1, 3])
def test_held_out_validation(stage: int, shards: Path, tmp_path: Path) -> None:
    """held_out samples are scored, all of them, and never trained on."""
    changes: dict[str, Any] = {"data__held_out": 23, "evaluation__every_steps": 10, "engine__zero_stage": stage}
    config = tiny_config(shards, tmp_path, **changes)
    run_ranks(finish, 2, config)
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    scores = [row for row in rows if "val/top1" in row]
    assert [row["step"] for row in scores] == [10, 20] and all(row["val/images"] == 23 for row in scores)
    trained_on = {index for samples in _global_samples(config).values() for _, index in samples}
    assert len(trained_on) == 101 - 23


def test_a_fallback_sets_the_damaged_checkpoint_aside(shards: Path, tmp_path: Path) -> None:
    """What was damaged does not count as kept: two valid checkpoints remain, and both starts are known."""
    config = tiny_config(shards, tmp_path, total_steps=60, checkpoint__every_steps=4, checkpoint__keep_last=2)
    _stop_after(config, 1, step=9, to_rank=0)
    folder = tmp_path / "tiny"
    newest = step_folders(folder / "checkpoints")[0]
    (newest / "state.json").write_text("{}")
    run_ranks(finish, 1, config)
    assert (folder / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert [step_of(path) for path in step_folders(folder / "checkpoints")] == [60, 56]
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 2
