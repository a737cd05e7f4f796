"""Agreement between ranks, their seeds, launchers' environments, starting ranks here."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_slurm import TASK

from pretrain.cluster import agreement, local, peers, ranks, signals
from pretrain.cluster.jobs import STOPPED, array_ranges, run_job
from pretrain.cluster.local import default_num_ranks, environment, free_port, gpus_asked_for, rank_variables
from pretrain.errors import LostProcessError, UserError

ROOT = Path(__file__).resolve().parents[1]
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CROSS_SIZE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")


def agree() -> dict[str, Any]:
    ranks.start(60)
    rank = ranks.rank()

    def fail() -> None:
        raise UserError("told by rank 0")

    try:
        agreement.from_main(fail)
        told = ""
    except UserError as error:
        told = str(error)
    ranks.seed_generators(1, 2)
    kept = torch.tensor([1.0, rank], dtype=torch.float64)  # as it is added up
    return {
        "gathered": agreement.gather(rank * 10),
        "to_main": agreement.to_main(rank * 10),
        "from_main": agreement.from_main(lambda: f"rank {ranks.rank()}"),
        "sum": agreement.add_up(torch.tensor([1.0, rank])).tolist(),
        "sums": [agreement.add_up(kept).tolist(), agreement.add_up(kept).tolist(), kept.tolist()],
        "any": (agreement.any_rank(rank == 2), agreement.any_rank(False)),
        "told": told,
        "draw": torch.rand(1).item(),
    }


def test_ranks_agree() -> None:
    """Three ranks: everybody gets everybody's value, rank 0's word and its error; what is added up stays as it was;
    seeds differ between ranks.
    """
    results = run_ranks(agree, 3)
    for result in results:
        assert result["gathered"] == [0, 10, 20] and result["from_main"] == "rank 0"
        assert result["sum"] == [3.0, 3.0] and result["any"] == (True, False) and result["told"] == "told by rank 0"
    assert [result["sums"] for result in results] == [[[3.0, 3.0]] * 2 + [[1.0, rank]] for rank in range(3)]
    assert [result["to_main"] for result in results] == [[0, 10, 20], [], []]
    draws = [result["draw"] for result in results]
    assert len(set(draws)) == 3 and draws == [result["draw"] for result in run_ranks(agree, 3)]


def _here(told: bool, host: str) -> tuple[int, int]:
    if told:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    socket.gethostname = lambda: f"{host}-{int(os.environ['RANK']) // 2}"
    ranks.start(60)
    return ranks.ranks_here(), ranks.world_size()


def test_ranks_of_a_node_are_counted_where_no_launcher_tells_them() -> None:
    """By the names of the hosts: of three ranks two are on one, the third on another; what is told counts."""
    assert run_ranks(_here, 3, False, "node") == [(2, 3), (2, 3), (1, 3)]
    assert run_ranks(_here, 2, True, "node") == [(2, 2), (2, 2)]


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher and without `start`, every function works."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (
        agreement.gather(5) == agreement.to_main(5) == [5]
        and agreement.from_main(lambda: 6) == 6
        and agreement.any_rank(True)
    )
    assert agreement.add_up(torch.ones(2)).tolist() == [1.0, 1.0] and ranks.is_main()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "3", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 3"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_contradictory_environment_is_refused(environment: dict, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's mistake is told by the variables' names."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        ranks.start(5)


@pytest.mark.parametrize(
    ("supervised", "kind", "told"),
    [(False, UserError, "is in use, by another run"), (True, LostProcessError, "EADDRINUSE")],
)
def test_a_port_that_is_taken(
    supervised: bool, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has chosen it must choose another; the process that restarts ranks does so by itself."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in rank_variables(0, 2, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv(signals.SUPERVISOR, raising=False)
        if supervised:
            monkeypatch.setenv(signals.SUPERVISOR, "1")
        with pytest.raises(kind, match=told):
            ranks.start(5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_is_lost(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is another one or rank 0 that is waited for: the same command may get further."""
    for name, value in rank_variables(rank, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(signals.SUPERVISOR, raising=False)
    with pytest.raises(LostProcessError, match=f"rank {rank} of 2 did not meet the others at 127.0.0.1:"):
        ranks.start(1)


@pytest.mark.parametrize(
    ("places", "cores"),
    [
        ([("a", range(16))] * 8, [2] * 8),  # as most launchers leave them
        ([("a", range(2 * n, 2 * n + 2)) for n in range(8)], [2] * 8),  # as srun binds them
        ([("a", range(4)), ("b", range(4)), ("b", range(4)), ("b", [4])], [4, 2, 2, 1]),
        ([("a", [0])] * 3, [1] * 3),
    ],
)
def test_cores_of_a_rank(places: list[tuple[str, Sequence[int]]], cores: list[int]) -> None:
    """Divided among those of a host that may use the same, not where each has its own."""
    assert ranks.cores_of_ranks((host, [*map(str, own)]) for host, own in places) == cores


def threads_of_bound_ranks() -> int:
    """Of a rank on a machine of eight cores, four of which are its own."""
    os.environ.pop("OMP_NUM_THREADS")
    first = 4 * ranks.rank()
    os.sched_getaffinity = lambda _: {*range(first, first + 4)}
    ranks.start(60)
    return torch.get_num_threads()


def test_a_rank_that_srun_has_bound_has_a_thread_on_each_of_its_cores() -> None:
    """They are not divided by the ranks of the node once more."""
    assert run_ranks(threads_of_bound_ranks, 2) == [4, 4]


def with_gpus(*uuids: str) -> str:
    """What is told at the start of a rank whose GPU has this one of the names; gloo stands in for NCCL."""
    join: Any = dist.init_process_group
    cuda: Any = torch.cuda
    dist.init_process_group = lambda backend, **named: join("gloo", **named)
    ranks.choose_device = lambda: torch.device("cuda", 0)
    cuda.set_device = lambda device: None
    cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuids[ranks.rank()])
    try:
        ranks.start(60)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_share_a_gpu_are_refused() -> None:
    """As srun with two tasks and one GPU a node gives it to both, each of which sees it alone; all tell the same."""
    told, others = run_ranks(with_gpus, 2, "a", "a")
    assert told == others and told.startswith("ranks 0, 1 on ") and "the same GPU: start one rank per GPU" in told
    assert run_ranks(with_gpus, 2, "a", "b") == ["", ""]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables of a task of srun, the only ones that are set; what this process knows of its place comes back."""
    monkeypatch.setattr(os, "environ", variables := dict(TASK))
    monkeypatch.setattr(ranks, "gpu_is_here", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for name in ("_from_slurm", "_place"):
        monkeypatch.setattr(ranks, name, getattr(ranks, name))
    yield variables


def test_a_task_that_sees_its_own_gpu_alone_keeps_its_place(
    task: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--gpus-per-task: DeepSpeed is told 0, the device; the node's first rank is still one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ranks.complete_environment()
    assert ranks.choose_device() == torch.device("cuda", 0)
    assert task["LOCAL_RANK"] == "0" and ranks.local_rank() == 1
    assert ranks.hides_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert not ranks.hides_gpus()


def test_gpus_without_a_task_are_told(task: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One task for each node would leave seven of eight idle, and say nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    ranks.complete_environment()
    with pytest.raises(UserError, match="this node has 8 GPUs, but 4 of the run's tasks: .*--ntasks-per-node=8"):
        ranks.choose_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks.choose_device() == torch.device("cuda", 1)


def test_idle_gpus_are_counted(task: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank that sees several; DS_ACCELERATOR=cpu wants none of them, not even with --restarts."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    task["SLURM_NTASKS"] = task["SLURM_STEP_NUM_TASKS"] = "1"
    assert ranks.num_idle_gpus() == 7 and default_num_ranks() == 8
    task["WORLD_SIZE"] = "8"
    assert ranks.num_idle_gpus() == 0
    task |= {"WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    assert ranks.num_idle_gpus() == 0 and default_num_ranks() == 1


def test_the_interface_to_a_host(task: dict[str, str]) -> None:
    """gloo is told it, unless somebody has; a name that leads nowhere tells none."""
    assert ranks.interface_to("127.0.0.1") == "lo" and ranks.interface_to("no-such-host.invalid") is None
    task["MASTER_ADDR"] = "127.0.0.1"  # of several nodes: this one's own name leads there
    ranks.complete_environment()
    assert "GLOO_SOCKET_IFNAME" not in task
    task |= rank_variables(0, 4, 1)  # all are here
    ranks.complete_environment()
    assert task["GLOO_SOCKET_IFNAME"] == "lo"
    task["GLOO_SOCKET_IFNAME"] = "eth7"
    ranks.complete_environment()
    assert task["GLOO_SOCKET_IFNAME"] == "eth7"


def test_several_tasks_and_no_srun_are_refused(task: dict[str, str]) -> None:
    """`sbatch --ntasks=8 --wrap "python launch/pretrain.py ..."` would be one rank alone."""
    for name in ("SLURM_STEP_ID", "SLURM_PROCID"):
        task.pop(name)
    task |= {"SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"}
    with pytest.raises(UserError, match="a batch script with 8 tasks has started this process, alone: put srun before"):
        ranks.complete_environment()
    task.pop("ENVIRONMENT")  # somebody's shell
    ranks.complete_environment()
    assert task["WORLD_SIZE"] == "1"


def test_a_node_that_names_itself_by_loopback_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name leads there, as some systems have it: at that address the asking node would find itself."""
    for name, value in rank_variables(1, 3, 1).items():
        monkeypatch.setenv(name, value)
    peers.meet(lambda own: [("n0", "127.0.1.1", 1), own, ("n2", "192.0.2.1", 1), ("n3", "::1", 1)])
    try:
        (told,) = peers.silent(0.2)
    finally:
        peers.leave()
    assert told.startswith("n2 (rank 2) ")


