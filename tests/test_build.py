"""Making data sets: shuffled shards, the same bytes each time, and damage is refused by name before training."""

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from pretrain.config import MAX_CLASSES
from pretrain.data.images import decode
from pretrain.data.manifest import Manifest, check_shards, load_index, load_manifest, write_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import UserError
from pretrain.shards import walks
from pretrain.shards.build import DataSet, build, finish, read_dropped, write_samples
from pretrain.shards.counts import read_counts
from pretrain.shards.existing import index_existing
from pretrain.shards.make import Options, make_shards
from pretrain.shards.sources import Item, Told, folder_items, npz_items
from pretrain.shards.tars import index_tar
from pretrain.shards.verify import verify

ROOT = Path(__file__).resolve().parents[1]


def image_bytes(seed: int, form: str = "jpeg") -> bytes:
    """A small picture as a file."""
    random = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (9, 8, 3)).astype(np.uint8)).save(file, form)
    return file.getvalue()


def items(count: int, num_classes: int = 3) -> list[Item]:
    """Small pictures in class order, as folders give them."""
    labels = sorted(number % num_classes for number in range(count))
    files = [image_bytes(number, "png") for number in range(count)]
    return [
        Item(io.BytesIO(file).getvalue, "png", label, f"picture {number}")
        for number, (file, label) in enumerate(zip(files, labels))
    ]


def tar_file(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes), as other tools write it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good_members(count: int = 6) -> list[tuple[str, bytes]]:
    """Members of complete samples."""
    pairs = [((f"k{i}.jpg", image_bytes(i)), (f"k{i}.cls", str(i % 3).encode())) for i in range(count)]
    return [member for pair in pairs for member in pair]


