"""Fine-tuning on own data: which folder is what, the split, the shards' cache, the figures, the page, and all of it."""

import html
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from PIL import Image
from scipy.stats import binomtest
from tiny import tiny_config
from weights_on_disk import ROOT, load_tool, one_line, save_run, tiny_model

from pretrain.cluster.jobs import STOPPED
from pretrain.config import ModelConfig, config_to_yaml
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import UserError
from pretrain.finetune import own_results
from pretrain.finetune.own_data import OwnData, held_out, prepare
from pretrain.finetune.own_folders import find_parts, name_of
from pretrain.finetune.own_results import _device, wilson
from pretrain.finetune.own_runs import (
    default_size,
    differences,
    in_words,
    plan_own,
    predictions_of,
    protocol_for,
    score_images,
    stored_side,
)
from pretrain.finetune.sweep import Options, Start, final_runs, selecting_runs
from pretrain.report.own_page import write_page
from pretrain.shards.examples import load_examples

START = Start(Path("weights"), tiny_model(), "0" * 64)
SIDE = 64  # pixels that photos are stored with, in these tests


def photo(path: Path, colour: tuple[int, int, int], size: int = 20) -> None:
    """Writes a nearly plain picture, no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).integers(-20, 20, (size, size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def photos(folder: Path, classes: dict[str, int], ending: str = "png") -> Path:
    """A folder of class folders with so many photos each; classes differ in their colour."""
    for place, (name, number) in enumerate(sorted(classes.items())):
        for index in range(number):
            photo(folder / name / f"{index:03d}.{ending}", (60 * place + 40, 200 - 50 * place, 90))
    return folder


def prepared(train: Path, out: Path, test: Path | None = None) -> OwnData:
    return prepare(find_parts(train, test)[0], out, shorter_side=SIDE)


def names_in(manifest: Path) -> list[str]:
    return [example.id for example in load_examples(load_manifest(manifest))]


# --- which folder is what --------------------------------------------------------------------------------------------

IN_PARTS = ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a/1.png", "b/1.png"], {"train": ""}),
        (IN_PARTS, {"train": "train", "test": "test"}),
        ([*IN_PARTS, "valid/a/1.png"], {"train": "train", "val": "valid", "test": "test"}),
        (["Train/a/1.png", "Validation/a/1.png"], {"train": "Train", "test": "Validation"}),  # the only one is scored
        (["train/a/1.png", "train/b/1.png"], {"train": "train"}),
        (["train/1.png", "train/old/2.png", "tram/1.png"], {"train": ""}),  # two classes, one of them of trains
        ([*IN_PARTS, "notes/readme.txt", ".git/a.png"], {"train": "train", "test": "test"}),
    ],
)
def test_parts_of_a_set_are_understood(tmp_path: Path, files: list[str], found: dict[str, str]) -> None:
    """train, val and test inside a folder are its parts, by any of their names; a class may be called train."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    parts, told = find_parts(tmp_path, None)
    assert parts == {part: tmp_path / name for part, name in found.items()}
    assert bool(told) == ("" not in found.values())


