"""The rows of the benchmark of reading, and its table. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.benchmark.cells import cell_rows
from pretrain.errors import UserError

PHOTOS = "imagenet_train_photos_dev-000000.tar"  # 150 photos of 105 KB

ROWS = {
    "decode": "reading, decoding, crop and flip on one core, beside webdataset, Pillow and timm",
    "randaugment": "the same with 2 layers of RandAugment, beside timm's rand-m10-n2",
    "workers": "2 loader processes beside 1",
    "far": "an epoch from a server with 30 ms latency that fails, beside one from the disk; then from the store",
    "start": "the first batch of 1,024 of 300 million samples: seconds, memory",
    "building": "2 processes that make shards from a folder beside 1",
    "memory": "memory and open files of a loader process over 10 epochs",
}
_WITHOUT_PHOTOS = ("start",)

OPTIONS: dict[str, Any] = {
    "rounds": 5,
    "worker_steps": 30,  # of 50 images, for each loader process
    "far_shards": 20,
    "far_samples": 1000,  # per shard
    "far_workers": 1,  # leaves a core to the server and the fetcher
    "far_turns": 100,  # steps of 64
    "start_shards": 30_000,
    "start_samples": 10_000,  # per shard
    "built_images": 4000,
    "built_times": 3,
    "repeats": 8,  # of each photo in an epoch of the row `memory`
}


def data_lines(row: str, photos: Path | None, folder: Path | None, **changes: Any) -> Iterator[dict[str, Any]]:
    """Yields the lines of a row, measured in a process of its own, or one line that says why it was skipped.

    changes: of OPTIONS. Raises UserError when the process fails.
    """
    if row not in _WITHOUT_PHOTOS and not (photos and photos.is_file()):
        why = f"{photos} is not there" if photos else "no photos: set --photos or PRETRAIN_TEST_DATA"
        yield {"row": row, "what": ROWS[row], "skipped": why}
        return
    place = {"photos": str(photos and photos.resolve()), "folder": str(folder.resolve()) if folder else None}
    found, failure = cell_rows("data", {"row": row, "options": OPTIONS | changes | place})
    yield from found
    if failure:
        raise UserError(f"{row}: {failure}")


def print_lines(lines: list[dict[str, Any]]) -> None:
    """Prints the table as Markdown."""
    print("| what | figure | target | holds | |\n|---|---:|---:|---|---|")
    for found in lines:
        if "skipped" in found:
            print(f"| {found['what']} | | | skipped | {found['skipped']} |")
        else:
            holds = "yes" if found["holds"] else "**no**"
            print(f"| {found['what']} | {found['value']:g} | {found['target']} | {holds} | {found['told']} |")
