"""Labels are names, not positions: wherever two lists of classes meet they are compared, mapped by name, or refused."""

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks
from tiny import tiny_config
from weights_on_disk import save_run

from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.classes import ClassMatch, join_classes, match_classes
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest, read_as
from pretrain.errors import ConfigError, UserError
from pretrain.models.timm_folder import write_own_folder
from pretrain.models.weights import read_weights
from pretrain.shards.build import build
from pretrain.shards.sources import Item
from pretrain.train import datasets
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data

CAFE = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


def match(theirs: list[str], ours: list[str], num_theirs: int = 0, num_ours: int = 0) -> ClassMatch:
    """The match of two lists, the first of `val`, the second of `train`."""
    counts = num_theirs or len(theirs), num_ours or len(ours)
    return match_classes(theirs, counts[0], ours, counts[1], their_place="val", our_place="train")


def test_equal_lists_are_silent() -> None:
    """Also two sets without names, and with mere numbers for names."""
    assert match(["a", "b"], ["a", "b"]) == (None, None)
    assert match([], [], 3, 3) == (None, None)
    assert match(["0", "1"], [], 2, 2) == (None, None)


@pytest.mark.parametrize(
    "theirs, ours, labels, said",
    [
        (["b", "a"], ["a", "b"], (1, 0), "val has the 2 classes of train, in another order: mapped by name"),
        (["c", "a"], ["a", "b", "c"], (2, 0), "val has 2 of the 3 classes of train, in another order: mapped by name"),
        (["a", "b"], ["a", "b", "c"], None, "val has 2 of the 3 classes of train: mapped by name"),
        (["x", CAFE[1]], ["x", CAFE[0]], None, "val has the 2 classes of train: mapped by name"),
        ([CAFE[1], "x"], ["x", CAFE[0]], (1, 0), "in another order"),
        (["1", "3"], ["0", "1", "2", "3"], (1, 3), "val has 2 of the 4 classes of train, in another order"),
        (["0", "1", "2"], ["0", "10", "2", "1"], (0, 3, 2), "in another order"),
        (["0", "1", "2"], ["0", "10", "2", "1", "unused 4"], (0, 3, 2), "in another order"),
        (["ash", "elm"], ["n00000001", "n00000002", "unused 2"], None, "labels are taken to mean the same"),
        (
            ["a", "b", "c"],
            ["a", "b", "unused 2", "unused 3"],
            None,
            "val has 3 of the 4 classes of train: mapped by name",
        ),
    ],
)
def test_what_can_be_mapped_by_name_is_mapped_and_said(
    theirs: list[str], ours: list[str], labels: tuple[int, ...] | None, said: str
) -> None:
    """Another order, a part of the classes, names that only look equal, a class for an output that was kept for it."""
    found = match(theirs, ours)
    assert found.labels == labels and found.told and said in found.told


def test_what_cannot_be_compared_is_said_once() -> None:
    """One side without names; ids on one side and words on the other."""
    assert match([], ["a", "b"], 2) == (None, "val has no class names: labels are taken to mean the same")
    with pytest.raises(UserError, match="of different kinds, and not as many"):
        match(["tench", "dog"], ["n01440764", "n01443537", "n01484850"])
    assert match(["a", "b"], ["0", "1"]) == (None, "train has no class names: labels are taken to mean the same")
    told = match(["n01440764"], ["tench"]).told
    assert told and "('n01440764') and train ('tench') are of different kinds" in told