@pytest.mark.parametrize(
    ("files", "train", "test", "message"),
    [
        (["photo.jpg"], "photo.jpg", None, "--train .*photo.jpg: is a file"),
        ([], "nowhere", None, "--train .*nowhere: not found"),
        (["a/1.png", "b/1.png", "t.csv"], "", "t.csv", "--test .*t.csv: is a file"),
        (["train/1.png", "test/1.png"], "", None, "test: holds no class folders"),
        ([*IN_PARTS, "cats/1.png"], "", None, "cats: holds pictures beside train, test"),
        (["a/1.png", "b/1.png"], "", "", "is what is trained on"),
        (["a/1.png", "b/1.png", "more/train/a/1.png"], "a", "more", "neither val nor test"),
    ],
)
def test_what_is_no_set_is_refused(
    tmp_path: Path, files: list[str], train: str, test: str | None, message: str
) -> None:
    """One line each: a file, nothing there, parts without classes, pictures that would be left out."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message) as caught:
        find_parts(tmp_path / train, None if test is None else tmp_path / test)
    one_line(caught.value)


@pytest.mark.parametrize("test", ["", "val", "val/../val"])
def test_what_is_scored_chooses_no_rate(tmp_path: Path, test: str) -> None:
    """Val that --test names, or that is all there is to score, is the test: images are held out of train instead."""
    photos(tmp_path / "train", {"a": 1, "b": 1})
    photos(tmp_path / "val", {"a": 1, "b": 1})
    scored = tmp_path / (test or "val")
    assert find_parts(tmp_path, tmp_path / test)[0] == {"train": tmp_path / "train", "test": scored}


def test_shards_are_the_same_as_their_manifest(tmp_path: Path) -> None:
    """A set may be named by its folder and by its manifest.json, and is not its own test by either."""
    (tmp_path / "manifest.json").touch()
    places = tmp_path, tmp_path / "manifest.json"
    for train, test in product(places, places):
        with pytest.raises(UserError, match="is what is trained on"):
            find_parts(train, test)


def test_names_of_sets(tmp_path: Path) -> None:
    """A set is called as its folder, not as its part or its manifest."""
    for place in ("birds", "birds/train", "birds/Train/manifest.json".lower()):
        assert name_of(tmp_path / place) == "birds"


# --- the split -------------------------------------------------------------------------------------------------------


def test_held_out_by_class_and_seed() -> None:
    """A fifth of each class, at least one, never a class's only image; the same for any order; another by the seed."""
    names = [f"{label}/{number}" for label, count in enumerate((20, 7, 2, 1)) for number in range(count)]
    labels = [int(name[0]) for name in names]
    chosen = {names[place] for place in held_out(labels, names)}
    assert Counter(name[0] for name in chosen) == {"0": 4, "1": 1, "2": 1}
    assert chosen == {"0/0", "0/13", "0/18", "0/4", "1/4", "2/0"}  # pinned: results of a folder must not move
    order = np.random.default_rng(0).permutation(len(names)).tolist()
    again = held_out([labels[place] for place in order], [names[place] for place in order])
    assert {names[order[place]] for place in again} == chosen
    assert {names[place] for place in held_out(labels, names, seed=1)} != chosen
    more = [*names, *(f"0/new {number}" for number in range(5))]
    assert len(chosen - {more[place] for place in held_out([*labels, *[0] * 5], more)}) <= 2


def test_split_of_a_folder(tmp_path: Path) -> None:
    """Train and test are the folder's images, none in both, with names; the photos' folder is as before."""
    folder = photos(tmp_path / "pets", {"cat": 10, "dog": 6, "newt": 1})
    (folder / "fish").mkdir()
    before = sorted(folder.rglob("*"))
    data = prepared(folder, tmp_path / "out")
    assert (data.num_train, data.num_test, data.class_names) == (14, 3, ("cat", "dog", "newt"))
    assert "3 of 17 images" in data.told[0] and data.told[0].endswith("not tested: 1, 'newt' first")
    assert "passed over: 1 folders without pictures, the first 'fish'" in data.told
    tested = names_in(data.test)
    assert Counter(name.partition("/")[0] for name in tested) == {"cat": 2, "dog": 1}
    pixels = {read_sample(load_manifest(data.test), index).image for index in range(3)}
    assert pixels == {(folder / name).read_bytes() for name in tested}
    learnt = {read_sample(load_manifest(data.train), index).image for index in range(14)}
    assert not learnt & pixels and len(learnt) == 14
    assert sorted(folder.rglob("*")) == before


def test_split_of_shards(shard_folder: Path, tmp_path: Path) -> None:
    """Shards without a test are split alike: 103 samples of 5 classes, a fifth of each."""
    data = prepared(shard_folder, tmp_path)
    assert (data.num_train, data.num_test) == (83, 20) and data.class_names[0] == "ash"
    labels = Counter(read_sample(load_manifest(data.test), index).label for index in range(20))
    assert labels == dict.fromkeys((b"0", b"1", b"2", b"3", b"4"), 4)


