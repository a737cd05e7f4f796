"""The functions that read the images and labels of the tasks, by their names in the rows of table.py."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.data.permutation import words
from pretrain.shards.archives import Splits, class_folders, sorted_class_folders
from pretrain.shards.imagenet import class_numbers, imagenet, wnids
from pretrain.shards.originals import cifar, dtd, flowers, pets
from pretrain.shards.tfrecord import Features
from pretrain.tasks import vtab_labels as labels


def _variant(folder_names: Callable[[], Sequence[str]]) -> Callable[[Path], Splits]:
    """The reader of an ImageNet variant, whose folders are classes: numbers, or WordNet ids in ImageNet's order."""

    def read(source: Path) -> Splits:
        wnid_classes = class_numbers()
        classes = {name: wnid_classes.get(name, number) for number, name in enumerate(folder_names())}
        return {"test": class_folders(source, classes)}

    return read


def _seeded(read: Callable[[Path], Splits], num_test: int = 0) -> Callable[[Path], Splits]:
    """The reader of a VTAB set's original files: 800 + 200 images by a seed, since they are not in TFDS's order.

    read: returns `train`, and perhaps `val`, which then gives the 200. num_test: images of `train` behind the 1,000
    that form the test split where the authors have none; 0: they have one.
    """

    def splits(source: Path) -> Splits:
        found = read(source)
        shuffled = {}
        for split, originals in found.items():
            plan = np.argsort(words(len(originals), "v1", "vtab", 0), kind="stable")
            shuffled[split] = [originals[number] for number in plan]
        train, val = shuffled["train"][:800], shuffled.get("val", shuffled["train"][800:])[:200]
        test = shuffled["train"][1000:][:num_test] if num_test else found["test"]
        return {"train": train, "val": val, "trainval": train + val, "test": test}

    return splits


def _class_folders(num_classes: int, num_test: int) -> Callable[[Path], Splits]:
    """The reader of a VTAB set that its authors give as one folder for each class, without splits."""
    return _seeded(lambda source: {"train": sorted_class_folders(source, num_classes)}, num_test)


# The authors' files of a set, by splits.
READERS: dict[str, Callable[[Path], Splits]] = {
    "imagenet": imagenet,
    "imagenet_v2": _variant(lambda: list(map(str, range(1000)))),
    "imagenet_a": _variant(partial(wnids, "imagenet_a")),
    "imagenet_r": _variant(partial(wnids, "imagenet_r")),
    "imagenet_sketch": _variant(wnids),
    "cifar10": partial(cifar, num_classes=10),
    "cifar100": partial(cifar, num_classes=100),
    "pets": pets,
    "flowers": flowers,
    "vtab/cifar100": _seeded(partial(cifar, num_classes=100)),
    "vtab/dtd": _seeded(dtd),
    "vtab/flowers102": _seeded(flowers),
    "vtab/pets": _seeded(pets),
    "vtab/eurosat": _class_folders(10, num_test=5_400),
    "vtab/resisc45": _class_folders(45, num_test=6_300),
}

# The class of a TFDS record.
LABELS: dict[str, Callable[[Features], int]] = {
    reader.__name__: reader
    for reader in (
        labels.stored_label,
        labels.clevr_count,
        labels.clevr_distance,
        labels.dsprites_x_position,
        labels.dsprites_orientation,
        labels.kitti_vehicle_distance,
        labels.smallnorb_azimuth,
        labels.smallnorb_elevation,
    )
}

# What is done to a TFDS record's image.
IMAGES: dict[str, Callable[[bytes], bytes]] = {"visible_sprite": labels.visible_sprite}