@pytest.mark.parametrize("names", [["0", "1", "10", "2"], ["1", "2", "3"], ["1", "3", "5"]])
def test_labels_alone_beside_names_that_are_other_numbers_are_refused(names: list[str]) -> None:
    """Folders 0 to 10, sorted as texts, and a list with number labels: label 2 would be class 10, without a word."""
    label = next(label for label, name in enumerate(names) if name != str(label))
    said = f": class {label} is called '{names[label]}', and {{}} has labels without names, which may mean either"
    with pytest.raises(UserError, match="train" + said.format("val")):
        match([], names, 3)
    with pytest.raises(UserError, match="val" + said.format("train")):
        match(names, [], 0, 9)
    with pytest.raises(UserError, match=f"class {label} is called '{names[label]}'"):
        match([], [*names, f"unused {len(names)}"], 3)  # a head with an output more
    padded = [f"{number:03}" for number in range(12)]
    assert match([], padded, 12).told == "val has no class names: labels are taken to mean the same"


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        (["b", "c", "d"], ["a", "b", "c"], "val: class 2 is 'd', which train does not have (its class 2 is 'c')"),
        (["a", "b", "c", "d"], ["a", "b", "c"], "class 3 is 'd', which train does not have (its class 3 is none)"),
        (["b", "a"], ["a", "b", "a"], "train: classes 0 and 2 are both called 'a'"),
        (["a", "a"], ["a", "b"], "val: class 1, 'a', stands twice in its list"),
        (["b", "c"], ["a", "b", "unused 2"], "val: class 1 is 'c', which train does not have (its class 1 is 'b')"),
    ],
)
def test_anything_else_is_refused_with_the_first_difference(theirs: list[str], ours: list[str], said: str) -> None:
    """The same number of classes is no reason to go on."""
    with pytest.raises(UserError) as error:
        match(theirs, ours)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_classes_of_several_sets_together() -> None:
    """In the order of the sets; a name is the same however its accents are written, ids and words are not."""
    names, meanings = join_classes([["b", "caf\u00e9"], ["a", "cafe\u0301", "b"], IDS], ["one", "two", "three"])
    assert names == ("b", "caf\u00e9", "a", *IDS)
    assert meanings == [(0, 1), (2, 1, 0), (3, 4, 5)]
    assert match(IDS[1:], names) == ((4, 5), "val has 2 of the 6 classes of train, in another order: mapped by name")
    assert match(["a", "b"], names).labels == (2, 0)
    with pytest.raises(UserError, match="val: class 1 is 'd', which train does not have"):
        match(["a", "d"], names)
    with pytest.raises(UserError, match="two has no class names, by which classes are joined"):
        join_classes([["b"], ["0", "1"]], ["one", "two"])
    with pytest.raises(UserError, match="two: class 'crane' stands twice in its list"):
        join_classes([["b"], ["crane", "dog", "crane"]], ["one", "two"])


def test_names_that_stand_twice_matter_where_they_are_used() -> None:
    """ImageNet's cranes are two classes: a set of cats and dogs does not mind."""
    assert match(["cat", "dog"], ["crane", "dog", "cat", "crane"]).labels == (2, 1)


IDS = ["n00004475", "n00005787", "n00006024"]


@pytest.mark.parametrize(
    "names, of_head",
    [
        (IDS, (*IDS, "unused 3", "unused 4")),
        (["a", "b"], ("a", "b", "unused 2", "unused 3", "unused 4")),
        (["a", "b", "c", "d", "e"], ("a", "b", "c", "d", "e")),
        (["0", "1", "2"], ()),
        (["0", "1", "2", "3", "4"], ("0", "1", "2", "3", "4")),
        ([], ()),
    ],
)
def test_a_head_with_more_outputs_than_classes_keeps_their_names(
    names: list[str], of_head: tuple[str, ...], tmp_path: Path
) -> None:
    """Of a checkpoint, as everything reads it, after the way through a folder too; a set with a part of the names, ids
    or words, is still mapped by name. Numbers are none.
    """
    save_run(tiny_config(tmp_path, tmp_path, name="run", model__num_classes=5), names)
    weights = read_weights(tmp_path / "run")
    assert weights.class_names == of_head
    write_own_folder(weights, tmp_path / "folder")
    assert read_weights(tmp_path / "folder").class_names == of_head
    if of_head and names[0] != "0":
        part = names[::-1][:2]
        assert match(part, list(of_head)).labels == (len(names) - 1, len(names) - 2)
        assert match(names, list(of_head), num_ours=5).labels is None


def shards(folder: Path, names: list[str], num_samples: int = 12) -> Path:
    """A set whose images are of their class's letter alone: (brightness, label)."""
    items = []
    for number in range(num_samples):
        label = number % len(names)
        file = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 10 * ord(names[label]) % 256, np.uint8)).save(file, "png")
        items.append(Item(file.getvalue, "png", label, f"{number}"))
    build(items, names, folder, samples_per_shard=100, seed=0)
    return folder


