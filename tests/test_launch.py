"""The commands that users type, as processes: DeepSpeed's launcher, plain python, wrong input, interrupts."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import processes_of, whole_session
from tiny import make_shards, tiny_config

from pretrain.checkpoint.layout import step_folders
from pretrain.cluster.local import free_port, gpu_is_here, launcher, on_cpu, rank_variables
from pretrain.config import config_to_dict

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, **on_cpu(1)}
AS_TYPED = {name: value for name, value in ENVIRONMENT.items() if name != "DS_ACCELERATOR" or gpu_is_here()}
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "squares")


def command(shards: Path, output: Path, *overrides: str, ranks: int = 2) -> list[str]:
    file = output / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(tiny_config(shards, output))))
    return [*launcher(ranks), str(ROOT / "launch" / "pretrain.py"), "--config", str(file), *overrides]


def run(
    words: list[str], cwd: Path = ROOT, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def test_deepspeed_launcher_trains_and_says_done(shards: Path, tmp_path: Path) -> None:
    """From another folder, uninstalled: the run folder is complete, DONE is there, the second start does nothing.

    Without a GPU nothing has to be said of that: the launcher's CUDA_VISIBLE_DEVICES asks for none.
    """
    words = command(shards, tmp_path)
    first = run(words, cwd=tmp_path, environment=AS_TYPED)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "tiny"
    assert json.loads((folder / "DONE").read_text())["step"] == 20
    for name in ("config.yaml", "deepspeed.json", "starts.jsonl", "metrics.jsonl", "batch.png", "tensorboard"):
        assert (folder / name).exists(), name
    start = json.loads((folder / "starts.jsonl").read_text())
    assert start["world_size"] == 2 and {"torch", "deepspeed", "timm"} <= start["versions"].keys()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"loss", "top1", "lr", "grad_norm", "images_per_s", "tflop_per_s", "data_wait", "memory_gb", "epoch"}
    assert {f"train/{name}" for name in wanted | {"bad_samples", "skipped_steps"}} <= row.keys()
    assert "step 20/20" in first.stdout and "left 0m00s" in first.stdout
    second = run(words)
    assert second.returncode == 0 and "done already" in second.stdout


def test_a_wrong_key_under_the_launcher(shards: Path, tmp_path: Path) -> None:
    """Exit code 2, one line from us, no traceback of ours."""
    result = run(command(shards, tmp_path, "optim.lrr=1"))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1
    assert "optim.lrr" in errors[0] and "Did you mean: 'optim.lr'" in errors[0]
    assert "Traceback" not in result.stderr + result.stdout


def test_plain_python_is_one_rank(shards: Path, tmp_path: Path) -> None:
    """Without a launcher."""
    words = [sys.executable, *command(shards, tmp_path, "total_steps=3")[6:]]
    result = run(words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "= 1 ranks x 1 x 12" in result.stdout and (tmp_path / "tiny" / "DONE").exists()


@pytest.mark.parametrize(
    ("key", "told"), [("data.train", "tools/make_shards.py"), ("data.val", "make shards"), ("init_from", "a run")]
)
def test_missing_paths_are_one_line(key: str, told: str, shards: Path, tmp_path: Path) -> None:
    """Data or weights that are not there: exit code 2, the path and the way out, before torch is loaded.

    Where an earlier start found them, their disk may be away: torch is loaded, and the code is another.
    """
    words = [sys.executable, *command(shards, tmp_path, f"{key}={tmp_path / 'nowhere'}")[6:]]
    result = run(words)
    assert result.returncode == 2 and not result.stdout and len(result.stderr.splitlines()) == 1
    assert f"error: {tmp_path / 'nowhere'}" in result.stderr and told in result.stderr
    if key == "data.train":
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "starts.jsonl").touch()
        result = run(words)
        assert result.returncode == 75 and "loading torch" in result.stdout and "when it is back" in result.stderr


def test_a_supervisor_deletes_nothing_of_a_run_that_is_going_on(shards: Path, tmp_path: Path) -> None:
    """Another process has the lock: how it ends, and whom it has lost, is its own."""
    words = [sys.executable, *command(shards, tmp_path)[6:], "--restarts=1", "--num-gpus=1"]
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "STOP.json").write_text('{"reason": "a wrong setting", "retry": false, "exit_code": 77}')
    (folder / "lost-rank-00003.txt").write_text("rank 3 is gone\n")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with open(folder / "lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = run(words)
    assert result.returncode == 2 and "another process trains in this folder" in result.stderr, result.stderr
    assert {name: (folder / name).read_text() for name in before} == before


def test_a_supervisor_whose_folder_cannot_be_made_is_one_line(shards: Path, tmp_path: Path) -> None:
    """A file stands where the runs' folder would be."""
    (tmp_path / "file").touch()
    words = [sys.executable, *command(shards, tmp_path, f"output={tmp_path / 'file'}")[6:], "--restarts=1"]
    result = run([*words, "--num-gpus=1"])
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert f"error: {tmp_path / 'file' / 'tiny'}: cannot be written (Not a directory)" in result.stderr


