"""A short run of the fuzzing tool over its targets: nothing comes out but what is written for users, within limits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.py"
INPUTS = 6  # of each target: half hand-made, half changed at random, always the same ones


def findings(tmp_path: Path, *arguments: object) -> list[tuple[str, str]]:
    """Runs the tool and returns its findings: target and what is told of it."""
    command = [sys.executable, str(RUN), "--quick", "--found", str(tmp_path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    found = re.findall(r"^(\w+): (.* first input \d+)$", done.stdout, flags=re.MULTILINE)
    assert done.returncode == int(bool(found)), done.stderr[-3000:]
    return found


@pytest.mark.timeout(1000)  # a minute of processor time, on a machine that may be busy
def test_damaged_and_hostile_files_are_used_or_refused(tmp_path: Path) -> None:
    """No traceback, no hang above 2 s, no memory above 300 MB, no signal: repeat with the command of tests/fuzz."""
    assert findings(tmp_path, "--inputs", INPUTS) == []


def test_the_tool_finds_each_kind_of_fault(tmp_path: Path) -> None:
    """A reader that is broken in each way is found in each way; what it uses or refuses in one line is not told."""
    told = [text.partition(",")[0] for _, text in findings(tmp_path, "--inputs", 17, "--targets", "broken")]
    kinds = [text.partition(" at ")[0] for text in told]
    assert kinds == ["KeyError", "several lines", "memory", "memory", "time", "SIGSEGV", "exit 0"]
    assert len(list(tmp_path.iterdir())) == len(kinds)
