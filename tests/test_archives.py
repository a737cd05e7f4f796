"""Original downloads: each archive as its authors lay it out, generated here in small, and what is wrong with one."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pretrain.data.images import decode
from pretrain.errors import UserError
from pretrain.shards import imagenet as imagenet_originals
from pretrain.shards import matlab
from pretrain.shards.archives import Original, class_folders
from pretrain.shards.imagenet import DEVKIT, imagenet, val_labels
from pretrain.shards.originals import cifar, dtd, flowers, pets
from pretrain.shards.packs import pack_originals, split_of


def picture(seed: int, form: str = "jpeg") -> bytes:
    """A small picture as a file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3)).astype(np.uint8)).save(file, form)
    return file.getvalue()


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of files, in the given order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def listed(originals: list[Original]) -> list[tuple[str, int, bytes]]:
    """(id, label, content) of each image."""
    return [(original.id, original.item.label, original.item.read()) for original in originals]


def refusal(function: Any, *arguments: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def cifar_rows(count: int, labels: int, seed: int) -> np.ndarray:
    """Rows of a CIFAR binary file: 1 or 2 bytes of labels, then red, green and blue planes."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (count, labels + 3072)).astype(np.uint8)
    rows[:, :labels] = random.integers(0, 10 if labels == 1 else 20, (count, labels))
    if labels == 2:
        rows[:, 1] = random.integers(0, 100, count)
    return rows


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_binary(num_classes: int, unpacked: bool, tmp_path: Path) -> None:
    """Batches in order, planes to pixels bit by bit, the fine label of CIFAR-100; from the archive or its folder."""
    labels = 1 if num_classes == 10 else 2
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if num_classes == 10 else ["train.bin"]
    names = [*train, "test_batch.bin" if num_classes == 10 else "test.bin"]
    rows = {name: cifar_rows(4, labels, seed) for seed, name in enumerate(names)}
    short, folder = ("cifar-10", "cifar-10-batches-bin") if num_classes == 10 else ("cifar-100", "cifar-100-binary")
    members = {f"{folder}/{name}": rows[name].tobytes() for name in reversed(names)} | {f"{folder}/readme.html": b"x"}
    listed_in = "batches.meta.txt" if num_classes == 10 else "fine_label_names.txt"
    if not unpacked:  # the list of names may be missing
        members[f"{folder}/{listed_in}"] = b"".join(b"class_%d\n" % i for i in range(num_classes)) + b"\n"
    if unpacked:
        (tmp_path / folder).mkdir()
        for name, data in members.items():
            (tmp_path / name).write_bytes(data)
    else:
        (tmp_path / f"{short}-binary.tar.gz").write_bytes(tar_bytes(members, "w:gz"))
    (tmp_path / f"{short}-python.tar.gz").write_bytes(b"the pickles, which a folder of downloads may hold too")
    splits = cifar(tmp_path, num_classes)
    assert {split: len(found) for split, found in splits.items()} == {"train": 4 * len(train), "test": 4}
    for split, files in (("train", train), ("test", names[-1:])):
        expected = np.concatenate([rows[name] for name in files])
        assert [original.item.label for original in splits[split]] == expected[:, labels - 1].tolist()
        for original, row in zip(splits[split], expected):
            assert original.class_name == ("" if unpacked else f"class_{row[labels - 1]}")
            assert np.array_equal(decode(original.item.read()).numpy().ravel(), row[labels:])
    assert splits["train"][1].id == f"{train[0]}[1]"


class Calls:
    """What a pickle can do when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def python_2s(batch: dict[str, Any]) -> bytes:
    """A pickle of a dict as Python 2 wrote CIFAR's: texts and the arrays' bytes are strings."""

    def text(data: bytes) -> bytes:
        return b"T" + len(data).to_bytes(4, "little") + data

    parts = [b"\x80\x02}q\x01("]
    for key, value in batch.items():
        parts.append(text(key.encode()))
        if isinstance(value, np.ndarray):
            parts.append(
                b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
            )
            parts.append(b"".join(b"J" + side.to_bytes(4, "little") for side in value.shape) + b"\x86cnumpy\ndtype\n")
            parts.append(
                text(b"u1")
                + b"K\x00K\x01\x87R(K\x03"
                + text(b"|")
                + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            )
            parts.append(text(value.tobytes()) + b"tb")
        else:
            parts.append(b"](" + b"".join(b"K" + bytes([v]) if isinstance(v, int) else text(v) for v in value) + b"e")
    return b"".join(parts) + b"u."


def pickled_arrays(shape: bytes, contents: list[bytes]) -> bytes:
    """A pickle of a list of arrays of bytes, of one shape, all given in opcodes."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR(K\x01" + shape
    made += b"cnumpy\ndtype\n(U\x02u1tR\x89"
    return b"](" + b"".join(made + content + b"tb" for content in contents) + b"e."


TEXT = b"T" + (9_000).to_bytes(4, "little") + bytes(9_000) + b"q\x01"
HUGE = b"\x8a\xff" + b"\x7f" * 255 + b"q\x02"


@pytest.mark.parametrize("write", [python_2s, partial(pickle.dumps, protocol=4)])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_python(num_classes: int, write: Callable[[Any], bytes], tmp_path: Path) -> None:
    """Pickles of Python 2 and 3: the same images, labels and names as the binary version's."""
    train = [f"data_batch_{i}" for i in range(1, 6)] if num_classes == 10 else ["train"]
    names, key = (
        [*train, "test_batch" if num_classes == 10 else "test"],
        "labels" if num_classes == 10 else "fine_labels",
    )
    rows = {name: cifar_rows(4, 1, seed) for seed, name in enumerate(names)}
    members = {
        f"x/{name}": write({"filenames": [b"a.png"] * 4, key: each[:, 0].tolist(), "data": each[:, 1:].copy()})
        for name, each in rows.items()
    }
    of_names = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}[num_classes]
    class_names = [f"class_{i}" for i in range(num_classes)]
    members[f"x/{of_names[0]}"] = pickle.dumps({of_names[1]: class_names}, protocol=4)
    (tmp_path / f"cifar-{num_classes}-python.tar.gz").write_bytes(tar_bytes(members, "w:gz"))
    splits = cifar(tmp_path, num_classes)
    for split, files in (("train", train), ("test", names[-1:])):
        expected = np.concatenate([rows[name] for name in files])
        assert [original.item.label for original in splits[split]] == expected[:, 0].tolist()
        for original, row in zip(splits[split], expected, strict=True):
            assert original.class_name == f"class_{row[0]}"
            assert np.array_equal(decode(original.item.read()).numpy().ravel(), row[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Calls(os.system, "touch executed"), "system', which could run code"),
        ({"data": Calls(eval, "open('executed', 'w')")}, "eval', which could run code"),
        ({"data": Calls(np.ndarray, (1,)), "labels": [1]}, "it calls numpy ndarray"),
        ({"data": np.zeros((2, 3072), object), "labels": [1, 2]}, "it calls numpy dtype"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}, "it calls numpy dtype"),
        ({"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), "labels": [1, 2]}, "else than rows of bytes"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}, "data is no array of rows of 3072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "labels is no list of 2 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, "2"]}, "labels is no list of 2 labels"),
        ([1], "holds no dict"),
        ({"data": {1, 2}}, "opcode EMPTY_SET"),
        (b"\x80\x02}q", "is no pickle of plain data"),
        (b"\x80\x02N", "is no pickle of plain data"),
        (b"", "is no pickle of plain data"),
        (b"}(s.", "is no pickle of plain data"),
        (b"e.", "is no pickle of plain data"),
        (b"T\xff\xff\xff\x7fabc.", "is no pickle of plain data"),
        (b"})" + b"\x85" * 300_000 + b"Ns.", "a tuple where a key is expected"),
        (b")" + b"\x85" * 300_000 + b"\x8c\x01a\x93.", "which could run code"),
        (b"cnumpy\ndtype\n)" + b"\x85" * 300_000 + b"R.", "it calls numpy dtype"),
        (b"2" * 9, "opcode DUP"),
        (pickled_arrays(b"(" + HUGE + b"h\x02" * 3_000 + b"t", [TEXT]), "else than rows of bytes"),
        (pickled_arrays(HUGE + b"h\x02\x86", [TEXT]), "with 9000 bytes"),
        (pickled_arrays(b"M\x28\x23\x85", [TEXT, b"h\x01"]), "more bytes than the file"),
    ],
)  # fmt: skip
def test_a_pickle_of_more_than_data_is_refused_and_runs_nothing(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls, other arrays, damage: one line with the file's name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    told = refusal(cifar, tmp_path, 10)
    assert message in told and "data_batch_1" in told and not (tmp_path / "executed").exists()


def test_cifar_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """A cut batch, a missing batch, nothing at all."""
    assert "holds none of cifar-10-binary.tar.gz" in refusal(cifar, tmp_path, 10)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    archive.write_bytes(tar_bytes({name: bytes(3073) for name in names[:-1]}, "w:gz"))
    assert "test_batch.bin is missing" in refusal(cifar, tmp_path, 10)
    archive.write_bytes(tar_bytes({name: bytes(3072) for name in names}, "w:gz"))
    assert "not a multiple of 3073" in refusal(cifar, tmp_path, 10)
    archive.write_bytes(archive.read_bytes()[:60])
    assert "not a readable tar" in refusal(cifar, archive, 10)


def test_pets(tmp_path: Path) -> None:
    """Lists name the images; classes count from 1; comments and macOS's ._files are skipped."""
    images = {f"images/{name}.jpg": picture(i) for i, name in enumerate(["Abyssinian_1", "beagle_2", "pug_3"])}
    (tmp_path / "images.tar.gz").write_bytes(tar_bytes({"images/._pug_3.jpg": b"mac"} | images, "w:gz"))
    lists = {
        "annotations/trainval.txt": b"#Image CLASS-ID SPECIES BREED ID\npug_3 37 2 25\nAbyssinian_1 1 1 1\n",
        "annotations/test.txt": b"beagle_2 5 2 4\n",
        "annotations/README": b"x",
    }
    (tmp_path / "annotations.tar.gz").write_bytes(tar_bytes(lists, "w:gz"))
    splits = pets(tmp_path)
    assert listed(splits["train"]) == [
        ("pug_3.jpg", 36, images["images/pug_3.jpg"]),
        ("Abyssinian_1.jpg", 0, images["images/Abyssinian_1.jpg"]),
    ]
    assert [original.item.label for original in splits["test"]] == [4]
    assert [original.class_name for originals in splits.values() for original in originals] == [
        *("pug", "Abyssinian", "beagle")
    ]
    lists["annotations/test.txt"] = b"gone_7 5 2 4\n"
    (tmp_path / "annotations.tar.gz").write_bytes(tar_bytes(lists, "w:gz"))
    assert "test.txt names gone_7" in refusal(pets, tmp_path)
    lists["annotations/test.txt"] = b"<html>\n"
    (tmp_path / "annotations.tar.gz").write_bytes(tar_bytes(lists, "w:gz"))
    assert "'<html>' is not a name and a class" in refusal(pets, tmp_path)


def test_flowers(tmp_path: Path) -> None:
    """setid.mat chooses, imagelabels.mat labels from 1, image_00001.jpg is the first; another .mat is refused."""
    images = {f"jpg/image_{number:05d}.jpg": picture(number) for number in range(1, 7)}
    (tmp_path / "102flowers.tgz").write_bytes(tar_bytes(dict(reversed(images.items())), "w:gz"))
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 6, 7]], np.uint8)})
    savemat(tmp_path / "setid.mat", {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[6, 5, 4]]})
    splits = flowers(tmp_path)
    assert listed(splits["train"]) == [
        ("image_00003.jpg", 101, images["jpg/image_00003.jpg"]),
        ("image_00001.jpg", 76, images["jpg/image_00001.jpg"]),
    ]
    assert [o.item.label for o in splits["val"]] == [0] and [o.item.label for o in splits["test"]] == [6, 5, 4]
    savemat(tmp_path / "setid.mat", {"trnid": [[9]], "valid": [[2]], "tstid": [[6]]})
    assert "setid.mat names image_00009" in refusal(flowers, tmp_path)
    (tmp_path / "setid.mat").write_bytes(b"<html>")
    assert "setid.mat: not a Matlab file" in refusal(flowers, tmp_path)


