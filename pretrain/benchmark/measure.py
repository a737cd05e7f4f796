"""Shared by the benchmarks: device, engine, random images, clocks."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pretrain.benchmark.cells import NUM_CLASSES, TIMEOUT_S, cell_config
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.loader import Batch, single_labels
from pretrain.data.order import plan_batch
from pretrain.engine.fp8 import check_fp8
from pretrain.engine.step import Engine
from pretrain.models.build import build_model


class Plan(NamedTuple):
    """How much is measured, and where."""

    device: torch.device
    name: str  # of the device
    batch: int  # images per step
    warmup: int
    steps: int


def plan_cell(options: dict[str, Any]) -> Plan:
    """Joins the process group; returns the requested values, with the device's defaults for the rest."""
    device = ranks.start(TIMEOUT_S)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    defaults = {"batch": 128, "warmup": 10, "steps": 40} if gpu else {"batch": 8, "warmup": 2, "steps": 5}
    return Plan(device, name, **{key: options[key] or default for key, default in defaults.items()})


def config_of_run(model: str, options: dict[str, Any], plan: Plan, **engine: Any) -> Config:
    """Returns the config of a run by the options of tools/benchmark.py train; engine: further keys of that section."""
    of_data = {"train": options["data"], "workers": options["workers"]} if options["data"] else None
    return cell_config(
        model,
        options["image_size"],
        plan.batch * ranks.world_size(),
        options["precision"],
        data=of_data,
        checkpoint_activations=options["checkpoint_activations"],
        zero_stage=options["zero_stage"],
        max_micro_batch_size=plan.batch,
        **engine,
    )


def build_engine(config: Config, device: torch.device, num_classes: int = NUM_CLASSES) -> Engine:
    """Returns the engine that trains a model."""
    check_fp8(config)
    plan = plan_batch(config.data.global_batch, ranks.world_size(), config.engine.max_micro_batch_size)
    return Engine(build_model(config.model, num_classes), config, plan, device)


def random_batch(config: Config, device: torch.device) -> Batch:
    """Returns a rank's share of a global batch of random images, on the device."""
    size, side = config.data.global_batch // ranks.world_size(), config.model.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    ones = torch.ones(size, dtype=torch.bool)
    return Batch(images, *single_labels(labels), ones, labels, labels, []).to(device)


def step_times_ms(step: Callable[[], Any], steps: int, gpu: bool) -> list[float]:
    """Returns the time of each step. On a GPU, by events that are read at the end: no host sync inside the loop."""
    if not gpu:
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1000 * (end - start) for start, end in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:])]


def summary_ms(times_ms: list[float]) -> dict[str, float]:
    """Returns the median and the first and last decile."""
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")  # "exclusive" extrapolates, even below zero
    values = {"median": statistics.median(times_ms), "p10": deciles[0], "p90": deciles[-1]}
    return {name: round(value, 3) for name, value in values.items()}
