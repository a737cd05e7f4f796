"""Schedules of random disasters: the run ends as an undisturbed one, and never in a way that is not documented.

PRETRAIN_TEST_DISASTERS=200 PRETRAIN_TEST_SEED=0 pytest -s tests/test_disasters.py -m long -k many

A schedule has at most 10 disasters; hypothesis makes one that fails as small as it can in five minutes, and prints it.
What is left to chance, the moments of real processes, is in the message.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import netns
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
CUT = "cut link"
KINDS = ("kill all", "kill one", "stop", "full disk", "hang", "damage", "lost disk", "lost data", "kill in a save", CUT)
MOST_PAUSE_S = 0.1  # more than a step, or a save, takes
CUT_S = 6  # engine.timeout_s of a start whose link is cut
# Ranks of another number add in another order, and training makes more of the difference. Runs of 1, 3 and 4 ranks
# without a disaster differ from one of 2 by at most 1.2e-6 of a step's loss until step 100, by 7e-4 after it.
SMOOTH_UNTIL, SMOOTH, LATER = 100, 1e-4, 2e-2


class Disaster(NamedTuple):
    """One start of a run, and what becomes of it; or a bit of the newest checkpoint that flips.

    The ranks of one whose link is cut are on two machines, the first half on the first.
    """

    kind: str  # of KINDS
    ranks: int
    victim: int  # modulo ranks
    steps: int  # that are done before
    pause_s: float  # after these
    bit: int  # modulo what there is; of "damage"


def drawn(kind: str, chance: random.Random, ranks: tuple[int, ...]) -> Disaster:
    """A disaster by chance."""
    numbers = chance.randrange(60), chance.randrange(1, 9), chance.uniform(0, MOST_PAUSE_S), chance.randrange(1 << 40)
    return Disaster(kind, chance.choice(ranks), *numbers)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[netns.Node, ...]]:
    """Two machines with a wire between; none where namespaces cannot be made: then no link is cut."""
    if reason := netns.why_not():
        print(f"no link is cut: {reason}")
        yield ()
        return
    with netns.two_nodes(tmp_path_factory.mktemp("nodes")) as found:
        yield found


@pytest.fixture(scope="module")
def kinds(nodes: tuple[netns.Node, ...]) -> list[str]:
    return [kind for kind in KINDS if nodes or kind != CUT]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def whole_run(shards: Path, output: Path, total_steps: int = 200) -> Config:
    """A run whose watchdog gives up on a stopped rank after 5 s; more steps than a schedule gets through.

    Its data is mounted beside its output, as a link.
    """
    data = _data_beside(output)
    data.symlink_to(shards)
    every = {"checkpoint__every_steps": 4, "log__every_steps": 20}
    return tiny_config(data, output, total_steps=total_steps, engine__watchdog_s=5, **every)


def _data_beside(output: Path) -> Path:
    return output.with_name(f"{output.name}-data")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = whole_run(shards, tmp_path_factory.mktemp("undisturbed") / "runs")
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


def trained_on_a_node(config: Config, insides: list[int]) -> int:
    """The same, on one of two machines."""
    netns.enter(insides[int(os.environ["RANK"]) * len(insides) // int(os.environ["WORLD_SIZE"])])
    os.environ.update({"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"})
    return trained(changed(config, engine__timeout_s=CUT_S))


class Schedule:
    """A run, started again and again, each start with its disaster; what was done, for who reads a failure."""

    def __init__(self, config: Config, nodes: tuple[netns.Node, ...]) -> None:
        self.nodes = nodes
        self.config, self.checkpoints = config, config.output / config.name / "checkpoints"
        self.done: list[str] = []
        self.newest = -1

    @property
    def is_over(self) -> bool:
        return (self.checkpoints.parent / "DONE").exists()

    def disaster(self, one: Disaster) -> None:
        """Has it happen; then the invariants."""
        if one.kind == "damage":
            return self._damage(one)
        if one.kind == "lost data":
            return self._lose_data(one)
        if one.kind == CUT and one.ranks == 1:
            one = one._replace(ranks=2)
        victim, steps = one.victim % one.ranks, steps_logged(self.config) + one.steps
        self.done.append(f"{one.kind}: rank {victim} of {one.ranks}, {one.pause_s:.2f} s after step {steps}")
        if one.kind == CUT:
            insides = [node.inside for node in self.nodes]
            processes = start_ranks(trained_on_a_node, one.ranks, self.config, insides)
        else:
            processes = start_ranks(trained, one.ranks, self.config)
        try:
            self._strike(one, processes, victim, steps)
        finally:
            if one.kind == CUT:
                self.nodes[1].run("ip", "link", "set", "eth0", "up")
            for process in processes:
                process.kill()

    def _strike(self, one: Disaster, processes: list[Any], victim: int, steps: int) -> None:
        kind, pause_s = one.kind, one.pause_s
        alive = lambda: all(process.is_alive() for process in processes)  # noqa: E731
        self._wait(lambda: steps_logged(self.config) >= steps or not alive())
        if kind == "kill in a save":
            self._wait(lambda: any(self.checkpoints.glob(".tmp-*")) or not alive())
            pause_s /= 20
        time.sleep(pause_s)
        away, reached = self.config.output.with_name("away"), steps_logged(self.config) + 5
        if kind == "full disk":
            resource.prlimit(processes[victim].pid, resource.RLIMIT_FSIZE, (WEIGHTS_DO_NOT_FIT, resource.RLIM_INFINITY))
            self._wait(lambda: steps_logged(self.config) >= reached or not alive())
        if kind == "lost disk":  # as a lazily unmounted one: no path leads there, open files stay
            os.rename(self.config.output, away)
            time.sleep(0.5)
        if kind == CUT:
            self.nodes[1].run("ip", "link", "set", "eth0", "down")
        asked = dict.fromkeys(("stop", "full disk", "lost disk"), signal.SIGTERM)
        number = {**asked, "hang": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        for rank, process in enumerate(processes):
            if (rank == victim or kind == "kill all") and kind != CUT and process.is_alive():
                os.kill(process.pid, number)
        codes = [self._code(process) for process in processes]
        if kind == "lost disk":
            shutil.rmtree(self.config.output, ignore_errors=True)  # what was written where the disk is not
            os.rename(away, self.config.output)
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

    def _lose_data(self, one: Disaster) -> None:
        """The run is started while its data is not there: to be tried again, where it was there at an earlier start."""
        data, known = _data_beside(self.config.output), (self.checkpoints.parent / "starts.jsonl").exists()
        self.done.append(f"lost data: {one.ranks} ranks")
        away = data.rename(f"{data}-away")
        codes = [self._code(process) for process in start_ranks(trained, one.ranks, self.config)]
        away.rename(data)
        self.done[-1] += f" -> {codes}"
        assert codes == [75 if known else 2] * one.ranks, self.done
        self.check([])

    def _damage(self, one: Disaster) -> None:
        """A bit of the newest checkpoint flips, where there is another one."""
        folders = step_folders(self.checkpoints)
        if len(folders) > 1:
            files = sorted(folders[0].iterdir())
            victim = files[one.victim % len(files)]
            content = bytearray(victim.read_bytes())
            content[one.bit // 8 % len(content)] ^= 1 << one.bit % 8
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


def survive(config: Config, disasters: list[Disaster], nodes: tuple[netns.Node, ...] = ()) -> Schedule:
    """Goes through a schedule and brings the run to its end; prints what was done."""
    schedule = Schedule(config, nodes)
    for one in disasters:
        if not schedule.is_over:
            schedule.disaster(one)
    end(schedule, disasters[-1].ranks)
    return schedule


def end(schedule: Schedule, ranks: int) -> None:
    """Brings the run to its end, without a disaster."""
    print(*schedule.done, sep="\n")
    run_ranks(finish, ranks, changed(schedule.config, engine__watchdog_s=300), timeout_s=900)


def expect_same_samples_and_losses(config: Config, undisturbed: Config) -> None:
    """On another number of ranks: each step's samples, and the losses to rounding."""
    samples, losses = _global_samples(config), _losses(config.output / config.name)
    assert samples == _global_samples(undisturbed) and list(samples) == list(range(1, config.total_steps + 1))
    expected = _losses(undisturbed.output / undisturbed.name)
    assert list(losses) == list(expected)
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, rel=SMOOTH if step <= SMOOTH_UNTIL else LATER), step


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_schedule_of_every_disaster(
    kinds: list[str], nodes: tuple[netns.Node, ...], shards: Path, undisturbed: Config, tmp_path: Path
) -> None:
    """Each kind once, on two ranks, in an order of chance: same weights, moments, random states and samples."""
    config = whole_run(shards, tmp_path / "runs")
    chance = random.Random(3)
    few = [kind for kind in kinds if kind != "kill in a save"]  # tests/test_saving.py has more of these
    disasters = [drawn(kind, chance, (2,)) for kind in chance.sample(few, len(few))]
    schedule = survive(config, disasters, nodes)
    assert len(schedule.done) == len(disasters), schedule.done
    expect_same_run(config, undisturbed)


