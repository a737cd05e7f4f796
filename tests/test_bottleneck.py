"""What bounds a run is named: eight slow-downs are planted, one in each stage, and each is found."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing.reductions as reductions
from ranks import run_ranks
from tiny import make_shards, tiny_config
from weights_on_disk import load_tool

from pretrain.benchmark import bottleneck
from pretrain.benchmark.bottleneck import Costs, diagnosis, images_per_s, stage_costs
from pretrain.benchmark.cells import cell_rows
from pretrain.benchmark.measure import Plan
from pretrain.benchmark.parts import PartClock, watch_collectives, watch_engine
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data import loader
from pretrain.data.loader import Batch
from pretrain.data.order import plan_batch
from pretrain.engine.step import Engine
from pretrain.models.build import build_model
from pretrain.train.datasets import open_data

SLOW_S = 0.12  # a batch of four images; the tiny run's own stages take a few milliseconds


def slowed(function: Any, seconds: float) -> Any:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def planted_and_named(config: Config) -> dict[str, str]:
    """The stage that is named for each stage that is slowed down, and for none."""
    device, data, clock = ranks.start(60), open_data(config), PartClock(gpu=False)
    reduce, waits = dist.all_reduce, {"seconds": 0.0}
    dist.all_reduce = lambda *args, **kwargs: slowed(reduce, waits["seconds"])(*args, **kwargs)  # below what is watched
    watch_collectives(clock)
    engine = Engine(build_model(config.model, data.num_classes), config, plan_batch(4, 1, 4), device)
    watch_engine(clock, engine)
    inside = engine._engine
    places: dict[str, tuple[Any, str]] = {
        "disk": (loader, "read_sample"),
        "decode": (loader, "decode"),
        "augmentation": (loader, "train_image"),
        "hand_over": (reductions, "storage_from_cache"),
        "copy": (Batch, "to"),
        "device": (inside.module, "forward"),
        "optimizer": (inside.optimizer, "step"),
        "collectives": (waits, "seconds"),
    }
    named = {}
    for stage, (owner, name) in places.items():
        with pytest.MonkeyPatch.context() as patch:
            if stage == "collectives":
                patch.setitem(waits, "seconds", SLOW_S)
            else:
                calls = {"disk": 4, "decode": 4, "augmentation": 4, "hand_over": 6}.get(stage, 1)  # of a batch
                patch.setattr(owner, name, slowed(getattr(owner, name), SLOW_S / calls))
            costs = stage_costs(config, data, engine, clock)
        named[stage] = diagnosis(costs, workers=1, cores=2, on_gpu=False)["bound_by"]
    return named


@pytest.mark.slow
def test_eight_planted_slow_downs_are_named(tmp_path: Path) -> None:
    """Each by its own stage, with the real loader, its worker process and the real engine."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, data__global_batch=4, data__workers=1)
    named = run_ranks(planted_and_named, 1, config)[0]
    assert len(named) == 8 and all(stage == found for stage, found in named.items()), named


