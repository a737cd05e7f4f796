"""Releases of torch and DeepSpeed: what was tried is silent, what was not is told, what cannot be read is refused."""

import contextlib
import io
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.loader import train_batches
from pretrain.engine.versions import STEP_OF, TESTED_DEEPSPEED, TESTED_TORCH, reading_inside, untried
from pretrain.errors import UserError
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    shards = make_shards(tmp_path_factory.mktemp("shards") / "squares")
    return tiny_config(shards, Path("unused"))


@pytest.mark.parametrize("release", TESTED_DEEPSPEED)
@pytest.mark.parametrize("torch_release", TESTED_TORCH)
def test_what_was_tried_is_silent(monkeypatch: pytest.MonkeyPatch, torch_release: str, release: str) -> None:
    """Whatever the patch release and the build of torch are."""
    monkeypatch.setattr(torch, "__version__", f"{torch_release}.1+cu128")
    monkeypatch.setattr(deepspeed, "__version__", release)
    assert untried(on_gpu=False) is None


@pytest.mark.parametrize(("torch_release", "release"), [("2.12.0", STEP_OF), ("2.15.0", "0.99.1"), ("2.1.0", STEP_OF)])
def test_what_was_not_is_told(monkeypatch: pytest.MonkeyPatch, torch_release: str, release: str) -> None:
    """Both releases by name, and those that were tried."""
    monkeypatch.setattr(torch, "__version__", torch_release)
    monkeypatch.setattr(deepspeed, "__version__", release)
    told = untried(on_gpu=False) or ""
    assert told.startswith(f"torch {torch_release} with deepspeed {release} has not been tried") and STEP_OF in told


def test_gpus_have_run_other_releases_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPUs have tried is no proof for GPUs."""
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    assert untried(on_gpu=False) is None
    assert (untried(on_gpu=True) or "").endswith("tried on GPUs are torch 2.11 with deepspeed " + STEP_OF)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert untried(on_gpu=True) is None


def loss_of_a_step(config: Config, method: str | None) -> tuple[float, str] | str:
    """With a DeepSpeed of another release, whose optimizer lacks a method: loss and printed text, or an error."""
    deepspeed.__version__ = "0.99.1"
    device = ranks.start(60)
    data = open_data(config)
    if method is not None:
        delattr(DeepSpeedZeroOptimizer, method)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            engine = build_engine(config, data, device, from_scratch=True)
    except UserError as error:
        return str(error)
    batch = next(train_batches(data.train, data.order, engine.plan, config, 0))
    return engine.train_step(batch, lr=1e-2).sums.tolist()[0], printed.getvalue()


def test_an_inside_that_can_be_read_trains(config: Config) -> None:
    """Without the light step, and with one line."""
    loss, printed = run_ranks(loss_of_a_step, 1, config, None)[0]
    assert loss > 0 and printed.count("has not been tried") == 1


def test_an_inside_that_cannot_be_read_is_refused(config: Config) -> None:
    """At the start, with what to install: also what only a resume would have read."""
    told = run_ranks(loss_of_a_step, 1, config, "_lazy_init_hp_params_optimizer_state")[0]
    assert isinstance(told, str) and "deepspeed 0.99.1: its inside cannot be read (AttributeError" in told
    assert told.endswith(f"install deepspeed=={STEP_OF}") and "\n" not in told


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    """In a release that was tried."""
    with pytest.raises(AssertionError), reading_inside():
        raise AssertionError("ours")