@pytest.mark.slow
def test_a_disk_of_8_mb(shards: Path, tmp_path: Path) -> None:
    """A tmpfs with room for two checkpoints beside another's file: training goes on, those two stay, it ends with 75 as
    the last one cannot be saved; with room, the same command ends with the undisturbed run's bits."""
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here: it needs root, and leave to")
    try:
        model, keep = (
            {"model__width": 96, "model__mlp_dim": 256},
            {"checkpoint__every_steps": 4, "checkpoint__keep_last": 2},
        )
        config = tiny_config(shards, disk, **model, **keep)
        undisturbed = changed(config, output=str(tmp_path / "undisturbed"))
        run_ranks(finish, 2, undisturbed)
        (disk / "another's").write_bytes(bytes(3 << 20))
        checkpoints = disk / "tiny" / "checkpoints"
        assert run_ranks(trained, 2, config) == [75, 75]
        left = step_folders(checkpoints)
        assert [step_of(path) for path in left] == [8, 4] and newest_valid(checkpoints) == left[0]
        (disk / "another's").unlink()
        run_ranks(finish, 2, config)
        ours, theirs = newest_valid(checkpoints), newest_valid(undisturbed.output / "tiny" / "checkpoints")
        assert ours and theirs and ours.name == theirs.name == "step-0000000020"
        for path in theirs.glob("*.safetensors"):
            assert path.read_bytes() == (ours / path.name).read_bytes(), path.name
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kill_9_20_times_on_1_to_4_ranks(shards: Path, tmp_path: Path) -> None:
    """20 restarts, each on another number of ranks: the samples of every step, and the losses."""
    config = whole_run(shards, tmp_path / "runs", 300)
    undisturbed = whole_run(shards, tmp_path / "undisturbed", 300)
    run_ranks(finish, 2, undisturbed, timeout_s=900)
    chance = random.Random(1)
    schedule = survive(config, [drawn(kind, chance, (1, 2, 3, 4)) for kind in ["kill all", "kill one"] * 10])
    assert len(schedule.done) == 20, schedule.done
    expect_same_samples_and_losses(config, undisturbed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
def test_many_disasters(
    kinds: list[str], nodes: tuple[netns.Node, ...], shards: Path, undisturbed: Config, tmp_path: Path
) -> None:
    """Schedules of ten: those on two ranks throughout end with the same bits, others with the same samples."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import configuration, stateful
    from hypothesis import strategies as some

    configuration.set_hypothesis_home_dir(tmp_path / "hypothesis")  # not a folder of the checkout

    most, seed = (
        int(os.environ.get(f"PRETRAIN_TEST_{name}", default)) for name, default in (("DISASTERS", 20), ("SEED", 0))
    )
    done: list[str] = []

    class Run(stateful.RuleBasedStateMachine):
        @stateful.initialize(fixed=some.booleans())
        def begin(self, fixed: bool) -> None:
            self.schedule = Schedule(whole_run(shards, Path(tempfile.mkdtemp(dir=tmp_path)) / "runs"), nodes)
            self.fixed, self.failed = fixed, False

        @stateful.rule(
            one=some.builds(
                Disaster,
                some.sampled_from(kinds),
                some.integers(1, 3),
                some.integers(0, 59),
                some.integers(1, 8),
                some.floats(0, MOST_PAUSE_S),
                some.integers(0, (1 << 40) - 1),
            )
        )
        def disaster(self, one: Disaster) -> None:
            if not self.schedule.is_over:
                self.failed = True
                self.schedule.disaster(one._replace(ranks=2) if self.fixed else one)
                self.failed = False

        def teardown(self) -> None:
            if self.failed:  # told as it is, not by what follows from it
                return
            end(self.schedule, 2)
            (expect_same_run if self.fixed else expect_same_samples_and_losses)(self.schedule.config, undisturbed)
            done.extend(self.schedule.done)

    settings = hypothesis.settings(
        max_examples=max(1, most // 10),
        stateful_step_count=11,  # the first one begins the run
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    stateful.run_state_machine_as_test(hypothesis.seed(seed)(Run), settings=settings)
    print(f"{len(done)} disasters, 0 violations")
