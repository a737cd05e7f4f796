"""Runs over two machines, each with its own network, host name and processes, and one wire between them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from netns import Node, serve_ssh, two_nodes
from tiny import make_shards, tiny_config

from pretrain.cluster.local import on_cpu
from pretrain.config import Config, config_to_dict
from pretrain.errors import LostProcessError
from pretrain.json_files import read_json

ROOT = Path(__file__).resolve().parents[1]
BINARIES = Path(sys.executable).parent
TIMEOUT_S = 10
PATIENT_S = 240  # for what takes seconds on a machine that is not busy


def config_file(folder: Path, config: Config) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    return path


def torchrun(node: Node, number: int, script: str, *words: object, log: Path) -> subprocess.Popen[bytes]:
    """Starts torchrun on a node, one rank each; n1 is where they meet."""
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", "--master-addr=n1", "--master-port=29500"]
    return node.start(BINARIES / "torchrun", *meet, ROOT / script, *words, log=log, **on_cpu(1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_on_two_nodes_whose_wire_is_cut(tmp_path: Path) -> None:
    """A rank on each node makes one world. The wire is cut during a step: both sides end soon after engine.timeout_s,
    each names the other node, and the run's folder says that it may be started again.
    """
    config = tiny_config(
        make_shards(tmp_path / "squares"), tmp_path / "runs", total_steps=1_000_000, engine__timeout_s=TIMEOUT_S
    )
    file, run = config_file(tmp_path, config), config.output / config.name
    with two_nodes(tmp_path / "nodes") as nodes:
        logs = [tmp_path / f"{node.name}.log" for node in nodes]
        words = "launch/pretrain.py", "--config", file
        started = [torchrun(node, n, *words, log=log) for n, (node, log) in enumerate(zip(nodes, logs))]
        wait_for_steps(run, started, logs)
        nodes[1].run("ip", "link", "set", "eth0", "down")
        cut = time.monotonic()
        told_after: dict[int, float] = {}
        while len(told_after) < 2:
            for number, (log, other) in enumerate(zip(logs, ("n2 (rank 1)", "n1 (rank 0)"))):
                if f"rank {number} of 2 lost another node of the run: {other}" in log.read_text():
                    told_after.setdefault(number, time.monotonic() - cut)
            assert time.monotonic() - cut < PATIENT_S, "".join(log.read_text() for log in logs)
            time.sleep(0.05)
        ended_after = [(process.wait(PATIENT_S), time.monotonic() - cut)[1] for process in started]
    print(f"engine.timeout_s={TIMEOUT_S}: told after {told_after} s, launchers ended after {ended_after} s")
    assert max(told_after.values()) < 5 * (TIMEOUT_S + 5)  # on a machine that is five times slower
    stop = read_json(run / "STOP.json")
    assert (stop["retry"], stop["exit_code"]) == (True, LostProcessError.exit_code)


def wait_for_steps(run: Path, started: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    samples, until = run / "samples-00000.jsonl", time.monotonic() + PATIENT_S
    while not (samples.exists() and samples.read_text().count("\n") > 20):
        alive = all(process.poll() is None for process in started)
        assert alive and time.monotonic() < until, "".join(log.read_text() for log in logs)
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hostfile_over_ssh_and_pdsh(tmp_path: Path) -> None:
    """`deepspeed --hostfile` starts the doctor, then a run, on two nodes: one world of 2 ranks, DONE."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path / "runs", total_steps=20)
    file = config_file(tmp_path, config)
    with two_nodes(tmp_path / "nodes", "ssh", "ssh-keygen", "sshd", "pdsh") as nodes:
        serve_ssh(nodes, tmp_path / "ssh")
        # What is started over ssh has these variables alone, and PYTHON..., NCCL... of the one who starts it.
        lines = [f"{name}={value}" for name, value in on_cpu(1).items()]
        (nodes[0].folder / ".deepspeed_env").write_text("\n".join(lines) + "\n")
        example = (ROOT / "launch" / "hostfile.example").read_text().replace("slots=8", "slots=1")
        (nodes[0].folder / "hostfile").write_text(example.replace("node1", "n1").replace("node2", "n2"))
        words = BINARIES / "deepspeed", "--hostfile", "hostfile"
        for name, script in (("doctor", "tools/doctor.py"), ("run", "launch/pretrain.py")):
            log = tmp_path / f"{name}.log"
            started = nodes[0].start(*words, ROOT / script, "--config", file, log=log, **on_cpu(1))
            assert started.wait(PATIENT_S) == 0, log.read_text()
    assert "2 ranks on 2 nodes (n1, n2)" in (tmp_path / "doctor.log").read_text()
    start = [json.loads(line) for line in (config.output / "tiny" / "starts.jsonl").read_text().splitlines()]
    assert [s["world_size"] for s in start] == [2] and (config.output / "tiny" / "DONE").is_file()


def test_the_image_holds_what_there_is() -> None:
    """launch/Dockerfile copies files that exist, and installs the versions of requirements.lock. Its example is not
    started by `deepspeed`, which as a container's first process drops SIGTERM."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert "requirements.lock" in copied and "--constraint requirements.lock" in text
    assert all((ROOT / word).exists() for word in copied)
    assert "python launch/pretrain.py --restarts" in text and "deepspeed launch/" not in text
