"""Shared by the rows of the benchmark of reading: sets of photos, a run's loader, a line of the table."""

import io
import os
import shutil
import statistics
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pretrain.config import config_from_dict
from pretrain.data.lanes import choose_lanes
from pretrain.data.loader import Batch, train_batches
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.order import Order, plan_batch
from pretrain.data.reader import read_sample
from pretrain.shards.existing import index_existing
from pretrain.shards.pool import num_cores


def line(
    what: str, value: float, *, at_least: float | None = None, at_most: float | None = None, told: str = ""
) -> dict[str, Any]:
    """Returns a line of the table: a figure, its target, whether it holds, and a note."""
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    return {"what": what, "value": round(value, 3), "target": target, "holds": holds, "told": told}


def two_beside_one(what: str, rate: Callable[[int], float], rounds: int, *, at_least: float) -> dict[str, Any]:
    """Returns the line for the rate of two processes divided by that of one: medians of rounds in turns."""
    one, two = (statistics.median(own) for own in zip(*((rate(1), rate(2)) for _ in range(rounds))))
    told = f"{two:.0f} and {one:.0f} images/s on {num_cores()} cores"
    return line(what, two / one, at_least=at_least, told=told)


def photo_set(tar: Path, folder: Path) -> Manifest:
    """Returns a copy of a tar of photos as a data set."""
    copy = folder / "photos" / "photos.tar"
    copy.parent.mkdir()
    shutil.copyfile(tar, copy)
    return load_manifest(index_existing([copy], (), copy.parent))


def repeated_set(photos: Manifest, folder: Path, num_shards: int, shard_samples: int) -> Manifest:
    """Returns a set of many shards in which the photos repeat, each time under another key."""
    folder.mkdir()
    samples = cycle([read_sample(photos, index) for index in range(photos.num_samples)])
    paths = []
    for shard in range(num_shards):
        paths.append(folder / f"{shard:06d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(islice(samples, shard_samples)):
                for ending, data in (("jpg", sample.image), ("cls", sample.label)):
                    member = tarfile.TarInfo(f"{shard:06d}{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return load_manifest(index_existing(paths, (), folder))


def loader(
    manifest: Manifest, num_steps: int, global_batch: int, *, first: int = 0, lanes: bool = False, **data: Any
) -> Iterator[Batch]:
    """Returns this rank's batches of a run from step `first` on; `data`: further keys of that section.

    The defaults are 224 px (`image_size`) and no loader processes (`workers`).
    """
    values = {
        "name": "benchmark",
        "total_steps": num_steps,
        "model": {"name": "Ti", "patch_size": 16, "image_size": data.pop("image_size", 224)},
        "data": {"train": str(manifest.path), "global_batch": global_batch, "workers": 0} | data,
        "optim": {"lr": 1e-3},
    }
    config = config_from_dict(values, "benchmark")
    order = Order(manifest.num_samples, 0, global_batch, config.seed)
    if lanes:
        order = replace(order, lanes=choose_lanes(manifest.block_samples, manifest.num_samples, global_batch))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return train_batches(manifest, order, plan_batch(global_batch, world_size, 128), config, first)
