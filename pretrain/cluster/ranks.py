"""The ranks of a run: join the process group, know one's rank and device, seed the generators.

One process without a launcher is a world of one rank.
"""

import fcntl
import os
import random
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.cluster import slurm
from pretrain.cluster.local import driver_advice, free_port, gpu_is_here, missing_gpus, rank_variables
from pretrain.cluster.signals import SUPERVISOR
from pretrain.errors import LostProcessError, UserError

_LOOPBACK = ("localhost", "127.0.0.1")
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface

_cpu_group: Any = None  # gloo, made by `start`
_from_slurm = False  # whether srun has started the ranks
_counted_here: int | None = None  # ranks on this node, counted by `start` where no launcher tells
_place: int | None = None  # this rank's number on its node, where LOCAL_RANK is only its device


def keep_float32() -> None:
    """Keeps a GPU from rounding factors of float32 to 10 bits (TF32).

    By default it does so in convolutions, and where the environment says TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, as in
    NVIDIA's containers, in products too.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def start(timeout_s: int) -> torch.device:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT describe; returns the device.

    Under plain srun SLURM's variables describe it. Raises UserError when they contradict each other, when GPUs are
    expected but missing, or when two ranks share one; when the ranks do not meet, the error that `not_met` returns.
    """
    global _cpu_group, _counted_here
    complete_environment()
    device = choose_device()
    keep_float32()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise not_met(error) from None
        _cpu_group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    if _told_ranks_here() is None:
        hosts = all_gather(socket.gethostname())
        _counted_here = hosts.count(hosts[rank()]) if len(hosts) > 1 else None
    if device.type == "cuda":
        _check_own_gpu(device)
    else:
        # Sums depend on the number of threads; a fixed share of the cores keeps runs repeatable on one machine.
        cores = cores_of_ranks(all_gather((socket.gethostname(), own_cores())))[rank()]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores))
    return device


def own_cores() -> list[str]:
    """Returns the names of the cores that this process may use; others may use them too."""
    return [str(number) for number in sorted(os.sched_getaffinity(0))]


