"""What bounds a run is named: eight slow-downs are planted, one in each stage, and each is found."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing.reductions as reductions
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain.benchmark.bottleneck import Costs, diagnosis, images_per_s, stage_costs
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


COSTS = Costs(
    disk=1e-3, decode=4e-3, augmentation=1e-3, hand_over=1e-4, copy=1e-4, device=1e-3, optimizer=0, collectives=0
)


def test_rates_for_other_numbers_of_workers() -> None:
    """Six milliseconds in a worker, 1.1 on a GPU's rank: workers add up, until cores or the rank bound."""
    rates = {workers: images_per_s(COSTS, workers, 8, on_gpu=True) for workers in (0, 1, 2, 4, 6, 7, 16)}
    expected = {0: 1 / 7.1e-3, 1: 1 / 6e-3, 2: 2 / 6e-3, 4: 4 / 6e-3, 6: 1 / 1.1e-3, 7: 1 / 1.1e-3, 16: 1 / 1.1e-3}
    assert rates == pytest.approx(expected | {6: min(6 / 6e-3, 1 / 1.1e-3)})
    assert images_per_s(COSTS, 64, 2, on_gpu=True) == pytest.approx(2 / 5e-3)  # two cores decode and crop
    assert images_per_s(COSTS, 64, 64, on_gpu=False) == pytest.approx(1 / 1.2e-3)  # hand-over beside nothing
    found = diagnosis(COSTS, 1, 8, on_gpu=True)
    assert found["bound_by"] == "decode" and found["way_out"].startswith("data.workers=8 (909.1 images/s); then shrink")
    assert diagnosis(COSTS, 8, 8, on_gpu=True)["bound_by"] == "device"
    assert diagnosis(COSTS._replace(hand_over=0.1), 8, 8, on_gpu=True)["bound_by"] == "hand_over"
