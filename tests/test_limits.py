"""Too few open files, too little memory: one line before the loader processes start."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import make_shards, tiny_config

from pretrain.cluster import limits
from pretrain.cluster.local import on_cpu
from pretrain.config import config_to_dict
from pretrain.errors import StorageError

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import resource, sys
from pretrain.cluster.limits import check_open_files
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    check_open_files(100, "many things")
except ValueError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard", "told"), [(64, 64, True), (64, 200, False), (200, 200, False)])
def test_open_files(soft: int, hard: int, told: bool) -> None:
    """The soft limit is raised; where the hard one is too low, the line names limit, need and the way out."""
    words = [sys.executable, "-c", CODE, str(soft), str(hard)]
    lines = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == str(hard) and len(lines) == 1 + told
    if told:
        assert (
            lines[0].startswith("open files: the limit is 64, ") and "100 more are needed for many things" in lines[0]
        )
        assert "ulimit -n 4096" in lines[0]


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free here is enough for a page, and not for a thousand times as much as it is; unknown is no reason."""
    free = limits.free_memory_bytes()
    assert free is not None and free >= resource.getpagesize()
    limits.check_memory(resource.getpagesize(), "a page")
    with pytest.raises(StorageError, match="memory: .* GB are free here, .* GB are needed for all of it; ask for more"):
        limits.check_memory(1000 * free, "all of it")
    monkeypatch.setattr(limits, "free_memory_bytes", lambda: None)
    limits.check_memory(1 << 60, "all of it")


def test_memory_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of the job and of its step count, where the process's own group has none; what it read is given back."""
    groups = [tmp_path / "job" / "step" / "task", tmp_path / "job" / "step", tmp_path / "job", tmp_path]
    groups[0].mkdir(parents=True)
    for group, most in zip(groups, ("max", "9000000", "8000000")):
        for name, text in {"max": most, "current": "5000000", "stat": "anon 4000000\nactive_file 1000000"}.items():
            (group / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(limits, "_control_groups", lambda: groups)
    assert limits.free_memory_bytes() == 4_000_000
    monkeypatch.undo()
    assert all(group.is_relative_to("/sys/fs/cgroup") for group in limits._control_groups())


def may_mount() -> bool:
    """Whether this user may have a /dev/shm of its own."""
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64m", "none", "/dev/shm"]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        ("mount -t tmpfs -o size=64m none /dev/shm", 75, "/dev/shm: the shared memory has 67.1 MB free; 4 loader proc"),
        ("ulimit -n 64", 2, "open files: the limit is 64, "),
    ],
)
def test_a_run_on_a_small_machine_is_told_at_once(shell: str, code: int, told: str, tmp_path: Path) -> None:
    """Docker's default of shared memory, a low limit of open files, under the real command: one line, nobody waits."""
    if "mount" in shell and not may_mount():
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    config = tiny_config(
        make_shards(tmp_path / "squares"), tmp_path, total_steps=1000, data__workers=4, data__prefetch=128
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    own = ["unshare", "--mount"] if "mount" in shell else []
    words = [*own, "bash", "-c", f'{shell} && exec "$@"', "bash", sys.executable, "launch/pretrain.py", "--config"]
    words.append(str(tmp_path / "tiny.yaml"))
    environment = {**os.environ, **on_cpu(1)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(errors) == 1 and errors[0].startswith(f"error: {told}"), done.stderr
