"""The demo's data sets: printed characters to pretrain on, real handwriting to transfer to."""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.data.manifest import Shard, load_manifest
from pretrain.errors import UserError
from pretrain.shards.build import build, finish_manifest, write_samples
from pretrain.shards.characters import CLASS_NAMES, digits_task, render
from pretrain.shards.items import Item
from pretrain.shards.pictures import png_of

SHARD = 5000  # characters a shard
SEED = 1  # of the characters


def make_characters(out: Path, count: int) -> None:
    """Writes so many characters, and says how many are done, unless they are there.

    Raises UserError when another number is there.
    """
    if (out / "manifest.json").exists():  # written last, so complete
        if (found := load_manifest(out).num_samples) != count:
            raise UserError(
                f"{out}: holds {found} characters, --images says {count}; remove it, or choose another --out"
            )
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    numbers = range(-(-count // SHARD))
    shards: list[Shard] = []
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard in pool.map(partial(_write_shard, out, count), numbers):
            shards.append(shard)
            print(f"  {sum(s.num_samples for s in shards):,} of {count:,} characters", flush=True)
    finish_manifest(out, shards, CLASS_NAMES, SEED)


def _write_shard(out: Path, count: int, number: int) -> Shard:
    indices = range(number * SHARD, min(count, (number + 1) * SHARD))
    samples = ((_png(image), label) for image, label in (render(index, seed=SEED) for index in indices))
    return write_samples(samples, "png", out / f"characters-{number:06d}.tar", number)


def make_digits(out: Path) -> None:
    """Writes scikit-learn's digits as OUT/digits-train and OUT/digits-test, unless they are there."""
    train_images, train_labels, test_images, test_labels = digits_task()
    for name, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        folder = out / f"digits-{name}"
        if (folder / "manifest.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        items = [Item(partial(_png, image), "png", int(label), name) for image, label in zip(images, labels)]
        build(items, [str(digit) for digit in range(10)], folder, samples_per_shard=SHARD, seed=0)


def _png(image: np.ndarray) -> bytes:
    return png_of(image, compress_level=1)
