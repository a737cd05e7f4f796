"""Schedules of random disasters, each from a seed: the run ends as an undisturbed one, and never in a way that is not
documented.

PRETRAIN_TEST_DISASTERS=200 PRETRAIN_TEST_SEED=0 pytest -s tests/test_disasters.py -m long -k many

A schedule has at most 10 disasters; one that fails is told with its seed, and what came before is in the message.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, start_ranks
from test_resume import _global_samples, _losses, expect_same_run, finish, steps_logged
from tiny import changed, make_shards, tiny_config

from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_folders, step_of
from pretrain.checkpoint.read import CheckpointReader
from pretrain.config import Config
from pretrain.train.run import train

DOCUMENTED = {0, 75, 76, -signal.SIGKILL}  # of a rank under these disasters; 1 would be a defect of ours
WEIGHTS_DO_NOT_FIT = 40_000  # bytes: a rank's weights have 47,000 or more, the logs of a whole run fewer
KINDS = ("kill all", "kill one", "stop", "full disk", "hang", "damage", "kill all", "kill in a save")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def whole_run(shards: Path, output: Path) -> Config:
    """A run whose watchdog gives up on a stopped rank after 5 s; more steps than a schedule gets through."""
    every = {"checkpoint__every_steps": 4, "log__every_steps": 20}
    return tiny_config(shards, output, total_steps=300, engine__watchdog_s=5, **every)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = whole_run(shards, tmp_path_factory.mktemp("undisturbed"))
    run_ranks(finish, 2, config, timeout_s=900)
    return config


def trained(config: Config) -> int:
    """The exit code of a rank."""
    try:
        train(config)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        return error.exit_code
    return 0


class Schedule:
    """A run, started again and again, each start with its disaster; what was done, for who reads a failure."""

    def __init__(self, config: Config, seed: int, ranks: tuple[int, ...]) -> None:
        self.config, self.chance, self.ranks = config, random.Random(seed), ranks
        self.checkpoints = config.output / config.name / "checkpoints"
        self.done, self.newest = [f"seed {seed}"], -1

    @property
    def is_over(self) -> bool:
        return (self.checkpoints.parent / "DONE").exists()

    def disaster(self, kind: str) -> None:
        """One start and what becomes of it, or a bit of the newest checkpoint that flips; then the invariants."""
        if kind == "damage":
            return self._damage()
        ranks = self.chance.choice(self.ranks)
        victim, pause_s = self.chance.randrange(ranks), self.chance.uniform(0, 0.3)
        steps = steps_logged(self.config) + self.chance.randrange(1, 9)
        self.done.append(f"{kind}: rank {victim} of {ranks}, {pause_s:.2f} s after step {steps}")
        processes = start_ranks(trained, ranks, self.config)
        alive = lambda: all(process.is_alive() for process in processes)  # noqa: E731
        self._wait(lambda: steps_logged(self.config) >= steps or not alive())
        if kind == "kill in a save":
            self._wait(lambda: any(self.checkpoints.glob(".tmp-*")) or not alive())
            pause_s /= 20
        time.sleep(pause_s)
        if kind == "full disk":
            resource.prlimit(processes[victim].pid, resource.RLIMIT_FSIZE, (WEIGHTS_DO_NOT_FIT, resource.RLIM_INFINITY))
            reached = steps_logged(self.config) + 5
            self._wait(lambda: steps_logged(self.config) >= reached or not alive())
        number = {"stop": signal.SIGTERM, "full disk": signal.SIGTERM, "hang": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        for rank, process in enumerate(processes):
            if (rank == victim or kind == "kill all") and process.is_alive():
                os.kill(process.pid, number)
        codes = [self._code(process) for process in processes]
        self.done[-1] += f" -> {codes}"
        self.check(codes)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline, self.done
            time.sleep(0.002)

    def _code(self, process: Any) -> int:
        """A rank's exit code: as it said, or as its process ended. A rank that does not end is a violation."""
        ended = process.results.poll(240)
        assert ended, ("a rank does not end", self.done)
        try:
            error, code = process.results.recv()
        except EOFError:
            process.join(60)
            return process.exitcode
        assert error is None, (error, self.done)
        process.join(60)
        return code

    def _damage(self) -> None:
        """A bit of the newest checkpoint flips, where there is another one."""
        folders = step_folders(self.checkpoints)
        if len(folders) > 1:
            victim = self.chance.choice(sorted(path for path in folders[0].iterdir()))
            content = bytearray(victim.read_bytes())
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            victim.write_bytes(content)
            self.newest = step_of(folders[1])
            self.done.append(f"damage: {victim.parent.name}/{victim.name}")

    def check(self, codes: list[int]) -> None:
        """Exit codes are documented; the newest checkpoint can be read, whole, and none was lost."""
        assert set(codes) <= DOCUMENTED, self.done
        found = newest_valid(self.checkpoints)
        reached = -1
        if found is not None:
            reader, reached = CheckpointReader(found), step_of(found)
            assert all(bool(reader.tensor(name).isfinite().all()) for name in reader.shapes()), self.done
        assert reached >= self.newest, (reached, self.newest, self.done)
        self.newest = reached


