"""What a training on a CPU has the C library do with freed memory: counted in pages that the kernel had to give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.engine import host_memory

ROOT = Path(__file__).resolve().parents[1]
TOUCHES = """
import ctypes, resource, torch
from pretrain.engine.host_memory import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "mallopt"):
    raise SystemExit("no mallopt")
{keep}
for number in range(15):
    if number == 12:  # the first ones take the memory
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty({elements}).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_given(keep: bool, num_bytes: int, **environment: str) -> int:
    """Returns how many pages three tensors of so many bytes took from the kernel, after twelve before them."""
    code = TOUCHES.format(keep="keep_freed_memory()" if keep else "", elements=num_bytes // 4)
    others = {name: value for name, value in os.environ.items() if name not in host_memory._AS_WISHED}
    environment = others | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "no mallopt" in result.stderr:
        pytest.skip("this C library has no mallopt")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_what_a_step_frees_the_next_one_has() -> None:
    """Three tensors of 100 MB, one after the other: without it the kernel gives each one's pages anew."""
    pages = 3 * (100 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert pages_given(True, 100 << 20) < pages // 100 < pages_given(False, 100 << 20)


def test_the_environment_comes_first() -> None:
    """Who sets glibc's memory otherwise has it so."""
    pages = 3 * (20 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert pages_given(True, 20 << 20, MALLOC_MMAP_THRESHOLD_="131072") > pages // 100
