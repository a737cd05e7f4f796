"""Weights & Biases beside a run's own files: the same numbers, and no way to slow or end a training."""

import json
import os
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.log import RunLog
from pretrain.train import run, wandb_log
from pretrain.train.wandb_log import WandbLog, check_installed, run_id

HERE = find_spec("wandb")
needs_wandb = pytest.mark.skipif(HERE is None or HERE.origin is None, reason="wandb is not installed")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "tiny").mkdir()
    return tiny_config(tmp_path / "shards", tmp_path, log__wandb_project="trials")


class Stub(SimpleNamespace):
    """Stands for the package and for a run of it, and notes what it is given."""

    def __init__(self, **changes: Any) -> None:
        self.begun: dict[str, Any] = {}
        self.defined: list[Any] = []
        self.lines: list[dict[str, float]] = []
        self.url, self.offline, self.ended = "https://wandb.test/run", False, False
        super().__init__(**changes)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **begun: Any) -> "Stub":
        self.begun = begun
        return self

    def define_metric(self, *defined: Any, **more: Any) -> None:
        self.defined.append((defined, more))

    def log(self, line: dict[str, float]) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.ended = True


def logged(config: Config, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> float:
    """Has two lines of a run logged; returns the seconds that this took, without its end."""
    monkeypatch.setitem(sys.modules, "wandb", stub)
    folder = config.output / config.name
    log = RunLog(folder, 0, 20, WandbLog(config, folder))
    began = time.monotonic()
    log.scalars(5, {"train/loss": 1.5})
    log.scalars(5, {"train/loss": 1.25}, on_console=False)
    took = time.monotonic() - began
    log.close()
    return took


def test_all_numbers_are_handed_over(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our step as a number and the axis, so that a step that comes again is taken again; then its run is ended."""
    stub = Stub()
    logged(config, stub, monkeypatch)
    assert stub.lines == [{"step": 5, "train/loss": 1.5}, {"step": 5, "train/loss": 1.25}] and stub.ended
    assert stub.defined == [(("step",), {}), (("*",), {"step_metric": "step"})]
    asked = {key: stub.begun[key] for key in ("project", "entity", "name", "resume")}
    assert asked == {"project": "trials", "entity": None, "name": "tiny", "resume": "allow"}
    assert stub.begun["config"]["optim"]["lr"] == 2e-3


def fails(*_: Any, **__: Any) -> Any:
    raise ConnectionError("no route to host\nand more")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_fails_there_is_told_once(
    where: str, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training's own files have every line."""
    logged(config, Stub(**{where: fails}), monkeypatch)
    told = capsys.readouterr().err
    assert told.count("warning: ") == told.count("Weights & Biases: no route to host; off for the rest") == 1
    assert len((config.output / "tiny" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("where", ["init", "log"])
def test_what_hangs_there_holds_nothing_up(
    where: str, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line waits, however many there are; the end waits as long as it may, and tells."""
    monkeypatch.setattr(wandb_log, "END_S", 0.2)
    monkeypatch.setattr(wandb_log, "MAX_WAITING", 1)
    let_go = threading.Event()
    assert logged(config, Stub(**{where: lambda *_, **__: let_go.wait(60)}), monkeypatch) < 5
    let_go.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":  # it must not speak in another test
            thread.join(10)
    assert "Weights & Biases: not done after 0 s" in capsys.readouterr().err


def test_the_same_run_goes_on_there(tmp_path: Path) -> None:
    """One id for all starts of a run; a run of the same name that begins anew has its own."""
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "time": "1"}\n')
    first = run_id(tmp_path)
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "time": "1"}\n{"step": 5, "time": "2"}\n')
    assert run_id(tmp_path) == first and len(first) == 16
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "time": "3"}\n')
    assert run_id(tmp_path) != first


def test_without_wandb_it_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before the training; also where a folder of that name lies about, as wandb leaves it."""
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^log.wandb_project is trials, but wandb is not installed: pip install"):
        check_installed(config)
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ConfigError, match="is not installed"):
        check_installed(config)
    check_installed(changed(config, log__wandb_project=None))


def train_offline(config: Config) -> None:
    os.environ["WANDB_MODE"] = "offline"
    run.train(config)


@needs_wandb
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_offline(tmp_path: Path) -> None:
    """The real package writes every loss of metrics.jsonl into its file in the run's folder; a resumed run too."""
    changes: dict[str, Any] = {"log__wandb_project": "trials", "optim__schedule": "constant", "total_steps": 10}
    config = tiny_config(make_shards(tmp_path / "shards"), tmp_path, **changes)
    run_ranks(train_offline, 2, config)
    run_ranks(train_offline, 2, changed(config, total_steps=20))
    files = sorted((tmp_path / "tiny" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{run_id(tmp_path / 'tiny')}"}
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    written = [file.read_bytes() for file in files]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row, place in zip(rows, (0, 0, 1, 1)):
        assert repr(row["train/loss"]).encode() in written[place], row