def test_given_parts_are_used_as_they_are(shard_folder: Path, own_shards: Path, tmp_path: Path) -> None:
    """A test folder with some of the classes, and shards, are taken whole; val chooses, by the names of its classes."""
    folder = photos(tmp_path / "set" / "train", {"a": 4, "b": 4, "c": 4}).parent
    photos(folder / "val", {"b": 2})
    photos(folder / "test", {"c": 3, "a": 1})
    data = prepared(folder, tmp_path / "out")
    assert (data.num_train, data.num_test, data.choose is not None) == (12, 4, True)
    assert [line for line in data.told if "mapped by name" in line] == [
        "val has 1 of the 3 classes of train, in another order: mapped by name",
        "test has 2 of the 3 classes of train, in another order: mapped by name",
    ]
    data = prepared(shard_folder, tmp_path / "other", own_shards / "manifest.json")
    assert (data.train, data.test) == (shard_folder / "manifest.json", own_shards / "manifest.json")
    assert not (tmp_path / "other/data/train").exists()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"only": 3}, None, "train: has one class, 'only'"),
        ({"only": 3, "empty": 0}, None, "has one class, 'only'"),
        ({}, None, "no images found"),
        ({"": 3}, None, "train: its 3 photos lie in no class folder"),
        ({"a": 1, "b": 1}, None, "each class has one image"),
        ({"cat": 2, "dog": 2}, {"cat": 1, "dgo": 1}, "test: class 'dgo' is none of the 2 of .*Did you mean: 'dog'"),
    ],
)
def test_sets_that_cannot_be_learnt(
    tmp_path: Path, train: dict[str, int], test: dict[str, int] | None, message: str
) -> None:
    """One line before anything is written: a single class, no image, nothing to test on, a class that train has not."""
    (tmp_path / "train").mkdir()
    for name in train:
        (tmp_path / "train" / name).mkdir(exist_ok=True)
    photos(tmp_path / "train", train)
    given = photos(tmp_path / "test", test) if test else None
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path / "train", tmp_path / "out", given)
    one_line(caught.value)
    assert not (tmp_path / "out").exists()


# --- the cache -------------------------------------------------------------------------------------------------------


def test_shards_are_made_once(tmp_path: Path) -> None:
    """Kept while photos are the same, gone on with after a kill, made again when one changes, but not under runs."""
    folder, out = photos(tmp_path / "pets", {"cat": 5, "dog": 5}), tmp_path / "out"
    data = prepared(folder, out)
    files = {path: path.stat().st_mtime_ns for path in (out / "data").rglob("*.*")}
    assert prepared(folder, out) == data
    assert {path: path.stat().st_mtime_ns for path in (out / "data").rglob("*.*")} == files
    was = load_manifest(data.test).sha256
    shutil.rmtree(data.test.parent)  # as a kill before it was begun
    assert (
        load_manifest(prepared(folder, out).test).sha256 == was and data.train.stat().st_mtime_ns == files[data.train]
    )
    os.utime(folder / "cat" / "000.png", ns=(1, 1))
    prepared(folder, out)
    assert data.train.stat().st_mtime_ns != files[data.train]
    (out / "sweep.json").touch()
    photo(folder / "cat" / "new.png", (1, 2, 3))
    with pytest.raises(UserError, match="was begun with other photos .* give another --out") as caught:
        prepared(folder, out)
    one_line(caught.value)
    assert load_manifest(data.train).num_samples == 8  # what the runs have learnt from is still there


def test_photos_that_cannot_be_read_are_told_and_named_apart(tmp_path: Path) -> None:
    """One is left out, whose name begins with another's: the others keep their names, and a second call tells."""
    folder, test = photos(tmp_path / "pets", {"cat": 3, "dog": 3}), photos(tmp_path / "test", {"cat": 2, "dog": 2})
    (test / "cat" / "000.png: y1.png").write_bytes(b"no picture")
    for _ in range(2):
        data = prepared(folder, tmp_path / "out", test)
        assert names_in(data.test) == ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"]
        told = "test: 1 image is left out, the first: cat/000.png: y1.png: "
        assert [line for line in data.told if line.startswith(told)]