def test_a_validation_set_of_another_order_is_read_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train a, b, c; validation c, a: each image gets the label that its class has in training. d is refused."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    train, val = shards(tmp_path / "train", ["a", "b", "c"]), shards(tmp_path / "val", ["c", "a"])
    config = tiny_config(train, tmp_path / "runs", data__val=str(val), evaluation__every_steps=5)
    data = open_data(config)
    assert "has 2 of the 3 classes of" in capsys.readouterr().out
    assert data.val is not None and data.val.class_names == ("a", "b", "c")
    options = {"batch_size": 12, "image_size": 16, "config": config.data}
    (batch,) = eval_batches(data.val, data.val_indices, **options)
    brightness = {10 * ord(name) % 256: label for label, name in enumerate("abc")}
    assert [brightness[int(image[0, 0, 0])] for image in batch.images] == batch.labels[:, 0].tolist()
    other = shards(tmp_path / "other", ["b", "c", "d"])
    with pytest.raises(UserError, match="class 2 is 'd', which .* does not have"):
        open_data(tiny_config(train, tmp_path / "runs", data__val=str(other)))
    (few,) = eval_batches(load_manifest(val), data.val_indices, **options)
    assert few.labels.tolist() != batch.labels.tolist()  # as stored, without the map


def test_sets_that_a_run_cannot_take_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More held out than there is; images one by one over a network, where nobody has chosen an order."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    train = shards(tmp_path / "train", ["a", "b", "c"])
    with pytest.raises(
        ConfigError, match=r"\(3000\) leaves nothing of 12 samples .*; hold out fewer, as data.held_out=0"
    ):
        open_data(tiny_config(train, tmp_path / "runs", data__held_out=3000))
    with pytest.raises(ConfigError, match=r"data.subset \(11\) is more than the 10 images to train on; lower it"):
        open_data(tiny_config(train, tmp_path / "runs", data__held_out=2, data__subset=11))
    told = f"warning: {train}/manifest.json is on NFS, which order=permuted asks for each image at another place; "
    for place, order, said in (
        ("NFS", "auto", told),
        ("NFS", "permuted", ""),
        ("NFS", "lanes", ""),
        (None, "auto", ""),
    ):
        monkeypatch.setattr(datasets, "network_file_system", lambda path, place=place: place)
        config = tiny_config(train, tmp_path / "runs", data__order=order)
        data = open_data(config)
        datasets.warn_of_single_reads(config.data, data.train, data.order)
        assert capsys.readouterr().out == (
            f"{said}data.order=lanes takes those that lie together within a few steps\n" if said else ""
        )


def start_from(configs: list[Config]) -> list[str]:
    """What each start from weights says: of its refusal, "" where there is none."""
    said = []
    device = ranks.start(60)
    for config in configs:
        try:
            build_engine(config, open_data(config), device, from_scratch=True).close()
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_a_head_goes_on_with_its_own_classes_alone(tmp_path: Path) -> None:
    """init_from: the same names go on; another order, another class, and a part at other places are refused."""
    origin = tiny_config(tmp_path, tmp_path / "runs", name="origin")
    save_run(origin, ["a", "b", "c"])
    configs = [
        tiny_config(
            shards(tmp_path / "".join(names), names),
            tmp_path / "runs",
            name="next",
            init_from=str(tmp_path / "runs" / "origin"),
            model__num_classes=3,
            init_new_head=new_head,
        )
        for names, new_head in (
            *((["a", "b", "c"], False), (["c", "a"], False), (["b", "a", "c"], False), (["a", "b", "d"], False)),
            (["c", "b", "a"], True),
        )
    ]
    same, part, turned, other, new = run_ranks(start_from, 1, configs)[0]
    assert (same, new) == ("", "")
    for refused in (part, turned):
        assert "has the classes of the head in another order (class 0 is" in refused and "init_new_head=true" in refused
    assert "class 2 is 'd', which" in other


def test_the_two_sets_of_few_shot_are_read_by_name(tmp_path: Path) -> None:
    """The test set's labels become those of the set that shots are drawn from."""
    few, test = shards(tmp_path / "few", ["a", "b", "c"]), shards(tmp_path / "test", ["c", "b", "a"])
    read, told = read_as(load_manifest(test), load_manifest(few))
    assert read.label_map == (2, 1, 0) and read.class_names == ("a", "b", "c") and told and "mapped by name" in told
