"""What determines results besides the config: versions of packages, the commit, the machine."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "timm", "omegaconf", "numpy", "pillow")


UNKNOWN = "unknown"  # in place of a version that cannot be read


@cache  # read once, at the start: a disk that fails later is no reason to end training
def _versions() -> tuple[tuple[str, str], ...]:
    return ("python", platform.python_version()), *((name, _version(name)) for name in _PACKAGES)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect results; UNKNOWN where one cannot be read."""
    return dict(_versions())


def _version(name: str) -> str:
    try:
        return metadata.version(name) or UNKNOWN
    except (OSError, metadata.PackageNotFoundError, UnicodeError, KeyError):
        return UNKNOWN


@cache
def processor() -> str:
    """Returns the name of this machine's CPU, such as "AMD EPYC 7763 64-Core Processor"; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine() or UNKNOWN


@cache
def commit() -> str | None:
    """The checked-out commit, "+changes" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 10}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if head.returncode == 0 else None