def test_every_rank_of_a_large_run_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them ask than the system keeps in its queue; nobody answers once this rank has left."""
    for name, value in rank_variables(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(peers, "_BACKLOG", 1)
    places: list[tuple[str, str, int]] = []
    peers.meet(lambda own: places.append(own) or [own])
    try:
        for _ in range(10):
            socket.create_connection(places[0][1:], timeout=peers.ANSWER_S).close()
            time.sleep(0.02)
    finally:
        peers.leave()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(places[0][1:], timeout=0.5)
    for thread in threading.enumerate():
        assert thread.name != "peers" or (thread.join(5), thread.is_alive()) == (None, False)


def test_stop_request_remembers_and_a_second_interrupt_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    """SIGUSR1 and the first SIGINT only set a flag; the second SIGINT raises; old handlers come back."""
    before = signal.getsignal(signal.SIGINT)
    stop = signals.StopRequest()
    try:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("ignored", [False, True])
def test_a_gone_terminal_stops_after_a_save_but_not_under_nohup(ignored: bool) -> None:
    """SIGHUP is remembered; where nohup has had it ignored it stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        stop = signals.StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        stop.close()
        assert stop.signal_name == (None if ignored else "SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_remembered_when_nobody_reads_stderr() -> None:
    """A handler that raises would end the training without a save."""
    code = """
import os, signal
from pretrain.cluster.signals import StopRequest
stop = StopRequest()
read, write = os.pipe(); os.close(read); os.dup2(write, 2)
os.kill(os.getpid(), signal.SIGTERM)
os.close(2)
os.kill(os.getpid(), signal.SIGUSR1)
print(stop.signal_name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGUSR1\n")


def test_gpus_that_were_asked_for_and_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on the CPU instead would take a hundred times as long, and say nothing."""
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    for name in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.rank_variables(0, 1, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0,1 asks for GPUs, but PyTorch finds none"):
        ranks.start(5)
    # As launch/pretrain.py has it: DeepSpeed is imported before, and must not be told that the CPU is meant.
    code = "import pretrain.train.run; from pretrain.cluster import ranks; ranks.start(5)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("DS_ACCELERATOR=cpu trains on the CPU"), done.stderr
    assert "DS_ACCELERATOR" not in environment()


def test_gpus_that_cannot_be_used_are_told(task: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed has torch count them by NVML, which knows nothing of CUDA and its driver."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"the GPUs here \(The NVIDIA .* 12020\)\.\): .*; DS_ACCELERATOR=cpu"):
        ranks.choose_device()


NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Sep 13 10:11:12 UTC 2025\nGCC version:  gcc 12\n"


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with a GPU whose driver is older than torch's CUDA wants, so that torch finds no GPU; its version."""
    (tmp_path / "version").write_text(NVIDIA.format("535.104.05"))
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(local, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(local, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (*GPU_VARIABLES, "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return "535.104.05"


def test_a_driver_too_old_for_torch_does_not_train_on_the_cpu(
    old_driver: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch finds no GPU then, and nobody need have named any; who hides them, or asks for the CPU, gets the CPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError) as refused:
        ranks.choose_device()
    told = str(refused.value)
    assert told.startswith(f"NVIDIA's driver {old_driver} has GPUs, but PyTorch finds none here: look at nvidia-smi; ")
    assert f"has CUDA 13.0, which needs driver 580 or newer: update {old_driver}, or make install CUDA=12" in told
    assert told.endswith("DS_ACCELERATOR=cpu trains on the CPU") and "DS_ACCELERATOR" not in environment()
    local.warn_of_missing_gpus()  # as `make install` ends
    assert capsys.readouterr().out == f"warning: {told}\n"
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "0", "DS_ACCELERATOR": "cpu"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert ranks.choose_device().type == "cpu"
            assert environment()["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setattr(local, "_DEVICES", Path("/nosuch"))  # a container that was given no GPU
    assert ranks.choose_device().type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "told"),
    [
        ("12.8", "has CUDA 12.8, which needs driver 525 or newer"),  # this one is: no word of an update
        ("14.0", "has CUDA 14.0, for which the driver may be too old"),
        (None, "is a build without CUDA, make install brings one with it"),
    ],
)
def test_advice_on_gpus_that_are_not_found(
    old_driver: str, cuda: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes by the CUDA that torch was built with."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert local.driver_advice().endswith(told)


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE"),
        ({"SLURM_STEP_GPUS": "0"}, "SLURM_STEP_GPUS"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, None),  # DeepSpeed's launcher, on CPUs too
        ({"CUDA_VISIBLE_DEVICES": "2,3", "CROSS_SIZE": "1"}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1", "SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS"),
    ],
)
def test_who_asks_for_gpus(variables: dict, asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables by which users and SLURM give a process its GPUs; those that give none."""
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpus_asked_for() == asked


def test_starting_ranks_here_needs_no_torch_before_it_asks_for_a_gpu() -> None:
    """A command line that is wrong is told at once: the launcher's words cost no import of torch."""
    code = "import sys; from pretrain.cluster import jobs, local; local.launcher(2); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


ODDLY_NAMED = """
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl(15, b"\\xff\\xfe")  # PR_SET_NAME
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
os.kill(os.getppid(), signal.SIGTERM)
for _ in range(100):
    time.sleep(0.1)
sys.exit("nobody told it to stop")
"""


def test_a_process_whose_name_is_no_text_is_told_to_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The names of all processes of a machine are read on the way; anybody's may be of any bytes."""
    assert run_job([sys.executable, "-c", ODDLY_NAMED], os.environ, tmp_path / "lock") == STOPPED
    assert capfd.readouterr().err == ""


def test_ranges_of_job_arrays() -> None:
    """One after the other, from 0 on; what has no job has no array."""
    assert array_ranges([4, 3]) == ["0-3", "4-6"]
    assert array_ranges([0, 3]) == ["0-2"] and array_ranges([1, 0]) == ["0-0"]


@pytest.mark.parametrize(("rank", "who"), [(None, ""), ("3", "rank 3: ")])
def test_a_wish_to_stop_is_told_once(
    rank: str | None, who: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C reaches ranks twice, from the terminal and as SIGTERM from what has started them, which is no rank."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    stop = signals.StopRequest()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    finally:
        stop.close()
    assert stop.signal_name == "SIGTERM"
    assert capfd.readouterr().err == f"{who}SIGINT: saving and stopping after this step or the next\n"
