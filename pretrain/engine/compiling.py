"""Whether blocks are compiled, and where compiled code is kept.

It is kept where the next start finds it; torch's own place, /tmp, loses it when the machine restarts.

It lies in the user's cache folder, not in the run's: it is executed, and a run's folder may come from somebody else.
Where that is on a network file system each node has a folder of its own: Triton loads what it has just written, and
over NFS ranks of several nodes end with "Stale file handle" when another one replaces it. torch looks it up by all
that it was made of (the graph, the releases, the device), so that ranks and runs share it; a file appears complete or
not at all, whatever kills its writer.
"""

import fcntl
import os
import shutil
import signal
import socket
import stat
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pretrain.cluster import agreement, ranks
from pretrain.cluster.signals import STOP_SIGNALS
from pretrain.config import Config
from pretrain.data.downloads import cache_folder
from pretrain.log import warn
from pretrain.storage import network_file_system

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable; Triton's kernels lie in the same folder
_OF_NODE = Path("/var/tmp")  # of this node, and kept when it restarts
_LEAST_CAPABILITY = (7, 0)  # Volta, which Triton needs


def compiles(config: Config, device: torch.device) -> tuple[bool, str]:
    """Returns whether blocks are compiled, on all ranks alike, and a line that says so: "" on a CPU. Collective."""
    asked = config.engine.compile
    if device.type != "cuda":
        return config.engine.compiles(on_gpu=False), ""
    lacking = next(filter(None, agreement.gather(_lacking(device))), None) if asked == "auto" else None
    compiled = config.engine.compiles(on_gpu=True, able=lacking is None)
    why = "" if compiled or asked != "auto" else f" ({lacking or 'ZeRO 3 would compile them over and over'})"
    return compiled, f"engine.compile={str(asked).lower()}: blocks are {'' if compiled else 'not '}compiled{why}"


def c_compiler() -> str | None:
    """Returns the C compiler that Triton calls, None where it finds none: a CC that is set is taken as it is."""
    chosen = os.environ.get("CC")
    return next(filter(shutil.which, ["gcc", "clang"] if chosen is None else [chosen]), None)


def python_headers() -> Path:
    """Returns the folder of Python.h, as Triton looks for it: Debian's own scheme leads to where no header lies."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def _lacking(device: torch.device) -> str | None:
    """What this rank lacks for compiling for its GPU, None when all is there."""
    if c_compiler() is None:
        chosen = os.environ.get("CC")
        none = "no C compiler: apt install build-essential python3-dev"
        return none if chosen is None else f"CC={chosen} is not there"
    if not (python_headers() / "Python.h").is_file():
        return "no Python.h: apt install python3-dev"
    if find_spec("triton") is None:
        return "no Triton in this torch"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the GPU is older than Triton's"
    return None


def keep_compiled() -> None:
    """Makes torch.compile keep its code in PRETRAIN_CACHE, or in /var/tmp where that is on a network file system.

    TORCHINDUCTOR_CACHE_DIR names another folder. One that cannot be written or locked, or that others may write to, is
    a warning: torch's own place serves.
    """
    torchs = default_cache_dir()  # which torch has set as soon as it imports its compiler
    if os.environ.get(_FOLDER, torchs) != torchs:
        return
    folder = None
    try:
        folder = _place()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(0, "others may write to it")
        with tempfile.TemporaryFile(dir=folder) as file:  # two ranks compile the same, and one waits
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, RuntimeError) as error:  # the latter: nobody knows this user's home
        if ranks.local_rank() == 0:
            why = getattr(error, "strerror", None) or error
            place = folder or "PRETRAIN_CACHE"
            warn(f"{place}: compiled code is not kept there, the next start may compile again ({why})")
        return
    os.environ[_FOLDER] = str(folder)


def start_compilers() -> None:
    """Starts the processes that compile for torch.compile, deaf to what asks to stop; torch would with the first block.

    SLURM sends its signals to every process of a job. A compiler that ended would end the run, without a save.
    """
    from torch._inductor.async_compile import AsyncCompile  # here: it takes a moment that other runs need not wait

    # A child begins with what is blocked here. By SIGTERM torch ends its workers itself.
    blocked = set(STOP_SIGNALS) - {signal.SIGTERM}
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _place() -> Path:
    """Where compiled code belongs, whether it can lie there or not."""
    name = f"compiled-{os.geteuid()}"  # of the user alone: the rest of the cache may be a group's
    if not network_file_system(cache_folder()):
        return cache_folder() / name
    if _holds_programs(_OF_NODE):
        return _OF_NODE / f"vit-pretrain-{name}"
    return cache_folder() / f"{name}-{socket.gethostname()}"


def _holds_programs(folder: Path) -> bool:
    """Whether what lies in a folder may be executed, as Triton's libraries are: hardened machines forbid it."""
    try:
        return not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:  # it is not there
        return False
