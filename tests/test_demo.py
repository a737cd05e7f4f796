"""What `make demo` runs, in small: data, training on two ranks, conversion, evaluation, fine-tuning, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import processes_of, whole_session
from weights_on_disk import ROOT, load_tool

SAVES = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: None)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(1)
open(sys.argv[1], "w").write("saved")
"""


def test_an_interrupt_lets_a_command_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both: the demo ends when the command that it runs has saved and ended."""
    demo = load_tool("demo")
    monkeypatch.setattr(demo, "environment", lambda **_: {})  # which imports torch
    with pytest.raises(KeyboardInterrupt):
        demo._run(sys.executable, "-c", SAVES, tmp_path / "state")
    assert (tmp_path / "state").read_text() == "saved"


def test_sigterm_leaves_no_command_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container or a scheduler sends it to the demo alone: what runs beside its steps is asked to stop."""
    demo = load_tool("demo")
    monkeypatch.setattr(demo, "environment", lambda **_: {})  # which imports torch
    later = "import sys, time; time.sleep(3); open(sys.argv[1], 'w')"
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            with demo._beside(tmp_path / "log", [sys.executable, "-c", later, tmp_path / "lived on"]):
                os.kill(os.getpid(), signal.SIGTERM)
        assert not (tmp_path / "lived on").exists()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("demo", "tests", "shown"),
    [
        ("echo broken; exit 3", "sleep 0.5; exit 1", True),
        ("echo fine", "sleep 0.5; exit 1", False),
        ("echo fine; exec sleep 60", "sleep 0.5; exit 1", False),
        ("echo broken; exit 3", "exit 0", True),
        (
            "echo fine; exec sleep 60",
            "sleep 0.5; kill -INT 0; exec sleep 60",
            False,
        ),  # Ctrl-C, which the demo is deaf to
    ],
)
def test_the_demo_beside_the_tests(demo: str, tests: str, shown: bool, tmp_path: Path) -> None:
    """Where it failed its words are shown, whatever came of the tests; with .ci/run it has ended."""
    script, programs = tmp_path / ".ci" / "run", tmp_path / "bin"
    script.parent.mkdir()
    shutil.copyfile(ROOT / ".ci" / "run", script)
    programs.mkdir()
    make = f"case $1 in demo) {demo};; test-all) {tests};; esac"
    installed = "git python3 chromium strace slurmctld slurmd sbatch ip".split()  # nothing is installed
    for name, does in {"make": make, **dict.fromkeys(installed, "exit 0")}.items():
        (programs / name).write_text(f"#!/bin/bash\n{does}\n")
        (programs / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    words, pipe = ["bash", str(script)], subprocess.PIPE
    process = subprocess.Popen(words, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    with whole_session(process):
        told, errors = process.communicate(timeout=30)
        assert process.returncode in (1, -signal.SIGINT) and ("broken" in told) == shown and not errors
        until = time.monotonic() + 5
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not processes_of(process.pid)


@pytest.mark.slow
@pytest.mark.long  # `make demo` is what is checked before a change lands
@pytest.mark.timeout(600)
def test_demo_from_data_to_report(tmp_path: Path) -> None:
    """Every step ends well, from another folder too, and prints where the table, the curves and the weights are."""
    small = ["--images", "600", "--finetune-steps", "40", "total_steps=4", "optim.warmup_steps=1", "data.held_out=100"]
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--out", "out", *small]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "runs" / "demo"
    paths = [
        run / "evaluation" / "results.md",
        tmp_path / "out" / "report" / "curves.png",
        tmp_path / "out" / "report" / "report.html",
        tmp_path / "out" / "weights",
    ]
    assert all(path.exists() and str(path) in result.stdout for path in paths)
    rows = json.loads((run / "evaluation" / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"trained", "random weights", "raw pixels"}
    assert {row["n"] for row in rows} == {1000}
    pixels = next(row["value"] for row in rows if (row["model"], row["metric"]) == ("raw pixels", "10-shot"))
    assert pixels > 0.8, "raw pixels of real handwriting: known beforehand"
    for name in ("digits_from_pretrained_weights", "digits_from_random_weights"):
        done = json.loads((run.parent / name / "DONE").read_text())
        assert done["step"] == 40 and done["val/images"] == 1000
        assert name in (tmp_path / "out" / "report" / "report.md").read_text()
