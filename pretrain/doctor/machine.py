"""Checks of a machine by a rank: versions, GPU, limits, memory, compiler. Nothing here waits for other ranks."""

import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.cuda import nccl

from pretrain import provenance
from pretrain.cluster import ranks
from pretrain.cluster.limits import free_memory_bytes
from pretrain.cluster.local import driver_version, gpus_asked_for
from pretrain.config import Config
from pretrain.data.loader import SHARED_MEMORY, Room
from pretrain.doctor.findings import OK, RED, WARN, Finding, size
from pretrain.errors import UserError
from pretrain.gpus import known_gpu
from pretrain.plan.speed import assumed_mfu
from pretrain.sizes import is_plain, plain_forward_macs

# Assumed without a config: some 8 loader processes with 2 batches each, of 256 images of 224 pixels.
USUAL = Room(open_files=512, memory_bytes=4 << 30, shared_bytes=1 << 30)
MIN_LOCKED_BYTES = 1 << 30  # InfiniBand registers NCCL's buffers, some hundred MB per rank
COMPILE_S = 30.0  # time limit of the test compilation, which takes a tenth of a second
_INFINIBAND = Path("/sys/class/infiniband")


def check_versions() -> Iterator[Finding]:
    """Python, packages, commit: the same on all ranks, and a DeepSpeed that was tested with this torch."""
    known = provenance.versions()
    for name in ("python", "torch"):
        yield Finding(name, OK, known[name], differs=RED)
    try:
        from pretrain.engine.versions import untried

        on_gpu = ranks.has_gpu()
        told = untried(on_gpu=on_gpu)
        remedy = "pip install -c requirements.lock -e ." if told and not on_gpu else ""
        yield Finding("deepspeed", WARN if told else OK, told or known["deepspeed"], remedy, differs=RED)
    except Exception as error:  # whatever a broken installation raises
        cause = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding("deepspeed", RED, cause, "pip install -c requirements.lock -e .")
    others = [f"{name} {known[name]}" for name in known if name not in ("python", "torch", "deepspeed")]
    yield Finding("packages", OK, ", ".join(others), differs=RED)
    yield Finding("commit", OK, provenance.commit() or "no checkout of git", differs=RED)


