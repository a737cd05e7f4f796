"""--restarts: ranks of one machine, started again when one is lost; what is not tried again; nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import is_quiet, whole_session
from ranks import run_ranks
from test_resume import expect_same_run, finish
from tiny import changed, make_shards, tiny_config

from pretrain.cluster import jobs, monitor, restarts, signals
from pretrain.cluster.local import on_cpu
from pretrain.config import config_to_dict, config_to_yaml
from pretrain.errors import UserError

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[1]
# A rank that needs no torch: in start N it does what the N-th word for it says, "0:76" being exit code 76 of rank 0.
RANK = """
import os, signal, sys, time
folder, *starts = sys.argv[1:]
rank, number = os.environ["RANK"], int(os.environ["PRETRAIN_RESTARTS"])
open(f"{folder}/start-{number}-{rank}", "w").close()
end = dict(word.split(":") for word in starts[min(number, len(starts) - 1)].split(","))[rank]
if end == "saves":
    os.mkdir(f"{folder}/step-{number}")
    end = "76"
if end == "loses":  # its newest: damaged, or the disk is away
    os.rmdir(f"{folder}/" + max(name for name in os.listdir(folder) if name.startswith("step-")))
    end = "76"
if end == "hangs":
    time.sleep(1000)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
"""


@pytest.mark.parametrize(
    ("starts", "code", "num_starts"),
    [
        (["0:0,1:0"], 0, 1),
        (["0:76,1:76", "0:75,1:75", "0:0,1:0"], 0, 3),
        (["0:hangs,1:killed", "0:0,1:0"], 0, 2),  # the other one does not wait for ever
        (["0:hangs,1:76", "0:0,1:0"], 0, 2),
        (["0:hangs,1:75", "0:0,1:0"], 0, 2),
        (["0:hangs,1:2"], 2, 1),  # it alone has a setting, or a machine, that is wrong
        (["0:hangs,1:1", "0:1,1:76", "0:0,1:0"], 0, 3),  # a defect may be one of the machine
        (["0:76,1:1"], 1, 3),
        *(([f"0:{code},1:{code}"], code, 1) for code in (2, 77, 78, 130)),
        (["0:76,1:2"], 2, 1),  # the others of a rank that needs a person have only lost it
        (["0:0,1:75"], 75, 3),
        (["0:killed,1:killed"], 128 + signal.SIGKILL, 3),  # after two restarts without a checkpoint
        (["0:76,1:76", "0:saves,1:0", "0:saves,1:0", "0:saves,1:0", "0:76,1:76"], 76, 7),
        (["0:saves,1:0", "0:saves,1:0", "0:loses,1:0", "0:loses,1:0", "0:76,1:76"], 76, 5),  # no progress
    ],
)
def test_what_is_tried_again(
    starts: list[str], code: int, num_starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage, a lost rank, a defect, a death by a signal: twice in a row without a new checkpoint. Never what needs a
    person."""
    monkeypatch.setattr(restarts, "MOST_PAUSE_S", 0.0)
    monkeypatch.setattr(restarts, "LOST_S", 1.0)  # within which the others have begun
    monkeypatch.setattr(restarts, "AGREED_S", 1.0)
    assert run_fakes(tmp_path, starts) == code
    assert len(list(tmp_path.glob("start-*-0"))) == len(list(tmp_path.glob("start-*-1"))) == num_starts


def run_fakes(folder: Path, starts: list[str], *, most: int = 2, refused: int | None = None) -> int:
    stop = signals.StopRequest()
    try:
        return restarts.run_with_restarts(
            restarts.by_command([sys.executable, "-S", "-c", RANK, str(folder), *starts]),
            2,
            most,
            stop,
            newest=lambda: max((path.name for path in folder.glob("step-*")), default=""),
            refused=lambda: refused,
        )
    finally:
        stop.close()


def test_a_run_that_says_no_is_not_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """STOP.json with retry false, whatever the ranks' exit codes: the one that wrote it may have ended later."""
    assert run_fakes(tmp_path, ["0:76,1:76"], refused=2) == 2
    told = "not restarted: rank 0 exit code 76, rank 1 exit code 76; newest checkpoint: none"
    assert capfd.readouterr().err.splitlines() == [told]


