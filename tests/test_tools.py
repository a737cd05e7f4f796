"""Command lines: what is wrong with the words is told before what takes seconds to import."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from weights_on_disk import ROOT

from pretrain.models.convert import TARGETS
from pretrain.models.formats import NPZ_NAMINGS, WRITABLE
from pretrain.models.google import NAMINGS

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# What else a tool needs when the first path that it is given is not there.
MORE = {
    "convert": ["out", "--to", "timm"],
    "evaluate": ["--val", "v"],
    "finetune": ["--task", "pets"],
    "predict": ["x"],
    "report": [],
    "visualize": [],
}
IN_TURN = """
import json, runpy, sys
_, tool, calls = sys.argv
for words in json.loads(calls):
    sys.argv = [tool, *words]
    try: runpy.run_path(tool, run_name="__main__")
    except SystemExit as end: print("exit", end.code, flush=True)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("name", TOOLS)
def test_help_and_wrong_words_need_no_torch(name: str, tmp_path: Path) -> None:
    """--help, an option that there is not, a path that is not there: a fraction of a second each, where torch takes
    seconds."""
    calls = [["--help"], ["--no-such-option"]]
    if name in MORE:
        calls.append([str(tmp_path / "absent"), *MORE[name]])
    command = [sys.executable, "-c", IN_TURN, str(ROOT / "tools" / f"{name}.py"), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    *ended, imported = [line for line in done.stdout.splitlines() if line.startswith(("exit ", "True", "False"))]
    assert ended == ["exit 0", *["exit 2"] * (len(calls) - 1)] and imported == "False", done.stdout + done.stderr
    assert "usage: " in done.stdout and "Traceback" not in done.stderr
    if name in MORE:
        assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent'}: not found; expected ")


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "pretrain.plan.choose": raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_path("%s", run_name="__main__")
"""


def test_an_interrupt_of_imports_is_a_word() -> None:
    """Ctrl-C before a command has read its first option."""
    code = INTERRUPTED % (ROOT / "tools" / "plan.py")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_formats_are_named_once_for_all() -> None:
    """What a command line offers before torch is imported is what there is."""
    assert WRITABLE == tuple(TARGETS) and set(NPZ_NAMINGS) < NAMINGS.keys()


def test_a_terminal_hears_that_it_takes_seconds() -> None:
    """Nothing within two seconds, and nothing where nobody watches."""
    program = "import time; from pretrain import cli\nwith cli.loading(): time.sleep(float({}))"
    for seconds, watched in ((0, True), (2.5, True), (2.5, False)):
        command = [sys.executable, "-c", program.format(seconds)]
        if not watched:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
            assert done.stderr == "" and done.returncode == 0
            continue
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stderr=theirs, cwd=ROOT)
        os.close(theirs)
        said = b""
        try:
            while block := os.read(ours, 1000):
                said += block
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(ours)
        assert process.wait(timeout=60) == 0 and (b"loading torch" in said) == (seconds > 2), said


COMMAND = """
import sys
from pretrain import cli
from pretrain.errors import StorageError
def main():
    if sys.argv[1] == "fail":
        raise StorageError("the disk is away")
    print("done")
cli.run(main)
"""


@pytest.mark.parametrize(
    ("outputs", "ends", "code"),
    [
        (">&-", "well", 0),
        ("| (exec <&-; sleep 1)", "well", 0),
        (">/dev/full", "well", 75),
        (">&- 2>&-", "fail", 75),
        ("2>&1 | (exec <&-; sleep 1)", "fail", 75),
        ("2>/dev/full", "fail", 75),
    ],
)
def test_outputs_that_nobody_takes_change_no_exit_code(outputs: str, ends: str, code: int, tmp_path: Path) -> None:
    """Closed, gone, or on a full disk: only what a disk did not take of a result is a failure of its own."""
    command = f'( "$0" -c "$1" {ends}; echo $? >"$2" ) {outputs}'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    subprocess.run(
        ["bash", "-c", command, sys.executable, COMMAND, tmp_path / "code"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (tmp_path / "code").read_text() == f"{code}\n"
