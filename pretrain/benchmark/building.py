"""How fast shards are made from a folder of photos, with several processes beside one."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from pretrain.shards.build import How, build
from pretrain.shards.sources import folder_items

_NUM_CLASSES = 10
_TIMED = 0.2, 0.9  # of the images: before, processes import torch; behind, the last shard is written by one alone
_SHARDS_PER_WORKER = 8  # so that they end at nearly the same time


def building_rows(
    photos: Sequence[bytes], *, num_images: int = 4000, workers: int = 2, repeats: int = 3
) -> Iterator[dict[str, Any]]:
    """Yields a row for one process and one for `workers`: images/s, median of repeats, and their ratio.

    photos: JPEGs, written to a folder under $TMPDIR, each often enough to make num_images, by links. One and several
    processes take turns. Images are read, decoded and written as make_shards does it; starting processes is left out.
    """
    with tempfile.TemporaryDirectory(prefix="pretrain-building-") as name:
        root = Path(name)
        _write(root / "photos", photos, num_images)
        rates: dict[int, list[float]] = {1: [], workers: []}
        for _ in range(repeats):
            for count, found in rates.items():
                found.append(_rate(root, count, -(-num_images // (_SHARDS_PER_WORKER * workers))))
    medians = {count: median(found) for count, found in rates.items()}
    for count, found in rates.items():
        row = {"what": "building", "processes": count, "images_per_s": round(medians[count], 1)}
        yield row | {"ratio": round(medians[count] / medians[1], 3), "all": [round(rate, 1) for rate in found]}


def _write(folder: Path, photos: Sequence[bytes], num_images: int) -> None:
    for number in range(num_images):
        path = folder / f"class{number % _NUM_CLASSES}" / f"{number:06d}.jpg"
        first = folder / f"class{number % len(photos) % _NUM_CLASSES}" / f"{number % len(photos):06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < len(photos):
            path.write_bytes(photos[number])
        else:
            os.link(first, path)


def _rate(root: Path, workers: int, samples_per_shard: int) -> float:
    """Images per second of one build."""
    items, names = folder_items(root / "photos")
    times: list[tuple[int, float]] = [(0, perf_counter())]

    def progress(count: int) -> None:
        times.append((times[-1][0] + count, perf_counter()))

    build(items, names, root / "set", samples_per_shard=samples_per_shard, seed=0, progress=progress, how=How(workers))
    shutil.rmtree(root / "set")
    first, last = (next(time for time in times if time[0] >= share * len(items)) for share in _TIMED)
    return (last[0] - first[0]) / (last[1] - first[1])