def test_calls_on_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    """While another process makes the shards of OUT, nothing in it is touched."""
    folder, out = photos(tmp_path / "pets", {"cat": 5, "dog": 5}), tmp_path / "out"
    out.mkdir()
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "print(1, flush=True); input()"
    words, pipe = [sys.executable, "-c", code, str(out / ".lock")], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as other:
        assert other.stdin and other.stdout and other.stdout.readline()
        made: list[OwnData] = []
        waiting = threading.Thread(target=lambda: made.append(prepared(folder, out)))
        waiting.start()
        waiting.join(1)
        there = [path.name for path in out.iterdir()]
        other.stdin.write(b"\n")
        other.stdin.close()
        waiting.join()
    assert there == [".lock"] and made[0].num_test == 2


def test_nothing_of_others_is_written_over(tmp_path: Path) -> None:
    """A folder data that was there before is left alone, and nothing is written among the photos."""
    folder, out = photos(tmp_path / "pets", {"cat": 5, "dog": 5}), tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "mine.txt").touch()
    for place, message in ((out, "data: is not empty"), (folder / "out", "lies inside")):
        with pytest.raises(UserError, match=message) as caught:
            prepared(folder, place)
        one_line(caught.value)
    assert (out / "data" / "mine.txt").exists() and not (folder / "out").exists()


def test_large_photos_are_stored_small_and_upright(tmp_path: Path) -> None:
    """A shorter side of so many pixels, turned as EXIF says: as tools/predict.py sees a photo."""
    folder = photos(tmp_path / "pets", {"cat": 5, "dog": 5})
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for path in sorted(folder.rglob("*.png")):
        Image.new("RGB", (3 * SIDE, 2 * SIDE)).save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    data = prepared(folder, tmp_path / "out")
    with Image.open(io.BytesIO(read_sample(load_manifest(data.test), 0).image)) as image:
        assert image.size == (SIDE, SIDE * 3 // 2)


# --- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_train", "steps", "batch", "warmup", "held_out"),
    [
        (1, 80, 16, 8, 0.2),
        (160, 80, 16, 8, 0.2),
        (1_020, 204, 64, 20, 0.2),  # as Flowers
        (3_680, 736, 256, 73, 1000 / 3680),  # as Pets
        (50_000, 10_000, 512, 500, 0.02),  # CIFAR, as the paper
        (1_281_167, 20_000, 512, 500, 0.01),  # ImageNet, as the paper
    ],
)
def test_protocol_by_size(num_train: int, steps: int, batch: int, warmup: int, held_out: float) -> None:
    """The paper's steps, batch, warm-up and held-out share for sets of its sizes, less for smaller ones."""
    found = protocol_for(num_train, 384)
    assert (found.steps, found.batch_size, found.warmup_steps) == (steps, batch, warmup)
    assert found.dev_fraction == pytest.approx(min(0.2, held_out))
    assert set(found.lr_grid) <= {0.001, 0.003, 0.01, 0.03}


@pytest.mark.parametrize(
    ("model", "on_gpu", "on_cpu"),
    [
        ({"name": "B"}, 384, 224),
        ({"name": "B", "image_size": 512}, 512, 512),
        ({"name": "H", "patch_size": 14}, 378, 224),  # 27 patches, as Google's convolution makes of 384
        ({"name": "Ti", "image_size": 32, "patch_size": 8}, 64, 32),  # the demo's
        ({"name": "timm:swin_tiny_patch4_window7_224"}, 224, 224),
    ],
)
def test_sizes_of_images(model: dict[str, Any], on_gpu: int, on_cpu: int) -> None:
    """384 px on a GPU in whole patches, at most twice the weights' own; their own on a CPU, of timm's, and above it."""
    start = Start(None, ModelConfig(**model), None)
    assert (default_size(start, on_gpu=True), default_size(start, on_gpu=False)) == (on_gpu, on_cpu)
    assert [stored_side(size) for size in (32, 384, 512)] == [512, 512, 683]


