"""Runs over two machines, each with its own network, host name and processes, and one wire between them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from netns import Node, two_nodes
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
    stop = read_json(run / "STOP.json")
    assert (stop["retry"], stop["exit_code"]) == (True, LostProcessError.exit_code)


def wait_for_steps(run: Path, started: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    samples, until = run / "samples-00000.jsonl", time.monotonic() + PATIENT_S
    while not (samples.exists() and samples.read_text().count("\n") > 20):
        alive = all(process.poll() is None for process in started)
        assert alive and time.monotonic() < until, "".join(log.read_text() for log in logs)
        time.sleep(0.2)
