"""Starting ranks on this machine: the launcher's command line, a rank's variables, whether there is a GPU.

Imports torch only when it is asked about GPUs.
"""

import os
import re
import socket
import sys
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = Path("/dev")  # nvidia0, nvidia1 ...: a GPU each
_LEAST_DRIVER = {"12": 525, "13": 580}  # of CUDA's releases, on Linux: NVIDIA's table of minor version compatibility


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
    """Returns the environment variable that gives this process GPUs; None if there is none."""
    return (_given() or "").partition("=")[0] or None


def gpus_expected() -> str | None:
    """Returns what says that this process has GPUs; None if nothing does, or if they are hidden from it.

    Without a variable that says so, a driver does if there is a GPU that this process may open: to torch, a driver too
    old for its CUDA looks like none.
    """
    if (given := _given()) is not None:
        return f"{given} asks for GPUs" if given else None
    driver = driver_version()
    may_open = any(os.access(path, os.R_OK | os.W_OK) for path in _DEVICES.glob("nvidia[0-9]*"))
    return f"NVIDIA's driver {driver} has GPUs" if driver and may_open else None


def _given() -> str | None:
    """NAME=VALUE of the variable that gives this process GPUs; "" if it gives none, None without such a variable."""
    # The first that is set decides: a step may have been given none of its job's GPUs, and a user may hide them.
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if (value := os.environ.get(name)) is not None and not _is_of_deepspeed(name, value):
            none = value.strip() in ("", "-1", "NoDevFiles") or (name == "SLURM_GPUS_ON_NODE" and value == "0")
            return "" if none else f"{name}={value}"
    return None


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, as 580.95.05; None without one."""
    try:
        found = re.search(r"Module .*?(\d+\.[\d.]+)", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def missing_gpus() -> str | None:
    """Returns the message for when torch finds no GPU though there should be one; None if none is expected."""
    if (expected := gpus_expected()) is None:
        return None
    return f"{expected}, but PyTorch finds none here: {driver_advice()}; DS_ACCELERATOR=cpu trains on the CPU"


def warn_of_missing_gpus() -> None:
    """Warns, at the end of `make install`, that a run would not find the GPUs here."""
    if (told := missing_gpus()) and not gpu_is_here():
        print(f"warning: {told}")


def driver_advice() -> str:
    """Returns what to do about GPUs that torch does not find or cannot use."""
    import torch

    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is a build without CUDA, make install brings one with it"
    least = _LEAST_DRIVER.get(version.partition(".")[0])
    advice = f"look at nvidia-smi; torch {torch.__version__} has CUDA {version}"
    if least is None:
        return f"{advice}, for which the driver may be too old"
    advice += f", which needs driver {least} or newer"
    if (driver := driver_version()) and int(driver.partition(".")[0]) < least:
        advice += f": update {driver}, or make install CUDA=12 (docs/troubleshooting.md)"
    return advice


def _is_of_deepspeed(name: str, value: str) -> bool:
    """Whether DeepSpeed's launcher has set CUDA_VISIBLE_DEVICES, as it does, to 0,1,..., without GPUs too."""
    if name != "CUDA_VISIBLE_DEVICES" or "CROSS_SIZE" not in os.environ:
        return False
    return value.split(",") == [str(number) for number in range(len(value.split(",")))]


def default_num_ranks() -> int:
    """Returns one rank per GPU of this machine; 1 without one, or where the CPU is asked for."""
    import torch

    return 1 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count() or 1


def launcher(num_ranks: int) -> list[str]:
    """Returns the command by which DeepSpeed's launcher starts so many ranks; a script and its arguments follow it."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    port = str(free_port())  # the default one may be taken
    return [deepspeed, "-q", "--num_gpus", str(num_ranks), "--master_port", port]


def launcher_or_python(num_ranks: int) -> list[str]:
    """Returns the fastest command to start a script: DeepSpeed's launcher, or plain python for one rank."""
    # The launcher imports DeepSpeed twice more, which takes seconds per run; one rank does not need it.
    return [sys.executable] if num_ranks == 1 else launcher(num_ranks)


def options_of_ranks(num_ranks: int | None) -> list[str]:
    """Returns the options of launch/pretrain.py that start so many ranks on this machine; None: one for each GPU.

    Faster than `deepspeed`, which imports DeepSpeed twice more, and which prints its own traceback at Ctrl-C.
    """
    if num_ranks == 1:
        return []
    return ["--restarts", "0", *([] if num_ranks is None else ["--num-gpus", str(num_ranks)])]


def environment(num_threads: int | None = None) -> dict[str, str]:
    """Returns the environment of ranks: this process's variables and, without a GPU, those of `on_cpu`.

    If GPUs are expected but missing, those of `on_cpu` are left out, and the ranks report it.
    """
    on_gpu = gpu_is_here() or gpus_expected() is not None
    return {**os.environ} if on_gpu else {**os.environ, **on_cpu(num_threads)}


def on_cpu(num_threads: int | None = None) -> dict[str, str]:
    """Returns the variables that keep a rank on the CPU, with so many threads; None: its share of the cores."""
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {"DS_ACCELERATOR": "cpu", **threads}


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns the variables that a launcher would set for a rank on this machine."""
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