def test_a_precision_that_the_cpu_lacks_is_one_line(shards: Path, tmp_path: Path) -> None:
    """fp16 on a CPU without its instructions: exit code 2 and one line, and the run's folder is not made."""
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU has fp16 instructions")
    result = run([sys.executable, *command(shards, tmp_path, "engine.precision=fp16")[6:]])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if "engine.precision=fp16" in line and "choose bf16" in line]
    assert not (tmp_path / "tiny").exists()


def test_a_port_in_use_is_one_line(shards: Path, tmp_path: Path) -> None:
    """Two runs on one machine with the launcher's default port: the second is told what to do."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        words = command(shards, tmp_path, ranks=1)
        words[words.index("--master_port") + 1] = str(taken.getsockname()[1])
        result = run(words)
    assert result.returncode == 2 and "is in use, by another run? Give this one --master_port" in result.stderr
    assert "Traceback" not in result.stderr


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    log = folder / "samples-00000.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= steps):
        time.sleep(0.05)


def test_ctrl_c_saves_and_stops(shards: Path, tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it: a checkpoint of the last step, no DONE, nobody left."""
    words = command(shards, tmp_path, "total_steps=100000", "checkpoint.every_steps=100000")
    with whole_session(_start(words)) as process:
        _wait_for_steps(tmp_path / "tiny", 5)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "stopped as asked at step" in output, output
        assert len(step_folders(tmp_path / "tiny" / "checkpoints")) == 1 and not (tmp_path / "tiny" / "DONE").exists()
        _expect_nobody(process.pid)


@pytest.mark.parametrize(
    ("launcher_word", "number"),
    [
        (b"deepspeed.launcher.launch", signal.SIGKILL),
        pytest.param(b"/deepspeed", signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_death_of_the_launcher_leaves_no_orphans(
    launcher_word: bytes, number: int, shards: Path, tmp_path: Path
) -> None:
    """launch.py, or `deepspeed` above it, is ended: DeepSpeed's ranks would go on for ever; ours save and stop."""
    words = command(shards, tmp_path, "total_steps=100000", "checkpoint.every_steps=100000")
    with whole_session(_start(words)) as process:
        _wait_for_steps(tmp_path / "tiny", 5)
        for pid in processes_of(process.pid):
            first_words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:5]
            if any(word.endswith(launcher_word) for word in first_words):
                os.kill(pid, number)
        process.communicate(timeout=60)
        assert len(step_folders(tmp_path / "tiny" / "checkpoints")) == 1 and not (tmp_path / "tiny" / "DONE").exists()
        assert json.loads((tmp_path / "tiny" / "STOP.json").read_text())["retry"]
        _expect_nobody(process.pid)


def test_a_signal_in_the_imports_stops_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    """SIGUSR1 ends a process that has not said otherwise; SLURM would call the job failed."""
    words = [sys.executable, *command(shards, tmp_path)[6:]]
    with whole_session(_start(words)) as process:
        assert process.stdout is not None and "loading torch" in process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped as asked before the first step" in output, output
    stop = json.loads((tmp_path / "tiny" / "STOP.json").read_text())
    assert stop == {"reason": "asked to stop before the first step", "retry": True, "exit_code": 0}
    done = run(words)
    assert done.returncode == 0 and (tmp_path / "tiny" / "DONE").exists()
    assert not (tmp_path / "tiny" / "STOP.json").exists()


def test_a_lost_rank_ends_the_others_in_one_line(shards: Path, tmp_path: Path) -> None:
    """kill -9 of rank 1: rank 0 says what happened, with an exit code of its own, and that it is worth a retry."""
    _, *words = [sys.executable, *command(shards, tmp_path, "total_steps=100000")[6:]]
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=ENVIRONMENT | rank_variables(rank, 2, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _wait_for_steps(tmp_path / "tiny", 5)
        ranks[1].kill()
        _, told = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 76 and "Traceback" not in told, told
    named = f"error: rank 0 of 2 lost another process of the run: rank 1 on {socket.gethostname()} (process "
    assert f"{named}{ranks[1].pid}) is gone, in section" in told
    assert json.loads((tmp_path / "tiny" / "STOP.json").read_text())["retry"] is True


def _expect_nobody(session: int) -> None:
    deadline = time.monotonic() + 30
    while (left := processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "processes were left behind"
