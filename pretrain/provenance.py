"""What decides numbers besides the config: versions of packages, the commit."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "timm", "omegaconf", "numpy", "pillow")


@cache  # described once: what is on the disk may change while the process runs, or fail to be read
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide numbers, "unknown" where they cannot be read."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, OSError):
        return "unknown"


def commit() -> str | None:
    """The checked-out commit, "+changes" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if head.returncode == 0 else None