def plan(data: OwnData, out: Path, **changes: Any) -> Any:
    values = {"num_seeds": 1, "steps": None, "lr_grid": None, "image_size": None, "overrides": (), "num_gpus": 1}
    options = Options(start=START, data=out / "data", out=out, **{**values, **changes})
    return plan_own("pets", data, options, image_size=16, on_gpu=False)


def test_runs_of_own_data(tmp_path: Path) -> None:
    """The rate is chosen on a part of train, or on val where there is one; the test is scored by final runs alone."""
    data = prepared(photos(tmp_path / "pets", {"cat": 20, "dog": 20}), tmp_path / "out")
    sweep = plan(data, tmp_path / "out", overrides=("model.dropout=0.1",))
    selecting, (final,) = selecting_runs(sweep), final_runs(sweep, 0.01)
    assert [config.optim.lr for config in selecting] == [0.003, 0.01, 0.03]
    assert all((config.data.val, config.data.held_out) == (None, 6) for config in selecting)
    assert (final.data.val, final.data.held_out, final.output) == (data.test, 0, tmp_path / "out")
    assert (final.total_steps, final.optim.name, final.optim.momentum, final.data.crop) == (
        80,
        "sgd",
        0.9,
        "inception",
    )
    assert (final.engine.precision, final.data.global_batch, final.model.num_classes) == ("fp32", 16, 2)
    told = " ".join([*in_words(sweep, data), *differences(sweep)])
    for part in ("32 images of 2 classes", "8 to test on", "0.003, 0.01, 0.03 on 6 of them", "batch 16 instead of 512"):
        assert part in told
    assert "model.dropout=0.1" in told and "workers" not in told
    assert "rates 0.003 0.01 0.03 instead of 0.001 0.003 0.01 0.03" in told and "steps 80" not in told
    cut = differences(plan(data, tmp_path / "out", steps=20, lr_grid=(0.01,)))
    expected = {"steps 20 instead of 80", "warm-up 2 instead of 8", "rates 0.01 instead of 0.001 0.003 0.01 0.03"}
    assert expected <= set(cut)
    photos(tmp_path / "split" / "train", {"a": 4, "b": 4})
    photos(tmp_path / "split" / "val", {"a": 2, "b": 2})
    photos(tmp_path / "split" / "test", {"a": 2, "b": 2})
    data = prepared(tmp_path / "split", tmp_path / "two")
    for config in selecting_runs(plan(data, tmp_path / "two")):
        assert (config.data.train, config.data.val, config.data.held_out) == (data.train, data.choose, 0)


