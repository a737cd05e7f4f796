"""Limits of this process, open files and memory, compared with what it will need before they are reached."""

import os
import resource
from pathlib import Path

from pretrain.errors import StorageError, UserError

_GROUPS = Path("/sys/fs/cgroup")


def check_open_files(needed: int, why: str) -> None:
    """Lifts the soft limit to the hard one. Raises UserError when that does not allow `needed` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    now = len(os.listdir("/dev/fd")) if Path("/dev/fd").is_dir() else 0
    if hard not in (resource.RLIM_INFINITY, -1) and hard < now + needed:
        raise UserError(
            f"open files: the limit is {hard}, {now} are open, and {needed} more are needed for {why}; raise it "
            "(ulimit -n 4096, LimitNOFILE=, docker run --ulimit nofile=4096), or lower data.workers or data.prefetch"
        )


def check_memory(needed: int, why: str) -> None:
    """Raises StorageError when this machine, or this job's part of it, has fewer than `needed` bytes free."""
    free = free_memory_bytes()
    if free is not None and free < needed:
        raise StorageError(
            f"memory: {free / 1e9:.1f} GB are free here, {needed / 1e9:.1f} GB are needed for {why}; ask for more, or "
            "lower data.workers or data.prefetch"
        )


def free_memory_bytes() -> int | None:
    """Returns the bytes that this process may still use, by the machine and by its control groups; None: unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *(_free_in(group, free) for group in _control_groups())])


def _control_groups() -> list[Path]:
    """This process's control group and its parents: SLURM limits job and step, not the task that a process is in."""
    try:
        own = _GROUPS / Path("/proc/self/cgroup").read_text().split("::", 1)[1].strip().lstrip("/")
    except (OSError, IndexError):  # no control groups, or version 1
        return []
    return [group for group in (own, *own.parents) if group.is_relative_to(_GROUPS)]


def _free_in(group: Path, unlimited: int) -> int:
    """The bytes that a control group has left, including what can be reclaimed, such as cached shards."""
    try:
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the limit is "max", or this is the root group
        return unlimited
    return most - used + sum(int(cached.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
