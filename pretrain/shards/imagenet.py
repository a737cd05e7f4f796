"""ImageNet as its authors publish it: two tars, or folders, and the labels of its validation images."""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files as package_files
from pathlib import Path

from pretrain.data.tar_headers import members
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.shards.archives import (
    UNREADABLE,
    Original,
    Splits,
    class_folders,
    class_of,
    content_of,
    files_of,
    found_in,
    is_image,
    one_of,
    original_of,
    plain_members,
    read_text,
    text_of,
)
from pretrain.shards.arrays import read_arrays, whole_numbers
from pretrain.shards.matlab import MAX_MATLAB_BYTES, read_matlab, whole
from pretrain.shards.tars import unreadable

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = ("val_labels.txt", "imagenet_2012_validation_synset_labels.txt", "val.txt", "imagenet_val_labels.npz")
_NUM_VAL = 50_000
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@lru_cache(maxsize=4)
def wnids(name: str = "imagenet") -> tuple[str, ...]:
    """Returns the sorted WordNet ids of ImageNet-1k, or the 200 of imagenet_a or imagenet_r, as timm ships them."""
    text = package_files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def class_numbers() -> dict[str, int]:
    """Returns the class of each WordNet id of ImageNet-1k."""
    return {wnid: number for number, wnid in enumerate(wnids())}


def imagenet(source: Path) -> Splits:
    """Returns ImageNet's train and val from the two ILSVRC2012 tars, or from folders train/WNID and val[/WNID].

    Labels of a flat `val` come from the devkit or from one of VAL_LABELS beside it. A missing split is left out.
    """
    classes = class_numbers()
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
        with path.open("rb") as file:
            outer = [member for member in members(file, 0, path.stat().st_size) if member.isreg()]
            for member in sorted(outer, key=lambda member: member.name):
                label = class_of(Path(member.name).stem, classes, path)
                images = plain_members(path, file, member.offset_data, member.offset_data + member.size)
                originals += [original_of(image, label) for image in sorted(images, key=lambda image: image.name)]
    except UNREADABLE as error:
        raise unreadable(path, error, what="tar of tars") from None
    return originals


def _flat_val(path: Path, labels: Sequence[int]) -> list[Original]:
    originals = []
    for file in files_of(path):
        if not is_image(file):
            continue
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(file.name).name)
        if not match or not 1 <= int(match[1]) <= _NUM_VAL:
            raise UserError(f"{path}: {shown(file.name)} is not ILSVRC2012_val_00000001.JPEG to _{_NUM_VAL:08d}.JPEG")
        originals.append(original_of(file, labels[int(match[1]) - 1]))
    return originals


def val_labels(folder: Path) -> list[int]:
    """Returns the 50,000 labels of ImageNet's validation images in the order of their names, 0 to 999.

    Reads the devkit, or one of VAL_LABELS: a line for each image that ends with a WordNet id or a class from 0, or a
    .npz with an array `label`. Raises UserError when none is there, or the labels are not 50,000 from 0 to 999.
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
    for name in ("meta.mat", _TRUTH):
        if name not in found:
            raise UserError(f"{devkit}: holds no {name}")
    try:
        synsets = read_matlab(content_of(found["meta.mat"], MAX_MATLAB_BYTES))["synsets"]
        wnid_of = {whole(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        index = class_numbers()
        return [index[wnid_of[int(number)]] for number in text_of(found[_TRUTH]).split()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{devkit}: meta.mat or the validation ground truth cannot be used ({error!r:.200})") from None


def _by_number(lines: list[list[str]]) -> list[list[str]]:
    """Sorts lines as "ILSVRC2012_val_00000001.JPEG 65" by image, whatever folders they name.

    Raises ValueError where a line does not name the next image.
    """
    lines = sorted(lines, key=lambda words: Path(words[0]).name)
    for number, words in enumerate(lines, start=1):
        if Path(words[0]).stem != f"ILSVRC2012_val_{number:08d}":
            raise ValueError(f"{words[0]} where ILSVRC2012_val_{number:08d}.JPEG is expected; name each image once")
    return lines


def _label_list(path: Path) -> list[int]:
    if path.suffix == ".npz":
        return whole_numbers(read_arrays(path, ("label",))["label"], f"{path}: label", -(10**9), 10**9)
    try:
        index = class_numbers()
        lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
        if lines and len(lines[0]) > 1:
            lines = _by_number(lines)
        return [index[words[-1]] if words[-1] in index else int(words[-1][:20]) for words in lines]
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a list of labels ({error!s:.200})") from None