@pytest.mark.parametrize(("overrides", "batch_size"), [((), "3"), (("evaluation.batch_size=2",), "2")])
def test_images_are_scored_by_as_many_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], batch_size: str
) -> None:
    """The micro-batch of the training: the 256 of tools/evaluate.py, in float32, may be too many for the memory."""
    monkeypatch.setattr("pretrain.finetune.own_runs.fitting_micro_batch", lambda *_: 3)
    called: list[list[str]] = []
    # What stops it is told, not taken for a failure.
    monkeypatch.setattr("pretrain.finetune.own_runs.run_job", lambda words, *_: called.append(words) or STOPPED)
    data = prepared(photos(tmp_path / "pets", {"cat": 5, "dog": 5}), tmp_path / "out")
    assert score_images(plan(data, tmp_path / "out", lr_grid=(0.01,), overrides=overrides)) == STOPPED
    (words,) = called
    assert words[words.index("--batch-size") + 1] == batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "photos", "--task", "cifar10"], "not allowed with argument"),
        ([], "one of the arguments --train --task is required"),
        (["--task", "cifar10", "--test", "x"], "--test is of --train"),
        (["--train", "x", "--data", "y"], "--data has no effect on --train, only on --task; leave"),
        (["--train", "x", "--run", "0"], "--run has no effect on --train, only on --task; leave"),
        (["--train", "x", "--list"], "--list has no effect on --train, only on --task; leave"),
        (["--train", "nowhere"], "--train nowhere: not found"),
        (["--train", ".", "--test", "nowhere"], "--test nowhere: not found"),
        (["--task", "cifar10", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["--train", ".", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--train", ".", "--num-gpus", "0"], "--num-gpus is 0, expected at least 1"),
        (["--train", ".", "--image-size", "0"], "--image-size is 0, expected at least 1"),
        (["--train", ".", "--lr", "0.1,0"], "--lr 0: expected rates above 0"),
        (["--train", ".", "--lr", "nan"], "--lr nan: expected rates above 0"),
        (["--task", "cifar10", "--lr", "2000"], "--lr 2000: expected rates above 0 and below 1000"),
    ],
)
def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Each is told before weights are looked for, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", "weights", *arguments])
    with pytest.raises((UserError, SystemExit)) as caught:
        load_tool("finetune").main()
    told = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
    assert message in told
    assert getattr(caught.value, "exit_code", None) == 2 or getattr(caught.value, "code", None) == 2


def test_weights_alone_are_required(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """KEY=VALUE may be left out, and so is not asked for."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--train", "photos"])
    with pytest.raises(SystemExit):
        load_tool("finetune").main()
    assert capsys.readouterr().err.endswith("the following arguments are required: WEIGHTS\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "optim.lrr"),
        (["optim.momentum=fast"], "optim.momentum"),
        (["optim.lr=0.1"], "the sweep sets optim.lr itself; give --lr"),
        (["epochs=3"], "the sweep sets epochs itself; give --steps"),
        (["--image-size", "17"], "expected a multiple of the weights' patches of"),
    ],
)
def test_wrong_words_are_told_before_photos_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    """A set may be large: what no run can have is told at once, and nothing is written."""
    folder, out = photos(tmp_path / "pets", {"cat": 2, "dog": 2}), tmp_path / "out"
    save_run(tiny_config(tmp_path / "unused", tmp_path, name="weights"), ["other", "classes"])
    call = [tmp_path / "weights", "--train", folder, "--out", out, *words]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, call)])
    with pytest.raises(UserError) as caught:
        load_tool("finetune").main()
    assert message in one_line(caught.value) and not out.exists()


# --- figures and page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "number"), [(0, 10), (10, 10), (1, 1), (8, 40), (379, 417), (4_321, 10_000)])
def test_interval_is_wilsons(correct: int, number: int) -> None:
    """As scipy's, at the ends too."""
    expected = binomtest(correct, number).proportion_ci(0.95, method="wilson")
    assert wilson(correct, number) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_table_and_page_have_the_same_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 0's is the float32 one of the predictions, wherever it stands; a training's own may differ in bf16."""
    data = prepared(photos(tmp_path / "pets", {"cat": 10, "dog": 10}), tmp_path / "out")
    overrides = ("engine.precision=bf16",)
    sweep = plan(data, tmp_path / "out", lr_grid=(0.01,), num_seeds=2, overrides=overrides)
    for config in final_runs(sweep, 0.01):
        folder = config.output / config.name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "config.yaml").write_text(config_to_yaml(config))
        (folder / "DONE").write_text(json.dumps({"step": config.total_steps, "val/top1": 0.5, "val/images": 4}))
        predictions = "".join(f'{{"label": {label}, "prediction": 1}}\n' for label in (1, 1, 1, 0))
        predictions_of(config).write_text(predictions)
    monkeypatch.setattr(own_results, "final_sha256", lambda _: "0")
    (sweep.test.parent.parent / "task.json").write_text("of somebody else's: no JSON")  # is not looked at
    found = own_results.accuracy(sweep, data, weights="w", seconds=None)
    own_results.write_accuracy(sweep, found)
    line = json.loads((sweep.folder / "results.json").read_text())
    assert found["top1"] == 0.75 and found["seeds"] == line["values"] == [0.75, 0.5] and line["mean"] == 0.625
    told = "seed 0 scored in fp32, the others in bf16"
    assert told in found["differs"] and told in (sweep.folder / "results.md").read_text()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"world_size": 1, "device": "NVIDIA H100", "device_type": "cuda"}, "one NVIDIA H100"),
        ({"world_size": 4, "device": "NVIDIA H100", "device_type": "cuda"}, "4 x NVIDIA H100"),
        ({"world_size": 2, "device": "AMD", "device_type": "cpu"}, None),
        (None, None),
    ],
)
def test_the_machine_is_that_of_the_last_start(tmp_path: Path, start: dict[str, Any] | None, expected: str) -> None:
    """As many GPUs as the run had; on a CPU its cores."""
    if start is not None:
        (tmp_path / "starts.jsonl").write_text(f'{{"step": 0}}\n{json.dumps(start)}\n')
    cores = len(os.sched_getaffinity(0))
    assert _device(tmp_path) == (expected or f"{cores} CPU core{'s' * (cores > 1)}")


SCRIPT = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\"'><svg onload=window.hurt=1>"


def results_folder(folder: Path, num_classes: int, word: str = "") -> Path:
    """What a fine-tuning has left, with many classes; `word` stands wherever someone could have written something."""
    random = np.random.default_rng(0)
    confusion, per_class = [], []
    for label in range(num_classes):
        right, wrong = int(random.integers(0, 50)), int(random.integers(1, 9))
        confusion += [[label, label, right], [label, (label + 1) % num_classes, wrong]]
        share = {"correct": right, "n": right + wrong, "top1": right / (right + wrong)}
        per_class.append({"label": label, **share, "interval": list(wilson(right, right + wrong))})
    correct, number = (sum(of[key] for of in per_class) for key in ("correct", "n"))
    values = {
        **{"format": "pretrain-accuracy", "version": 1, "run": "final", "from_scratch": False, "seconds": 200.0},
        **dict.fromkeys(("data", "weights", "model", "device"), word or "word"),
        **{
            "image_size": 384,
            "steps": 100,
            "batch": 16,
            "lr": 0.01,
            "seeds": [0.5],
            "num_train": 9,
            "num_test": number,
        },
        **{"correct": correct, "n": number, "top1": correct / number, "interval": list(wilson(correct, number))},
        **{"classes": [f"{word} a class of number {label}" for label in range(num_classes)], "per_class": per_class},
        **{"confusion": [row for row in confusion if row[2]], "told": [word], "differs": [word]},
        "selection": [{"lr": 0.01, "top1": 0.5, "n": 9}, {"lr": 0.03, "top1": None, "n": 0}],
    }
    (folder / "final" / "evaluation").mkdir(parents=True)
    (folder / "accuracy.json").write_text(json.dumps(values))
    item = {"name": word, "label": word, "predicted": word, "probability": 0.9}
    (folder / "final" / "evaluation" / "wrong.json").write_text(json.dumps({"items": [item] * 5}))
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing is asked of anyone, nothing runs, nothing is wider than the screen, the first screen has the chart."""
    page = write_page(results_folder(tmp_path / "out", 40, SCRIPT))
    browser.open(page, width=width, scheme=scheme)
    wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in wrong]
    sent = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("window.hurt === undefined && document.scripts.length === 0")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    text = browser.evaluate("document.body.innerText")
    assert SCRIPT in text and str(tmp_path) not in text
    plain = write_page(results_folder(tmp_path / "plain", 3))
    browser.open(plain, width=width, scheme=scheme)
    assert browser.evaluate("document.querySelector('.bars').getBoundingClientRect().bottom") < 844


@pytest.mark.parametrize(
    ("of", "is_shown"),
    [
        ({"data_sha256": "a", "weights_sha256": "b"}, True),
        ({"data_sha256": "other", "weights_sha256": "b"}, False),
        ({"data_sha256": "a", "weights_sha256": "other"}, False),
        ({}, True),  # of an earlier version, which did not say it
    ],
)
def test_wrong_photos_are_those_of_the_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of: dict[str, str], is_shown: bool
) -> None:
    """Where tools/evaluate.py has scored other data or another checkpoint since, its photos are left out and told."""
    folder = results_folder(tmp_path, 3)
    for path, about in (
        ("accuracy.json", {"test_sha256": "a", "run_sha256": "b"}),
        ("final/evaluation/wrong.json", of),
    ):
        values = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**values, **about}))
    assert ("most certain" in write_page(folder).read_text()) == is_shown
    assert ("wrong.json: left out: of other data or weights" in capsys.readouterr().err) != is_shown


