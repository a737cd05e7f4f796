"""Runs as SLURM jobs, on a real slurmctld and two slurmds; what SLURM's variables mean, without one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ranks import run_ranks
from slurm import cluster, power_off, wait_for
from slurm import processes as slurm_processes
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
    assert slurm.is_task(TASK) and slurm.num_tasks(TASK) == 8 and slurm.num_tasks({}) == 0
    assert slurm.rank_variables(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + (8 * 4711 + 2) % 12000),
    }
    assert (
        slurm.rank_variables(TASK | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"]
        != slurm.rank_variables(TASK)["MASTER_PORT"]
    )
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


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (["launch/prepare.sbatch", "photos", "out"], "--array goes to 7, but there are 2 parts, from 0: give all, or"),
        (["launch/evaluate.sbatch", "knn:a knn:b", "weights"], "element 7 of 2: give sbatch --array=0-1"),
    ],
)
def test_an_array_of_another_length_is_refused(script: list[str], told: str) -> None:
    """Elements that were submitted again alone would make other parts; one that is too many has no task."""
    element = {"ARRAY_TASK_ID": "7", "ARRAY_TASK_MAX": "7", "ARRAY_TASK_COUNT": "2", "ARRAY_JOB_ID": "1", "JOB_ID": "2"}
    variables = {**os.environ, **{f"SLURM_{name}": value for name, value in element.items()}}
    done = subprocess.run(["bash", *script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stdout and not done.stderr


FAKES = {
    "python": 'echo "$FOLDER"; exit "${FAILS:-0}"',
    "squeue": 'echo "${COMMENT:-}"',
    "scancel": 'echo "$*" >> "$LOG.cancelled"',
    "sleep": 'echo "$1" >> "$LOG.slept"',
    "scontrol": 'echo "$*" >> "$LOG"; [[ $1 == update && -z ${NO_COMMENT:-} ]]',  # else the script waits for its end
    "sbatch": """n=$(($(cat "$LOG.count" 2>/dev/null || echo 0) + 1)); echo $n > "$LOG.count"
