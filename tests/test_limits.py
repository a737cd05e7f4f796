"""Too few open files, too little memory: one line before the loader processes start."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster import limits
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