def test_the_interval_is_as_exact_as_the_accuracy(tmp_path: Path) -> None:
    """Of many test images it is narrower than a percent: 97.7% is not 98 to 98%."""
    folder = results_folder(tmp_path, 3)
    values = json.loads((folder / "accuracy.json").read_text())
    values |= {"correct": 48_825, "n": 50_000, "top1": 48_825 / 50_000, "interval": list(wilson(48_825, 50_000))}
    (folder / "accuracy.json").write_text(json.dumps(values))
    assert "97.7% <span>accuracy; 97.5 to 97.8% with 95% confidence" in write_page(folder).read_text()


def test_the_pages_command_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, with the folder as it was given; of a whole path nothing that is above the working folder."""
    monkeypatch.chdir(tmp_path)
    results_folder(Path("runs/my pets"), 3)
    for folder in (Path("runs/my pets"), tmp_path / "runs" / "my pets"):
        text = html.unescape(write_page(folder).read_text())
        assert "python tools/predict.py 'runs/my pets/final' PHOTO.jpg" in text and str(tmp_path) not in text


def test_a_page_of_its_own_is_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a run it is refused by its name: it is none."""
    folders = [str(results_folder(tmp_path / name, 3)) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["report.py", *folders])
    with pytest.raises(UserError, match=f"{folders[0]}: .* has a page of its own; give it alone"):
        load_tool("report").main()