printf "%s\\n" "$*" >> "$LOG"
[[ $n == "${FAIL_AT:-}" ]] && exit 3
[[ $n == "${CTRL_C_AT:-}" ]] && { trap '' INT; kill -INT 0; }
echo "$n;cluster"
""",
}


def with_fakes(
    folder: Path, words: list[str], cwd: Path = ROOT, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a script with programs that only write down what they are asked for; returns that too."""
    for name, lines in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), "LC_ALL": "C", **variables}
    environment = {**os.environ, **environment}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, start_new_session=True, timeout=100
    )
    return done, (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_what_a_chain_submits(tmp_path: Path) -> None:
    """Tasks over several lines, options that change the array, weights inside the run, any name in plain quotes."""
    run = "runs/it's é"
    variables = {"FOLDER": run, "TASKS": "a,b\nknn:c", "EVALUATE_OPTIONS": "--array=0-1%1"}
    done, asked = with_fakes(tmp_path, ["launch/chain.sh", "--config", "c"], **variables)
    assert done.returncode == 0 and "evaluate 3: 2 elements" in done.stdout, done.stderr
    assert f"launch/convert.sbatch {run} {run}/converted --to pretrain --overwrite" in asked[1]
    assert "--array=0-1 --array=0-1%1 launch/evaluate.sbatch a,b" in asked[2] and asked[3].startswith("knn:c ")
    command = asked[4].partition("--wrap ")[2].replace("python", "printf %s,")
    shown = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert shown.stdout == f"tools/report.py,{run},"


def test_a_chain_to_npz_wants_the_file_s_name(tmp_path: Path) -> None:
    """Refused before anything is submitted: the conversion would fail when the training is done."""
    done, asked = with_fakes(tmp_path, ["launch/chain.sh"], FOLDER="runs/x", TO="npz", TASKS="a")
    assert (done.returncode, asked) == (2, []) and "give OUT=NAME.npz too" in done.stderr
    done, asked = with_fakes(tmp_path, ["launch/chain.sh"], FOLDER="runs/x", TO="npz", OUT="x.npz")
    assert done.returncode == 0 and "launch/convert.sbatch runs/x x.npz --to npz" in asked[1], done.stderr


@pytest.mark.parametrize(("event", "code", "cancelled"), [("FAIL_AT", 3, "1 2"), ("CTRL_C_AT", 130, "1 2 3")])
def test_a_chain_that_is_not_submitted_whole_is_cancelled(
    event: str, code: int, cancelled: str, tmp_path: Path
) -> None:
    """Where one job is refused, or Ctrl-C comes between: once, all that were."""
    done, _ = with_fakes(tmp_path, ["launch/chain.sh"], FOLDER="runs/x", TASKS="a", **{event: "3"})
    assert done.returncode == code, done.stderr
    assert (tmp_path / "log.cancelled").read_text() == f"{cancelled}\n" and "evaluate" not in done.stdout


COUNT = "restarts without the disk: "
COUNTED = f"update JobId=9 Comment={COUNT}"


@pytest.mark.parametrize(
    ("script", "variables", "code", "asked"),
    [
        ("launch/pretrain.sbatch", {"FAILS": "2"}, 2, []),
        ("launch/pretrain.sbatch", {"FAILS": "1"}, 1, [f"{COUNTED}1", "requeue 9"]),
        ("launch/pretrain.sbatch", {"FAILS": "1", "COMMENT": f"{COUNT}4"}, 1, [f"{COUNTED}5", "requeue 9"]),
        ("launch/pretrain.sbatch", {"FAILS": "1", "COMMENT": f"{COUNT}5"}, 1, []),
        ("launch/pretrain.sbatch", {"FOLDER": "/dev/null/run", "COMMENT": "mine"}, 75, [f"{COUNTED}1", "requeue 9"]),
        ("launch/pretrain.sbatch", {"FOLDER": "/dev/null/run", "COMMENT": f"{COUNT}5"}, 75, []),
        ("launch/pretrain.sbatch", {"BLIND": "0"}, 2, []),
        ("launch/pretrain.sbatch", {"BLIND": "1"}, 75, [f"{COUNTED}1", "requeue 9"]),
        ("launch/pretrain.sbatch", {"FAILS": "1", "NO_COMMENT": "1"}, 1, [f"{COUNTED}1"]),
        ("launch/pretrain.sbatch", {"GONE": "launch"}, 75, [f"{COUNTED}1", "requeue 9"]),
        ("launch/evaluate.sbatch", {}, 2, []),
    ],
)
def test_a_job_that_does_not_come_to_its_command(
    script: str, variables: dict[str, str], code: int, asked: list[str], tmp_path: Path
) -> None:
    """A wrong key needs a person; a disk that is away is tried again, not for ever; no arguments: how it is used.

    Python exits with 2 too, on a node that does not see the code.
    """
    if "BLIND" in variables:
        (tmp_path / "srun").write_text('#!/bin/bash\n[[ $1 == bash ]] && exit "$BLIND"; exit 2\n')
        (tmp_path / "srun").chmod(0o755)
    cwd = tmp_path if variables.pop("GONE", "") else ROOT
    variables = {"FOLDER": str(tmp_path / "run"), "SLURM_JOB_ID": "9", **variables}
    done, told = with_fakes(tmp_path, ["bash", str(ROOT / script)], cwd, **variables)
    assert (done.returncode, told) == (code, asked), done.stderr
    slept = (tmp_path / "log.slept").read_text() if (tmp_path / "log.slept").exists() else ""
    assert slept == ("960\n" if told == [f"{COUNTED}5", "requeue 9"] else ""), slept
    assert script != "launch/evaluate.sbatch" or "usage: sbatch --array" in done.stdout


NO_MORE = '{"reason": "a wrong setting", "retry": false, "exit_code": 77}'


@pytest.mark.parametrize(
    ("does", "idle", "told", "counted"),
    [
        ("exit 76", "", "exit code 76, newest checkpoint : requeued", "9 1"),  # it has not come to its folder
        ("exit 76", "9 4", "exit code 76, newest checkpoint : requeued", "9 5"),
        ("exit 76", "9 5", "not requeued: 6 starts in a row without a new checkpoint", "9 6"),
        ("exit 76", "8 5", "exit code 76, newest checkpoint : requeued", "9 1"),  # another job, looked at since
        ('mkdir -p "$FOLDER/checkpoints/step-1"; exit 76', "9 5", "newest checkpoint step-1: requeued", "9 0"),
        ('/bin/sleep 0.1; echo "$STOP" > "$FOLDER/STOP.json"; exit 77', "", f"not requeued: {NO_MORE}", ""),
    ],
)
def test_what_an_earlier_job_has_left_is_not_deleted(
    does: str, idle: str, told: str, counted: str, tmp_path: Path
) -> None:
    """That job may be ending: its script has yet to read STOP.json, which says nothing of this start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP.json").write_text(NO_MORE)
    (tmp_path / "run" / "idle_restarts").write_text(idle)
    (tmp_path / "srun").write_text(f'#!/bin/bash\ngrep -q false "$FOLDER/STOP.json" || exit 2\n{does}\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {"FOLDER": str(tmp_path / "run"), "SLURM_JOB_ID": "9", "STOP": NO_MORE}
    done, asked = with_fakes(tmp_path, ["bash", str(ROOT / "launch/pretrain.sbatch")], **variables)
    assert done.returncode == (77 if "77" in does else 76) and done.stdout.splitlines()[-1].endswith(told), done.stdout
    assert asked == (["requeue 9"] if told.endswith(": requeued") else [])
    assert (tmp_path / "run" / "idle_restarts").read_text().strip() == counted
    slept = (tmp_path / "log.slept").read_text() if (tmp_path / "log.slept").exists() else ""
    assert slept == ("960\n" if counted == "9 5" else ""), "an outage lasts longer than six starts in a row"


@pytest.mark.parametrize(("ends", "slept"), [(100, "40\n"), (10_000, "960\n"), (0, "0\n")])
def test_a_pause_ends_before_the_job_does(ends: int, slept: str, tmp_path: Path) -> None:
    """Ended at its time limit, SLURM would not requeue it."""
    (tmp_path / "date").write_text("#!/bin/bash\necho 1000\n")
    (tmp_path / "date").chmod(0o755)
    variables = {"FOLDER": "/dev/null/run", "COMMENT": f"{COUNT}4", "SLURM_JOB_ID": "9"}
    variables["SLURM_JOB_END_TIME"] = str(1000 + ends)
    _, asked = with_fakes(tmp_path, ["bash", str(ROOT / "launch/pretrain.sbatch")], **variables)
    assert asked == [f"{COUNTED}5", "requeue 9"] and (tmp_path / "log.slept").read_text() == slept


def test_progress_forgets_starts_without_the_disk(tmp_path: Path) -> None:
    """Else five outages in all the weeks of a job would be its end."""
    (tmp_path / "srun").write_text('#!/bin/bash\nmkdir -p "$FOLDER/checkpoints/step-1"; exit 76\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {"FOLDER": str(tmp_path / "run"), "SLURM_JOB_ID": "9", "COMMENT": f"{COUNT}4"}
    _, asked = with_fakes(tmp_path, ["bash", str(ROOT / "launch/pretrain.sbatch")], **variables)
    assert asked == [f"{COUNTED}0", "requeue 9"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_data_set_as_a_job_array(tmp_path: Path) -> None:
    """Two parts at once, then the job that writes the manifest: the shards of one call."""
    for number in range(24):
        path = tmp_path / "photos" / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (10 * number, 0, 0)).save(path)
    with cluster(tmp_path / "s") as run:
        arguments = ("launch/prepare.sbatch", tmp_path / "photos", tmp_path / "out", "--samples-per-shard", "5")
        submit = partial(
            run, "sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%x-%A_%a.out", cwd=ROOT
        )
        parts = submit("--array=0-1", *arguments)
        last = submit(f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes", *arguments)
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=300)
        assert "JobState=COMPLETED" in job_state(run, last), logs(tmp_path)
    assert logs(tmp_path).count("shards are complete") == 2 and "24 samples in 5 shards, 3 classes" in logs(tmp_path)
    make_shards_of_folder = [
        sys.executable,
        "tools/make_shards.py",
        *arguments[1:2],
        tmp_path / "alone" / "out",
        *arguments[3:],
    ]
    subprocess.run(make_shards_of_folder, cwd=ROOT, check=True, capture_output=True)
    for path in sorted((tmp_path / "alone" / "out").glob("*.tar")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_goes_through_without_a_hand(tmp_path: Path) -> None:
    """2 nodes x 2 tasks under plain srun are one world of 4 ranks. Signalled as before its time limit, the run saves,
    is requeued, and reaches DONE: the same samples and weights as an undisturbed one. Only then its weights are
    converted, four elements of an array score them at once, and the report has every score.
    """
    shards = make_shards(tmp_path / "data" / "squares" / "train")
    make_shards(tmp_path / "data" / "squares" / "test", num_samples=31, seed=1)
    config = tiny_config(shards, tmp_path / "disturbed", total_steps=120, checkpoint__every_steps=1000)
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


def expect_the_undisturbed(config: Config, output: Path, ranks: int = 4) -> None:
    """The run has the weights and the samples of one on as many ranks that nobody has disturbed."""
    run_ranks(finish, ranks, changed(config, output=str(output)), timeout_s=900)
    ours, theirs = (folder / "tiny" for folder in (config.output, output))
    found, expected = (newest_valid(folder / "checkpoints") for folder in (ours, theirs))
    assert found and expected and found.name == expected.name == f"step-{config.total_steps:010d}"
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(theirs.glob("samples-*.jsonl"))) == ranks
    for path in theirs.glob("samples-*.jsonl"):
        assert (ours / path.name).read_text() == path.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Its data is not there: it ends with the reason and is not requeued; what waits for it is cancelled; the report,
    which comes in any case, has nothing to tell. One that is cancelled saves, and does not come back."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path / "runs", total_steps=100_000)
    file, going = config_file(tmp_path, config), tmp_path / "runs" / "going"
    with cluster(tmp_path / "s") as run:
        size = f"--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --output={tmp_path}/%x-%j.out"
        arguments = ("--config", file, f"data.train={tmp_path}/no")
        jobs = chain(run, tmp_path, *arguments, PRETRAIN_OPTIONS=size, TASKS="knn:a knn:b")
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=300)
        states = {name: job_state(run, job) for name, job in jobs.items()}
        command = ("launch/pretrain.sbatch", "--config", file, "name=going")
        job = run("sbatch", "--parsable", *size.split(), *command, cwd=ROOT, **on_cpu(1))
        log = going / "samples-00000.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 6, run, seconds=300)
        run("scancel", job)
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=60)
        cancelled = job_state(run, job)
    told = logs(tmp_path)
    assert "JobState=CANCELLED" in cancelled and "Restarts=0" in cancelled, told
    saved = newest_valid(going / "checkpoints")
    assert saved and saved.name == f"step-{log.read_text().count(chr(10)):010d}", told
    assert "JobState=FAILED" in states["pretrain"] and "Restarts=0" in states["pretrain"], told
    assert "not requeued" in told and "no: not found" in told
    assert "JobState=CANCELLED" in states["convert"] and "JobState=CANCELLED" in states["evaluate"], states
    assert "JobState=FAILED" in states["report"] and "report-" in told, states


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_user_s_error_on_two_ranks_is_not_requeued(tmp_path: Path) -> None:
    """srun ends the second by SIGTERM, as it waits for the first one's word: their code, and that word alone."""
    (tmp_path / "weights").mkdir()
    with cluster(tmp_path / "s") as run:
        options = "--parsable --array=0-0 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1".split()
        command = ("launch/evaluate.sbatch", "knn:a", tmp_path / "weights", "--data", tmp_path)
        variables = {**on_cpu(1), "MAX_RESTARTS": "1"}
        job = run("sbatch", *options, f"--output={tmp_path}/%x-%j.out", *command, cwd=ROOT, **variables)
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=200)
        state = job_state(run, job)
    told = logs(tmp_path)
    assert "Restarts=0" in state and "ExitCode=2:0" in state, told
    assert told.count("error: no data") == 1 and "rank 1" not in told, told


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_job_survives_what_happens_to_it(tmp_path: Path) -> None:
    """Preempted by an urgent job, a rank killed, one stopped, a node without power and one to spare: each time
    it comes back by itself, and ends as an undisturbed run."""
    config = tiny_config(
        make_shards(tmp_path / "squares"), tmp_path / "runs", total_steps=1000, checkpoint__every_steps=20
    )
    file, folder, log = config_file(tmp_path, config), tmp_path / "runs" / "tiny", "samples-00001.jsonl"
    with cluster(tmp_path / "s") as run:
        size = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
        options = ("--parsable", f"--output={tmp_path}/%x-%j.out")
        job = run("sbatch", *options, *size, "launch/pretrain.sbatch", "--config", file, cwd=ROOT, **on_cpu(1))

        def wait_for_steps(number: int) -> None:
            """Of the start with this number, from 1: some beyond its first."""

            def is_there() -> bool:
                if not (folder / log).exists() or len(starts(folder)) != number:
                    return False
                steps = [json.loads(line)["step"] for line in (folder / log).read_text().splitlines()]
                return max(steps, default=0) > starts(folder)[-1]["step"] + 25

            wait_for(is_there, run, seconds=400)

        def rank_1() -> int:
            (pid,) = (
                pid
                for pid in slurm_processes(environment="SLURM_PROCID=1", command=str(file))
                if "monitor.py" not in Path(f"/proc/{pid}/cmdline").read_text()
            )
            return pid

        wait_for_steps(1)
        run("sbatch", *options, "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1")
        wait_for_steps(2)
        os.kill(rank_1(), signal.SIGKILL)
        wait_for_steps(3)
        os.kill(rank_1(), signal.SIGSTOP)  # told after 45 s by the process beside it
        wait_for_steps(4)
        variables = Path(f"/proc/{rank_1()}/environ").read_text().split("\0")
        lost = next(v.partition("=")[2] for v in variables if v.startswith("SLURMD_NODENAME="))
        power_off(lost, tmp_path / "s")
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=600)
        assert "JobState=COMPLETED" in job_state(run, job), logs(tmp_path)
    told = [start["job"] for start in starts(folder)]
    assert [of.get("SLURM_RESTART_COUNT") for of in told] == [None, "1", "2", "3", "4"], logs(tmp_path)
    assert "is stopped, in section" in logs(tmp_path)
    assert lost in slurm_nodes(told[3]) and lost not in slurm_nodes(told[4])
    assert starts(folder)[1]["lost_steps"] == 0, "a preempted run saves"
    expect_the_undisturbed(config, tmp_path / "undisturbed", 2)


def slurm_nodes(job: dict[str, str]) -> list[str]:
    found = re.fullmatch(r"node\[(\d)[-,](\d)\]", job["SLURM_JOB_NODELIST"])
    assert found, job
    return [f"node{found[1]}", f"node{found[2]}"]