def contents(manifest: Manifest) -> list[tuple[bytes, bytes]]:
    """(image, label) of every sample, in index order."""
    return [tuple(read_sample(manifest, index)[1:]) for index in range(manifest.num_samples)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_item_is_written_once_in_shuffled_order(tmp_path: Path) -> None:
    """All samples arrive with their labels; class order is gone; shards but the last are full."""
    source = items(100, 5)
    manifest = load_manifest(build(source, list("abcde"), tmp_path / "set", samples_per_shard=30, seed=0))
    assert [shard.num_samples for shard in manifest.shards] == [30, 30, 30, 10]
    assert Counter(contents(manifest)) == Counter((item.read(), str(item.label).encode()) for item in source)
    labels = [int(label) for _, label in contents(manifest)]
    assert all(len(set(labels[i : i + 20])) >= 3 for i in range(0, 100, 20))  # sorted: at most 2
    assert manifest.class_names == tuple("abcde") and manifest.name == "set"
    assert json.loads(manifest.path.read_text())["shuffle"] == {"method": "permutation", "scope": "global", "seed": 0}
    assert list(verify(manifest)) == []
    check_shards(manifest)


def test_the_same_items_give_the_same_bytes(tmp_path: Path) -> None:
    """Shards, indexes and manifest are equal bit for bit; another seed gives another order."""
    for name, seed in (("a/set", 0), ("b/set", 0), ("c/set", 1)):
        build(items(40), ["x", "y", "z"], tmp_path / name, samples_per_shard=15, seed=seed)
    first, again, other = (digests(tmp_path / name) for name in ("a/set", "b/set", "c/set"))
    assert first == again
    assert set(first) == {"classes.json", "counts.json", "manifest.json"} | {
        f"set-{i:06d}.{e}" for i in range(3) for e in ("tar", "idx")
    }
    assert all(first[name] != other[name] for name in first if name not in ("classes.json", "counts.json"))


def test_images_that_cannot_be_decoded_are_left_out_and_named(tmp_path: Path) -> None:
    """A broken file costs itself alone, is named in provenance.json, and the progress counts it."""
    source = items(10)
    source[4] = source[4]._replace(read=lambda: b"<html>", source="broken.jpg")
    told: list[int] = []
    manifest = load_manifest(build(source, [], tmp_path / "set", samples_per_shard=4, seed=0, progress=told.append))
    assert manifest.num_samples == 9 and manifest.num_classes == 3 and manifest.class_names == ()
    assert sum(told) == 10
    (dropped,) = json.loads((tmp_path / "set" / "provenance.json").read_text())["dropped"]
    assert dropped.startswith("broken.jpg: decode")
    broken = [item._replace(read=lambda: b"") for item in items(3)]
    assert "none of the 3 images" in refusal(build, broken, [], tmp_path / "none", samples_per_shard=2, seed=0)


def test_a_label_without_a_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Three classes of labels and two names: the set would lose a third of its samples in training."""
    message = refusal(build, items(9), ["x", "y"], tmp_path / "set", samples_per_shard=4, seed=0)
    assert "label 2 is not one of the 2 classes" in message
    assert not list((tmp_path / "set").glob("*.tar"))


def several(count: int) -> list[Item]:
    """Items with lists of classes."""
    return [item._replace(label=[k % 3, 3 + k % 2]) for k, item in enumerate(items(count))]


def test_lists_of_classes_are_written_indexed_and_verified(tmp_path: Path) -> None:
    """The manifest says `multi`, the members are JSON lists, and existing tars of such labels are recognised."""
    manifest = load_manifest(build(several(9), [], tmp_path / "set", samples_per_shard=4, seed=0))
    assert manifest.multi_label and manifest.num_classes == 5
    assert {label for _, label in contents(manifest)} <= {b"[%d, %d]" % (i, j) for i in range(3) for j in (3, 4)}
    assert list(verify(manifest)) == []
    tars = [shard.path for shard in manifest.shards]
    again = load_manifest(index_existing(tars, [], tmp_path / "again"))
    assert again.multi_label and again.num_classes == 5
    few = dataclasses.replace(manifest, num_classes=4)
    assert any("is not a list of different integers in 0..3" in problem for problem in verify(few))
    other = build(items(4), [], tmp_path / "single", samples_per_shard=4, seed=0)
    assert not load_manifest(other).multi_label
    mixed = [*tars, *(shard.path for shard in load_manifest(other).shards)]
    for number, tars in enumerate((mixed, mixed[::-1])):
        kinds = ["a class", "a list of classes"][:: -1 if number else 1]
        said = refusal(index_existing, tars, [], tmp_path / f"mixed{number}")
        assert f".tar: its labels are {kinds[0]} each, those of " in said and said.endswith(f".tar {kinds[1]}")


def test_wrong_lists_of_classes_are_refused(tmp_path: Path) -> None:
    """Single classes among lists, empty lists, repetitions and classes without a name, each by its source."""
    for label, said in [(1, "are mixed"), ([], "is empty"), ([2, 2], "names a class twice"), ([7], "not one of the 5")]:
        wrong = several(5)
        wrong[3] = wrong[3]._replace(label=label, source="third")
        message = refusal(build, wrong, list("abcde"), tmp_path / "set", samples_per_shard=4, seed=0)
        assert said in message
        assert label == 1 or message.startswith("third")


def test_a_folder_that_holds_a_set_is_refused(own_shards: Path, tmp_path: Path) -> None:
    """Neither writing nor indexing other tars overwrites a set; indexing its own tars again keeps its names."""
    before, counts = digests(own_shards), read_counts(own_shards)
    assert "holds a data set already" in refusal(build, items(4), [], own_shards, samples_per_shard=2, seed=0)
    other = tar_file(tmp_path / "other.tar", good_members())
    assert "holds a data set already" in refusal(index_existing, [other], [], own_shards)
    assert digests(own_shards) == before
    tars = sorted(own_shards.glob("*.tar"))
    again = load_manifest(index_existing(tars, ["ash", "birch", "cedar", "elm", "fir"], own_shards))
    assert {name for name, digest in digests(own_shards).items() if digest != before[name]} == {
        "manifest.json",
        "counts.json",  # says now that nothing was passed over
    }
    assert read_counts(own_shards) == counts
    assert [shard.sha256 for shard in again.shards] == [before[tar.name] for tar in tars]
    path, told = make_shards(tars, None, own_shards, Options())
    assert load_manifest(path).class_names == again.class_names
    assert told.classes == f"5 classes, as {own_shards / 'classes.json'} names them; --classes gives others"


def test_folders_are_read_by_class(tmp_path: Path) -> None:
    """root/CLASS/**/NAME: classes sorted by name, images of all endings at any depth, other files passed over."""
    for name, form in [("b/1.jpg", "jpeg"), ("a/2.PNG", "png"), ("a/deep/3.webp", "webp"), ("b/4.jpeg", "jpeg")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(len(name), form))
    (tmp_path / "a" / "notes.txt").write_text("x")
    found, classes = folder_items(tmp_path)
    assert classes == ["a", "b"]
    assert [(item.source.removeprefix(f"{tmp_path}/"), item.label, item.ending) for item in found] == [
        ("a/2.PNG", 0, "png"),
        ("a/deep/3.webp", 0, "webp"),
        ("b/1.jpg", 1, "jpg"),
        ("b/4.jpeg", 1, "jpeg"),
    ]
    (tmp_path / "empty").mkdir()
    assert "no images found; expected" in refusal(folder_items, tmp_path / "empty")


@pytest.mark.parametrize(
    ("pair", "shape", "order"),
    [
        (("images", "labels"), (5, 6, 8, 3), "C"),
        (("x", "y"), (5, 6, 8), "C"),
        (("x_train", "y_train"), (5, 6, 8, 3), "F"),
        (("train_images", "train_labels"), (5, 6, 8), "C"),
    ],
)
def test_arrays_of_pixels(pair: tuple[str, str], shape: tuple[int, ...], order: Any, tmp_path: Path) -> None:
    """Pixel for pixel, with the labels also as a column; arrays of another split are told."""
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    labels = np.array([3, 0, 1, 0, 2], np.uint8)[:, None]
    arrays: Any = {pair[0]: pixels.copy(order), pair[1]: labels, "test_images": pixels[:1]}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    told = Told()
    items, classes = npz_items(tmp_path / "a.npz", told)
    assert [item.label for item in items] == [3, 0, 1, 0, 2] and not classes
    for item, image in zip(items, pixels):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(item.read()))), image) and item.ending == "png"
    assert told.passed_over == {f"arrays of a.npz beside {pair[0]} and {pair[1]} (['test_images'])": 1}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"data": (2, 4, 4)}, "its arrays are ['data'], expected pixels with their labels (images/labels, x/y, "),
        ({"x": (2, 4, 4, 4), "y": (2,)}, "x is uint8 of shape (2, 4, 4, 4), expected uint8 of [images, height, width]"),
        ({"x": (2, 16), "y": (2,)}, "x is uint8 of shape (2, 16), expected"),
        ({"x": (2, 4, 4), "y": (3,)}, "y has shape (3,), expected a class for each image of (2, 4, 4)"),
        ({"x": (2, 4, 4), "y": (2, 5)}, "y has shape (2, 5), expected a class for each"),
        ({"x": (0, 4, 4), "y": (0,)}, "has no samples"),
        ({"x": (1_000_001, 1, 1), "y": (1_000_001,)}, "has 1,000,001 images, at most 1,000,000"),
    ],
)
def test_arrays_that_are_no_pixels(arrays: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    """With what is expected."""
    made: Any = {name: np.zeros(shape, np.uint8) for name, shape in arrays.items()}
    np.savez(tmp_path / "a.npz", **made)
    assert said in refusal(npz_items, tmp_path / "a.npz", Told())


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.zeros((2, 4, 4)), "x is float64 of shape (2, 4, 4), expected uint8"),
        (np.zeros((2, 4, 4), bool), "x.npy is bool of shape (2, 4, 4), expected an array of 1 to 4 dimensions of num"),
        (np.array([np.zeros((4, 4)), np.zeros((5, 4))], object), "x.npy is object of shape (2,), expected an array of"),
        (np.zeros((2, 4, 4, 3, 1), np.uint8), "x.npy is uint8 of shape (2, 4, 4, 3, 1), expected an array of 1 to 4"),
    ],
)
def test_pixels_of_other_kinds_are_refused(pixels: np.ndarray, said: str, tmp_path: Path) -> None:
    """Images of several sizes too, which numpy holds as objects; none is unpickled."""
    np.savez(tmp_path / "a.npz", x=pixels, y=np.zeros(2, np.uint8))
    assert said in refusal(npz_items, tmp_path / "a.npz", Told())


def npz(path: Path, **changes: Any) -> Path:
    """A CIFAR-style archive of four images."""
    files = [image_bytes(0, "webp"), image_bytes(1, "png"), image_bytes(2), image_bytes(3, "webp")]
    arrays = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": np.array([2, 0, 1, 2], dtype=np.uint8),
        "classes": np.array(["x", "y", "z"]),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def test_archives_are_read(tmp_path: Path) -> None:
    """Images, labels, names, and the ending by content."""
    found, classes = npz_items(npz(tmp_path / "a.npz"), Told())
    assert classes == ["x", "y", "z"]
    assert [(item.label, item.ending) for item in found] == [(2, "webp"), (0, "png"), (1, "jpg"), (2, "webp")]
    assert [item.read() for item in found[:2]] == [image_bytes(0, "webp"), image_bytes(1, "png")]


def test_wrong_archives_are_refused(tmp_path: Path) -> None:
    """Missing arrays, lengths that disagree and pickled objects are refused by file name."""
    for changes in ({"offset": None}, {"label": np.zeros(3)}, {"blob": np.zeros(5, np.uint8)}):
        assert "a.npz: " in refusal(npz_items, npz(tmp_path / "a.npz", **changes), Told())
    objects = npz(tmp_path / "b.npz", label=np.array([{}, 1, 2, 3], dtype=object))
    assert "not an archive of images" in refusal(npz_items, objects, Told())
    (tmp_path / "c.npz").write_bytes(b"no zip")
    assert "not an archive of images" in refusal(npz_items, tmp_path / "c.npz", Told())


def test_existing_tars_are_indexed_as_they_are(tmp_path: Path) -> None:
    """.tar and .tar.gz give the same shard bytes, in the given order, with the number of classes seen or named."""
    (tmp_path / "in").mkdir()
    first = tar_file(tmp_path / "in" / "first.tar", good_members())
    second = tar_file(tmp_path / "in" / "second.tar", good_members(2))
    (tmp_path / "in" / "second.tar.gz").write_bytes(gzip.compress(second.read_bytes()))
    sources = [tmp_path / "in" / "second.tar.gz", first]
    manifest = load_manifest(index_existing(sources, [], tmp_path / "out"))
    assert [shard.path.name for shard in manifest.shards] == ["second.tar", "first.tar"]
    assert manifest.shards[0].path.read_bytes() == second.read_bytes()
    assert (manifest.num_samples, manifest.num_classes) == (8, 3)
    expected = [data for _, data in good_members(2) + good_members()]
    assert [part for sample in contents(manifest) for part in sample] == expected
    assert json.loads(manifest.path.read_text())["shuffle"] == {"scope": "none"}
    assert list(verify(manifest)) == []
    again = load_manifest(index_existing(sources, list("abcdefg"), tmp_path / "named"))
    assert again.num_classes == 7


@pytest.mark.parametrize(
    "members, said",
    [
        ([("a.jpg", b"x")], "sample a has no label (.cls), only jpg"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")], "sample a has no label"),
        (
            [("./x/a.jpg", b"x"), ("./x/b.jpg", b"x")],
            "sample ./x/a has no label (.cls), only jpg; folders of photos in",
        ),
        ([("a.cls", b"1"), ("a.txt", b"1")], "sample a has no image, only cls, txt"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"), ("a.png", b""), ("a.cls", b"")], "key a"),
        ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"1")], "sample 0: tar"),
        ([("a.jpg", b"x"), ("a.cls", b"x")], "sample 0: label: b'x' is not an integer"),
        ([("a.jpg", b"x"), ("a.cls", b"3")], "sample 0: label: b'3' is not an integer in 0..2"),
        ([], "has no samples"),
    ],
)
def test_incomplete_samples_are_refused_by_name(members: list, said: str, tmp_path: Path) -> None:
    """No label, no image, a key twice, a label beyond --classes: the shard and the sample are named."""
    path = tar_file(tmp_path / "a.tar", members)
    message = refusal(index_existing, [path], ["x", "y", "z"], tmp_path)
    assert said in message and "a.tar" in message
    assert not (tmp_path / "manifest.json").exists()


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """Cut inside or between samples, at every block: plain tar reading would take the rest for the end."""
    path = tar_file(tmp_path / "a.tar", good_members())
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    for cut in range(512, end + 1, 512):
        path.write_bytes(data[:cut])
        assert "a.tar: " in refusal(index_tar, path)
    path.write_bytes(data[: end + 512])
    assert index_tar(path).num_samples == 6


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    """A flipped bit in any header is found when the shard is indexed: tarfile would end there without a word."""
    path = tar_file(tmp_path / "a.tar", good_members())
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for header in headers:
        damaged = bytearray(data)
        damaged[header + 3] ^= 4
        path.write_bytes(damaged)
        assert "a.tar: " in refusal(index_tar, path)


@pytest.mark.parametrize("end", [1024, None], ids=["cut", "good"])
def test_a_tar_that_lies_in_the_way_is_not_replaced(
    end: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor removed where the source is damaged: it is no copy of ours. One that an interrupted call made is replaced."""
    source, out = tar_file(tmp_path / "a.tar", good_members()), tmp_path / "out"
    source.write_bytes(source.read_bytes()[:end])
    out.mkdir()
    other = tar_file(out / "a.tar", good_members(1))
    before = other.read_bytes()
    for begun in (False, True):  # an indexing of other tars, which says nothing of this one
        if begun:
            (out / walks.FOLDER).mkdir()
        assert "out/a.tar: is there already, and would be replaced" in refusal(index_existing, [source], [], out)
        assert other in out.iterdir() and other.read_bytes() == before and not (out / "a.idx").exists()
    if end is None:
        other.unlink()
        monkeypatch.setattr(walks, "walk", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index_existing([source], [], out)
        assert other.exists()
        monkeypatch.undo()
        assert load_manifest(index_existing([source], [], out)).num_samples == 6


def test_damaged_compressed_tars_links_and_equal_names_are_refused(tmp_path: Path) -> None:
    """A cut .gz leaves nothing behind; links and two tars of one name are refused."""
    good = tar_file(tmp_path / "a.tar", good_members())
    packed = gzip.compress(good.read_bytes())
    cut = tmp_path / "b.tar.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    assert "b.tar.gz: cannot be copied" in refusal(index_existing, [cut], [], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "again").mkdir()
    shutil.copy(good, tmp_path / "again" / "a.tar")
    assert "the same name: a.tar" in refusal(index_existing, [good, tmp_path / "again" / "a.tar"], [], tmp_path / "out")
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert "a.jpg is not a plain file" in refusal(index_tar, link)


def test_verify_finds_a_flipped_bit(own_shards: Path) -> None:
    """One bit in a pixel, which no tar header shows, is found by the digest; a damaged index and a lost shard too."""
    manifest = load_manifest(own_shards)
    assert list(verify(manifest)) == []
    shard = manifest.shards[1].path
    data = bytearray(shard.read_bytes())
    data[load_index(manifest.shards[1]).byte_range(7)[0] + 1700] ^= 1
    shard.write_bytes(data)
    assert list(verify(manifest)) == [f"{shard}: is not the file that was indexed (SHA-256 differs)"]
    manifest.shards[0].path.with_suffix(".idx").write_bytes(b"{}\n")
    manifest.shards[2].path.unlink()
    problems = list(verify(manifest))
    assert len(problems) == 3 and "does not fit its shard" in problems[0] and "but not found" in problems[2]


def test_verify_names_samples_that_cannot_be_used(tmp_path: Path) -> None:
    """Shards that are intact but hold an undecodable image or a wrong label: each sample with its reason."""
    samples = [(image_bytes(0), 0), (b"nothing", 1), (image_bytes(1), 9)]
    shard = write_samples(samples, "jpg", tmp_path / "a.tar", 0)
    manifest = load_manifest(finish(tmp_path, DataSet([shard], 2, ["x", "y"], None, []), {"scope": "none"}))
    assert [problem.split(": ", 1)[1][:16] for problem in verify(manifest)] == ["sample 1: decode", "sample 2: label:"]


def run_tool(*lines: str) -> subprocess.CompletedProcess[str]:
    """tools/make_shards.py with each line of arguments in turn, in one process: torch takes seconds to import.

    Standard output ends each run with a line that holds its exit code.
    """
    program = (
        "import runpy, sys\n"
        "from pretrain import cli\n"
        "cli.end_process = sys.exit\n"
        "for line in sys.stdin:\n"
        "    sys.argv = ['make_shards.py', *line.split()]\n"
        f"    try: runpy.run_path({str(ROOT / 'tools' / 'make_shards.py')!r}, run_name='__main__')\n"
        "    except SystemExit as end: print('exit', end.code, flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True, cwd=ROOT)


def test_the_command_line_makes_and_checks_a_set(tmp_path: Path) -> None:
    """A folder becomes a set; --verify exits with 0; after a flipped bit it names the shard and exits with 2."""
    for number in range(12):
        (tmp_path / "in" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ab"[number % 2] / f"{number}.jpg").write_bytes(image_bytes(number))
    out = tmp_path / "set"
    made = run_tool(f"{tmp_path / 'in'} {out} --samples-per-shard 5 --seed 3", f"--verify {out}")
    assert made.stderr == ""
    assert made.stdout.splitlines() == [
        f"{out}/manifest.json: 12 samples in 3 shards, 2 classes",
        "  6 a",
        "  6 b",
        "exit 0",
        f"{out}/manifest.json: 12 samples, 0 problems",
        "exit 0",
    ]
    shard = sorted(out.glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--verify", str(out)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        f"{shard}: is not the file that was indexed (SHA-256 differs)",
        "error: 1 problems found",
    ]


def test_the_command_lines_mistakes_end_in_one_line(tmp_path: Path) -> None:
    """Exit code 2 and one line on stderr, whatever is wrong; nothing is left behind."""
    tar = tar_file(tmp_path / "a.tar", good_members())
    (tmp_path / "classes.json").write_text('{"other": 1}')
    (tmp_path / "two.json").write_text('["x", "y"]')
    (tmp_path / "photos.zip").write_bytes(b"PK")
    mistakes = {
        f"{tmp_path / 'nothing.tar'} {tmp_path / 'out'}": "nothing.tar: not found",
        f"{tar}": "give at least one SOURCE and then the folder OUT",
        f"{tar} {tmp_path / 'classes.json'} {tmp_path / 'out'}": "give one folder (of class folders",
        f"{tar} {tmp_path / 'out'} --classes {tmp_path / 'classes.json'}": "expected a JSON list of names",
        f"{tar} {tmp_path / 'out'} --classes {tmp_path / 'two.json'}": "label: b'2' is not an integer in 0..1",
        f"{tmp_path / 'classes.json'} {tmp_path / 'out'}": "give one folder",
        f"{' '.join([str(tmp_path / 'two.json')] * 9)} {tmp_path / 'out'}": "two.json and 6 more: give one folder",
        f"{tmp_path / 'photos.zip'} {tmp_path / 'out'}": "photos.zip: unpack it, and give what was in it",
        f"{npz(tmp_path / 'a.npz')} {tmp_path / 'out2'} --samples-per-shard 0": "expected at least 1",
        f"--verify {tmp_path}": "manifest.json: not found",
    }
    done = run_tool(*mistakes)
    assert done.stdout.splitlines() == ["exit 2"] * len(mistakes)
    lines = done.stderr.splitlines()
    assert len(lines) == len(mistakes)
    for line, said in zip(lines, mistakes.values()):
        assert line.startswith("error: ") and said in line
    assert not list(tmp_path.rglob("manifest.json"))


def test_real_shards_are_indexed(test_data: Path, tmp_path: Path) -> None:
    """Tiny-ImageNet validation (.tar.gz) and the full-size photos: counts and classes as their description says."""
    names = json.loads((test_data / "tiny_imagenet_classes.json").read_text())["names"]
    tiny = load_manifest(index_existing([test_data / "tiny_imagenet_val_dev-000000.tar.gz"], names, tmp_path / "tiny"))
    assert (tiny.num_samples, tiny.num_classes) == (2000, 200)
    for index in range(0, 2000, 97):
        assert decode(read_sample(tiny, index).image).shape == (3, 64, 64)
    photos = [test_data / "imagenet_val_fullsize_dev-000000.tar"]
    large = load_manifest(index_existing(photos, ["?"] * 1000, tmp_path / "large"))
    assert (large.num_samples, large.num_classes) == (20, 1000)
    assert list(verify(large)) == []


def test_a_real_archive_is_written(test_data: Path, tmp_path: Path) -> None:
    """200 CIFAR-100 images from WebP: lossless, so that pixels and labels are found again bit for bit."""
    found, classes = npz_items(test_data / "cifar100_vtab1k_style_val200.npz", Told())
    manifest = load_manifest(build(found, classes, tmp_path / "cifar", samples_per_shard=150, seed=0))
    assert (manifest.num_samples, manifest.num_classes, len(manifest.shards)) == (200, 100, 2)
    assert Counter(contents(manifest)) == Counter((item.read(), str(item.label).encode()) for item in found)
    assert list(verify(manifest)) == []


def test_what_belongs_to_no_sample_is_skipped_by_index_and_reader(tmp_path: Path) -> None:
    """A tar of a folder as people make it: entries of folders, `./`, hidden files, README, strangers."""
    tar = tmp_path / "dataset.tar"
    with tarfile.open(tar, "w") as file:
        for name in (".", "./dataset", "./dataset/__MACOSX"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            file.addfile(folder)
        for number in range(3):
            for name, data in (
                (f"./dataset/{number}.jpg", image_bytes(number)),
                (f"./dataset/._{number}.jpg", b"mac"),
                (f"./dataset/{number}.cls", str(number).encode()),
                (f"./dataset/{number}.json", b"{}"),
                ("./dataset/.DS_Store", b"x"),
                ("./dataset/README", b"x"),
                (f"./dataset/notes{number}.txt", b"x"),
                (f"./dataset/__MACOSX/{number}.jpg", b"x"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    told: Counter[str] = Counter()
    manifest = load_manifest(index_existing([tar], [], tmp_path / "set", passed_over=told))
    assert contents(manifest) == [(image_bytes(number), str(number).encode()) for number in range(3)]
    assert told == {"hidden and system files": 9, "files without an ending": 3, "files of no sample": 3}


def test_a_kill_behind_the_manifest_loses_no_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of existing tars: a later call says that there is a data set, so counts.json has to be whole before."""
    tar = tar_file(tmp_path / "a.tar", [*good_members(), ("README", b"x")])

    def killed(*arguments: Any, **options: Any) -> None:
        write_manifest(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.shards.build.write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        make_shards([tar], None, tmp_path / "set", Options())
    kept = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert kept["passed_over"]["files without an ending"] == 1 and kept["notes"] == {}


def test_members_out_of_order_say_so(tmp_path: Path) -> None:
    """All images, then all labels: the cause is their order, not that a sample has no label."""
    members = good_members()
    tar = tar_file(tmp_path / "a.tar", members[::2] + members[1::2])
    message = refusal(index_tar, tar)
    assert "members of a sample must follow each other" in message and "tar --sort=name" in message


def test_an_index_of_another_tool_is_not_overwritten(tmp_path: Path) -> None:
    """NAME.idx of DALI lies beside NAME.tar."""
    tar = tar_file(tmp_path / "a.tar", good_members())
    (tmp_path / "a.idx").write_text("v1.2 6\n")
    assert "a.idx: is in the way and no index of ours" in refusal(index_tar, tar)
    assert (tmp_path / "a.idx").read_text() == "v1.2 6\n"
    (tmp_path / "a.idx").unlink()
    index_tar(tar)
    index_tar(tar)  # ours is


def test_what_nobody_could_read_again_is_not_written(tmp_path: Path) -> None:
    """Labels and names beyond the limits of a manifest are refused before anything is written."""
    for label, classes, said in (
        (MAX_CLASSES, [], f"label {MAX_CLASSES} is not one of the {MAX_CLASSES} classes"),
        (10**18, [], "label 1000000000000000000"),
        (-1, [], "label -1"),
        (0, ["a" * 5000], "class 0 is 'aaa"),
        (0, ["a", "\udcff"], r"class 1 is '\\udcff'"),
    ):
        with pytest.raises(UserError, match=said):
            build([Item(lambda: b"", "png", label, "x")], classes, tmp_path / "set", samples_per_shard=5, seed=0)
    with pytest.raises(UserError, match=r"x\\udcff: the folder's name is not UTF-8"):
        build([Item(lambda: b"", "png", 0, "x")], [], tmp_path / "x\udcff", samples_per_shard=5, seed=0)
    assert not list(tmp_path.glob("*/*"))


def test_a_link_is_not_indexed_where_it_lies(own_shards: Path, tmp_path: Path) -> None:
    """A folder of links to tars elsewhere would be a set that no training takes; said before its index is written."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "a.tar"
    link.symlink_to(own_shards / "trees-000000.tar")
    with pytest.raises(UserError, match="a.tar: leads to .*, outside the data set's folder"):
        index_existing([link], [], tmp_path / "links")
    assert list((tmp_path / "links").iterdir()) == [link]
    assert load_manifest(index_existing([link], [], tmp_path / "copied")).num_samples == 40


def test_verify_finds_links_out_of_the_folder(own_shards: Path, tmp_path: Path) -> None:
    """Of a shard and of an index: the other shards are checked all the same."""
    for name in ("trees-000000.tar", "trees-000001.idx"):
        (own_shards / name).symlink_to((own_shards / name).rename(tmp_path / name))
    problems = list(verify(load_manifest(own_shards)))
    assert len(problems) == 2 and all("outside the data set's folder" in problem for problem in problems)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "5", "{}", '{"dropped": 5, "images": 5}'])
@pytest.mark.parametrize("name, read", [("provenance.json", read_dropped), ("counts.json", read_counts)])
def test_lists_beside_the_manifest_are_read_by_type(name: str, read: Callable, text: str, tmp_path: Path) -> None:
    """What was left out, and how many images each class has: one line, or the list."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read(tmp_path)


@pytest.mark.parametrize(
    "images, classes",
    [([1.0], []), ([True], []), ([-1], []), ([None], []), ([float("nan")], []), ({"a": 1}, []), ([1, 2], ["a"])]
    + [([1], [5]), ([1], "a"), ([1], None)],
)
def test_counts_are_whole_numbers_one_for_each_class(images: Any, classes: Any, tmp_path: Path) -> None:
    """Else their table could not be shown."""
    (tmp_path / "counts.json").write_text(json.dumps({"images": images, "classes": classes}))
    with pytest.raises(UserError, match="counts.json: "):
        read_counts(tmp_path)
