"""The bottleneck of a run: the time of each stage per image, and the predicted rate with other numbers of workers.

Worker processes read, decode and crop samples; the rank's own process receives batches, copies them and trains.
"""

import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from pretrain.benchmark.measure import build_engine, config_of_run, plan_cell
from pretrain.benchmark.parts import PartClock, watch_collectives, watch_engine
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data import loader
from pretrain.data.loader import Batch, train_batches
from pretrain.engine.step import Engine
from pretrain.provenance import commit, versions
from pretrain.shards.pool import num_cores
from pretrain.train.datasets import DataSets, open_data

_BATCHES = 3  # per stage: the loader's take the median, hand_over the least, those of the step the mean
_LOADER = {"disk": "read_sample", "decode": "decode", "augmentation": "train_image"}  # names in data/loader.py


class Costs(NamedTuple):
    """Seconds per image in each stage, of one worker process or of one rank."""

    disk: float  # reading its bytes from the shard, page cache included
    decode: float
    augmentation: float  # crop, resize, flip, and all of data/augment.py
    hand_over: float  # from a worker's shared memory to the rank, pinned for a GPU
    copy: float  # to the device
    device: float  # forward and backward pass
    optimizer: float  # clipping, update
    collectives: float  # gradients, norm, weights between ranks

    @property
    def worker(self) -> float:
        """Seconds per image of a worker process."""
        return self.disk + self.decode + self.augmentation

    def rank(self, on_gpu: bool) -> float:
        """Seconds per image of the rank: a GPU computes while the next batch arrives, a CPU does these in sequence."""
        step = self.device + self.optimizer + self.collectives
        return max(self.hand_over, self.copy, step) if on_gpu else self.hand_over + self.copy + step


_WAYS_OUT = {
    "disk": "copy the shards to a local disk, or set data.store for remote ones; more workers wait side by side",
    "decode": "shrink the images once (make_shards.py --shorter-side), or give the rank more cores",
    "augmentation": "shrink the images once (make_shards.py --shorter-side), less augmentation, or more cores",
    "hand_over": "look at /dev/shm and at the limits of pinned memory; a larger batch has less to unpack per image",
    "copy": "look at the GPU's PCIe link (nvidia-smi topo -m): images are copied as bytes already",
    "device": "engine.compile=true, bf16, and the largest engine.max_micro_batch_size that fits",
    "optimizer": "a larger batch per rank, so that there are fewer steps per image",
    "collectives": "a larger batch per rank, stage 1 instead of 3, and a look at the network (tools/doctor.py)",
}


def images_per_s(costs: Costs, workers: int, cores: int, on_gpu: bool) -> float:
    """Returns the images per second of one rank with so many workers, of which `cores` can compute at once.

    A CPU rank trains on the same cores as the workers, so their times add up.
    """
    if workers == 0:
        return 1 / (costs.worker + costs.rank(on_gpu))
    of_the_cores = (costs.decode + costs.augmentation) / cores
    step = costs.rank(on_gpu)
    return min(workers / costs.worker, 1 / max(of_the_cores, step) if on_gpu else 1 / (of_the_cores + step))


def diagnosis(costs: Costs, workers: int, cores: int, on_gpu: bool) -> dict[str, Any]:
    """Returns the stage that is the bottleneck, the remedy, and the rates with other numbers of workers."""
    rate = images_per_s(costs, workers, cores, on_gpu)
    of_loader = costs._asdict()
    of_rank = {name: of_loader.pop(name) for name in Costs._fields if name not in _LOADER}
    if on_gpu and costs.rank(on_gpu) > max(costs.hand_over, costs.copy):  # hidden behind the step
        del of_rank["hand_over"], of_rank["copy"]
    by_rank = rate >= 0.999 / costs.rank(on_gpu)
    if workers == 0:
        stages = of_loader | of_rank
    elif not on_gpu and rate < 0.999 * workers / costs.worker:  # rank and workers compete for cores
        stages = {"decode": costs.decode / cores, "augmentation": costs.augmentation / cores} | of_rank
    else:
        stages = of_rank if by_rank else of_loader
    bound = max(stages, key=lambda name: stages[name])
    numbers = sorted({0, 1, 2, 4, 8, 16, 32, workers, cores})
    predicted = {
        number: images_per_s(costs, number, cores, on_gpu) for number in numbers if number <= max(cores, workers)
    }
    best = max(predicted, key=lambda number: (round(predicted[number], 3), -number))
    way_out = _WAYS_OUT[bound]
    if predicted[best] > 1.05 * rate:
        way_out = f"data.workers={best} ({predicted[best]:,.1f} images/s); then {way_out}"
    return {
        "bound_by": bound,
        "way_out": way_out,
        "images_per_s": round(rate, 2),
        "predicted_images_per_s": {number: round(value, 2) for number, value in predicted.items()},
    }


