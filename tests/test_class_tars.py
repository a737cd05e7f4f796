"""ImageNet-21k as it is handed out, in small: a tar for each class, in a folder, in a tar, in a .tar.gz."""

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.manifest import load_manifest
from pretrain.shards.class_list import read_class_list
from pretrain.shards.class_tars import class_tar_items, tar_of_tars_items
from pretrain.shards.counts import read_counts
from pretrain.shards.make import Options, make_part, make_shards
from pretrain.shards.passes import FOLDER, Work
from pretrain.shards.sources import Told
from pretrain.shards.verify import verify
from tests.test_building import refusal, tree
from tests.test_records import content, image

SMALL = Options(samples_per_shard=4, seed=1)
WNIDS = ["n01440764", "n01443537", "n02084071"]


def tar_of(files: dict[str, bytes]) -> bytes:
    """A plain tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


# Four images of each class; the dog is a fish too, and twice in its own class.
IMAGES = {wnid: {f"{wnid}_{n}.JPEG": image(10 * k + n, "jpeg") for n in range(4)} for k, wnid in enumerate(WNIDS)}
IMAGES[WNIDS[1]]["n01443537_9.JPEG"] = IMAGES[WNIDS[2]]["n02084071_0.JPEG"]
IMAGES[WNIDS[2]]["n02084071_9.JPEG"] = IMAGES[WNIDS[2]]["n02084071_0.JPEG"]
TARS = {f"{wnid}.tar": tar_of(images) for wnid, images in IMAGES.items()}


def fall11(folder: Path) -> Path:
    """One tar, whose members lie in no order."""
    path = folder / "fall11_whole.tar"
    path.write_bytes(tar_of(dict(reversed(TARS.items()))))
    return path


def winter21(folder: Path) -> Path:
    """One .tar.gz, with a folder inside."""
    path = folder / "winter21_whole.tar.gz"
    path.write_bytes(gzip.compress(tar_of({f"winter21_whole/{name}": data for name, data in TARS.items()})))
    return path


def unpacked(folder: Path) -> Path:
    """The folder of tars."""
    for name, data in TARS.items():
        (folder / "in21k").mkdir(exist_ok=True)
        (folder / "in21k" / name).write_bytes(data)
    return folder / "in21k"


def decompress(source: Path, out: Path) -> None:
    """The beginning of a build."""
    tar_of_tars_items(source, Told(), Work(out))


def test_classes_are_sorted_as_in_the_folder(tmp_path: Path) -> None:
    """By the names with their ending: where one class's name begins with another's, that is another order."""
    tars = dict(zip(("dog.tar", "dog-house.tar", "cat.tar"), TARS.values()))
    (tmp_path / "in").mkdir()
    for name, data in tars.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "x.tar").write_bytes(tar_of(tars))
    items, names = tar_of_tars_items(tmp_path / "x.tar", Told(), Work(tmp_path / "set"))
    of_folder, names_of_folder = class_tar_items(tmp_path / "in", Told())
    assert names == names_of_folder == ["cat", "dog-house", "dog"]
    assert items.labels == of_folder.labels and items[0].read() == of_folder[0].read()


@pytest.mark.parametrize("make", [fall11, winter21])
def test_a_tar_of_tars_is_the_folder_of_tars(make: Any, tmp_path: Path) -> None:
    """The same files to the byte, also when elements of an array write them; nothing unpacked stays."""
    make_shards([unpacked(tmp_path)], None, tmp_path / "a" / "set", SMALL)
    source = make(tmp_path)
    if source.suffix == ".gz":
        message = refusal(make_part, [source], None, tmp_path / "b" / "set", (1, 2), SMALL)
        assert "with --part each element would decompress it; do it before" in message
        decompress(source, tmp_path / "b" / "set")
    make_part([source], None, tmp_path / "b" / "set", (1, 2), SMALL)
    if source.suffix == ".gz":  # another element has decompressed it at another time
        (copy,) = (tmp_path / "b" / "set" / FOLDER).glob("*.tar")
        os.utime(copy, ns=(5, 5))
    make_shards([source], None, tmp_path / "b" / "set", SMALL)
    assert tree(tmp_path / "b" / "set") == tree(tmp_path / "a" / "set")
    manifest = load_manifest(tmp_path / "b" / "set")
    assert manifest.class_names == tuple(WNIDS) and manifest.num_samples == 14 and not list(verify(manifest))


def test_google_s_order_and_one_image_for_equal_ones(tmp_path: Path) -> None:
    """Labels are places in a list with more classes; the image in two classes is there once, with both labels."""
    order = tmp_path / "imagenet21k_wordnet_ids.txt"
    order.write_text("\n".join(["n00004475", WNIDS[2], WNIDS[0], WNIDS[1]]) + "\n")
    once = replace(SMALL, merge_duplicates=True)
    _, told = make_shards([fall11(tmp_path)], read_class_list(order), tmp_path / "set", once)
    manifest = load_manifest(tmp_path / "set")
    assert manifest.multi_label and manifest.num_classes == 4 and not list(verify(manifest))
    labels = {data: json.loads(label) for data, label in content(tmp_path / "set")}
    assert len(labels) == 12 == manifest.num_samples
    dog = IMAGES[WNIDS[2]]["n02084071_0.JPEG"]
    assert labels.pop(dog) == [1, 3]
    assert labels.pop(IMAGES[WNIDS[0]]["n01440764_1.JPEG"]) == [2]
    assert all(len(label) == 1 for label in labels.values())
    assert read_counts(tmp_path / "set")[0] == [0, 4, 4, 5]
    assert told.passed_over["images that are there already, whose labels were merged"] == 2
    make_part([fall11(tmp_path)], read_class_list(order), tmp_path / "b" / "set", (0, 2), once)
    other = refusal(make_shards, [fall11(tmp_path)], read_class_list(order), tmp_path / "b" / "set", SMALL)
    assert "its --merge-duplicates was 1 and is now None" in other or "number of images" in other


@pytest.mark.parametrize("how", ["cut", "zeros", "twice", "gz cut", "bomb"])
def test_a_damaged_tar_of_tars_is_named(how: str, tmp_path: Path) -> None:
    """An inner tar that is cut between two images, a header that became zeros, a class twice, half a .gz."""
    tars, path = dict(TARS), tmp_path / "x.tar"
    inner = bytearray(TARS[f"{WNIDS[1]}.tar"])
    if how == "cut":
        tars[f"{WNIDS[1]}.tar"] = bytes(inner[: tarfile.BLOCKSIZE * 4])
    elif how == "zeros":
        start = inner.rindex(b"n01443537_9")
        inner[start : start + 512] = bytes(512)
        tars[f"{WNIDS[1]}.tar"] = bytes(inner)
    elif how == "twice":
        tars[f"x/{WNIDS[0]}.tar"] = tars[f"{WNIDS[0]}.tar"]
    data = tar_of(tars)
    if how in ("gz cut", "bomb"):
        path = tmp_path / "x.tar.gz"
        data = gzip.compress(data + bytes(70 << 20) * (how == "bomb"))
        data = data[:-100] if how == "gz cut" else data
    path.write_bytes(data)
    message = refusal(make_shards, [path], None, tmp_path / "set", SMALL)
    said = {
        "cut": WNIDS[1],
        "zeros": WNIDS[1],
        "twice": "more than once",
        "gz cut": "not a readable",
        "bomb": "becomes",
    }
    assert said[how] in message and str(path) in message
    assert not list((tmp_path / "set").glob("**/*.tar"))


def test_a_list_of_classes_in_lines_that_is_none(tmp_path: Path) -> None:
    """Bytes that are no text."""
    (tmp_path / "x.txt").write_bytes(b"\xff")
    assert "is not UTF-8" in refusal(read_class_list, tmp_path / "x.txt")


ONE = {"1.jpg": b"1"}  # a tar of one class, by its headers
OTHERS = {
    "folders of classes": ({"cat/1.jpg": b"1", "dog/2.jpg": b"2"}, "images in several folders, cat and dog"),
    "a folder and none": ({"./1.jpg": b"1", "x/2.jpg": b"2"}, "images in several folders, . and x"),
    "tars": ({"n01.tar": b"1"}, "holds a tar, n01.tar"),
    "img2dataset": ({"0.jpg": b"1", "0.json": b"{}", "0.txt": b"x"}, "0.jpg and 0.json are a sample"),
    "texts first": ({"0.txt": b"x", "0.jpg": b"1"}, "0.txt and 0.jpg are a sample"),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_tars_of_something_else_would_become_classes(kind: str, within: bool, tmp_path: Path) -> None:
    """Parts with folders of classes, tars of tars, shards without .cls: in a folder of tars, and in a tar of tars."""
    members, said = OTHERS[kind]
    tars = {"a.tar": tar_of(ONE), "b.tar": tar_of(members)}
    (tmp_path / "in").mkdir()
    for name, data in {"x.tar": tar_of(tars)}.items() if within else tars.items():
        (tmp_path / "in" / name).write_bytes(data)
    source = tmp_path / "in" / "x.tar" if within else tmp_path / "in"
    message = refusal(make_shards, [source], None, tmp_path / "set", SMALL)
    assert said in message and "b.tar" in message


@pytest.mark.parametrize("within", [False, True])
def test_tars_that_are_called_as_parts_are_no_classes(within: bool, tmp_path: Path) -> None:
    """train.tar and val.tar, whatever they hold; a class of trains lies beside others."""
    tars = {"train.tar": tar_of(ONE), "val.tar": tar_of(ONE)}
    (tmp_path / "in").mkdir()
    for name, data in tars.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "x.tar").write_bytes(tar_of(tars))
    source = tmp_path / "x.tar" if within else tmp_path / "in"
    assert "its tars train, val are parts of a set" in refusal(make_shards, [source], None, tmp_path / "set", SMALL)
    (tmp_path / "in" / "val.tar").rename(tmp_path / "in" / "tram.tar")
    assert class_tar_items(tmp_path / "in", Told())[1] == ["train", "tram"]


def test_what_lies_in_one_folder_of_a_class_is_its_images(tmp_path: Path) -> None:
    """A folder inside, and texts that are of no image, are no sign of anything."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        members = {f"./{name}/1.jpg": b"1", f"{name}/2.jpg": b"2", f"{name}/README.txt": b"x", f"{name}/x.json": b"{}"}
        (tmp_path / "in" / f"{name}.tar").write_bytes(tar_of(members))
    told = Told()
    items, names = class_tar_items(tmp_path / "in", told)
    assert names == ["a", "b"] and list(items.labels) == [0, 0, 1, 1] and told.passed_over[".json files"] == 2