def test_what_all_ranks_refuse_is_told_once(tmp_path: Path) -> None:
    """By rank 0, without a wait of the others for it; a real run of two, whose data are no data set."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    config = tiny_config(tmp_path / "foreign", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(config_to_yaml(config))
    words = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(tmp_path / "tiny.yaml")]
    words += ["--restarts", "3", "--num-gpus", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | on_cpu(1), timeout=120)
    lines = [line for line in done.stderr.splitlines() if "loading torch" not in line]
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert lines[0].startswith(f"error: {tmp_path / 'foreign'}") and lines[1].startswith(
        "not restarted: rank 0 exit code 2"
    )


@pytest.mark.parametrize("first", ["0:76,1:76", "0:saves,1:0"])
def test_no_restarts_are_none(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a start that has written a checkpoint, as nearly each does."""
    monkeypatch.setattr(restarts, "LOST_S", 1.0)
    assert run_fakes(tmp_path, [first, "0:0,1:0"], most=0) == 76
    assert len(list(tmp_path.glob("start-*"))) == 2


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, "torchrun has --max-restarts"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "launch/pretrain.sbatch requeues the job"),
        ({"RANK": "1"}, "start it by plain python"),
    ],
)
def test_under_a_launcher_it_is_refused(environment: dict[str, str], told: str) -> None:
    """One rank that starts others would make several worlds; each launcher has its own way."""
    with pytest.raises(UserError, match=told):
        restarts.is_supervised(environment)
    assert restarts.is_supervised(environment | {signals.SUPERVISOR: "1"}) and not restarts.is_supervised({})
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}  # salloc's own step is no launcher
    assert not restarts.is_supervised(shell)
    assert not restarts.is_supervised(environment | {jobs.PART_OF: "1"})  # tools/finetune.py starts it, under srun too


SUPERVISED = """
import os, signal, sys, time
from pretrain.cluster import forks, restarts, signals
stop = signals.StopRequest()
def rank():
    signals.end_with_launcher()
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    while stop.signal_name is None:
        time.sleep(0.02)
    open(f"{sys.argv[1]}/saved-{os.environ['RANK']}", "w").close()
    time.sleep(float(sys.argv[2]))
    sys.exit()
if restarts.is_supervised(os.environ):
    rank()
start = forks.by_fork(rank) if "forks" in sys.argv else restarts.by_command([sys.executable, *sys.orig_argv[1:]])
sys.exit(restarts.run_with_restarts(start, 2, 5, stop, newest=str, refused=lambda: None))
"""


