"""Original downloads as their authors publish them: CIFAR, Oxford Pets and Flowers, DTD. Nothing in them is run."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards.archives import (
    File,
    Original,
    Splits,
    content_of,
    files_of,
    found_in,
    is_image,
    one_of,
    original_of,
    read_file,
    text_of,
)
from pretrain.shards.items import Item
from pretrain.shards.matlab import MAX_MATLAB_BYTES, read_matlab, whole
from pretrain.shards.pictures import png_of
from pretrain.shards.plain_pickles import read_plain_pickle

_CIFAR_PIXELS = 3 * 32 * 32  # red plane, green plane, blue plane
_MAX_CIFAR_BYTES = 256 << 20  # of a batch: the largest, CIFAR-100's train.bin, has 154 MB


def cifar(source: Path, num_classes: int) -> Splits:
    """Returns CIFAR-10 or -100 from `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz` or the folder in either.

    The python version's pickles are read without unpickling; if both are there, the binary one is used.
    """
    is_10 = num_classes == 10
    short = f"cifar-{num_classes}"
    binary = f"{short}-binary.tar.gz", "cifar-10-batches-bin" if is_10 else f"{short}-binary"
    pickled = f"{short}-python.tar.gz", "cifar-10-batches-py" if is_10 else f"{short}-python"
    are_pickles = found_in(source, *pickled) is not None and found_in(source, *binary) is None
    archive = one_of(source, *(pickled if are_pickles else binary))
    files = {Path(file.name).name: file for file in files_of(archive)}
    ending = "" if are_pickles else ".bin"
    train = [f"data_batch_{i}{ending}" for i in range(1, 6)] if is_10 else [f"train{ending}"]
    test = [f"test_batch{ending}" if is_10 else f"test{ending}"]
    for name in train + test:
        if name not in files:
            raise UserError(f"{archive}: {name} is missing")
    names_in, batch_of = (_names_in_pickle, _pickled_batch) if are_pickles else (_names_in_text, _binary_batch)
    class_names = dict(enumerate(names_in(files, is_10)))
    return {
        split: [original for name in names for original in batch_of(files[name], is_10, class_names)]
        for split, names in (("train", train), ("test", test))
    }


def _names_in_text(files: dict[str, File], is_10: bool) -> Sequence[str]:
    listed = files.get("batches.meta.txt" if is_10 else "fine_label_names.txt")
    return text_of(listed).split() if listed else ()


def _names_in_pickle(files: dict[str, File], is_10: bool) -> Sequence[str]:
    meta, key = ("batches.meta", "label_names") if is_10 else ("meta", "fine_label_names")
    names = _pickled(files[meta]).get(key) if meta in files else ()
    if not isinstance(names, (list, tuple)) or not all(map(is_text, names)):
        raise UserError(f"{files[meta].source}: {key} is no list of texts")
    return names


def _pickled_batch(file: File, is_10: bool, class_names: dict[int, str]) -> list[Original]:
    values, key = _pickled(file), "labels" if is_10 else "fine_labels"
    rows, labels = values.get("data"), values.get(key)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != _CIFAR_PIXELS:
        raise UserError(f"{file.source}: data is no array of rows of {_CIFAR_PIXELS} bytes")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(label) is int for label in labels):
        raise UserError(f"{file.source}: {key} is no list of {len(rows)} labels")
    return _cifar_originals(file, rows, labels, class_names)


def _pickled(file: File) -> dict[Any, Any]:
    values = read_plain_pickle(content_of(file, _MAX_CIFAR_BYTES), file.source)
    if not isinstance(values, dict):
        raise UserError(f"{file.source}: holds no dict")
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in values.items()}


def _binary_batch(file: File, is_10: bool, class_names: dict[int, str]) -> list[Original]:
    label_bytes = 1 if is_10 else 2  # of CIFAR-100: coarse class, then class
    data = np.frombuffer(content_of(file, _MAX_CIFAR_BYTES), np.uint8)
    if len(data) % (label_bytes + _CIFAR_PIXELS):
        raise UserError(f"{file.source}: {len(data)} bytes are not a multiple of {label_bytes + _CIFAR_PIXELS}; cut?")
    rows = data.reshape(-1, label_bytes + _CIFAR_PIXELS)
    labels = [int(label) for label in rows[:, label_bytes - 1]]
    return _cifar_originals(file, rows[:, label_bytes:], labels, class_names)


def _cifar_originals(file: File, rows: np.ndarray, labels: list[int], class_names: dict[int, str]) -> list[Original]:
    originals = []
    for i, (row, label) in enumerate(zip(rows, labels)):
        item = Item(partial(_png_of_planes, row), "png", label, f"{file.source}[{i}]")
        originals.append(Original(f"{Path(file.name).name}[{i}]", item, class_names.get(label, "")))
    return originals


def _png_of_planes(planes: np.ndarray) -> bytes:
    return png_of(planes.reshape(3, 32, 32).transpose(1, 2, 0))


def pets(source: Path) -> Splits:
    """Returns Oxford-IIIT Pets from images.tar.gz and annotations.tar.gz: trainval.txt as train, and test.txt."""
    images = {
        Path(file.name).stem: file
        for file in files_of(one_of(source, "images.tar.gz", "images.tar", "images"))
        if is_image(file)
    }
    lists = {
        Path(file.name).name: file
        for file in files_of(one_of(source, "annotations.tar.gz", "annotations.tar", "annotations"))
        if file.name.endswith(".txt")
    }
    splits = {}
    for split, name in (("train", "trainval.txt"), ("test", "test.txt")):
        if name not in lists:
            raise UserError(f"{source}: annotations hold no {name}")
        splits[split] = []
        for line in text_of(lists[name]).splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            words = line.split()  # Abyssinian_201 1 1 1: breed and number, class from 1, species, breed in the species
            if len(words) < 2 or not re.fullmatch(r"[0-9]{1,9}", words[1]):
                raise UserError(f"{lists[name].source}: {line[:60]!r} is not a name and a class")
            key, label = words[0], int(words[1])
            if key not in images:
                raise UserError(f"{source}: {name} names {shown(key)}, images hold no such file")
            splits[split].append(original_of(images[key], label - 1, key.rpartition("_")[0]))
    return splits


def flowers(source: Path) -> Splits:
    """Returns Oxford Flowers-102 from 102flowers.tgz, imagelabels.mat and setid.mat (trnid, valid, tstid)."""
    images = {
        int(match[1]): file
        for file in files_of(one_of(source, "102flowers.tgz", "102flowers.tar", "jpg"))
        if (match := re.search(r"image_(\d{5})\.jpg$", file.name))
    }
    labels = _matlab(one_of(source, "imagelabels.mat"), "labels")["labels"]  # from 1, of image_00001 and on
    sets = _matlab(one_of(source, "setid.mat"), "trnid", "valid", "tstid")
    splits = {}
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        missing = [i for i in sets[name] if i not in images or not 1 <= i <= len(labels)]
        if missing:
            raise UserError(f"{source}: setid.mat names image_{missing[0]:05d}, which has no file or no label")
        splits[split] = [original_of(images[i], int(labels[i - 1]) - 1) for i in sets[name]]
    return splits


def _matlab(path: Path, *names: str) -> dict[str, list[int]]:
    """Returns lists of integers from a Matlab file."""
    file = File(path.name, partial(read_file, path), str(path))
    try:
        values = read_matlab(content_of(file, MAX_MATLAB_BYTES))
        return {name: [whole(value) for value in values[name]] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a Matlab file with {', '.join(names)} ({error!s:.200})") from None


def dtd(source: Path) -> Splits:
    """Returns the Describable Textures from dtd-r1.0.1.tar.gz or the folder `dtd`: the first of its ten divisions."""
    archive = one_of(source, "dtd-r1.0.1.tar.gz", "dtd-r1.0.1.tar", "dtd")
    files = files_of(archive)
    images = {"/".join(Path(file.name).parts[-2:]): file for file in files if is_image(file)}
    lists = {Path(file.name).name: file for file in files if file.name.endswith(".txt")}
    classes = {name: number for number, name in enumerate(sorted({key.partition("/")[0] for key in images}))}
    splits = {}
    for split in ("train", "val", "test"):
        if f"{split}1.txt" not in lists:
            raise UserError(f"{archive}: labels/{split}1.txt is missing")
        keys = text_of(lists[f"{split}1.txt"]).split()  # banded/banded_0002.jpg
        if unknown := [key for key in keys if key not in images]:
            raise UserError(f"{archive}: {split}1.txt names {shown(unknown[0])}, which has no file")
        named = [(key, key.partition("/")[0]) for key in keys]
        splits[split] = [original_of(images[key], classes[name], name) for key, name in named]
    return splits