def cores_of_ranks(places: Iterable[tuple[str, Sequence[str]]]) -> list[int]:
    """Returns how many cores each rank has, given its host and `own_cores`: ranks divide the cores that they share.

    srun binds each task to its own cores; other launchers leave all cores to all ranks.
    """
    masks = [(host, set(cores)) for host, cores in places]
    here: dict[str, list[set[str]]] = {}
    for host, own in masks:
        here.setdefault(host, []).append(own)
    return [max(1, len(own) // sum(not own.isdisjoint(other) for other in here[host])) for host, own in masks]


def all_gather(value: Any) -> list[Any]:
    """Returns every rank's value, as agreement.gather does, but does not count as progress for the watchdog."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_cpu_group)
    return found


def _check_own_gpu(device: torch.device) -> None:
    """Raises UserError, on all ranks, when some of them share a GPU, which NCCL would refuse with another message."""
    found = all_gather((socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)))
    for host, uuid in found:
        sharing = [str(number) for number, other in enumerate(found) if other == (host, uuid)]
        if len(sharing) > 1:
            raise UserError(
                f"ranks {', '.join(sharing)} on {host} have the same GPU: start one rank per GPU (under srun "
                "--gpus-per-node as large as --ntasks-per-node)"
            )


def hides_gpus() -> bool:
    """Whether each task of a node sees only its own GPU: to find NVLink between GPUs, NCCL must see all of a node.

    Source: its maintainers, https://github.com/NVIDIA/nccl/issues/1066.
    """
    return has_gpu() and _from_slurm and ranks_here() > 1 and torch.cuda.device_count() == 1


def not_met(error: Exception) -> UserError | LostProcessError:
    """Returns the error to raise when this rank did not meet the others at MASTER_ADDR:MASTER_PORT."""
    where, told = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
    # A supervisor, or the job's number, chose the port, and somebody has taken it since: the next start has another.
    # After a timeout, another rank was lost, or MASTER_ADDR is wrong.
    if SUPERVISOR in os.environ or _from_slurm or "timed out" in told.lower():
        return LostProcessError(f"rank {rank()} of {world_size()} did not meet the others at {where}: {told}")
    if "EADDRINUSE" in str(error):
        return UserError(f"{where} is in use, by another run? Give this one --master_port PORT, or MASTER_PORT=PORT")
    return UserError(f"rank {rank()} cannot reach rank 0 at {where}: {told}")


def stop() -> None:
    """Leaves the process group."""
    global _cpu_group, _counted_here
    _cpu_group = _counted_here = None
    if dist.is_initialized():
        dist.destroy_process_group()


def cpu_group() -> Any:
    """The process group of agreement.py; None before `start` and after `stop`."""
    return _cpu_group


def has_gpu() -> bool:
    """Whether this run uses GPUs; DS_ACCELERATOR=cpu keeps it, and DeepSpeed, on the CPU."""
    return gpu_is_here() and os.environ.get("DS_ACCELERATOR") != "cpu"


def num_idle_gpus() -> int:
    """GPUs that a run of one rank sees and does not use."""
    return torch.cuda.device_count() - 1 if has_gpu() and world_size() == 1 else 0


def rank() -> int:
    """The number of this process, from 0, over all nodes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes over all nodes; each has one device."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its node, from 0; also that of its device, unless it sees only that one."""
    return _place if _place is not None else int(os.environ.get("LOCAL_RANK", 0))


def ranks_here() -> int:
    """Processes of the run on this node; all of them until `start` has counted what no launcher has told."""
    return _told_ranks_here() or _counted_here or world_size()


def _told_ranks_here() -> int | None:
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else None


def is_main() -> bool:
    """Whether this process speaks for all: rank 0."""
    return rank() == 0


def seed_generators(seed: int, step: int) -> None:
    """Seeds this rank's generators (dropout, drop path) from (seed, step, rank): ranks differ, restarts repeat."""
    words = np.random.SeedSequence([seed, step, rank()]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % (1 << 32))
    torch.manual_seed(int(words[1]) >> 1)  # seeds the devices too


def complete_environment() -> None:
    """Sets the variables that no launcher has set, for a task of srun or a world of one rank. Raises UserError."""
    global _from_slurm
    if "RANK" not in os.environ and (tasks := slurm.tasks_beside(os.environ)):
        raise UserError(
            f"a batch script with {tasks} tasks has started this process, alone: put srun before python, as "
            "launch/pretrain.sbatch does, or ask for --ntasks=1"
        )
    if "RANK" not in os.environ and slurm.is_task(os.environ):
        variables = slurm.rank_variables(os.environ)
        if _from_slurm := variables["WORLD_SIZE"] != "1":  # else a free port, below: one step may run several by hand
            os.environ.update(variables)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:  # no launcher: one rank
        os.environ.update(rank_variables(0, 1, free_port()))
    missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; check its environment")
    # Otherwise gloo takes the address of the host's own name, which on many systems is 127.0.1.1, or warns of it.
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(os.environ["MASTER_ADDR"])):
        # Rank 0's own name may resolve to loopback too, which no other node can reach.
        here = _told_ranks_here() or (world_size() if os.environ["MASTER_ADDR"] in _LOOPBACK else None)
        if name != "lo" or here == world_size():
            os.environ["GLOO_SOCKET_IFNAME"] = name
    if not 0 <= rank() < world_size():
        raise UserError(f"WORLD_SIZE is {world_size()} but RANK is {rank()}: ranks count from 0; check the launcher")


def interface_to(host: str) -> str | None:
    """Returns the name of the network interface by which this machine reaches a host; None if it is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an address
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if socket.inet_ntoa(found[20:24]) == own:
                        return name
    except OSError:
        pass
    return None


def _enter_driver() -> None:
    """Initialises CUDA: DeepSpeed makes torch count GPUs without checking that they can be used."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        raise UserError(
            f"CUDA cannot use the GPUs here ({str(error).splitlines()[0]}): {driver_advice()}; "
            "DS_ACCELERATOR=cpu trains on the CPU"
        ) from None


def choose_device() -> torch.device:
    """Returns the device of this rank. Raises UserError when GPUs are expected and PyTorch does not find them."""
    if not has_gpu():
        told = None if os.environ.get("DS_ACCELERATOR") == "cpu" else missing_gpus()
        if told:  # else it would run a hundred times slower without a word
            raise UserError(told)
        return torch.device("cpu")
    global _place
    _enter_driver()
    count = torch.cuda.device_count()
    if count == 1 and _from_slurm:  # --gpus-per-task: it sees only its own
        _place = local_rank()
        os.environ["LOCAL_RANK"] = "0"  # where DeepSpeed looks for the device
        return torch.device("cuda", 0)
    if _from_slurm and count > ranks_here():
        raise UserError(
            f"this node has {count} GPUs, but {ranks_here()} of the run's tasks: ask for --ntasks-per-node={count}, a "
            "task for each GPU, or set CUDA_VISIBLE_DEVICES"
        )
    if local_rank() >= count:
        raise UserError(f"LOCAL_RANK is {local_rank()}, but this process sees {count} GPUs; start one rank per GPU")
    return torch.device("cuda", local_rank())
