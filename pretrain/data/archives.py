"""Original downloads of evaluation sets, as their authors publish them: lists of images with names and labels.

Nothing is unpacked: members of plain tars are read where they lie, compressed ones are held in memory (4 GiB at most:
the large sets are plain tars or folders). Pickles are refused.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from importlib.resources import files as package_files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.data.build import Item, files_below, npz_items
from pretrain.data.manifest import IMAGE_ENDINGS, LABEL_ENDING
from pretrain.data.matlab import read_matlab
from pretrain.errors import UserError

MAX_UNPACKED_BYTES = 4 << 30  # of a compressed archive, held in memory: Oxford Pets has 0.8 GB


class Original(NamedTuple):
    """An image of an original set."""

    id: str  # its name there: ILSVRC2012_val_00000001.JPEG, or where it lies
    item: Item
    class_name: str = ""  # as its authors call it, where the files tell


Splits = dict[str, list[Original]]  # by the name of the split


# --- files inside archives and folders -------------------------------------------------------------------------------


class File(NamedTuple):
    """A file of a folder or an archive."""

    name: str  # path below the folder or in the archive
    read: Callable[[], bytes]
    source: str  # for error messages; one of its own for each


def files_of(path: Path) -> list[File]:
    """Returns the files of a folder, a .tar, or a .tar.gz or .tgz, sorted by name. Links to folders are followed."""
    if path.is_dir():
        return [File(str(file.relative_to(path)), file.read_bytes, str(file)) for file in files_below(path)]
    if path.suffix == ".zip":
        raise UserError(f"{path}: zip archives are not read; unpack it and give the folder")
    if not path.is_file():
        raise UserError(f"{path}: not found")
    try:
        return sorted(_members(path), key=lambda file: file.name)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None


def _members(path: Path) -> Iterable[File]:
    packed = path.name.endswith((".gz", ".tgz"))
    with tarfile.open(path, "r:gz" if packed else "r:") as tar:
        total = 0
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            name, source = member.name.removeprefix("./"), f"{path}[{member.name}]"
            if not packed:
                yield File(name, partial(_read_at, path, member.offset_data, member.size), source)
                continue
            total += member.size
            if total > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES >> 30} GiB unpacked; unpack it to a folder")
            content = tar.extractfile(member)
            assert content is not None  # a regular file has content
            yield File(name, partial(bytes, content.read()), source)


def _read_at(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), num_bytes, offset)
    if len(data) < num_bytes:
        raise UserError(f"{path}: ends at byte {offset + len(data)}, within a file of {num_bytes} bytes at {offset}")
    return data


def _original(file: File, label: int, class_name: str = "") -> Original:
    ending = file.name.rpartition(".")[2].lower()
    return Original(Path(file.name).name, Item(file.read, ending, label, file.source), class_name)


def _is_image(file: File) -> bool:
    return file.name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not Path(file.name).name.startswith(".")


def _found(source: Path, *names: str) -> Path | None:
    """Returns the first of these files or folders that is there; `source` may be the folder or the thing itself."""
    if source.name in names:
        return source if source.exists() else None
    return next((source / name for name in names if (source / name).exists()), None)


def _one_of(source: Path, *names: str) -> Path:
    found = _found(source, *names)
    if found is None:
        raise UserError(f"{source}: holds none of {', '.join(names)}")
    return found


# --- CIFAR -----------------------------------------------------------------------------------------------------------

_CIFAR_PIXELS = 3 * 32 * 32  # red plane, green plane, blue plane


def cifar(source: Path, num_classes: int) -> Splits:
    """Returns CIFAR-10 or -100 from `cifar-10-binary.tar.gz`, `cifar-100-binary.tar.gz` or the folder in it."""
    short = "cifar-10" if num_classes == 10 else "cifar-100"
    unpacked = f"{short}-batches-bin" if num_classes == 10 else f"{short}-binary"
    names = f"{short}-binary.tar.gz", unpacked
    pickled = _found(source, f"{short}-python.tar.gz", f"{short}-batches-py", f"{short}-python")
    if pickled and not _found(source, *names):
        raise UserError(f"{pickled}: holds pickles, which can run code; download {short}-binary.tar.gz instead")
    archive = _one_of(source, *names)
    files = {Path(file.name).name: file for file in files_of(archive)}
    binary = {name: file for name, file in files.items() if name.endswith(".bin")}
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if num_classes == 10 else ["train.bin"]
    test = ["test_batch.bin" if num_classes == 10 else "test.bin"]
    for name in train + test:
        if name not in binary:
            raise UserError(f"{archive}: {name} is missing")
    label_bytes = 1 if num_classes == 10 else 2  # of CIFAR-100: coarse class, then class
    listed = files.get("batches.meta.txt" if num_classes == 10 else "fine_label_names.txt")
    class_names = dict(enumerate(listed.read().decode(errors="replace").split() if listed else []))
    return {
        split: [original for name in names for original in _cifar_batch(binary[name], label_bytes, class_names)]
        for split, names in (("train", train), ("test", test))
    }


def _cifar_batch(file: File, label_bytes: int, class_names: dict[int, str]) -> list[Original]:
    data = np.frombuffer(file.read(), np.uint8)
    if len(data) % (label_bytes + _CIFAR_PIXELS):
        raise UserError(f"{file.source}: {len(data)} bytes are not a multiple of {label_bytes + _CIFAR_PIXELS}; cut?")
    rows = data.reshape(-1, label_bytes + _CIFAR_PIXELS)
    name = Path(file.name).name
    originals = []
    for i, row in enumerate(rows):
        label = int(row[label_bytes - 1])
        item = Item(partial(_png_of_planes, row[label_bytes:]), "png", label, f"{file.source}[{i}]")
        originals.append(Original(f"{name}[{i}]", item, class_names.get(label, "")))
    return originals


def _png_of_planes(planes: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.reshape(3, 32, 32).transpose(1, 2, 0))).save(file, "png")
    return file.getvalue()


# --- Oxford Pets and Flowers -----------------------------------------------------------------------------------------


def pets(source: Path) -> Splits:
    """Returns Oxford-IIIT Pets from images.tar.gz and annotations.tar.gz: trainval.txt as train, and test.txt."""
    images = {
        Path(file.name).stem: file
        for file in files_of(_one_of(source, "images.tar.gz", "images.tar", "images"))
        if _is_image(file)
    }
    lists = {
        Path(file.name).name: file
        for file in files_of(_one_of(source, "annotations.tar.gz", "annotations.tar", "annotations"))
        if file.name.endswith(".txt")
    }
    splits = {}
    for split, name in (("train", "trainval.txt"), ("test", "test.txt")):
        if name not in lists:
            raise UserError(f"{source}: annotations hold no {name}")
        splits[split] = []
        for line in lists[name].read().decode().splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            # Abyssinian_201 1 1 1: breed and number, class from 1, species, breed within the species
            key, label = _list_entry(lists[name], line)
            if key not in images:
                raise UserError(f"{source}: {name} names {key}, images hold no such file")
            splits[split].append(_original(images[key], label - 1, key.rpartition("_")[0]))
    return splits


def _list_entry(file: File, line: str) -> tuple[str, int]:
    words = line.split()
    if len(words) < 2 or not words[1].isdigit():
        raise UserError(f"{file.source}: {line[:60]!r} is not a name and a class")
    return words[0], int(words[1])


def flowers(source: Path) -> Splits:
    """Returns Oxford Flowers-102 from 102flowers.tgz, imagelabels.mat and setid.mat (trnid, valid, tstid)."""
    images = {
        int(match[1]): file
        for file in files_of(_one_of(source, "102flowers.tgz", "102flowers.tar", "jpg"))
        if (match := re.search(r"image_(\d{5})\.jpg$", file.name))
    }
    labels = _matlab(_one_of(source, "imagelabels.mat"), "labels")["labels"]  # from 1, of image_00001 and on
    sets = _matlab(_one_of(source, "setid.mat"), "trnid", "valid", "tstid")
    splits = {}
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        missing = [i for i in sets[name] if i not in images or not 1 <= i <= len(labels)]
        if missing:
            raise UserError(f"{source}: setid.mat names image_{missing[0]:05d}, which has no file or no label")
        splits[split] = [_original(images[i], int(labels[i - 1]) - 1) for i in sets[name]]
    return splits


def _matlab(path: Path, *names: str) -> dict[str, list[int]]:
    """Returns lists of integers from a Matlab file."""
    try:
        values = read_matlab(path.read_bytes())
        return {name: [int(value) for value in values[name]] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a Matlab file with {', '.join(names)} ({error})") from None


# --- ImageNet and its variants ---------------------------------------------------------------------------------------

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
    if tar := _found(source, TRAIN_TAR):
        splits["train"] = _train_tar(tar, classes)
    elif folder := _found(source, "train"):
        splits["train"] = class_folders(folder, classes)
    if val := _found(source, VAL_TAR, "val"):
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
                label = _class_of(Path(member.name).stem, classes, path)
                file.seek(member.offset_data)
                with tarfile.open(fileobj=file, mode="r:") as inner:  # its offsets count from the file's beginning
                    for image in sorted((m for m in inner if m.isreg()), key=lambda m: m.name):
                        read = partial(_read_at, path, image.offset_data, image.size)
                        originals.append(_original(File(image.name, read, f"{path}[{image.name}]"), label))
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar of tars ({error})") from None
    return originals


def class_folders(path: Path, classes: dict[str, int]) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders bear the names of classes."""
    originals = []
    for file in files_of(path):
        if _is_image(file):
            folder = _folder_of(file, path)
            original = _original(file, _class_of(folder, classes, path), folder)
            originals.append(original._replace(id=f"{folder}/{original.id}"))  # sketch_3.JPEG is in each folder
    if not originals:
        raise UserError(f"{path}: no images found; expected folders {next(iter(classes))} and so on")
    return originals