@pytest.mark.parametrize("way", ["forks", "command"])
@pytest.mark.parametrize(
    ("numbers", "saving_s", "code"),
    [
        ([signal.SIGTERM], 0.5, 0),
        ([signal.SIGUSR1], 0.5, 0),
        ([signal.SIGINT], 0.5, 0),
        ([signal.SIGINT, signal.SIGINT], 1000, 1),  # KeyboardInterrupt: cli.run makes it 130
        ([signal.SIGKILL], 0.5, -signal.SIGKILL),
    ],
)
def test_a_signal_reaches_the_ranks(numbers: list[int], saving_s: float, code: int, way: str, tmp_path: Path) -> None:
    """They save and end, and are not started again; a second Ctrl-C is now; the supervisor's own death is a stop."""
    words = [sys.executable, "-c", SUPERVISED, str(tmp_path), str(saving_s), way]
    with start(words, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        expect(lambda: len(pids(tmp_path)) == 2)
        for number in numbers:
            process.send_signal(number)
            expect(lambda: len(list(tmp_path.glob("saved-*"))) == 2)
        assert process.wait(60) in (code, -signal.SIGINT if code == 1 else code)
        expect(lambda: all(monitor.state_of(int(pid)) in ("", "Z") for pid in pids(tmp_path)))
    assert len(pids(tmp_path)) == 2


def test_a_rank_whose_supervisor_has_died_before_it_looked_stops(tmp_path: Path) -> None:
    """While it still imports: nobody is left whose death it could see."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), signals.SUPERVISOR: "0", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", SUPERVISED, str(tmp_path), "0"], env=environment, timeout=60)
    assert done.returncode == 0 and (tmp_path / "saved-0").exists()


RUNNER = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.launch", *sys.argv[1:]]).wait()
"""
LAUNCH = """
import os, subprocess, sys, time
runner = os.getppid()
open(f"{sys.argv[1]}/launch", "w").close()
while os.getppid() == runner:
    time.sleep(0.02)
subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]])
"""
RANK_OF_LAUNCH = """
import sys, time
from pretrain.cluster import signals
signals._LOOK_EVERY_S = 0.05
stop = signals.StopRequest()
signals.end_with_launcher(stop)
until = time.monotonic() + 1
while stop.signal_name is None and time.monotonic() < until:
    time.sleep(0.02)
open(f"{sys.argv[1]}/{stop.signal_name}", "w").close()
"""


PATIENT_RANK = RANK_OF_LAUNCH.replace("monotonic() + 1", "monotonic() + 40")


@pytest.mark.parametrize(("options", "heard"), [([], "SIGTERM"), (["--node_rank=0"], "None")])
def test_ranks_of_a_launcher_that_died_before_they_began(options: list[str], heard: str, tmp_path: Path) -> None:
    """`deepspeed` on one machine, ended while its launch.py still imports, leaves that, which would start the ranks. By
    its --node_rank one is known that a remote shell has started, whose parent is nobody's launcher."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    packages = ((folder / "__init__.py", "") for folder in (package, package.parent))
    for path, lines in ((package / "launch.py", LAUNCH), (tmp_path / "ds", RUNNER), *packages):
        path.write_text(lines)
    rank = RANK_OF_LAUNCH if heard == "None" else PATIENT_RANK
    words = [sys.executable, str(tmp_path / "ds"), str(tmp_path), rank, *options]
    places = f"{tmp_path}:{ROOT}"  # this deepspeed is not the real one, which would import torch
    runner = subprocess.Popen(words, start_new_session=True, env={**os.environ, "PYTHONPATH": places})
    expect(lambda: (tmp_path / "launch").exists())
    runner.kill()
    runner.wait()
    expect(lambda: (tmp_path / "SIGTERM").exists() or (tmp_path / "None").exists())
    assert (tmp_path / heard).exists()


TORCHRUN_FAKE = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]]).wait()
"""
IMPORTS = """
open(f"{sys.argv[1]}/begun", "w").close()
while signals._started(stop.launchers[0].number):
    time.sleep(0.02)
"""


def test_a_launcher_that_dies_during_the_imports_is_missed(tmp_path: Path) -> None:
    """Nobody is there any more when they are over and launchers begin to be watched."""
    rank = PATIENT_RANK.replace("signals.end_with_launcher", f"{IMPORTS}signals.end_with_launcher")
    (tmp_path / "torchrun").write_text(TORCHRUN_FAKE)
    words = [sys.executable, str(tmp_path / "torchrun"), str(tmp_path), rank]
    launcher = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    expect(lambda: (tmp_path / "begun").exists())
    launcher.kill()
    launcher.wait()
    expect(lambda: (tmp_path / "SIGTERM").exists() or (tmp_path / "None").exists())
    assert (tmp_path / "SIGTERM").exists()


COMMAND = """
import os, sys
from pathlib import Path
from pretrain.cluster import jobs
jobs.run_job([sys.executable, "-c", *sys.argv[1:]], os.environ, Path(os.devnull))
"""
AN_ORPHAN = """
import os, sys, time
command = os.getppid()
if "PRETRAIN_SUPERVISOR" not in os.environ:
    open(f"{sys.argv[1]}/0", "w").close()
    while os.getppid() == command:
        time.sleep(0.02)
"""


@pytest.mark.parametrize("way", ["forks", "command"])
@pytest.mark.parametrize("before", ["", AN_ORPHAN])
def test_a_training_ends_with_the_command_that_started_it(before: str, way: str, tmp_path: Path) -> None:
    """Killed, as tools/finetune.py may be: the ranks, which else would train on, save and stop; also where the command
    was gone before they began."""
    words = [sys.executable, "-c", COMMAND, before + SUPERVISED, str(tmp_path), "0", way]
    with start(words, env={**os.environ, "PYTHONPATH": str(ROOT)}) as command:
        expect(lambda: len(pids(tmp_path)) == (1 if before else 2))
        command.kill()
        expect(lambda: len(list(tmp_path.glob("saved-*"))) == 2)


def start(words: list[str], **options: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """A command in a session of its own, which ends with the block: a test that fails leaves no training behind."""
    return whole_session(subprocess.Popen(words, cwd=ROOT, start_new_session=True, **options))


def pids(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.isdigit()]


def expect(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


OURS = [sys.executable, "launch/pretrain.py", "--restarts=1", "--num-gpus=2"]
BACK_S = 60  # after a rank was lost, where nothing else runs
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "--max-restarts=5"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("words", "count"),
    [
        (OURS, "PRETRAIN_RESTARTS"),
        pytest.param([*TORCHRUN, "launch/pretrain.py"], "TORCHELASTIC_RESTART_COUNT", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_leads_to_the_next_step(words: list[str], count: str, tmp_path: Path) -> None:
    """kill -9 of rank 1 of 2: both start again by themselves, from the newest checkpoint, and end with the weights,
    random states and samples of an undisturbed run; each start says which one it is. torchrun needs several tries."""
    shards = make_shards(tmp_path / "squares")
    config = tiny_config(shards, tmp_path / "killed", total_steps=160, model__dropout=0.1, checkpoint__every_steps=20)
    run_ranks(finish, 2, undisturbed := changed(config, output=str(tmp_path / "undisturbed")))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    words = [*words, "--config", str(tmp_path / "tiny.yaml")]
    log, folder = tmp_path / "killed" / "tiny" / "samples-00001.jsonl", tmp_path / "killed" / "tiny"
    with start(words, env={**os.environ, **on_cpu(1)}, stderr=subprocess.PIPE, text=True) as process:
        expect(lambda: log.exists() and log.read_text().count("\n") > 25, 300)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        _, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert count != "PRETRAIN_RESTARTS" or "rank 1 ended by SIGKILL; newest checkpoint: step-" in told
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    numbers = [int(start["job"][count]) for start in starts]
    assert len(numbers) == 2 and numbers[0] == 0 < numbers[1] and starts[1]["step"] >= 20
    assert count != "PRETRAIN_RESTARTS" or numbers[1] == 1
    assert [start["world_size"] for start in starts] == [2, 2]
    expect_same_run(config, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_are_back_in_seconds(tmp_path: Path) -> None:
    """kill -9 of one of 4 ranks: the next optimizer step after 10 s on 2 cores (alone on the machine; wanted: 15; asked
    for where nothing else runs: BACK_S); one process has imported torch for all ranks and starts."""
    quiet_before = is_quiet()
    shards = make_shards(tmp_path / "squares")
    config = tiny_config(shards, tmp_path, total_steps=10**6, checkpoint__every_steps=10, log__every_steps=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    words = [
        sys.executable,
        "launch/pretrain.py",
        "--restarts=1",
        "--num-gpus=4",
        "--config",
        str(tmp_path / "tiny.yaml"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    log = tmp_path / "tiny" / "samples-00000.jsonl"
    with start(words, env={**os.environ, **on_cpu(1)}, text=True, **pipes) as process:
        expect(lambda: log.exists() and log.read_text().count("\n") > 15, 300)
        os.kill(rank_of(process.pid, 2), signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(0.2)  # what the others have still written
        size = log.stat().st_size
        expect(lambda: log.stat().st_size > size, 300)
        seconds = time.monotonic() - killed
        process.send_signal(signal.SIGTERM)
        said, told = process.communicate(timeout=60)
    print(f"\nback after {seconds:.1f} s")
    assert seconds < BACK_S or not (quiet_before and is_quiet(own=4))
    assert process.returncode == 0 and "restart 1: rank 2 ended by SIGKILL" in told, told
    assert said.count("loading torch") == 1 and said.count("batch 12 = 4 ranks") == 2


def rank_of(supervisor: int, rank: int) -> int:
    """The rank-th child: they are started in this order."""
    return int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[rank])
