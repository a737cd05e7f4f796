"""Decides whether blocks are compiled, and where compiled code is cached.

The next start has to find the cache; torch's default, under /tmp, is lost when the machine reboots.

The cache is in the user's cache folder, not in the run's: it is executed, and a run's folder may come from somebody
else. On a network file system each node has its own folder: Triton loads what it has just written, and over NFS ranks
on several nodes fail with "Stale file handle" when another rank replaces the file. torch's cache key covers all that
the code was made from (the graph, the releases, the device), so ranks and runs can share the cache; a file appears
complete or not at all, even if its writer is killed.
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

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable; Triton's kernels are cached there too
_OF_NODE = Path("/var/tmp")  # local to the node, and kept over a reboot
_LEAST_CAPABILITY = (7, 0)  # Volta, the oldest that Triton supports


def compiles(config: Config, device: torch.device) -> tuple[bool, str]:
    """Returns whether blocks are compiled, the same on all ranks, and a log line about it: "" on a CPU. Collective."""
    asked = config.engine.compile
    if device.type != "cuda":
        return config.engine.compiles(on_gpu=False), ""
    lacking = next(filter(None, agreement.gather(_lacking(device))), None) if asked == "auto" else None
    compiled = config.engine.compiles(on_gpu=True, able=lacking is None)
    why = "" if compiled or asked != "auto" else f" ({lacking or 'ZeRO 3 would compile them over and over'})"
    return compiled, f"engine.compile={str(asked).lower()}: blocks are {'' if compiled else 'not '}compiled{why}"


def c_compiler() -> str | None:
    """Returns the C compiler that Triton calls, None if there is none: with CC set, Triton tries no other."""
    chosen = os.environ.get("CC")
    return next(filter(shutil.which, ["gcc", "clang"] if chosen is None else [chosen]), None)


def python_headers() -> Path:
    """Returns the folder in which Triton looks for Python.h; Debian's own scheme names a folder without headers."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def _lacking(device: torch.device) -> str | None:
    """What this rank lacks to compile for its GPU, None if it lacks nothing."""
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
    """Makes torch.compile cache its code in PRETRAIN_CACHE, or in /var/tmp where that is on a network file system.

    A TORCHINDUCTOR_CACHE_DIR that the user sets takes precedence. If the folder cannot be written or locked, or others
    may write to it, a warning is given and torch's default is used.
    """
    torchs = default_cache_dir()  # torch sets the variable to it on importing its compiler
    if os.environ.get(_FOLDER, torchs) != torchs:
        return
    folder = None
    try:
        folder = _place()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(0, "others may write to it")
        with tempfile.TemporaryFile(dir=folder) as file:  # torch needs locks: two ranks compile the same, one waits
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user's home folder is unknown
        if ranks.local_rank() == 0:
            why = getattr(error, "strerror", None) or error
            place = folder or "PRETRAIN_CACHE"
            warn(f"{place}: compiled code is not kept there, the next start may compile again ({why})")
        return
    os.environ[_FOLDER] = str(folder)


def start_compilers() -> None:
    """Starts torch.compile's worker processes now, deaf to stop signals; torch would start them with the first block.

    SLURM signals every process of a job. A worker that a signal killed would end the run without a save.
    """
    from torch._inductor.async_compile import AsyncCompile  # here: a slow import that other runs do not need

    # Child processes inherit the blocked signals. SIGTERM is not blocked: torch ends its workers with it.
    blocked = set(STOP_SIGNALS) - {signal.SIGTERM}
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _place() -> Path:
    """The folder for compiled code; whether it is usable is not checked here."""
    name = f"compiled-{os.geteuid()}"  # one per user: a group may share the rest of the cache
    if not network_file_system(cache_folder()):
        return cache_folder() / name
    if _holds_programs(_OF_NODE):
        return _OF_NODE / f"vit-pretrain-{name}"
    return cache_folder() / f"{name}-{socket.gethostname()}"


def _holds_programs(folder: Path) -> bool:
    """Whether files in a folder may be executed, as Triton's libraries are: hardened machines forbid it."""
    try:
        return not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:  # it does not exist
        return False