@pytest.mark.parametrize("key", ["classes", "per_class", "confusion", "interval", "run", "top1", "seconds"])
@pytest.mark.parametrize("value", [None, [], [[0, 10**9, 1]], {"a": 1}, "../..", 1e300])
def test_strangers_figures_are_shown_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    """A folder may come from anyone: what is not of its type is one line."""
    folder = results_folder(tmp_path, 3)
    values = json.loads((folder / "accuracy.json").read_text())
    (folder / "accuracy.json").write_text(json.dumps({**values, key: value}))
    try:
        write_page(folder)
    except UserError as error:
        assert key in one_line(error) or "class" in str(error) or "label" in str(error)
    else:
        assert (key, value) in (("seconds", None), ("per_class", []), ("confusion", []))


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_photos_to_predictions(tmp_path: Path) -> None:
    """A folder of photos, tuned by the command as people give it: figures that add up, a page, weights that predict."""
    folder = photos(tmp_path / "pets", {"cat": 20, "dog": 20, "newt": 20}, "jpg")
    weights = tiny_config(tmp_path / "unused", tmp_path, name="weights")
    save_run(weights, ["other", "classes"])
    words = ["tools/finetune.py", tmp_path / "weights", "--train", folder, "--steps", "60", "--lr", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words), "data.workers=0", "data.crop_area=[0.5,1]"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "weights" / "finetune" / "pets"
    found = json.loads((out / "accuracy.json").read_text())
    assert (found["n"], found["num_train"], found["classes"]) == (12, 48, ["cat", "dog", "newt"])
    assert found["correct"] >= 10  # three colours: a guess is right 4 times
    assert sum(row[2] for row in found["confusion"]) == 12
    assert found["correct"] == sum(number for label, to, number in found["confusion"] if label == to)
    assert f"{found['top1']:.1%} of 12 test images are named rightly (95% interval" in done.stdout
    wrong = json.loads((out / found["run"] / "evaluation" / "wrong.json").read_text())
    assert (wrong["weights_sha256"], wrong["data_sha256"]) == (found["run_sha256"], found["test_sha256"])
    assert (out / "report.html").is_file() and str(tmp_path) not in (out / "report.html").read_text()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and "launch/pretrain.py" not in again.stdout  # nothing is trained twice
    image = folder / "newt" / "000.jpg"
    predict = [sys.executable, "tools/predict.py", str(out / found["run"]), str(image), "--json"]
    told = subprocess.run(predict, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    best = json.loads(told.stdout)["predictions"][0]
    assert best["name"] == "newt", told.stdout
