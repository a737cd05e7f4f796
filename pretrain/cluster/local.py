"""Starting ranks on this machine: the launcher's words, what a rank is told, whether there is a GPU.

Does not import torch before it is asked for a GPU.
"""

import os
import socket
import sys
from pathlib import Path


def free_port() -> int:
    """Returns a TCP port that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gpu_is_here() -> bool:
    """Returns whether this machine has a GPU, wanted or not."""
    import torch

    return torch.cuda.is_available()


def gpus_asked_for() -> str | None:
    """Returns the variable, with its value, by which somebody has given this process GPUs; None when nobody has."""
    # The first that is there decides: a step may have been given none of its job's, and a user may hide them.
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if (value := os.environ.get(name)) is not None and not _is_of_deepspeed(name, value):
            none = value.strip() in ("", "-1", "NoDevFiles") or (name == "SLURM_GPUS_ON_NODE" and value == "0")
            return None if none else f"{name}={value}"
    return None


def _is_of_deepspeed(name: str, value: str) -> bool:
    """Whether DeepSpeed's launcher has set a variable: it numbers its ranks so on CPUs too."""
    if name != "CUDA_VISIBLE_DEVICES" or "CROSS_SIZE" not in os.environ:
        return False
    return value.split(",") == [str(number) for number in range(len(value.split(",")))]


def default_num_ranks() -> int:
    """Returns one rank per GPU of this machine; 1 without one, or where the CPU is asked for."""
    import torch

    return 1 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count() or 1


def launcher(num_ranks: int) -> list[str]:
    """Returns the words before a script and its arguments that start it on so many ranks by DeepSpeed's launcher."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    port = str(free_port())  # the default one may be taken
    return [deepspeed, "-q", "--num_gpus", str(num_ranks), "--master_port", port]


def launcher_or_python(num_ranks: int) -> list[str]:
    """Returns the words that start a script soonest: DeepSpeed's launcher, plain python for one rank."""
    # DeepSpeed's imports DeepSpeed twice more, seconds per run: for one rank there is no need of it.
    return [sys.executable] if num_ranks == 1 else launcher(num_ranks)


def options_of_ranks(num_ranks: int | None) -> list[str]:
    """Returns the options of launch/pretrain.py that start so many ranks of this machine; None: on all GPUs.

    Sooner than `deepspeed`, which imports DeepSpeed twice more, and which answers Ctrl-C with a traceback of its own.
    """
    if num_ranks == 1:
        return []
    return ["--restarts", "0", *([] if num_ranks is None else ["--num-gpus", str(num_ranks)])]


def environment(num_threads: int | None = None) -> dict[str, str]:
    """Returns what ranks are started with: this process's variables and, without a GPU, those of `on_cpu`.

    Where GPUs are asked for and not there, the ranks say so.
    """
    on_gpu = gpu_is_here() or gpus_asked_for() is not None
    return {**os.environ} if on_gpu else {**os.environ, **on_cpu(num_threads)}


def on_cpu(num_threads: int | None = None) -> dict[str, str]:
    """Returns the variables that keep a rank on the CPU, with so many threads; None: its share of the cores."""
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {"DS_ACCELERATOR": "cpu", **threads}


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns what a launcher would tell a rank of a world on this machine."""
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
