"""The benchmark of the first batch of a run on a very large set: seconds and memory beyond the imports.

The set is fake: all its shards are hard links to one file, and so are their indexes.
"""

import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.benchmark.cells import last_row
from pretrain.benchmark.reading import line, loader
from pretrain.data.manifest import check_shards, load_manifest, write_manifest
from pretrain.shards.build import write_samples

_BATCH = 1024  # over all ranks
_LATE = 1_000_000  # step
_PARTS = ("manifest", "check of shards", "batch")
_CASES = [
    (order, rank, first) for order in ("permuted", "lanes") for rank in ((0, 1), (500, 512)) for first in (0, _LATE)
]


def start_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields time and memory for each order, rank and first step, each measured in a fresh process."""
    shards = faked_set(folder / "large", options["start_shards"], options["start_samples"])
    for order, (rank, world_size), first in _CASES:
        case = {"order": order, "rank": rank, "world_size": world_size, "first": first, "shards": str(shards)}
        cell = {"row": "first_batch", "options": case | {"folder": str(folder)}}
        found, what = last_row("data", cell, "first batch"), f"{order}, rank {rank} of {world_size}, step {first:,}"
        parts = ", ".join(f"{name} {found[name]:.2f}" for name in _PARTS)
        told = f"{parts}; {found['images']} images"
        yield line(f"s to the first batch: {what}", found["seconds"], at_most=2, told=told)
        yield line(f"MB beyond imports: {what}", found["mb"], at_most=150)


def first_batch_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measures one case in this process, which so far has only done the imports."""
    rank, world_size = options["rank"], options["world_size"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % 8)}
    os.environ["LOCAL_WORLD_SIZE"] = str(min(8, world_size))
    before, marks = _peak_mb(), [time.perf_counter()]
    manifest = load_manifest(Path(options["shards"]))
    marks.append(time.perf_counter())
    if rank % 8 == 0:
        check_shards(manifest)
    marks.append(time.perf_counter())
    lanes, first = options["order"] == "lanes", options["first"]
    batch = next(loader(manifest, first + 1000, _BATCH, first=first, lanes=lanes, image_size=32))
    marks.append(time.perf_counter())
    seconds = dict(zip(_PARTS, np.diff(marks).tolist()))
    found = {"what": "case", "images": int(batch.valid.sum()), "mb": _peak_mb() - before}
    yield {**found, **seconds, "seconds": marks[-1] - marks[0]}


def _peak_mb() -> float:
    """Returns this process's peak resident memory in MB."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def faked_set(folder: Path, num_shards: int, shard_samples: int) -> Path:
    """Makes a set of identical shards of tiny images, and returns its manifest's path."""
    folder.mkdir()
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (90, 120, 40)).save(file, "jpeg")
    samples = ((file.getvalue(), number % 1000) for number in range(shard_samples))
    first = write_samples(samples, "jpg", folder / "000000.tar", 0)
    shards = [first._replace(place=str(folder / f"{number:06d}.tar")) for number in range(num_shards)]
    for shard in shards[1:]:
        for ending in (".tar", ".idx"):
            os.link(first.path.with_suffix(ending), shard.path.with_suffix(ending))
    return write_manifest(folder, "large", shards, 1000, has_names=False, shuffle={"scope": "none"})
