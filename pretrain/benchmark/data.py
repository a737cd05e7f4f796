"""The benchmark of reading: each row is measured against its peer in one process, on the user's photos.

Rates of one core are by CPU time, medians over steps taken in turns; other times are wall-clock.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.transforms_factory import create_transform
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.benchmark.building import building_rows
from pretrain.benchmark.far_data import far_rows
from pretrain.benchmark.first_batch import first_batch_rows, start_rows
from pretrain.benchmark.reading import line, loader, photo_set, two_beside_one
from pretrain.data import images
from pretrain.data.crops import random_resized_crop
from pretrain.data.loader import Batch
from pretrain.data.manifest import Manifest
from pretrain.data.permutation import uniform, words
from pretrain.data.randaugment import rand_augment
from pretrain.data.reader import IMAGE_ENDINGS, read_sample

_BATCH = 50  # images of a step
_COMPARED = 3  # steps whose pixels are compared


def measure(row: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a row: what was measured, the figure, its target, whether it holds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options["folder"], prefix="benchmark-data-") as folder:
        for found in _ROWS[row](Path(folder), options):
            yield {"row": row} | found


def _one_core(what: str, layers: int, target: float, folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields our CPU time against timm's, and the share of images with equal pixels; layers: of RandAugment."""
    manifest = photo_set(Path(options["photos"]), folder)
    ours = loader(manifest, 1 << 20, _BATCH, randaugment_layers=layers)
    theirs = _timm_batches(manifest.shards[0].path, "rand-m10-n2" if layers else None)
    times: tuple[list[float], list[float]] = [], []
    equal = compared = 0
    for number in range(options["rounds"] * max(1, manifest.num_samples // _BATCH) + 1):
        for batches, own in zip((ours, theirs), times):
            start = time.process_time()
            batch = next(batches)
            if number:  # the first one opens files and fills caches
                own.append((time.process_time() - start) * 1000 / _BATCH)
            if batches is ours and number < _COMPARED:
                compared += int(batch.valid.sum())
                equal += _equal_to_plain(batch, manifest, layers)
    own, other = map(statistics.median, times)
    yield line(what, other / own, at_least=target, told=f"{own:.2f} and {other:.2f} ms per image")
    yield line("images whose pixels are those of the plain path", equal / compared, at_least=1.0, told=f"of {compared}")


def _timm_batches(tar: Path, augment: str | None) -> Iterator[Any]:
    """Yields batches by timm's training transforms and fast collate, of images read by webdataset and Pillow."""
    options: Any = {"color_jitter": None, "auto_augment": augment, "interpolation": "bicubic"}
    transform: Any = create_transform(224, is_training=True, use_prefetcher=True, **options)

    def sample(raw: dict[str, Any]) -> tuple[Any, int]:
        with Image.open(io.BytesIO(next(raw[ending] for ending in IMAGE_ENDINGS if ending in raw))) as image:
            return transform(image.convert("RGB")), int(raw["cls"])

    part = []
    while True:
        with tar.open("rb") as stream:
            for raw in group_by_keys(tar_file_expander([{"url": str(tar), "stream": stream}])):
                part.append(sample(raw))
                if len(part) == _BATCH:
                    yield fast_collate(part)
                    part = []


def _equal_to_plain(batch: Batch, manifest: Manifest, layers: int) -> int:
    """Returns how many of a batch's images have the pixels that torchvision computes from the whole decoded image."""
    equal = 0
    for slot, (epoch, index) in enumerate(zip(batch.epoch.tolist(), batch.index.tolist())):
        if batch.valid[slot]:
            key = (0, manifest.name, epoch, index)
            equal += torch.equal(batch.images[slot], _plain(read_sample(manifest, index).image, layers, *key))
    return equal


def _plain(data: bytes, layers: int, *key: Any) -> torch.Tensor:
    try:
        image: Any = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        image = images.decode(data)
    draws: Any = uniform(words(23, "v1", "aug", *key))
    height, width = image.shape[1:]
    top, left, *size = random_resized_crop(height, width, (0.08, 1.0), (0.75, 4 / 3), draws)
    crop = F.resized_crop(image, top, left, size[0], size[1], [224, 224], F.InterpolationMode.BICUBIC, antialias=True)
    return rand_augment(F.horizontal_flip(crop) if draws[-1] < 0.5 else crop, layers, 10.0, *key)


def _workers_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the wall-clock images per second of two loader processes over those of one."""
    manifest = photo_set(Path(options["photos"]), folder)

    def rate(workers: int) -> float:
        batches = loader(manifest, options["worker_steps"] * workers, _BATCH, workers=workers)
        next(batches)  # waits for processes to start
        start = time.perf_counter()
        return _BATCH * sum(1 for _ in batches) / (time.perf_counter() - start)

    yield two_beside_one("images/s of 2 loader processes / of 1", rate, options["rounds"], at_least=1.9)


def _memory_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the growth of a loader process's memory and open files over 10 epochs; the first one fills caches.

    Compares means and minima of several epochs: within an image, a process holds some 10 MB more or less, and the
    shard's file while it reads.
    """
    manifest = photo_set(Path(options["photos"]), folder)
    steps = -(-manifest.num_samples * options["repeats"] // _BATCH)
    batches: Any = loader(manifest, 10 * steps, _BATCH, workers=1, randaugment_layers=2)
    process = Path("/proc") / str(batches._workers[0].pid)
    memory, files = [], []
    for number, _ in enumerate(batches, 1):
        if number % steps == 0:
            memory.append(_private_mb(process))
            files.append(len(list((process / "fd").iterdir())))
    told = " ".join(f"{mb:.0f}" for mb in memory)
    gained = statistics.mean(memory[5:]) - statistics.mean(memory[1:5])
    what = f"MB that a loader process gains from epochs 2 to 5 to 6 to 10, of {steps * _BATCH:,} images each"
    yield line(what, gained, at_most=5, told=told)
    told = " ".join(map(str, files))
    yield line("open files that it gains", min(files[5:]) - min(files[1:5]), at_most=0, told=told)


def _private_mb(process: Path) -> float:
    """Returns a process's private memory, without pages shared with its parent and batches in shared memory."""
    rollup = (process / "smaps_rollup").read_text().splitlines()
    return sum(int(text.split()[1]) for text in rollup if text.startswith(("Private_Clean", "Private_Dirty"))) / 1000


_ROWS: dict[str, Callable[[Path, dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "decode": partial(_one_core, "decode, crop, flip on one core: x timm + webdataset", 0, 1.6),
    "randaugment": partial(_one_core, "the same with 2 layers of RandAugment: x timm's rand-m10-n2", 2, 1.75),
    "workers": _workers_rows,
    "far": far_rows,
    "start": start_rows,
    "building": building_rows,
    "memory": _memory_rows,
    "first_batch": first_batch_rows,  # one case of `start`, in a process of its own
}
