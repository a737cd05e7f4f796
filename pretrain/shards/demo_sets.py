"""The demo's data sets: printed characters to pretrain on, real handwriting to transfer to."""

import shutil
from functools import partial
from pathlib import Path

from pretrain import cli
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.shards.build import How, build
from pretrain.shards.characters import CLASS_NAMES, digits_task, label_of, render
from pretrain.shards.items import Item
from pretrain.shards.pictures import png_of
from pretrain.shards.pool import num_cores

SHARD = 5000  # characters a shard
SEED = 1  # of the characters


def make_characters(out: Path, count: int) -> None:
    """Writes `count` characters, unless they exist. Raises UserError when another number of them exists."""
    if (out / "manifest.json").exists():  # written last, so complete
        if (found := load_manifest(out).num_samples) != count:
            raise UserError(
                f"{out}: holds {found} characters, --images says {count}; remove it, or choose another --out"
            )
        return
    items = [Item(partial(_character, index), "png", label_of(index, seed=SEED), str(index)) for index in range(count)]
    how = How(num_cores())
    with cli.progress("characters", count, "images") as advance:
        build(items, CLASS_NAMES, out, samples_per_shard=SHARD, seed=None, progress=advance, how=how)


def _character(index: int) -> bytes:
    return png_of(render(index, seed=SEED)[0], compress_level=1)


def make_digits(out: Path) -> None:
    """Writes scikit-learn's digits as OUT/digits-train and OUT/digits-test, unless they exist."""
    train_images, train_labels, test_images, test_labels = digits_task()
    for name, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        folder = out / f"digits-{name}"
        if (folder / "manifest.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        pngs = [partial(png_of, image, compress_level=1) for image in images]
        items = [Item(png, "png", int(label), name) for png, label in zip(pngs, labels)]
        build(items, [str(digit) for digit in range(10)], folder, samples_per_shard=SHARD, seed=0)
