"""The rate of making shards from a folder of photos, with two processes and with one."""

import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from pretrain.benchmark.reading import photo_set, two_beside_one
from pretrain.data.reader import read_sample
from pretrain.shards.build import How, build
from pretrain.shards.sources import folder_items

_NUM_CLASSES = 10
_TIMED = 0.2, 0.9  # share of the images: before, processes import torch; after, one process alone writes the last shard
_SHARDS = 16  # enough for both processes to end at nearly the same time


def building_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields images per second of two processes over those of one, measured in turns, in a folder of repeated photos.

    Images are read, decoded and written as by make_shards; the start of the processes is left out.
    """
    photos = photo_set(Path(options["photos"]), folder)
    images = [read_sample(photos, index).image for index in range(photos.num_samples)]
    _write(folder / "by class", images, options["built_images"])
    rate = partial(_rate, folder, -(-options["built_images"] // _SHARDS))
    yield two_beside_one("images/s of 2 processes that make shards / of 1", rate, options["built_times"], at_least=1.8)


def _write(folder: Path, photos: Sequence[bytes], num_images: int) -> None:
    paths = [folder / f"class{number % _NUM_CLASSES}" / f"{number:06d}.jpg" for number in range(num_images)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < len(photos):
            path.write_bytes(photos[number])
        else:
            os.link(paths[number % len(photos)], path)


def _rate(root: Path, samples_per_shard: int, workers: int) -> float:
    """Returns the images per second of one build."""
    items, names = folder_items(root / "by class")
    times: list[tuple[int, float]] = [(0, perf_counter())]

    def progress(count: int) -> None:
        times.append((times[-1][0] + count, perf_counter()))

    build(items, names, root / "set", samples_per_shard=samples_per_shard, seed=0, progress=progress, how=How(workers))
    shutil.rmtree(root / "set")
    first, last = (next(time for time in times if time[0] >= share * len(items)) for share in _TIMED)
    return (last[0] - first[0]) / (last[1] - first[1])