def test_a_matlab_file_that_crashes_its_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus error in scipy's compiled reader ends its process, not ours (one flipped byte was enough)."""
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGBUS)\n")
    (tmp_path / "imagelabels.mat").touch()
    (tmp_path / "102flowers.tgz").write_bytes(tar_bytes({}, "w:gz"))
    monkeypatch.setattr(matlab, "__file__", str(tmp_path / "crash.py"))
    message = refusal(flowers, tmp_path)
    assert "imagelabels.mat: not a Matlab file" in message and "the reader crashed, signal 7" in message


@pytest.fixture
def ilsvrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ImageNet as downloaded, of 4 validation images and 3 of training; 1,000 classes need a longer label list."""
    monkeypatch.setattr(imagenet_originals, "_NUM_VAL", 4)
    wnids = imagenet_originals.wnids()
    train = {wnids[5]: [("_18", 1), ("_2", 2)], wnids[999]: [("_7", 3)]}
    inner = {
        f"{wnid}.tar": tar_bytes({f"{wnid}{name}.JPEG": picture(seed) for name, seed in files})
        for wnid, files in reversed(train.items())
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": picture(10 + number) for number in (3, 1, 4, 2)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    return {"folder": tmp_path, "val": val, "wnids": wnids, "labels": [999, 0, 65, 7]}


def test_imagenet_from_its_tars(ilsvrc: dict[str, Any]) -> None:
    """A tar of tars is read where it lies; validation images by number, with the labels of their number."""
    folder, wnids = ilsvrc["folder"], ilsvrc["wnids"]
    (folder / "val_labels.txt").write_text("".join(f"{label}\n" for label in ilsvrc["labels"]))
    splits = imagenet(folder)
    assert listed(splits["train"]) == [
        (f"{wnids[5]}_18.JPEG", 5, picture(1)),
        (f"{wnids[5]}_2.JPEG", 5, picture(2)),
        (f"{wnids[999]}_7.JPEG", 999, picture(3)),
    ]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    assert listed(splits["val"]) == [(n, label, ilsvrc["val"][n]) for n, label in zip(names, ilsvrc["labels"])]


@pytest.mark.parametrize("form", ["synsets", "pairs", "pairs in folders", "npz", "devkit"])
def test_validation_labels_in_every_form(form: str, ilsvrc: dict[str, Any]) -> None:
    """WordNet ids, (name, class) in any order, an array, and the devkit, whose classes have an order of their own."""
    folder, wnids, labels = ilsvrc["folder"], ilsvrc["wnids"], ilsvrc["labels"]
    if form == "synsets":
        text = "".join(f"{wnids[label]}\n" for label in labels)
        (folder / "imagenet_2012_validation_synset_labels.txt").write_text(text)
    elif form == "pairs":
        lines = [f"ILSVRC2012_val_{number:08d}.JPEG {label}\n" for number, label in enumerate(labels, start=1)]
        (folder / "val.txt").write_text("".join(reversed(lines)))
    elif form == "pairs in folders":  # sorted by their paths, they are sorted by class
        names = [f"{wnids[label]}/ILSVRC2012_val_{number:08d}.JPEG" for number, label in enumerate(labels, start=1)]
        (folder / "val.txt").write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels)))
    elif form == "npz":
        np.savez(folder / "imagenet_val_labels.npz", label=np.array(labels, np.uint16))
    else:
        order = np.random.default_rng(0).permutation(1000)  # ILSVRC2012_ID k + 1 is the class order[k]
        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("children", "O")]
        rows = [(number + 1, wnids[index], "word", np.arange(number % 3)) for number, index in enumerate(order)]
        stream = io.BytesIO()
        savemat(stream, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
        truth = "".join(f"{order.tolist().index(label) + 1}\n" for label in labels)
        members = {
            "ILSVRC2012_devkit_t12/data/meta.mat": stream.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        }
        (folder / DEVKIT).write_bytes(tar_bytes(members, "w:gz"))
    assert val_labels(folder) == labels


@pytest.mark.parametrize("labels, said", [([1000, 1, 66, 8], "from 1 to 1000"), ([0, 999, 3], "3 validation labels")])
def test_other_label_lists_are_refused(labels: list[int], said: str, ilsvrc: dict[str, Any]) -> None:
    """Numbers from 1 are another order of the classes: scores would be near zero without a word."""
    (ilsvrc["folder"] / "val_labels.txt").write_text("".join(f"{label}\n" for label in labels))
    message = refusal(imagenet, ilsvrc["folder"])
    assert said in message and DEVKIT in message


@pytest.mark.parametrize(
    "names, said",
    [
        (["ILSVRC2012_val_{:08d}.JPEG", "{}.JPEG"], "ILSVRC2012_val_00000001.JPEG is expected"),
        (["x/ILSVRC2012_val_{:08d}.JPEG"], "ILSVRC2012_val_00000002.JPEG is expected"),
        (["{}"], "ILSVRC2012_val_00000001.JPEG is expected"),
    ],
)
def test_a_list_of_other_names_is_refused(names: list[str], said: str, ilsvrc: dict[str, Any]) -> None:
    """Its order would be taken for that of the images: plain numbers are sorted 1, 10, 2; one that is there twice."""
    numbers = [1, 1, 3, 4] if names[0].startswith("x/") else [1, 2, 3, 4]
    lines = [f"{names[place % len(names)].format(number)} 7\n" for place, number in enumerate(numbers)]
    (ilsvrc["folder"] / "val.txt").write_text("".join(lines))
    assert said in refusal(val_labels, ilsvrc["folder"])


def test_imagenet_from_folders(tmp_path: Path) -> None:
    """train/WNID and val/WNID; the validation images in the order of their names, not of their classes."""
    wnids = imagenet_originals.wnids()
    for name in (f"train/{wnids[3]}/{wnids[3]}_1.JPEG", f"val/{wnids[9]}/ILSVRC2012_val_00000001.JPEG"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / f"val/{wnids[2]}").mkdir()
    (tmp_path / f"val/{wnids[2]}/ILSVRC2012_val_00000002.JPEG").write_bytes(picture(2))
    splits = imagenet(tmp_path)
    assert [(o.id, o.item.label) for o in splits["train"]] == [(f"{wnids[3]}/{wnids[3]}_1.JPEG", 3)]
    assert [(o.id, o.item.label) for o in splits["val"]] == [
        ("ILSVRC2012_val_00000001.JPEG", 9),
        ("ILSVRC2012_val_00000002.JPEG", 2),
    ]
    (tmp_path / "train/n00000001").mkdir()
    (tmp_path / "train/n00000001/x.JPEG").write_bytes(picture(1))
    assert "'n00000001' is not one of the 1000 classes" in refusal(imagenet, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds none of ILSVRC2012_img_train.tar" in refusal(imagenet, tmp_path / "empty")


def test_class_folders_of_a_tar_or_a_folder(tmp_path: Path) -> None:
    """The innermost folder is the class, and it is part of the id, since names repeat; zip has its way out."""
    members = {"set/10/sketch_1.JPEG": picture(1), "set/2/sketch_1.JPEG": picture(2), "set/README.txt": b"x"}
    (tmp_path / "set.tar").write_bytes(tar_bytes(members))
    with tarfile.open(tmp_path / "set.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    classes = {str(number): number for number in range(20)}
    expected = [("10/sketch_1.JPEG", 10, picture(1)), ("2/sketch_1.JPEG", 2, picture(2))]
    assert listed(class_folders(tmp_path / "set.tar", classes)) == expected
    assert listed(class_folders(tmp_path / "out", classes)) == expected
    assert listed(class_folders(tmp_path / "out" / "set", classes)) == expected
    assert "'10' is not one of the 2 classes" in refusal(class_folders, tmp_path / "out", {"1": 1, "2": 2})
    assert "unpack it" in refusal(class_folders, tmp_path / "set.zip", classes)
    (tmp_path / "none").mkdir()
    assert "no images found" in refusal(class_folders, tmp_path / "none", classes)


def test_dtd(tmp_path: Path) -> None:
    """The first division by its lists; classes in alphabetical order; a list or an image that is missing is told."""
    images = {
        f"dtd/images/{n}.jpg": picture(i) for i, n in enumerate(["woven/w_1", "banded/b_1", "banded/b_2", "lined/l"])
    }
    lists = {
        "dtd/labels/train1.txt": b"woven/w_1.jpg\nbanded/b_2.jpg\n",
        "dtd/labels/val1.txt": b"banded/b_1.jpg\n",
        "dtd/labels/test1.txt": b"lined/l.jpg\n",
        "dtd/labels/train2.txt": b"lined/l.jpg\n",
    }
    (tmp_path / "dtd-r1.0.1.tar.gz").write_bytes(tar_bytes(images | lists, "w:gz"))
    splits = dtd(tmp_path)
    assert listed(splits["train"]) == [
        ("w_1.jpg", 2, images["dtd/images/woven/w_1.jpg"]),
        ("b_2.jpg", 0, images["dtd/images/banded/b_2.jpg"]),
    ]
    assert [(o.item.label, o.class_name) for o in splits["val"] + splits["test"]] == [(0, "banded"), (1, "lined")]
    for changed, said in (
        ({"dtd/labels/val1.txt": b"gone/g.jpg"}, "val1.txt names gone/g.jpg, which has no file"),
        ({"dtd/labels/val1.txt": None}, "labels/val1.txt is missing"),
    ):
        members = {name: data for name, data in (images | lists | changed).items() if data is not None}
        (tmp_path / "dtd-r1.0.1.tar.gz").write_bytes(tar_bytes(members, "w:gz"))
        assert said in refusal(dtd, tmp_path)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    """Classes that lie on another disk count, a link that leads back up ends, a link to nothing is told."""
    (tmp_path / "disk/10").mkdir(parents=True)
    (tmp_path / "disk/10/x.jpg").write_bytes(picture(1))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/10").symlink_to(tmp_path / "disk/10")
    (tmp_path / "train/2").mkdir()
    (tmp_path / "train/2/x.jpg").symlink_to(tmp_path / "disk/10/x.jpg")
    (tmp_path / "train/2/again").symlink_to(tmp_path / "train")
    classes = {str(number): number for number in range(20)}
    expected = [("10/x.jpg", 10, picture(1)), ("2/x.jpg", 2, picture(1))]
    assert listed(class_folders(tmp_path / "train", classes)) == expected
    (tmp_path / "disk/10/x.jpg").unlink()
    message = refusal(class_folders, tmp_path / "train", classes)
    assert "train/2/x.jpg: is a link to" in message and "which is not there" in message


@pytest.mark.parametrize(
    "name, split",
    [
        *(
            ("cifar100_vtab1k_style_train800.npz", "train"),
            ("eurosat_val200.tar.gz", "val"),
            ("trainval.tar", "trainval"),
        ),
        *(
            ("vtab_eurosat_devtest1500.tar.gz", "test"),
            ("cifar10_train_part_a.npz", "train"),
            ("x-test-000003.tar", "test"),
        ),
        *(("imagenet_val_227px_dev-000000.tar", "val"), ("contest.npz", None), ("train_and_test.npz", None)),
    ],
)
def test_the_split_is_in_the_name(name: str, split: str | None) -> None:
    """A word of its own, with or without a count behind it; two of them tell nothing."""
    assert split_of(Path(name)) == split


def test_packs_of_tars_keep_names_and_order(tmp_path: Path) -> None:
    """KEY.jpg and KEY.cls, plain or compressed; a sample without a label is refused."""
    members = {"b_2.jpg": picture(1), "b_2.cls": b"3", "a_1.cls": b"4\n", "a_1.png": picture(2, "png")}
    for name, mode in (("val.tar", "w"), ("val.tar.gz", "w:gz")):
        (tmp_path / name).write_bytes(tar_bytes(members, mode))
        assert listed(pack_originals(tmp_path / name)) == [("b_2", 3, picture(1)), ("a_1", 4, picture(2, "png"))]
    (tmp_path / "val.tar").write_bytes(tar_bytes(members | {"c.jpg": picture(3)}))
    assert "c.jpg has no label; expected c.cls" in refusal(pack_originals, tmp_path / "val.tar")


def test_arrays_of_all_splits_are_no_pack(tmp_path: Path) -> None:
    """Of Keras's four arrays the training pixels would become the split that the file is named for."""
    pixels, labels = np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8)
    np.savez(tmp_path / "my_test.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    assert "no array 'blob'" in refusal(pack_originals, tmp_path / "my_test.npz")
