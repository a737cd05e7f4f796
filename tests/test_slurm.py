"""Runs as SLURM jobs, on a real slurmctld and two slurmds; what SLURM's variables mean, without one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from slurm import cluster, wait_for
from tiny import changed, make_shards, tiny_config

from pretrain.checkpoint.find import newest_valid
from pretrain.cluster import slurm
from pretrain.cluster.local import on_cpu
from pretrain.config import Config, config_to_dict
from pretrain.errors import UserError
from pretrain.train.run import train

ROOT = Path(__file__).resolve().parents[1]
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


def job_state(run: Callable[..., str], job: str) -> str:
    """What SLURM says of a job, or of every element of an array."""
    return run("scontrol", "show", "job", job)


def chain(run: Callable[..., str], folder: Path, *arguments: object, **variables: str) -> dict[str, str]:
    """Submits launch/chain.sh; returns the numbers of the jobs by what they do."""
    log = f"--cpus-per-task=1 --output={folder}/%x-%j.out"
    options = {f"{name}_OPTIONS": f"--gpus-per-node=0 {log}" for name in ("PRETRAIN", "EVALUATE", "REPORT")}
    options |= {"CONVERT_OPTIONS": log, "DATA": str(folder / "data"), "OUT": str(folder / "converted")}
    told = run("launch/chain.sh", *arguments, cwd=ROOT, **on_cpu(1), **options | variables)
    return dict(line.partition(":")[0].split() for line in told.splitlines())


def logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.out")))


def finish(config: Config) -> None:
    train(config)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_goes_through_without_a_hand(tmp_path: Path) -> None:
    """2 nodes x 2 tasks under plain srun are one world of 4 ranks. Signalled as before its time limit, the run saves,
    is requeued, and reaches DONE: the same samples and weights as an undisturbed one. Only then its weights are
    converted, four elements of an array score them at once, and the report has every score.
    """
    shards = make_shards(tmp_path / "data" / "squares" / "train")
    make_shards(tmp_path / "data" / "squares" / "test", num_samples=31, seed=1)
    config = tiny_config(shards, tmp_path / "disturbed", total_steps=300, checkpoint__every_steps=1000)
    file, run_folder = config_file(tmp_path, config), tmp_path / "disturbed" / "tiny"
    tasks = [f"{kind}:squares" for kind in ("knn", "fewshot", "probe")]
    shutil.copytree(shards.parent, shards.parent.with_name("more"))
    with cluster(tmp_path / "s") as run:
        size = f"--nodes=2 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output={tmp_path}/%x-%j.out"
        jobs = chain(run, tmp_path, "--config", file, PRETRAIN_OPTIONS=size, TASKS=" ".join([*tasks, "knn:more"]))
        log = run_folder / "samples-00000.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 20, run, seconds=300)
        run("scancel", "--signal=USR1", jobs["pretrain"])  # as --signal=USR1@300 does: to the step, not the script
        wait_for((run_folder / "STOP.json").exists, run)
        assert "JobState=PENDING" in job_state(run, jobs["convert"])
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=600)
        states = {name: job_state(run, job) for name, job in jobs.items()}
    told = logs(tmp_path)
    assert {name: state.count("JobState=COMPLETED") for name, state in states.items()} == {
        **{"pretrain": 1, "convert": 1, "evaluate": 4, "report": 1}
    }, told
    assert [start["world_size"] for start in starts(run_folder)] == [4, 4], told
    assert [start["job"].get("SLURM_RESTART_COUNT") for start in starts(run_folder)] == [None, "1"]
    assert starts(run_folder)[1]["step"] > 20 and not (run_folder / "STOP.json").exists()
    assert told.count(": requeued") == 1
    assert (tmp_path / "converted" / "config.json").is_file()
    (report,) = json.loads((run_folder / "report" / "report.json").read_text())["runs"]
    scored = {row["metric"].partition("/")[0] for row in report["evaluation"]["rows"]}
    assert scored == {*tasks, "knn:more"}, told
    expect_the_undisturbed(config, tmp_path / "undisturbed")


def expect_the_undisturbed(config: Config, output: Path) -> None:
    """The run has the weights and the samples of one on 4 ranks that nobody has disturbed."""
    run_ranks(finish, 4, changed(config, output=str(output)))
    ours, theirs = (folder / "tiny" for folder in (config.output, output))
    found, expected = (newest_valid(folder / "checkpoints") for folder in (ours, theirs))
    assert found and expected and found.name == expected.name == f"step-{config.total_steps:010d}"
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(theirs.glob("samples-*.jsonl"))) == 4
    for path in theirs.glob("samples-*.jsonl"):
        assert (ours / path.name).read_text() == path.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Its data is not there: it ends with the reason and is not requeued; what waits for it is cancelled; the report,
    which comes in any case, has nothing to tell."""
    file = config_file(tmp_path, tiny_config(make_shards(tmp_path / "squares"), tmp_path / "runs"))
    with cluster(tmp_path / "s") as run:
        size = f"--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --output={tmp_path}/%x-%j.out"
        arguments = ("--config", file, f"data.train={tmp_path}/no")
        jobs = chain(run, tmp_path, *arguments, PRETRAIN_OPTIONS=size, TASKS="knn:a knn:b")
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=300)
        states = {name: job_state(run, job) for name, job in jobs.items()}
    told = logs(tmp_path)
    assert "JobState=FAILED" in states["pretrain"] and "Restarts=0" in states["pretrain"], told
    assert "not requeued" in told and "no: not found" in told
    assert "JobState=CANCELLED" in states["convert"] and "JobState=CANCELLED" in states["evaluate"], states
    assert "JobState=FAILED" in states["report"] and "report-" in told, states
