"""The ranks of a run: start them, agree between them, seed them, and hear the wish to stop.

Agreement (flags, counts, small objects) goes over a CPU group, so that it never waits for the device. One process
without a launcher is a world of one rank, and every function here works there too.
"""

import ctypes
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.errors import StorageError, UserError

_cpu_group: Any = None  # gloo, made by `start`; None where there is one process


def start(timeout_s: int) -> torch.device:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT describe; returns the device.

    Raises UserError when these variables contradict each other.
    """
    global _cpu_group
    _complete_environment()
    device = torch.device("cuda", local_rank()) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Sums depend on the number of threads; a fixed share of the cores keeps runs repeatable on one machine.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // ranks_here)))
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        except dist.DistNetworkError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            if "EADDRINUSE" in str(error):
                raise UserError(f"{where} is in use, by another run? Give this one --master_port PORT") from None
            raise UserError(f"rank {rank()} cannot reach rank 0 at {where}: {str(error).splitlines()[0]}") from None
        _cpu_group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return device


def end_with_launcher() -> None:
    """Has this process asked to stop (SIGTERM) when DeepSpeed's launch.py dies, which otherwise leaves orphans.

    Only under that launcher: a plain shell may be closed while its jobs go on.
    """
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return  # not Linux
    if b"deepspeed.launcher.launch" in parent:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def stop() -> None:
    """Leaves the process group."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeouts(timeout_s: int) -> None:
    """Gives every group of this process the timeout. DeepSpeed makes groups without one, which wait for 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.set_timeout(timedelta(seconds=timeout_s), group)


def has_gpu() -> bool:
    """Whether this run uses GPUs; DS_ACCELERATOR=cpu keeps it, and DeepSpeed, on the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def rank() -> int:
    """This process, from 0, over all nodes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes over all nodes; each has one device."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process on its node, from 0: the device it uses."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process speaks for all: rank 0."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank has come here."""
    if dist.is_initialized():
        dist.barrier(group=_cpu_group)


def gather(value: Any) -> list[Any]:
    """Returns every rank's (small, picklable) value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def from_main(make: Callable[[], Any]) -> Any:
    """Calls `make` on rank 0 and returns its result on every rank; its error is raised on every rank."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=_cpu_group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_together(error: Exception | None) -> None:
    """Raises, on all ranks alike, the error that any rank met; does nothing when none did. Called by all ranks.

    An error raised on one rank alone leaves the others waiting in a collective, and the exit code to chance.
    """
    if any_rank(error is not None):
        raise next(found for found in gather(error) if found is not None)


def together(make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on this rank; a user's or a storage error of any rank is raised on all."""
    result, met = None, None
    try:
        result = make()
    except (UserError, StorageError) as error:
        met = error
    raise_together(met)
    return result


def add_up(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks of a small tensor, as float64 on the CPU."""
    total = numbers.detach().to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total, group=_cpu_group)
    return total


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on at least one rank; the same answer on all."""
    value = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_cpu_group)
    return bool(value)


def seed_generators(seed: int, step: int) -> None:
    """Seeds this rank's generators (dropout, drop path) from (seed, step, rank): ranks differ, restarts repeat."""
    words = np.random.SeedSequence([seed, step, rank()]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % (1 << 32))
    torch.manual_seed(int(words[1]) >> 1)  # seeds the devices too


class StopRequest:
    """Hears SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) and remembers; the loop decides when to stop.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        print(f"rank {rank()}: {self.signal_name}: saving and stopping after this step", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Returns, on every rank alike, whether any rank was asked to stop."""
        return any_rank(self.signal_name is not None)

    def close(self) -> None:
        """Restores the handlers found before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """For child processes: a signal to the whole group must not end them before the loop has saved."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def free_port() -> int:
    """Returns a TCP port that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _complete_environment() -> None:
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:  # no launcher: one rank
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks the host's name up, and warns if it fails
    missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; check its environment")
    if not 0 <= rank() < world_size():
        raise UserError(f"WORLD_SIZE is {world_size()} but RANK is {rank()}: ranks count from 0; check the launcher")
