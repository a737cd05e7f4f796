"""Logs: nothing twice after a resume, nothing lost by a kill, and a full disk for logs does not end the training."""

import json
import resource
import signal
from pathlib import Path

import pytest
from ranks import run_ranks

from pretrain.log import JsonLines, RunLog, duration, rewind


def test_rewind_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    """What a killed run wrote after its checkpoint goes; what it wrote before stays, byte for byte."""
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1 / step})
    expected = path.read_bytes().splitlines(keepends=True)[:2]
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    rewind(path, 2)
    assert path.read_bytes() == b"".join(expected)


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    """A line can be read by others when append returns."""
    log = JsonLines(tmp_path / "a.jsonl")
    log.append({"step": 1})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"step": 1}


def test_a_full_disk_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full refuses every byte: one warning, no exception."""
    log = JsonLines(Path("/dev/full"))
    for step in range(3):
        log.append({"step": step})
    assert capsys.readouterr().err.count("No space left on device") == 1


def log_on_a_full_disk(folder: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    log = RunLog(folder, 0, 1000)
    for step in range(1000):
        log.scalars(step, {"train/loss": 1.0 / (step + 1)})
        log.sync()
    log.close()
    return len(list(folder.glob("tensorboard/*")))


def test_tensorboard_and_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """Files may grow to 8 kB: TensorBoard and metrics.jsonl stop there, the run goes on."""
    assert run_ranks(log_on_a_full_disk, 1, tmp_path) == [1]
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 8_000


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m05s"), (75.4, "1m15s"), (7260, "2h01m")])
def test_duration(seconds: float, text: str) -> None:
    """Times are told as a person would."""
    assert duration(seconds) == text