def check_gpu() -> Iterator[Finding]:
    """The GPU of this rank, driver and CUDA; red when GPUs are expected and none is found."""
    try:
        device = ranks.choose_device()
    except UserError as error:
        told, _, remedy = str(error).partition(": ")
        yield Finding("GPU", RED, told, remedy)
        return
    asked = gpus_asked_for()
    if device.type == "cpu":
        chosen = os.environ.get("DS_ACCELERATOR") == "cpu"
        told = "DS_ACCELERATOR=cpu: the CPU trains" if chosen else "none found, none asked for: the CPU would train"
        remedy = "" if chosen else "if there should be one: look at nvidia-smi, and at the driver"
        yield Finding("GPU", OK if chosen else WARN, told, remedy, differs=RED)
        return
    properties = torch.cuda.get_device_properties(device)
    seen = f"{torch.cuda.device_count()} seen" + (f", asked for by {asked}" if asked else "")
    # Not the GPU's index or UUID, which differ between ranks, as they should.
    yield Finding("GPU", OK, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB; {seen}", differs=WARN)
    version = ".".join(map(str, nccl.version()))
    driver = driver_version() or provenance.UNKNOWN
    yield Finding("CUDA", OK, f"{torch.version.cuda}, NCCL {version}, driver {driver}", differs=WARN)


def images_per_s(config: Config, num_classes: int) -> float | None:
    """Returns the images per second that tools/plan.py assumes for this rank's GPU; None where no formula holds."""
    device = known_gpu(torch.cuda.get_device_name()) if ranks.has_gpu() and is_plain(config.model) else None
    if device is None:
        return None
    precision = config.engine.precision
    reached = device.peak(precision) * assumed_mfu(device, config.model.shape.width, precision)
    return reached / (6 * plain_forward_macs(config.model, num_classes))


def check_limits(room: Room, why: str) -> Iterator[Finding]:
    """Compares open files, locked memory, shared memory and memory with what loader processes need."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    unlimited = hard == resource.RLIM_INFINITY
    here = len(os.listdir("/dev/fd")) if Path("/dev/fd").is_dir() else 0
    needed = room.open_files + here
    told = f"{'no limit' if unlimited else f'{hard:,} at most'}; {needed:,} needed for {why}"
    remedy = "ulimit -n 4096, LimitNOFILE=, docker run --ulimit nofile=4096; or lower data.workers or data.prefetch"
    enough = unlimited or hard >= needed
    yield Finding(
        "open files", OK if enough else RED, told, "" if enough else remedy, value=1e30 if unlimited else hard
    )
    yield _locked_memory()
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    yield _room(
        str(SHARED_MEMORY), free, room.shared_bytes, why, "docker run --shm-size=16g, mount -o remount,size=16g"
    )
    memory = free_memory_bytes()
    if memory is not None:
        yield _room("memory", memory, room.memory_bytes, why, "ask for more (SLURM: --mem), end what else runs here")


def _room(check: str, free: int, needed: int, why: str, remedy: str) -> Finding:
    told = f"{size(free)} free; {size(needed)} needed for {why}"
    if free >= needed:
        return Finding(check, OK, told, value=free)
    return Finding(check, RED, told, f"{remedy}; or lower data.workers or data.prefetch", value=free)


def _locked_memory() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "no limit", value=1e30)
    told = f"{limit / 1e6:,.1f} MB at most"
    remedy = "ulimit -l unlimited, LimitMEMLOCK=, docker run --ulimit memlock=-1"
    with_infiniband = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    if limit >= MIN_LOCKED_BYTES or not with_infiniband:
        return Finding("locked memory", OK, told if with_infiniband else f"{told}; no InfiniBand", value=limit)
    state = WARN if os.geteuid() == 0 else RED  # the limit does not bind root, unless a container lacks CAP_IPC_LOCK
    return Finding(
        "locked memory", state, f"{told}; InfiniBand is here, and NCCL locks its buffers", remedy, value=limit
    )


def check_cores(workers: int, cores: int) -> Iterator[Finding]:
    """Compares this rank's cores with its number of processes; srun may have bound it to a single core."""
    told = f"{cores} for a rank with {workers} loader processes"
    if cores > workers:
        return (yield Finding("cores", OK, told, value=cores))
    remedy = "srun --cpus-per-task=, docker run --cpus=; or lower data.workers"
    yield Finding("cores", WARN, told, remedy, value=cores)


def check_host_name(num_hosts: int) -> Iterator[Finding]:
    """The address of this node's own name, which gloo passes to other nodes; torch uses gloo on GPUs too."""
    name = socket.gethostname()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    told = f"is {address}" + (f"; GLOO_SOCKET_IFNAME={chosen}" if chosen else "")
    if num_hosts < 2 or chosen or not address.startswith(("127.", "no")):
        return (yield Finding("own name", OK, told))
    remedy = "GLOO_SOCKET_IFNAME=eth0 (see `ip address`), or its true address in /etc/hosts"
    yield Finding("own name", RED, f"{name} {told}, where no other node reaches it", remedy)


def check_compiler(wanted: bool) -> Iterator[Finding]:
    """The C compiler that torch.compile would run, tested with Python's header. wanted: engine.compile asks for it."""
    from pretrain.engine.compiling import c_compiler, python_headers

    compiler, chosen = c_compiler(), os.environ.get("CC")
    bad = RED if wanted else WARN
    remedy = "apt install gcc g++ python3-dev, or a module of the cluster" + ("; or engine.compile=false" * wanted)
    if compiler is None:
        found = "none (gcc, clang)" if chosen is None else f"CC={chosen} is not there"
        return (yield Finding("compiler", bad, f"{found}, torch.compile needs one", remedy))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.c"
        source.write_text("#include <Python.h>\nint f(void) { return 0; }\n")
        words = [compiler, "-shared", "-fPIC", f"-I{python_headers()}", str(source), "-o", f"{folder}/a.so"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=COMPILE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return (yield Finding("compiler", bad, f"{compiler} does not run: {error}", remedy))
    if done.returncode:
        cause = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        return (yield Finding("compiler", bad, f"{compiler} cannot build for Python: {cause[-200:]}", remedy))
    yield Finding("compiler", OK, f"{compiler} builds for Python")


def check_precision(config: Config) -> Iterator[Finding]:
    """Whether this device has instructions for engine.precision."""
    from pretrain.engine import settings

    try:
        settings.check_precision(config)
    except UserError as error:
        told, _, remedy = str(error).partition("; ")
        yield Finding("precision", RED, told, remedy)
    else:
        yield Finding("precision", OK, config.engine.precision)
