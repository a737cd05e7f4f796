"""Logs: nothing twice after a resume, nothing lost by a kill, and a full disk for logs does not end the training."""

import errno
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain import log as log_module
from pretrain.config import Config
from pretrain.gpus import peak_flops
from pretrain.log import JsonLines, RunLog, duration, rewind, sync
from pretrain.train import meter, run


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


@pytest.mark.parametrize(
    ("text", "kept", "last"),
    [
        (b"", b"", 2),
        (b"torn", b"", 2),
        (b'{"step": 1}', b"", 2),  # torn behind its last letter: nobody knows
        (b'{"step": 3}\n{"step": 4}\n', b"", 4),
        (b'{"step": 1}\n', b'{"step": 1}\n', 2),
        (b'{"step": 2}\n{"step": 2}\n{"step": 9}\n', b'{"step": 2}\n{"step": 2}\n', 9),
        (
            b'{"step": 2, "x": "' + b"long" * 50 + b'"}\n{"step": 3}\n',
            b'{"step": 2, "x": "' + b"long" * 50 + b'"}\n',
            3,
        ),
        (b'what\n{"step": 2}\n\n', b'what\n{"step": 2}\n', 2),  # behind the last line that counts nothing is read
        (b'\n\n{"step": 3}\n', b"", 3),
    ],
)
def test_rewind_reads_from_the_end(
    text: bytes, kept: bytes, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a block, smaller than a line or as large as the file: the same cut, in the same file."""
    path = tmp_path / "metrics.jsonl"
    for size in (1, 2, 3, 12, 13, max(1, len(text)), 1 << 20):
        monkeypatch.setattr(log_module, "_BLOCK_BYTES", size)
        path.write_bytes(text)
        before = path.stat().st_ino
        assert (rewind(path, 2), path.read_bytes(), path.stat().st_ino) == (last, kept, before), size


def test_rewind_does_not_read_the_whole_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 steps logged, three of them to be dropped: a block is read, a few lines are looked at."""
    path, looked = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(100_000)))
    monkeypatch.setattr(log_module, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(log_module, "step_of", lambda line: looked.append(line) or json.loads(line)["step"])
    assert rewind(path, 99_996) == 99_999
    assert path.read_bytes().endswith(b'\n{"step": 99996}\n') and len(looked) == 4


UNUSABLE = [
    b'{"loss": 1}',  # no step
    b"[1, 2]",
    b"7",
    b"{",
    b"\xff\xfe",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b'{"step": -1}',
    b'{"step": Infinity}',
    b'{"step": 1e400}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1, "x": ' + b"[" * 100_000 + b"}",
    b'{"step": 1, "x": ' + b"[" * 100 + b"]" * 100 + b"}",
    b"",
]


def test_rewind_leaves_out_what_is_no_line_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands there, a run can be resumed: a warning with the number, the others stay byte for byte."""
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": NaN}\n{"step": 2}\n'
    path.write_bytes(good + b"\n".join(UNUSABLE) + b'\n{"step": 3}\n{"step": 2, "lo')
    assert rewind(path, 2) == 3
    assert path.read_bytes() == good
    assert f"metrics.jsonl: {len(UNUSABLE)} damaged lines left out" in capsys.readouterr().err


def test_rewind_that_cannot_be_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder or a link in its place, or no room for the new file: the run goes on, warned."""
    (tmp_path / "other").write_text('{"step": 9}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "other")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("link.jsonl", "folder.jsonl"):
        rewind(tmp_path / name, 2)
        assert f"{name}: " in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == '{"step": 9}\n'


def test_nothing_is_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder that somebody else made could lead into any file."""
    (tmp_path / "other").write_text("precious")
    for name, target in (("metrics.jsonl", "other"), ("new.jsonl", "not there yet")):
        (tmp_path / name).symlink_to(tmp_path / target)
        JsonLines(tmp_path / name).append({"step": 1})
        assert name in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == "precious" and not (tmp_path / "not there yet").exists()


def test_a_line_that_did_not_fit_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a line is taken back, so that the next one is whole; the end tells how many lines were lost."""
    log = JsonLines(tmp_path / "a.jsonl")
    log.append({"step": 1})
    log.append()
    real, room = os.write, [15]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(descriptor, data[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        log.append({"step": 2}, {"step": 2})  # the first one would fit
        log.append({"step": 3})
    log.append({"step": 4})
    assert (tmp_path / "a.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'
    log_module.tell_lost_lines()
    log_module.tell_lost_lines()
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1 and told.count("a.jsonl: 3 lines could not be written") == 1


def test_logs_that_cannot_be_listed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before each save; it must not end a training."""

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", fail)
    sync(tmp_path)
    assert "Input/output error" in capsys.readouterr().err


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
    with (folder / "stderr").open("w") as sys.stderr:
        log = RunLog(folder, 0, 1000)
        for step in range(1000):
            log.scalars(step, {"train/loss": 1.0 / (step + 1)})
            log.sync()
        log.close()
    return len(list(folder.glob("tensorboard/*")))


def test_tensorboard_and_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """Files may grow to 8 kB: TensorBoard and metrics.jsonl stop there, the run goes on; each is told in a line."""
    assert run_ranks(log_on_a_full_disk, 1, tmp_path) == [1]
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 8_000
    told = (tmp_path / "stderr").read_text().splitlines()
    assert len(told) == 3 and all(line.startswith("warning: ") for line in told), told
    assert "lines could not be written" in told[2]


def test_tensorboard_that_cannot_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where its folder should be: the training goes on without."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # which RunLog wraps
    (tmp_path / "tensorboard").write_text("")
    log = RunLog(tmp_path, 0, 10)
    log.scalars(5, {"train/loss": 1.0})
    log.close()
    assert "tensorboard: " in capsys.readouterr().err and (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m05s"), (75.4, "1m15s"), (7260, "2h01m")])
def test_duration(seconds: float, text: str) -> None:
    """Times are told as a person would."""
    assert duration(seconds) == text


def test_the_console_shows_what_tables_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shares in per cent, memory in GB; the files keep numbers."""
    values = {"train/loss": 1.23456, "train/top1": 0.1234, "train/lr": 1e-3, "train/data_wait": 0.02}
    values |= {"train/memory_gb": 12.34, "train/tflop_per_s": 400.0, "train/bad_samples": 0, "train/skipped_steps": 2}
    values |= {"train/mfu": 0.40446}
    log = RunLog(tmp_path, 0, 100)
    log.scalars(50, values)
    log.scalars(50, {"val/top1": 0.5, "val/fewshot_5": 0.25, "val/images": 101, "val/loss": 2.0})
    log.close()
    training, validation = capsys.readouterr().out.splitlines()
    shown = "loss 1.235  top1 12.34%  lr 0.001  data_wait 2.00%  memory 12.3 GB  skipped_steps 2  mfu 40.4%"
    assert training.startswith(f"step 50/100 (50.0%)  {shown}  left "), training
    assert "  val/top1 50.00%  val/fewshot_5 25.00%  val/images 101  val/loss 2  left" in validation
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["train/top1"] == 0.1234


def train_on(gpu: str, config: Config) -> None:
    """A run on CPUs, whose meter takes them for such a GPU."""
    meter.gpu_name = lambda device: gpu
    run.train(config)


@pytest.mark.parametrize(("gpu", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GeForce RTX 4090", None)])
def test_the_share_of_the_peak_is_logged(gpu: str, peak: float | None, tmp_path: Path) -> None:
    """Each line of two ranks' run has it where the GPU's peak is known: their FLOP/s by twice that peak."""
    config = tiny_config(make_shards(tmp_path / "shards"), tmp_path, total_steps=10)
    run_ranks(train_on, 2, gpu, config)
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(("train/mfu" in row) == (peak is not None) for row in rows)
    for row in rows if peak else []:
        assert row["train/mfu"] == pytest.approx(1e12 * row["train/tflop_per_s"] / (2 * peak))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_of_gpus(name: str, peak: float | None) -> None:
    """By the names that torch gives them; a slower form of the same name is not taken for the sheet's."""
    assert peak_flops(name) == peak


def test_a_line_that_nobody_takes_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing flushes stdout before it starts a process: what is left over there would end the run."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(log_module.ranks, "is_main", lambda: True)
        log_module.say("a line")
        stream.flush()