def survive(config: Config, kinds: list[str], seed: int, ranks: tuple[int, ...]) -> Schedule:
    """Goes through a schedule and brings the run to its end; prints what was done."""
    schedule = Schedule(config, seed, ranks)
    for kind in kinds:
        if not schedule.is_over:
            schedule.disaster(kind)
    print(*schedule.done, sep="\n")
    run_ranks(finish, ranks[-1], changed(config, engine__watchdog_s=300), timeout_s=900)
    return schedule


def expect_same_samples_and_losses(config: Config, undisturbed: Config) -> None:
    """On another number of ranks: each step's samples, and the losses to rounding."""
    samples, losses = _global_samples(config), _losses(config.output / config.name)
    assert samples == _global_samples(undisturbed) and list(samples) == list(range(1, config.total_steps + 1))
    assert losses == pytest.approx(_losses(undisturbed.output / undisturbed.name), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_schedule_of_every_disaster(shards: Path, undisturbed: Config, tmp_path: Path) -> None:
    """Each kind once, on two ranks, in an order of chance: same weights, moments, random states and samples."""
    config = whole_run(shards, tmp_path)
    kinds = random.Random(3).sample(KINDS[:6], 6)
    schedule = survive(config, kinds, 3, (2,))
    assert len(schedule.done) == 1 + len(kinds), schedule.done
    expect_same_run(config, undisturbed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kill_9_20_times_on_1_to_4_ranks(shards: Path, undisturbed: Config, tmp_path: Path) -> None:
    """20 restarts, each on another number of ranks: the samples of every step, and the losses."""
    config = whole_run(shards, tmp_path)
    schedule = survive(config, ["kill all", "kill one"] * 10, 1, (1, 2, 3, 4))
    assert len(schedule.done) == 21, schedule.done
    expect_same_samples_and_losses(config, undisturbed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
def test_many_disasters(shards: Path, undisturbed: Config, tmp_path: Path) -> None:
    """Schedules of ten, in turn on two ranks and on one to three."""
    most, seed = (
        int(os.environ.get(f"PRETRAIN_TEST_{name}", default)) for name, default in (("DISASTERS", 20), ("SEED", 0))
    )
    number = 0
    while number < most:
        kinds = random.Random(seed).choices(KINDS, k=min(10, most - number))
        fixed, config = seed % 2 == 0, whole_run(shards, tmp_path / str(seed))
        number += len(survive(config, kinds, seed, (2,) if fixed else (1, 2, 3)).done) - 1
        (expect_same_run if fixed else expect_same_samples_and_losses)(config, undisturbed)
        seed += 1
    print(f"{number} disasters, 0 violations")