def test_batches_are_pinned_where_a_run_pins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor, on a GPU alone: from other memory the copy takes longer than in a run."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, data__global_batch=4)
    pinned: list[torch.Tensor] = []
    trained: list[Batch] = []
    engine: Any = SimpleNamespace(
        plan=plan_batch(4, 1, 4), device=torch.device("cpu"), train_step=lambda batch, lr: trained.append(batch)
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    for gpu in (False, True):
        monkeypatch.setattr(ranks, "has_gpu", lambda gpu=gpu: gpu)
        stage_costs(config, open_data(config), engine, PartClock(gpu=False))
        assert len(pinned) == 6 * gpu
        assert all(any(found is own for own in pinned) == gpu for found in trained[-1][:4])


@pytest.mark.parametrize("workers", [0, 1])
def test_stages_have_the_threads_of_who_runs_them(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader process has one, a rank without loader processes its own; behind the stages it has them again."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, data__global_batch=4, data__workers=workers)
    decode, found, before = loader.decode, set(), torch.get_num_threads()
    monkeypatch.setattr(loader, "decode", lambda *args: found.add(torch.get_num_threads()) or decode(*args))
    engine: Any = SimpleNamespace(plan=plan_batch(4, 1, 4))
    try:
        torch.set_num_threads(2)
        bottleneck._loaded(config, open_data(config), engine)
        assert found == {1 if workers else 2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def run_bottleneck(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """The options that the command gives its cells."""
    asked: list[dict[str, Any]] = []
    row = {"images_per_s": 1.0, "cores": 1, "bound_by": "disk", "way_out": "none"}
    tool = load_tool("benchmark")
    monkeypatch.setattr(tool, "last_row", lambda what, cell, name: asked.append(cell["options"]) or row)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--bottleneck", "--data", "set", *arguments])
    tool.main()
    return asked


def test_what_is_measured_is_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled as engine.compile=auto has it, unless told otherwise; ranks share the machine's cores."""
    (own,) = run_bottleneck(monkeypatch)
    assert (own["compile"], own["ranks"]) == ("auto", 1)
    both = run_bottleneck(monkeypatch, "--compile", "on", "off", "--ranks", "4")
    assert [(own["compile"], own["ranks"]) for own in both] == [(True, 4), (False, 4)]


@pytest.mark.slow
def test_ranks_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: a rank of as many as there are cores has one of them, to compute and to load."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {"batch": 4, "warmup": 1, "steps": 2, "precision": "fp32", "image_size": 32}
    options |= {"data": str(make_shards(tmp_path / "squares")), "workers": 1, "zero_stage": 1, "compile": "auto"}
    options |= {"checkpoint_activations": True, "fp8": False}
    rows, failure = cell_rows("bottleneck", {"model": "Ti/16", "options": options | {"ranks": cores}})
    assert failure is None
    assert (rows[0]["cores"], rows[0]["ranks"], rows[0]["compile"]) == (1, cores, False)
    assert rows[0]["device"] == "cpu, 1 threads" and max(rows[0]["predicted_images_per_s"], key=int) == "1"


def test_the_engine_s_keys_reach_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is the run with them."""

    class Told(Exception):
        pass

    def stop(*_: Any, **engine: Any) -> None:
        raise Told(engine["checkpoint_activations"], engine["fp8"])

    plan = Plan(torch.device("cpu"), "a CPU", batch=4, warmup=1, steps=2)
    monkeypatch.setattr(bottleneck, "plan_cell", lambda options: plan)
    monkeypatch.setattr("pretrain.benchmark.measure.cell_config", stop)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (options,) = run_bottleneck(monkeypatch, "--fp8", "--checkpoint-activations")
    with pytest.raises(Told, match="True, True"):
        next(bottleneck.measure("Ti/16", options))


COSTS = Costs(
    disk=1e-3, decode=4e-3, augmentation=1e-3, hand_over=1e-4, copy=1e-4, device=1e-3, optimizer=0, collectives=0
)


def test_rates_for_other_numbers_of_workers() -> None:
    """Six milliseconds in a worker, one on a GPU's rank, which hands over and copies beside it: workers add up, until
    cores or the rank bound."""
    rates = {workers: images_per_s(COSTS, workers, 8, on_gpu=True) for workers in (0, 1, 2, 4, 7, 16)}
    assert rates == pytest.approx({0: 1 / 7e-3, 1: 1 / 6e-3, 2: 2 / 6e-3, 4: 4 / 6e-3, 7: 1 / 1e-3, 16: 1 / 1e-3})
    assert images_per_s(COSTS._replace(copy=2e-3), 16, 8, on_gpu=True) == pytest.approx(1 / 2e-3)  # the copy bounds
    assert images_per_s(COSTS, 64, 2, on_gpu=True) == pytest.approx(2 / 5e-3)  # two cores decode and crop
    assert images_per_s(COSTS, 64, 5, on_gpu=False) == pytest.approx(
        1 / 2.2e-3
    )  # 1.2 of the rank, 5 / 5 of the workers
    assert images_per_s(COSTS, 1, 5, on_gpu=False) == pytest.approx(1 / 6e-3)  # the worker bounds
    assert diagnosis(COSTS, 64, 5, on_gpu=False)["bound_by"] == "device"
    assert diagnosis(COSTS, 64, 2, on_gpu=False)["bound_by"] == "decode"
    found = diagnosis(COSTS, 1, 8, on_gpu=True)
    assert found["bound_by"] == "decode" and found["way_out"].startswith(
        "data.workers=8 (1,000.0 images/s); then shrink"
    )
    assert diagnosis(COSTS, 8, 8, on_gpu=True)["bound_by"] == "device"
    hidden = COSTS._replace(copy=1.5e-3, optimizer=1e-3)  # by a step of 2 ms
    assert diagnosis(hidden, 16, 16, on_gpu=True)["bound_by"] in ("device", "optimizer")
    for beside in ("hand_over", "copy"):
        assert diagnosis(COSTS._replace(**{beside: 0.1}), 8, 8, on_gpu=True)["bound_by"] == beside
