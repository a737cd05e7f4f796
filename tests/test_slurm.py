"""Runs as SLURM jobs, on a real slurmctld and two slurmds; what SLURM's variables mean, without one."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from slurm import cluster, wait_for
from tiny import make_shards, tiny_config

from pretrain.checkpoint.find import newest_valid
from pretrain.cluster import slurm
from pretrain.cluster.local import on_cpu
from pretrain.config import Config, config_to_dict
from pretrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "launch/pretrain.sbatch"
# As srun sets them for the sixth task of a step: eight tasks on two nodes with four each.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007,012]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_knows_its_place() -> None:
    """Every variable of torchrun's; the port belongs to the job and step."""
    assert slurm.is_task(TASK)
    assert slurm.rank_variables(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + (8 * 4711 + 2) % 20000),
    }
    uneven = TASK | {"SLURM_STEP_TASKS_PER_NODE": "6,2", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": "29500"}
    found = slurm.rank_variables(uneven)
    assert (found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("2", "127.0.0.1", "29500")


@pytest.mark.parametrize("step", [None, "", "4294967291", "4294967290", "batch"])
def test_what_srun_did_not_start_is_no_task(step: str | None) -> None:
    """The batch script, an interactive shell, a login node."""
    others = {name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"}
    assert not slurm.is_task(others | ({} if step is None else {"SLURM_STEP_ID": step}))


def test_another_world_size_is_refused() -> None:
    """As scripts export it that count nodes, or GPUs of one node."""
    with pytest.raises(UserError, match="WORLD_SIZE is 4, but srun has started 8 tasks"):
        slurm.rank_variables(TASK | {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("n[1-2]", "n1"),
        ("gpu[003-017,020],login", "gpu003"),
        ("a-b,c[1-9]", "a-b"),
        ("rack[2,4]-n[07-09]", "rack2-n07"),
        ("tux[5].cluster.org", "tux5.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    """As `scontrol show hostnames` has it, which containers lack."""
    assert slurm.first_host(nodes) == first


def config_file(folder: Path, config: Config) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    return path


def starts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_as_a_job_that_is_warned_and_comes_back(tmp_path: Path) -> None:
    """2 nodes x 2 tasks under plain srun are one world of 4 ranks. Signalled as before its time limit, the job saves,
    is requeued, and reaches DONE without a hand: the same samples and weights as an undisturbed job. One whose data
    is not there ends with the reason and is not requeued.
    """
    shards = make_shards(tmp_path / "squares")
    config = tiny_config(shards, tmp_path / "disturbed", total_steps=300, checkpoint__every_steps=1000)
    file, run_folder = config_file(tmp_path, config), tmp_path / "disturbed" / "tiny"
    with cluster(tmp_path / "s") as run:
        size = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
        environment = ",".join(f"{name}={value}" for name, value in on_cpu(1).items())
        submit = partial(
            run, "sbatch", "--parsable", *size, f"--output={tmp_path}/%j.out", f"--export=ALL,{environment}"
        )
        jobs = {
            "disturbed": submit(SCRIPT, "--config", file, cwd=ROOT),
            "undisturbed": submit(SCRIPT, "--config", file, f"output={tmp_path}/undisturbed", cwd=ROOT),
            "empty": submit(
                *("--nodes=1", "--ntasks-per-node=1", SCRIPT, "--config", file),
                *(f"output={tmp_path}/empty", f"data.train={tmp_path}/no"),
                cwd=ROOT,
            ),
        }
        log = run_folder / "samples-00000.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 20, run, seconds=300)
        run("scancel", "--signal=USR1", jobs["disturbed"])  # as --signal=USR1@300 does: to the step, not the script
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=400)
        states = {name: run("scontrol", "show", "job", job) for name, job in jobs.items()}
    logs = {name: (tmp_path / f"{job}.out").read_text() for name, job in jobs.items()}
    assert [start["world_size"] for start in starts(run_folder)] == [4, 4], logs["disturbed"]
    assert [start["job"].get("SLURM_RESTART_COUNT") for start in starts(run_folder)] == [None, "1"]
    assert starts(run_folder)[1]["step"] > 20 and not (run_folder / "STOP.json").exists()
    assert "JobState=COMPLETED" in states["disturbed"] and logs["disturbed"].count(": requeued") == 1
    found, expected = (newest_valid(tmp_path / name / "tiny" / "checkpoints") for name in ("disturbed", "undisturbed"))
    assert found and expected and found.name == expected.name == "step-0000000300"
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    for path in (tmp_path / "undisturbed" / "tiny").glob("samples-*.jsonl"):
        assert (run_folder / path.name).read_text() == path.read_text()
    assert "JobState=FAILED" in states["empty"] and "Restarts=0" in states["empty"], logs["empty"]
    assert "not requeued" in logs["empty"] and "no: not found" in logs["empty"]