def measure(model: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row of a model on a data set; options: of tools/benchmark.py train --bottleneck.

    Measures a single rank, with its share of the cores of `options["ranks"]` ranks, and so without collectives.
    """
    cores = max(1, num_cores() // options["ranks"])
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # a CPU rank's share; a single rank would get all
    plan = plan_cell(options)
    config = config_of_run(model, options, plan, compile=options["compile"], fp8=options["fp8"])
    data, clock = open_data(config), PartClock(plan.device.type == "cuda")
    watch_collectives(clock)
    engine = build_engine(config, plan.device, data.num_classes)
    watch_engine(clock, engine)
    costs = stage_costs(config, data, engine, clock)
    yield {
        "model": model,
        **diagnosis(costs, config.data.workers, cores, plan.device.type == "cuda"),
        "ms_per_image": {name: round(1000 * value, 4) for name, value in costs._asdict().items()},
        "workers": config.data.workers,
        "cores": cores,
        "ranks": options["ranks"],
        "compile": engine.compiled,
        "batch_per_rank": plan.batch,
        "data": options["data"],
        "device": plan.name,
        "versions": versions(),
        "commit": commit(),
    }


def stage_costs(config: Config, data: DataSets, engine: Engine, clock: PartClock) -> Costs:
    """Measures each stage; the clock times the engine's parts. Called by all ranks."""
    images = engine.plan.micro_batch * engine.plan.accumulation
    batch, loaded_s = _loaded(config, data, engine)
    found = {name: seconds / images for name, seconds in loaded_s.items()}
    found["hand_over"] = _handed_over_s(config, data, engine, sum(loaded_s.values())) / images
    engine.train_step(batch.to(engine.device), 1e-4)  # the first step is slower
    clock.read_ms()
    for _ in range(_BATCHES):
        with clock.part("copy"):
            moved = batch.to(engine.device)
        engine.train_step(moved, 1e-4)
    ms = {name: value / _BATCHES / images for name, value in clock.read_ms().items()}
    found |= {"copy": ms["copy"] / 1000, "device": (ms["forward"] + ms["backward"]) / 1000}
    return Costs(**found, optimizer=ms["optimizer"] / 1000, collectives=ms["collectives"] / 1000)


def _loaded(config: Config, data: DataSets, engine: Engine) -> tuple[Batch, dict[str, float]]:
    """Returns a batch prepared in this process, and the median seconds per batch in each stage of the loader."""
    steps = loader._TrainSteps(data.train, data.order, engine.plan, config)
    clocks = [PartClock(gpu=False) for _ in _LOADER]
    plain = {function: getattr(loader, function) for function in _LOADER.values()}
    for clock, function in zip(clocks, _LOADER.values()):
        clock.wrap(loader, function, "data")
    threads = torch.get_num_threads()
    if config.data.workers:
        torch.set_num_threads(1)  # as torch sets it in loader processes
    try:
        seconds: list[list[float]] = []
        for number in range(_BATCHES):
            batch = steps[number]
            seconds.append([clock.read_ms()["data"] / 1000 for clock in clocks])
    finally:
        torch.set_num_threads(threads)
        for function, original in plain.items():
            setattr(loader, function, original)
    return _pinned(batch) if ranks.has_gpu() else batch, dict(zip(_LOADER, map(median, zip(*seconds))))


def _pinned(batch: Batch) -> Batch:
    """Returns a batch in pinned memory, as the loader gives it on a GPU: other copies are slower and block."""
    images, labels, weights, valid, epoch, index = (tensor.pin_memory() for tensor in batch[:6])
    return batch._replace(images=images, labels=labels, label_weights=weights, valid=valid, epoch=epoch, index=index)


def _handed_over_s(config: Config, data: DataSets, engine: Engine, loaded_s: float) -> float:
    """Returns the seconds that a rank takes to receive a batch that is ready."""
    if not config.data.workers:
        return 0.0
    batches, seconds = train_batches(data.train, data.order, engine.plan, config, 0), []
    next(batches)  # workers have started
    for _ in range(_BATCHES):
        time.sleep(2 * loaded_s)
        began = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - began)
    return min(seconds)  # slower ones may have waited for a worker
