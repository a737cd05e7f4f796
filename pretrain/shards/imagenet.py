"""ImageNet as its authors publish it: two tars, or folders, and the labels of its validation images."""

import re
import tarfile
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.archives import File, Original, Splits, files_of, found_in, is_image, one_of, original_of, read_at
from pretrain.shards.class_folders import class_folders, class_of
from pretrain.shards.matlab import read_matlab

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = ("val_labels.txt", "imagenet_2012_validation_synset_labels.txt", "val.txt", "imagenet_val_labels.npz")
_NUM_VAL = 50_000


@lru_cache(maxsize=4)
def wnids(name: str = "imagenet") -> tuple[str, ...]:
    """Returns the sorted WordNet ids of ImageNet-1k, or the 200 of imagenet_a or imagenet_r, as timm ships them."""
    text = package_files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def imagenet(source: Path) -> Splits:
    """Returns ImageNet's train and val from the two ILSVRC2012 tars, or from folders train/WNID and val[/WNID].

    Labels of a flat `val` come from the devkit or from one of VAL_LABELS beside it. What is not there is left out.
    """
    classes = {wnid: index for index, wnid in enumerate(wnids())}
    splits: Splits = {}
    if tar := found_in(source, TRAIN_TAR):
        splits["train"] = _train_tar(tar, classes)
    elif folder := found_in(source, "train"):
        splits["train"] = class_folders(folder, classes)
    if val := found_in(source, VAL_TAR, "val"):
        sorted_out = val.is_dir() and any((val / wnid).is_dir() for wnid in classes)
        found = class_folders(val, classes) if sorted_out else _flat_val(val, val_labels(val.parent))
        found = [original._replace(id=Path(original.id).name) for original in found]
        splits["val"] = sorted(found, key=lambda original: original.id)  # sample i is ILSVRC2012_val_{i+1:08d}
    if not splits:
        raise UserError(f"{source}: holds none of {TRAIN_TAR}, {VAL_TAR}, train/, val/")
    return splits


def _train_tar(path: Path, classes: dict[str, int]) -> list[Original]:
    """Returns the images of a tar that holds a tar for each class, nNNNNNNNN.tar."""
    originals = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            members = sorted((member for member in outer if member.isreg()), key=lambda member: member.name)
            for member in members:
                label = class_of(Path(member.name).stem, classes, path)
                file.seek(member.offset_data)
                with tarfile.open(fileobj=file, mode="r:") as inner:  # its offsets count from the file's beginning
                    for image in sorted((m for m in inner if m.isreg()), key=lambda m: m.name):
                        read = partial(read_at, path, image.offset_data, image.size)
                        originals.append(original_of(File(image.name, read, f"{path}[{image.name}]"), label))
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar of tars ({error})") from None
    return originals


def _flat_val(path: Path, labels: Sequence[int]) -> list[Original]:
    originals = []
    for file in files_of(path):
        if not is_image(file):
            continue
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(file.name).name)
        if not match or not 1 <= int(match[1]) <= _NUM_VAL:
            raise UserError(f"{path}: {file.name} is not ILSVRC2012_val_00000001.JPEG to _{_NUM_VAL:08d}.JPEG")
        originals.append(original_of(file, labels[int(match[1]) - 1]))
    return originals


def val_labels(folder: Path) -> list[int]:
    """Returns the 50,000 labels of ImageNet's validation images in the order of their names, 0 to 999.

    Reads the devkit, or one of VAL_LABELS: a line for each image that ends with a WordNet id or a class from 0, or a
    .npz with an array `label`. Raises UserError when none is there or one counts otherwise.
    """
    if devkit := found_in(folder, DEVKIT, "ILSVRC2012_devkit_t12"):
        labels = _devkit_labels(devkit)
    else:
        labels = _label_list(one_of(folder, DEVKIT, *VAL_LABELS))
    if len(labels) != _NUM_VAL or min(labels) != 0 or max(labels) != 999:
        raise UserError(
            f"{folder}: {len(labels)} validation labels from {min(labels, default=0)} to {max(labels, default=0)}, "
            f"expected {_NUM_VAL} from 0 to 999; labels from 1 are ILSVRC2012's own numbers: give {DEVKIT}"
        )
    return labels


def _devkit_labels(devkit: Path) -> list[int]:
    """ILSVRC2012 numbers its classes in an order of its own, which meta.mat maps to WordNet ids."""
    found = {Path(file.name).name: file for file in files_of(devkit)}
    try:
        synsets = read_matlab(found["meta.mat"].read())["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        index = {wnid: number for number, wnid in enumerate(wnids())}
        truth = found["ILSVRC2012_validation_ground_truth.txt"].read().split()
        return [index[wnid_of[int(number)]] for number in truth]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{devkit}: meta.mat or the validation ground truth cannot be used ({error!r})") from None


def _label_list(path: Path) -> list[int]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return arrays["label"].astype(int).tolist()
        index = {wnid: number for number, wnid in enumerate(wnids())}
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines[0]) > 1:
            lines.sort()  # "ILSVRC2012_val_00000001.JPEG 65": by name
        return [index[words[-1]] if words[-1] in index else int(words[-1]) for words in lines]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a list of labels ({error})") from None