def _folder_of(file: File, path: Path) -> str:
    return Path(file.source if path.is_dir() else file.name).parent.name


def sorted_class_folders(path: Path, num_classes: int) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders are classes, numbered in alphabetical order."""
    names = sorted({_folder_of(file, path) for file in files_of(path) if _is_image(file)})
    if len(names) != num_classes:
        raise UserError(f"{path}: has images in {len(names)} folders, expected one for each of {num_classes} classes")
    return class_folders(path, {name: number for number, name in enumerate(names)})


def dtd(source: Path) -> Splits:
    """Returns the Describable Textures from dtd-r1.0.1.tar.gz or the folder `dtd`: the first of its ten divisions."""
    archive = _one_of(source, "dtd-r1.0.1.tar.gz", "dtd-r1.0.1.tar", "dtd")
    files = files_of(archive)
    images = {"/".join(Path(file.name).parts[-2:]): file for file in files if _is_image(file)}
    lists = {Path(file.name).name: file for file in files if file.name.endswith(".txt")}
    classes = {name: number for number, name in enumerate(sorted({key.partition("/")[0] for key in images}))}
    splits = {}
    for split in ("train", "val", "test"):
        if f"{split}1.txt" not in lists:
            raise UserError(f"{archive}: labels/{split}1.txt is missing")
        keys = lists[f"{split}1.txt"].read().decode().split()  # banded/banded_0002.jpg
        if unknown := [key for key in keys if key not in images]:
            raise UserError(f"{archive}: {split}1.txt names {unknown[0]}, which has no file")
        named = [(key, key.partition("/")[0]) for key in keys]
        splits[split] = [_original(images[key], classes[name], name) for key, name in named]
    return splits


def _class_of(name: str, classes: dict[str, int], path: Path) -> int:
    if name not in classes:
        raise UserError(f"{path}: {name!r} is not one of the {len(classes)} classes, as {next(iter(classes))!r} is")
    return classes[name]


def _flat_val(path: Path, labels: Sequence[int]) -> list[Original]:
    originals = []
    for file in files_of(path):
        if not _is_image(file):
            continue
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(file.name).name)
        if not match or not 1 <= int(match[1]) <= _NUM_VAL:
            raise UserError(f"{path}: {file.name} is not ILSVRC2012_val_00000001.JPEG to _{_NUM_VAL:08d}.JPEG")
        originals.append(_original(file, labels[int(match[1]) - 1]))
    return originals


def val_labels(folder: Path) -> list[int]:
    """Returns the 50,000 labels of ImageNet's validation images in the order of their names, 0 to 999.

    Reads the devkit, or one of VAL_LABELS: a line for each image that ends with a WordNet id or a class from 0, or a
    .npz with an array `label`. Raises UserError when none is there or one counts otherwise.
    """
    if devkit := _found(folder, DEVKIT, "ILSVRC2012_devkit_t12"):
        labels = _devkit_labels(devkit)
    else:
        labels = _label_list(_one_of(folder, DEVKIT, *VAL_LABELS))
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


# --- packs that somebody has cut into splits already -----------------------------------------------------------------

_SPLIT_WORD = re.compile(r"(?<![a-z])(trainval|train|val|validation|dev_?test|test)(?![a-z])")


def split_of(path: Path) -> str | None:
    """Returns the split that a pack's name tells: train, val or test (cifar100_val200.npz, eurosat_devtest.tar.gz)."""
    found = set(_SPLIT_WORD.findall(path.name.lower()))
    names = {"validation": "val", "devtest": "test", "dev_test": "test"}
    return names.get(word := found.pop(), word) if len(found) == 1 else None


def pack_originals(path: Path) -> list[Original]:
    """Returns the samples of a .npz pack, or of a .tar or .tar.gz of KEY.jpg and KEY.cls, in the pack's order."""
    if path.suffix == ".npz":
        items, classes = npz_items(path)
        labels = [item.label for item in items if isinstance(item.label, int)]  # all of them: an array of integers
        named = [classes[label] if label < len(classes) else "" for label in labels]
        return [Original(f"{path.name}[{i}]", item, named[i]) for i, item in enumerate(items)]
    try:
        members = list(_members(path))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    labels = {name.rpartition(".")[0]: file for file in members if (name := file.name).endswith(f".{LABEL_ENDING}")}
    originals = []
    for file in members:
        key = file.name.rpartition(".")[0]
        if _is_image(file):
            text = labels[key].read().strip() if key in labels else b""
            if not text.isdigit():
                raise UserError(f"{path}: {file.name} has no label; expected {key}.{LABEL_ENDING} with digits")
            originals.append(_original(file, int(text))._replace(id=key))
    return originals
