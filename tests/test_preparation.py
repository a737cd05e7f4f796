"""Tasks made from TFDS records, original files and packs: right images, labels and names, in shards, and told apart."""

import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tfds_records import example, write_split
from weights_on_disk import load_tool

import pretrain.shards.build
from pretrain.data.images import decode
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import UserError
from pretrain.shards import originals as originals_of_authors
from pretrain.shards.build import build
from pretrain.shards.examples import (
    Example,
    content_sha256,
    examples_sha256,
    load_examples,
    sample_names,
    write_examples,
)
from pretrain.shards.imagenet import wnids
from pretrain.shards.sources import Item
from pretrain.tasks.imagenet_labels import real_labels
from pretrain.tasks.preparation import Source, open_source, prepare, set_differences
from pretrain.tasks.table import TASKS, VTAB, Task, missing, task


def pixels(seed: int, gray: bool = False) -> np.ndarray:
    """A picture of 8 x 8 pixels that no other seed has."""
    shape = (8, 8) if gray else (8, 8, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(image: np.ndarray, form: str = "png", **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def samples(folder: Path) -> list[tuple[bytes, int]]:
    """(image, label) of each sample of a prepared split."""
    manifest = load_manifest(folder)
    raw = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    return [(sample.image, int(sample.label)) for sample in raw]


def refusal(function: Any, *arguments: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def dtd(folder: Path, counts: Sequence[int] = (820, 230, 12), **changes: Any) -> Path:
    """A TFDS data folder with `dtd` as TFDS writes it, in several files, of tiny images."""
    place = folder / "dtd" / "3.0.1"
    for split, count, start in zip(("train", "validation", "test"), counts, (0, 2000, 4000)):
        records = [
            example(
                **{
                    "file_name": f"{split}_{number}.jpg".encode(),
                    "image": encoded(pixels(start + number), "jpeg"),
                    "label": number % 47,
                }
                | changes
            )
            for number in range(count)
        ]
        write_split(place, "dtd", split, records, num_files=3)
    (place / "label.labels.txt").write_text("".join(f"texture {number}\n" for number in range(47)))
    return folder


def test_a_vtab_task_from_tfds_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first 800 and 200 in storage order over files, both together, and the test: bytes, labels, names, order."""
    out = tmp_path / "out"
    command = ["make_shards.py", "--task", "vtab/dtd", str(dtd(tmp_path / "tfds")), str(out)]
    monkeypatch.setattr(sys, "argv", command)
    load_tool("make_shards").main()
    said = capsys.readouterr()
    train = [(encoded(pixels(number), "jpeg"), number % 47) for number in range(800)]
    val = [(encoded(pixels(2000 + number), "jpeg"), number % 47) for number in range(200)]
    test = [(encoded(pixels(4000 + number), "jpeg"), number % 47) for number in range(12)]
    for split, expected in (("train", train), ("val", val), ("trainval", train + val), ("test", test)):
        assert samples(out / split) == expected
        manifest = load_manifest(out / split)
        assert manifest.num_classes == 47 and manifest.class_names[46] == "texture 46"
    examples = load_examples(load_manifest(out / "trainval"))
    assert examples[801] == Example(801, "validation_1.jpg", 1, content_sha256(val[1][0]))
    assert sample_names(load_manifest(out / "test"), [11]) == ["test_11"]
    record = json.loads((out / "task.json").read_text())
    assert (record["task"], record["version"], record["differs"]) == ("vtab/dtd", 2, ["test has 12 of 1,880 samples"])
    assert set_differences(out) == record["differs"]
    assert record["splits"]["trainval"]["source"] == "TFDS records"
    assert record["splits"]["trainval"]["tfds_slice"] == "train[:800]+validation[:200]"
    assert record["splits"]["test"]["examples_sha256"] in said.out
    assert "not comparable with published scores: test has 12 of 1,880 samples" in said.err
    assert missing(replace(task("vtab/dtd"), name="out"), tmp_path) is None
    changed = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    load_tool("make_shards").main()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == changed
    assert "test/manifest.json: kept, as task.json lists it: 12 samples" in capsys.readouterr().out


SCENE = {"objects__size": [0, 1, 0, 1, 1], "objects__pixel_coords": [1.0, 2.0, 9.25] * 4 + [3.0, 4.0, 8.5]}
STREET = {"objects__type": [3, 1, 0], "objects__location": [0.0, 0.0, 2.0, 0.0, 0.0, 25.0, 0.0, 0.0, 19.5]}
STORED = {
    "vtab/clevr_count": (SCENE, 2),
    "vtab/clevr_distance": (SCENE, 1),
    "vtab/kitti_distance": (STREET, 1),
    "vtab/dsprites_location": ({"label_x_position": 31, "label_orientation": 4}, 15),
    "vtab/dsprites_orientation": ({"label_x_position": 31, "label_orientation": 4}, 1),
    "vtab/smallnorb_azimuth": ({"label_azimuth": 17, "label_elevation": 3}, 17),
    "vtab/smallnorb_elevation": ({"label_azimuth": 17, "label_elevation": 3}, 3),
}


@pytest.mark.parametrize("name", VTAB)
def test_each_vtab_task_reads_its_features(name: str, tmp_path: Path) -> None:
    """All 19, from records with the features of their TFDS builder (two slices of a few records instead of 1,000)."""
    row = replace(task(name), splits={"train": "train[:2]", "test": "train[50%:]"})
    builder, _, version = row.tfds.replace("*", "0").partition(":")
    dataset = builder.partition("/")[0]
    sprite = name.startswith("vtab/dsprites")
    gray = sprite or name.startswith("vtab/smallnorb")
    features, label = STORED.get(name, ({"label": 1}, 1))
    images = [pixels(number, gray) & (1 if sprite else 255) for number in range(4)]
    records = [example(image=encoded(image), **features) for image in images]
    write_split(tmp_path / builder / version, dataset, "train", records)
    prepare(row, open_source(row, [tmp_path]), tmp_path / "out")
    for split, chosen in (("train", images[:2]), ("test", images[2:])):
        found = samples(tmp_path / "out" / split)
        assert [found_label for _, found_label in found] == [label] * 2
        for (data, _), image in zip(found, chosen):
            seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            expected = np.broadcast_to(image[..., None], (8, 8, 3)) if gray else image
            assert np.array_equal(seen, expected * (255 if sprite else 1))
    manifest = load_manifest(tmp_path / "out" / "test")
    assert manifest.num_classes == row.num_classes
    assert load_examples(manifest)[0].id == f"{dataset}-train.tfrecord-00000-of-00001__2"


@pytest.mark.parametrize(
    "name, features, said",
    [
        ("vtab/svhn", {"image": encoded(pixels(0)), "label": 10}, "label 10 is not one of the 10 classes"),
        ("vtab/svhn", {"image": encoded(pixels(0))}, "not as vtab/svhn needs it (KeyError: 'label'); it has image"),
        ("vtab/svhn", {"label": 1}, "(KeyError: 'image'); it has label"),
        ("vtab/clevr_count", {"image": encoded(pixels(0)), "objects__size": [1] * 2}, "label -1 is not one"),
        (
            "vtab/clevr_distance",
            {"image": encoded(pixels(0)), "objects__pixel_coords": [1.0, 1.0, 101.0]},
            "label 6 is not one of the 6 classes",
        ),
        ("vtab/dsprites_location", {"image": encoded(pixels(0)), "label_x_position": 1}, "pixels up to 2"),
        ("vtab/svhn", {"image": b"<html>", "label": 1}, "none of the 1 images can be decoded"),
    ],
)
def test_records_of_something_else_are_refused(name: str, features: dict, said: str, tmp_path: Path) -> None:
    """A label without a class, a feature that is not there, an image that is none: told with the record."""
    row = replace(task(name), splits={"test": "train"})
    builder, _, version = row.tfds.replace("*", "0").partition(":")
    write_split(tmp_path / builder / version, builder, "train", [example(**features)])
    message = refusal(lambda: prepare(row, open_source(row, [tmp_path]), tmp_path / "out"))
    assert said in message and f"{builder}-train.tfrecord-00000-of-00001" in message


def test_an_image_that_cannot_be_decoded_is_left_out_and_told(tmp_path: Path) -> None:
    """The others keep their names and labels, the count tells, and the set no longer counts as the official one."""
    row = replace(task("vtab/dtd"), splits={"test": "test"}, num_samples={"test": 5})
    files = [encoded(pixels(number)) for number in range(5)]
    files[2] = b"<html>"
    records = [example(file_name=f"{i}.png".encode(), image=data, label=i) for i, data in enumerate(files)]
    write_split(tmp_path / "dtd/3.0.1", "dtd", "test", records)
    (prepared,), _ = prepare(row, open_source(row, [tmp_path]), tmp_path / "out")
    assert (prepared.num_samples, prepared.left_out) == (4, 1)
    assert sample_names(load_manifest(tmp_path / "out/test"), range(4)) == ["0", "1", "3", "4"]
    assert [label for _, label in samples(tmp_path / "out/test")] == [0, 1, 3, 4]
    assert [e.sha256 for e in load_examples(load_manifest(tmp_path / "out/test"))] == [
        content_sha256(files[i]) for i in (0, 1, 3, 4)
    ]
    assert set_differences(tmp_path / "out") == ["test has 4 of 5 samples"]


def test_a_complete_official_set_is_comparable(tmp_path: Path) -> None:
    """As many as there should be, from records: only then."""
    row = replace(task("vtab/dtd"), splits={"test": "test"}, num_samples={"test": 2})
    write_split(tmp_path / "dtd/3.0.1", "dtd", "test", [example(image=encoded(pixels(i)), label=i) for i in range(2)])
    prepare(row, open_source(row, [tmp_path]), tmp_path / "out")
    assert set_differences(tmp_path / "out") == []


def test_a_set_that_was_not_prepared_has_one_reason(tmp_path: Path) -> None:
    """No task.json, one of an earlier version; one that cannot be read is refused."""
    (only,) = set_differences(tmp_path)
    assert "no task.json" in only and "make_shards.py --task" in only
    (tmp_path / "task.json").write_text('{"format": "pretrain-task", "version": 1, "comparable": true}')
    (only,) = set_differences(tmp_path)
    assert "version 1, not 2: prepare the set again" in only
    for text in ("{", "[]", '{"format": "x"}', '{"format": "pretrain-task", "version": 2}'):
        (tmp_path / "task.json").write_text(text)
        assert f"{tmp_path / 'task.json'}: " in refusal(set_differences, tmp_path)
    start = '{"format": "pretrain-task", "version": '
    for text in (
        *("true}", "1.0}", "null}", "[]}", '2, "differs": 5}', '2, "differs": [5]}', '2, "differs": "abc"}'),
        "[" * 9**5,
    ):
        (tmp_path / "task.json").write_text(start + text)
        assert f"{tmp_path / 'task.json'}: " in refusal(set_differences, tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_dtd(folder: Path, splits: Sequence[str] = ("train", "validation", "test")) -> Task:
    """The row of `dtd` with three splits of three images, and its records."""
    for number, split in enumerate(splits):
        records = [example(image=encoded(pixels(10 * number + i)), label=i) for i in range(3)]
        write_split(folder / "dtd/3.0.1", "dtd", split, records)
    splits_of = {"train": "train", "val": "validation", "test": "test"}
    return replace(task("vtab/dtd"), splits=splits_of, num_samples=dict.fromkeys(splits_of, 3))


@pytest.mark.parametrize("when", ["at a shard", "at task.json", "at the move"])
def test_a_killed_preparation_is_finished_by_another_run(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ended, a second run gives the very files of an undisturbed one and writes finished splits no more."""
    row = small_dtd(tmp_path / "tfds")
    source = open_source(row, [tmp_path / "tfds"])
    whole, out = tmp_path / "whole", tmp_path / "out"
    _, new = prepare(row, source, whole)
    assert new == ["train", "val", "test"]
    owner, name, last = {
        "at a shard": (pretrain.shards.build, "index_tar", "val-000000.tar"),
        "at task.json": (Path, "write_text", ".tmp-task.json"),
        "at the move": (Path, "replace", "val"),
    }[when]
    real, calls = getattr(owner, name), []

    def dies_in_the_second_split(path: Path, *arguments: Any, **options: Any) -> Any:
        calls.append(path.name)
        if path.name == last and calls.count(last) == (2 if when == "at task.json" else 1):
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dies_in_the_second_split)
        prepare(row, source, out)
    assert not (out / "val").exists() and (out / ".unfinished/val/val-000000.tar").exists()
    done, new = prepare(row, source, out)
    assert new == ["val", "test"] and [p.split for p in done] == ["train", "val", "test"]
    assert tree(out) == tree(whole)


def test_a_set_is_completed_by_another_source(tmp_path: Path) -> None:
    """First the splits for validation, later train alone: task.json tells of all, and nothing is written twice."""
    row = small_dtd(tmp_path / "tfds")
    source = open_source(row, [tmp_path / "tfds"])
    first = {split: source.splits[split] for split in ("val", "test")}
    out = tmp_path / "out"
    prepare(row, source._replace(splits=first), out)
    before = tree(out / "val")
    done, new = prepare(row, source._replace(splits={"train": source.splits["train"]}), out)
    assert new == ["train"] and [p.split for p in done] == ["train", "val", "test"] and tree(out / "val") == before
    record = json.loads((out / "task.json").read_text())
    assert list(record["splits"]) == ["train", "val", "test"] and set_differences(out) == []


def test_what_is_there_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    """Other images, names of classes or task, a foreign folder, a wrong label, a cut shard: told, nothing changed."""
    row = small_dtd(tmp_path / "tfds")
    source = open_source(row, [tmp_path / "tfds"])
    train, val = ({split: source.splits[split]} for split in ("train", "val"))
    out = tmp_path / "out"
    prepare(row, source._replace(splits=val), out)
    before = tree(out)

    def told(changed: Source, changed_row: Task = row) -> str:
        message = refusal(prepare, changed_row, changed, out)
        assert tree(out) == before
        return message

    fewer = source._replace(splits=train | {"val": source.splits["val"][:2]})
    assert "out/val: was made from other images (3 from TFDS records, here 2 from TFDS records)" in told(fewer)
    assert "was made from other images" in told(source._replace(kind="packs"))
    relabelled = [o._replace(item=o.item._replace(label=7)) for o in source.splits["val"]]
    assert "was made from other images" in told(source._replace(splits=train | {"val": relabelled}))
    assert "class 0 is called '0' there and 'a' in the source" in told(
        source._replace(splits=train, class_names=["a"] * 47)
    )
    assert "is of 'vtab/dtd', version 2, not of vtab/svhn" in told(source, replace(row, name="vtab/svhn"))
    unknown = [o._replace(item=o.item._replace(label=47)) for o in source.splits["test"]]
    assert "label 47 is not one of the 47" in told(source._replace(splits=source.splits | {"test": unknown}))
    kept = json.loads((out / "task.json").read_text())
    val = kept["splits"]["val"]
    wrong = [{"../val": val}, {"": val}, [val], {"val": []}, {"val": None}, {"val": {**val, "source": 5}}]
    wrong += [{"val": {**val, "num_samples": number}} for number in (3.0, "3", -1, 10**30, float("inf"))]
    for splits in wrong:
        (out / "task.json").write_text(json.dumps(kept | {"splits": splits}))
        before = tree(out)
        assert f"{out / 'task.json'}: splits" in told(source)
    (out / "task.json").write_text(json.dumps(kept))
    (out / "train").mkdir()
    (out / "train/holiday.jpg").write_bytes(b"x")
    before = tree(out)
    assert "out/train: is not empty, but no finished split" in told(source)
    (out / "train/holiday.jpg").unlink()
    next((out / "val").glob("*.tar")).write_bytes(b"")
    before = tree(out)
    assert "has 0 bytes" in told(source)


def test_the_digest_is_of_images_and_labels(tmp_path: Path) -> None:
    """The same pixels in PNG, another PNG or WebP, in another order under other names: equal. A changed label: not."""
    image, other = pixels(0), pixels(1)
    forms = [encoded(image), encoded(image, compress_level=0), encoded(image, "webp", lossless=True)]
    assert len(set(forms)) == 3 and len({content_sha256(data) for data in forms}) == 1
    assert content_sha256(encoded(other)) != content_sha256(forms[0])
    assert content_sha256(encoded(image.reshape(4, 16, 3))) != content_sha256(forms[0])
    lossy = [encoded(image, "jpeg", quality=quality) for quality in (90, 91)]
    assert content_sha256(lossy[0]) != content_sha256(lossy[1])
    first = [Example(0, "a", 3, "x"), Example(1, "b", 4, "y")]
    assert examples_sha256(first) == examples_sha256([Example(0, "p/q", 4, "y"), Example(1, "r", 3, "x")])
    assert examples_sha256(first) != examples_sha256([Example(0, "a", 4, "x"), Example(1, "b", 3, "y")])


def test_names_without_a_list_are_the_keys(tmp_path: Path) -> None:
    """Shards that were indexed as they are have their names in the tar; a list that does not fit is refused."""
    build([Item(lambda: encoded(pixels(0)), "png", 0, "x")], ["a"], tmp_path / "set", samples_per_shard=5, seed=0)
    manifest = load_manifest(tmp_path / "set")
    assert sample_names(manifest, [0]) == ["000000000000"]
    assert "examples.jsonl: not found" in refusal(load_examples, manifest)
    (tmp_path / "set/examples.jsonl").write_text("")
    assert "lists 0 examples" in refusal(load_examples, manifest)
    (tmp_path / "set/examples.jsonl").write_text('{"index": 0}\n')
    assert "examples.jsonl: line 1: id is missing" in refusal(load_examples, manifest)
    good = {"index": 0, "id": "x", "label": 0, "sha256": "0" * 64}
    texts = [
        "[" * 100_000,
        "5",
        "[]",
        "\xff",
        '"' + "a" * 100_000,
        "9" * 5000,
        json.dumps(good) + "\n" + json.dumps(good),
    ]
    wrong = {"index": [1, 0.0, True, None, "0"], "id": [5, "\ud800", [], "a" * 5000], "label": [0.0, -1, 10**30, "0"]}
    texts += [json.dumps({**good, key: value}) for key, values in wrong.items() for value in values]
    for text in texts:
        (tmp_path / "set/examples.jsonl").write_text(text, encoding="latin-1")
        assert len(refusal(load_examples, manifest)) < 400
    (tmp_path / "set/examples.jsonl").unlink()
    (tmp_path / "examples.jsonl").write_text(json.dumps({**good, "id": "a\u2028b"}, ensure_ascii=False) + "\n")
    (tmp_path / "set/examples.jsonl").symlink_to(tmp_path / "examples.jsonl")
    assert "outside the data set's folder" in refusal(load_examples, manifest)
    (tmp_path / "examples.jsonl").replace(tmp_path / "set/examples.jsonl")
    assert load_examples(manifest)[0].id == "a\u2028b"


IDS = {  # as each source names its samples -> as predictions.jsonl and wrong.json show them
    "data_batch_1.bin[5]": "data_batch_1.bin[5]",
    "data_batch_1.bin[6]": "data_batch_1.bin[6]",
    "cifar10_test.npz[17]": "cifar10_test.npz[17]",
    "cifar10-train.tfrecord-00000-of-00001__17": "cifar10-train.tfrecord-00000-of-00001__17",
    "ILSVRC2012_val_00000001.JPEG": "ILSVRC2012_val_00000001",
    "n01498041/sketch_1.jpg": "n01498041/sketch_1",
    "n01514859/sketch_1.jpg": "n01514859/sketch_1",
    "Dr. No.webp": "Dr. No",
    "x.v2": "x.v2",
    "twice.png": "9/twice",
    "twice.jpg": "10/twice",
    "a/same.png": "a/same",
    "b/same.png": "b/same",
}


def test_names_tell_samples_apart(tmp_path: Path) -> None:
    """Nothing is cut but the ending of an image, and what is equal then has its index in front."""
    items = [Item(partial(encoded, pixels(number)), "png", 0, "x") for number in range(len(IDS))]
    build(items, ["a"], tmp_path / "set", samples_per_shard=50, seed=None)
    write_examples(tmp_path / "set", [Example(index, name, 0, "") for index, name in enumerate(IDS)])
    manifest = load_manifest(tmp_path / "set")
    assert sample_names(manifest, range(len(IDS))) == list(IDS.values())
    assert sample_names(manifest, [10, 0]) == ["10/twice", "data_batch_1.bin[5]"]  # whichever are asked for


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """What is wrong and what the task can be made from, before anything is written."""
    (tmp_path / "empty").mkdir()
    assert "scored on the data of imagenet" in refusal(open_source, task("real"), [tmp_path])
    assert "not found; pets is at https://www.robots" in refusal(open_source, task("pets"), [tmp_path / "gone"])
    assert "made from TFDS records (svhn_cropped:3.*.*)" in refusal(
        open_source, task("vtab/svhn"), [tmp_path / "empty"]
    )
    for name, row in TASKS.items():
        if row.originals:
            assert "empty" in refusal(open_source, row, [tmp_path / "empty"]), name
    (tmp_path / "val.npz").touch()
    assert "is a pack of val; cifar10 has train, test" in refusal(open_source, task("cifar10"), [tmp_path / "val.npz"])
    two = [tmp_path / "val.npz", tmp_path / "empty"]
    assert "give one folder, or packs" in refusal(open_source, task("cifar10"), two)
    dtd(tmp_path / "tfds", counts=(3, 3, 3))
    assert "asks for more than the 3 records" in refusal(open_source, task("vtab/dtd"), [tmp_path / "tfds"])
    assert "made from TFDS records" in refusal(open_source, task("vtab/svhn"), [tmp_path / "tfds"])
    old = replace(task("vtab/dtd"), tfds="dtd:2.*.*")
    assert "no records of dtd:2.*.* below it" in refusal(open_source, old, [tmp_path / "tfds"])


@pytest.mark.parametrize("option", [["--classes", "names.json"], ["--seed", "0"]])
def test_options_without_effect_are_refused(option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task has its own classes and order."""
    monkeypatch.setattr(sys, "argv", ["make_shards.py", "--task", "pets", str(tmp_path), str(tmp_path / "o"), *option])
    assert f"{option[0]} has no effect with --task" in refusal(load_tool("make_shards").main)
    assert not (tmp_path / "o").exists()


def test_vtab_from_original_files_is_a_seeded_choice(tmp_path: Path) -> None:
    """800 + 200 of 1,100 training images, apart, the same ones each time; the authors' test; said to differ."""
    place = tmp_path / "in/cifar-100-binary"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train.bin", 1100), ("test.bin", 5)):
        rows = random.integers(0, 100, (count, 2 + 3072)).astype(np.uint8)
        (place / name).write_bytes(rows.tobytes())
    row = task("vtab/cifar100")
    source = open_source(row, [tmp_path / "in"])
    ids = {split: [original.id for original in originals] for split, originals in source.splits.items()}
    assert {split: len(found) for split, found in ids.items()} == {
        "train": 800,
        "val": 200,
        "trainval": 1000,
        "test": 5,
    }
    assert ids["trainval"] == ids["train"] + ids["val"] and len(set(ids["trainval"])) == 1000
    assert set(ids["train"]) != {f"train.bin[{number}]" for number in range(800)}
    assert ids["test"] == [f"test.bin[{number}]" for number in range(5)]
    again = open_source(row, [tmp_path / "in"]).splits
    assert {split: [original.id for original in originals] for split, originals in again.items()} == ids
    prepare(row, source._replace(splits={"test": source.splits["test"]}), tmp_path / "out")
    assert set_differences(tmp_path / "out") == [
        "test has 5 of 10,000 samples",
        "its images are a seeded choice from the original files, not the ones that TFDS's order gives",
    ]


@pytest.mark.parametrize("name", ["vtab/dtd", "vtab/flowers102"])
def test_vtab_validation_images_of_the_authors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they have a split for validation, the 200 are from it, as TFDS's are."""
    place = tmp_path / "dtd/images"
    lists = dict.fromkeys(("train", "val", "test"), "")
    for number in range(1300):
        split = "train" if number < 1000 else "val" if number < 1293 else "test"
        key = f"class_{number % 47:02d}/{split}_{number}.jpg"
        (place / key).parent.mkdir(parents=True, exist_ok=True)
        (place / key).touch()
        lists[split] += f"{key}\n"
    (tmp_path / "dtd/labels").mkdir()
    for split, text in lists.items():
        (tmp_path / f"dtd/labels/{split}1.txt").write_text(text)
    if name == "vtab/flowers102":
        monkeypatch.setattr(originals_of_authors, "_matlab", matlab_of_flowers)
        (tmp_path / "jpg").mkdir()
        for file in ("imagelabels.mat", "setid.mat", *(f"jpg/image_{number:05d}.jpg" for number in range(1, 1301))):
            (tmp_path / file).touch()
    splits = open_source(task(name), [tmp_path]).splits
    ids = {split: [int(re.findall(r"\d+", o.id)[0]) for o in originals] for split, originals in splits.items()}
    assert [len(ids[split]) for split in ("train", "val", "trainval", "test")] == [800, 200, 1000, 7]
    assert max(ids["train"]) <= 1000 and 1000 <= min(ids["val"]) and max(ids["val"]) <= 1293
    assert len(set(ids["trainval"])) == 1000


def matlab_of_flowers(path: Path, *names: str) -> dict[str, list[int]]:
    """1,000 flowers to learn from, 293 to validate and 7 to test on."""
    ranges = {"trnid": range(1, 1001), "valid": range(1001, 1294), "tstid": range(1294, 1301)}
    return {name: list(ranges.get(name, [1] * 1300)) for name in names}


@pytest.mark.parametrize("name", ["vtab/eurosat", "vtab/resisc45"])
def test_vtab_from_class_folders(name: str, tmp_path: Path) -> None:
    """Classes in alphabetical order, test images behind the 1,000; another number of folders is refused."""
    row = task(name)
    for number in range(row.num_classes):
        (tmp_path / f"class_{number:02d}").mkdir()
        for image in range(1350 // row.num_classes):
            (tmp_path / f"class_{number:02d}/{image}.jpg").touch()
    source = open_source(row, [tmp_path])
    assert {split: len(found) for split, found in source.splits.items()} == {
        **{"train": 800, "val": 200},
        **{"trainval": 1000, "test": 350},
    }
    assert source.class_names == [f"class_{number:02d}" for number in range(row.num_classes)]
    everything = source.splits["trainval"] + source.splits["test"]
    assert all(o.id.startswith(f"class_{o.item.label:02d}/") for o in everything)
    assert len({o.id for o in everything}) == 1350
    (tmp_path / "class_00/more").mkdir()
    (tmp_path / "class_00/more/x.jpg").touch()
    assert f"images in {row.num_classes + 1} folders, expected one for each" in refusal(open_source, row, [tmp_path])


def test_a_variant_is_labelled_in_imagenets_classes(tmp_path: Path) -> None:
    """Numbers of ImageNet-V2 and WordNet ids of ImageNet-A become classes of the 1000; others are refused."""
    for name, folder, label in (("imagenet_v2", "730", 730), ("imagenet_a", "n01498041", 6)):
        place = tmp_path / name / "images" / folder
        place.mkdir(parents=True)
        (place / "x.jpg").write_bytes(encoded(pixels(0), "jpeg"))
        prepare(task(name), open_source(task(name), [tmp_path / name]), tmp_path / "out" / name)
        assert samples(tmp_path / "out" / name / "test") == [(encoded(pixels(0), "jpeg"), label)]
        manifest = load_manifest(tmp_path / "out" / name / "test")
        assert manifest.num_classes == 1000 and manifest.class_names == wnids()
    (tmp_path / "imagenet_a/images/n01440764").mkdir()  # tench: in ImageNet, not in ImageNet-A
    (tmp_path / "imagenet_a/images/n01440764/x.jpg").write_bytes(b"x")
    assert "'n01440764' is not one of the 200" in refusal(open_source, task("imagenet_a"), [tmp_path / "imagenet_a"])


def test_eurosat_from_real_packs(test_data: Path, tmp_path: Path) -> None:
    """Real satellite tiles: 800 + 200 + 1,500, the names and order of the split lists, trainval is both."""
    packs = sorted(test_data.glob("vtab_eurosat_*.tar.gz"))
    row = task("vtab/eurosat")
    prepare(row, open_source(row, packs), tmp_path)
    lists = json.loads((test_data / "vtab1k_style_splits.json").read_text())
    classes = lists["classes"]["eurosat"]
    names = lists["splits"]["eurosat"]
    expected = {"train": names["train800"], "val": names["val200"], "test": names["devtest1500"]}
    expected["trainval"] = expected["train"] + expected["val"]
    for split, wanted in expected.items():
        found = load_examples(load_manifest(tmp_path / split))
        assert [e.id for e in found] == wanted
        assert [classes[e.label] for e in found] == [name.partition("_")[0] for name in wanted]
    assert set_differences(tmp_path) == [
        "test has 1,500 of 5,400 samples",
        "its packs need not hold the images that TFDS's order gives",
    ]


def test_cifar100_from_real_packs(test_data: Path, tmp_path: Path) -> None:
    """The ready VTAB-style packs of CIFAR-100: labels and pixels as in the pack, through the shards."""
    packs = sorted(test_data.glob("cifar100_vtab1k_style_*.npz"))
    row = task("vtab/cifar100")
    prepared = {p.split: p for p in prepare(row, open_source(row, packs), tmp_path)[0]}
    assert {split: p.num_samples for split, p in prepared.items()} == {
        "train": 800,
        "val": 200,
        "trainval": 1000,
        "test": 1000,
    }
    with np.load(test_data / "cifar100_vtab1k_style_val200.npz") as pack:
        offset, blob, label, classes = (pack[name] for name in ("offset", "blob", "label", "classes"))
    found = samples(tmp_path / "val")
    assert [label for _, label in found] == label.tolist()
    assert list(load_manifest(tmp_path / "val").class_names) == classes.tolist()
    for number in (0, 99, 199):
        assert found[number][0] == blob[offset[number] : offset[number + 1]].tobytes()


def test_real_names_survive(test_data: Path, tmp_path: Path) -> None:
    """ReaL on 500 real validation images: 482 are scored, and the original label is right for 446 of them."""
    row = task("imagenet")
    source = open_source(row, [test_data / "imagenet_val_227px_dev-000000.tar"])
    prepare(row, source, tmp_path)
    manifest = load_manifest(tmp_path / "val")
    names = sample_names(manifest, range(manifest.num_samples))
    found = real_labels(names)
    labels = [label for _, label in samples(tmp_path / "val")]
    assert sum(map(bool, found)) == 482
    assert sum(label in accepted for label, accepted in zip(labels, found)) == 446
    official = np.load(test_data / "imagenet_val_labels.npz")["label"]
    assert labels == [int(official[int(name[-8:]) - 1]) for name in names]


def test_cifar10_binary_equals_the_real_pack(test_data: Path, tmp_path: Path) -> None:
    """Real CIFAR-10 test images written as the authors' binary batch give the digest of the WebP pack."""
    row = replace(task("cifar10"), splits={"test": "test"})
    with np.load(test_data / "cifar10_test.npz") as pack:
        count, blob, offset, label = 600, pack["blob"], pack["offset"], pack["label"]
    files = [blob[offset[i] : offset[i + 1]].tobytes() for i in range(count)]
    np.savez(tmp_path / "part_test.npz", blob=blob[: offset[count]], offset=offset[: count + 1], label=label[:count])
    place = tmp_path / "cifar-10-batches-bin"
    place.mkdir()
    planes = [decode(data).numpy().tobytes() for data in files]
    (place / "test_batch.bin").write_bytes(b"".join(bytes([label[i]]) + planes[i] for i in reversed(range(count))))
    for number in range(1, 6):
        (place / f"data_batch_{number}.bin").write_bytes(b"")
    (place / "batches.meta.txt").write_text("".join(f"class_{i}\n" for i in range(10)))
    packed, _ = prepare(row, open_source(row, [tmp_path / "part_test.npz"]), tmp_path / "packed")
    source = open_source(row, [tmp_path])
    source.splits.pop("train")
    (binary,), _ = prepare(row, source, tmp_path / "binary")
    assert load_manifest(tmp_path / "binary/test").class_names[9] == "class_9"
    assert load_manifest(tmp_path / "packed/test").class_names[9] == "9"  # the part is written without names
    assert binary.examples_sha256 == packed[0].examples_sha256 and binary.num_samples == count
