"""The table of tasks says what its sources say: splits, counts, protocol, published results."""

import json
import re
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.tasks.imagenet_labels import real_labels, scored_classes
from pretrain.tasks.published import PAPER_ROWS
from pretrain.tasks.table import TASKS, VTAB, missing, prepare_command, task, vtab_means

OFFICIAL = {  # names of the definitions file
    "caltech101": "vtab/caltech101",
    "cifar(num_classes=100)": "vtab/cifar100",
    "dtd": "vtab/dtd",
    "oxford_flowers102": "vtab/flowers102",
    "oxford_iiit_pet": "vtab/pets",
    "sun397": "vtab/sun397",
    "svhn": "vtab/svhn",
    "patch_camelyon": "vtab/patch_camelyon",
    "eurosat": "vtab/eurosat",
    "resisc45": "vtab/resisc45",
    'diabetic_retinopathy(config="btgraham-300")': "vtab/diabetic_retinopathy",
    'clevr(task="count_all")': "vtab/clevr_count",
    'clevr(task="closest_object_distance")': "vtab/clevr_distance",
    "dmlab": "vtab/dmlab",
    'kitti(task="closest_vehicle_distance")': "vtab/kitti_distance",
    'dsprites(predicted_attribute="label_x_position",num_classes=16)': "vtab/dsprites_location",
    'dsprites(predicted_attribute="label_orientation",num_classes=16)': "vtab/dsprites_orientation",
    'smallnorb(predicted_attribute="label_azimuth")': "vtab/smallnorb_azimuth",
    'smallnorb(predicted_attribute="label_elevation")': "vtab/smallnorb_elevation",
}
NUM_TRAIN = {  # of the whole TFDS split that validation and test are cut from
    "vtab/caltech101": 3060,
    "vtab/cifar100": 50_000,
    "vtab/pets": 3680,
    "vtab/svhn": 73_257,
    "vtab/eurosat": 27_000,
    "vtab/resisc45": 31_500,
    "vtab/clevr_count": 70_000,
    "vtab/clevr_distance": 70_000,
    "vtab/dsprites_location": 737_280,
    "vtab/dsprites_orientation": 737_280,
}


def test_vtab_is_as_its_authors_define_it(test_data: Path) -> None:
    """Builder, group, number of classes and all four slices of the 19 tasks, percentages worked out by hand."""
    definitions = json.loads((test_data / "vtab1k_official_definitions.json").read_text())["tasks"]
    assert set(definitions) == set(OFFICIAL) and set(OFFICIAL.values()) == set(VTAB)
    for name, official in definitions.items():
        row = TASKS[OFFICIAL[name]]
        assert row.tfds == official["tfds_builder"]
        assert str(row.group).replace("specialised", "specialized") == official["group"]
        assert row.num_classes == official.get("num_classes", row.num_classes)
        slices = {}
        for split in ("train800", "val200", "train800val200", "test"):
            text = re.sub(r"see TRAIN_SPLIT_PERCENT.*: ", "", official[split])
            text, _, rule = text.partition(" with n = ")
            percent = rule.partition("%")[0] or "90"
            begin = int(percent) * NUM_TRAIN.get(row.name, 0) // 100
            slices[split] = text.replace("n+200", str(begin + 200)).replace("[n:", f"[{begin}:")
        assert list(row.splits.values()) == list(slices.values()), name


def test_every_row_is_complete() -> None:
    """Splits and counts name the same, a VTAB task has its 800 + 200, the last split is the one that is scored."""
    for name, row in TASKS.items():
        assert name == row.name and row.tested_on in ("real", "synthetic records")
        assert list(row.splits) == list(row.num_samples) and row.test_split in ("test", "val")
        assert row.url.startswith("http") and row.licence and row.num_classes > 1
        assert (row.finetuning is None) == (list(row.splits) == [row.test_split])
    assert len(VTAB) == 19 and [TASKS[name].group for name in VTAB].count("natural") == 7
    for name in VTAB:
        row = TASKS[name]
        assert list(row.num_samples.values())[:3] == [800, 200, 1000]
        assert row.splits["trainval"] == f"{row.splits['train']}+{row.splits['val']}"
    assert TASKS["real"].metric == "real" and TASKS["real"].data_of == "imagenet"


def test_the_protocol_is_table_4_of_the_paper() -> None:
    """Steps, learning rates, development share, warm-up, resolution and batch."""
    cifar = (10_000, 500, (0.001, 0.003, 0.01, 0.03), 0.02)
    small = (500, 100, (0.001, 0.003, 0.01, 0.03), 0.1)
    expected = {
        "imagenet": (20_000, 500, (0.003, 0.01, 0.03, 0.06), 0.01),
        "cifar10": cifar,
        "cifar100": cifar,
        "pets": small,
        "flowers": small,
        **dict.fromkeys(VTAB, (2500, 200, (0.01,), None)),  # the warm-up is Scaling ViT's
    }
    found = {name: row.finetuning for name, row in TASKS.items() if row.finetuning}
    assert {n: (f.steps, f.warmup_steps, f.lr_grid, f.dev_fraction) for n, f in found.items()} == expected
    assert {(f.image_size, f.batch_size) for f in found.values()} == {(384, 512)}


def test_crops_and_flips_of_vtab_are_scaling_vits() -> None:
    """scenic's vtab_plainvit_config.py: none where they would change the label; all other tasks have both."""
    whole = {"clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location"}
    unmirrored = {"dsprites_location", "dsprites_orientation", "smallnorb_azimuth"}
    found = {name: row.finetuning for name, row in TASKS.items() if row.finetuning}
    assert {name for name, f in found.items() if not f.crops} == {f"vtab/{name}" for name in whole}
    assert {name for name, f in found.items() if not f.flips} == {f"vtab/{name}" for name in unmirrored}


def test_vtab_means_are_the_papers() -> None:
    """The 19 numbers of Table 9 give its means and those of Table 2, but for 0.01 in two of three."""
    of_tasks = [row for row in PAPER_ROWS if set(VTAB) <= set(row.scores)]
    means = [vtab_means(row.scores) for row in of_tasks]
    assert [round(mean["vtab"], 2) for mean in means] == [77.63, 76.29, 72.71]
    groups = [[mean[group] for group in ("natural", "specialised", "structured")] for mean in means]
    for found, expected in zip(groups, [(86.69, 87.0, 65.02), (85.56, 86.72, 62.96), (83.27, 84.65, 57.5)]):
        assert found == pytest.approx(expected, abs=0.006)
    published = [row for row in PAPER_ROWS if "vtab" in row.scores and "Table 2" in row.source]
    assert [row.scores["vtab"] for row in published] == pytest.approx([mean["vtab"] for mean in means], abs=0.0106)
    assert [(row.model, row.upstream) for row in published] == [(row.model, row.upstream) for row in of_tasks]


def test_groups_without_a_task_have_no_mean() -> None:
    """Natural tasks alone: their mean twice, and nothing for the others."""
    assert vtab_means({"vtab/svhn": 0.25, "vtab/pets": 0.75}) == {"vtab": 0.5, "natural": 0.5}


def test_reference_rows_say_which_version_of_the_paper() -> None:
    """The first arXiv version, the published one and the flagship on public data; every row has its source."""
    columns = ("imagenet", "real", "cifar100", "vtab")
    rows = {(row.model, row.upstream, row.source[:19]): row for row in PAPER_ROWS if "vtab" in row.scores}
    found = {key: tuple(row.scores[column] for column in columns) for key, row in rows.items()}
    assert found["H/14", "JFT-300M", "arXiv 2010.11929 v1"] == (88.36, 90.77, 94.55, 77.16)
    assert found["H/14", "JFT-300M", "arXiv 2010.11929 v2"] == (88.55, 90.72, 94.55, 77.63)
    assert found["L/16", "ImageNet-21k", "arXiv 2010.11929 v2"] == (85.30, 88.62, 93.25, 72.72)
    names = {*TASKS, "vtab"}
    assert all(row.source.startswith("arXiv 2010.11929 v") and set(row.scores) <= names for row in PAPER_ROWS)


def test_missing_data_is_told_in_one_line(tmp_path: Path) -> None:
    """Name, folder, source, licence, TFDS builder and the command; nothing once the splits are there."""
    for row in TASKS.values():
        line = str(missing(row, tmp_path))
        assert "\n" not in line
        for part in (
            row.name,
            str(tmp_path),
            row.url,
            row.licence,
            row.tfds,
            prepare_command(row, tmp_path),
            *row.splits,
        ):
            assert part in line
    assert prepare_command(TASKS["real"], Path("data")).endswith("--task imagenet SOURCE data/imagenet")
    (tmp_path / "imagenet/val").mkdir(parents=True)
    (tmp_path / "imagenet/val/manifest.json").touch()
    assert missing(TASKS["real"], tmp_path) is None and missing(TASKS["imagenet"], tmp_path, ["val"]) is None
    assert "no train in" in str(missing(TASKS["imagenet"], tmp_path))


def test_an_unknown_task_is_refused_with_the_names() -> None:
    """A typo shows what there is."""
    assert task("pets") is TASKS["pets"]
    with pytest.raises(UserError, match="'vtab/pet' is not a task. Did you mean: 'vtab/pets'. There are imagenet"):
        task("vtab/pet")


def test_imagenet_a_and_r_are_scored_on_their_200_classes(test_data: Path) -> None:
    """The classes lie in ImageNet's order, and the class list is ImageNet's."""
    from pretrain.shards.imagenet import wnids

    assert list(wnids()) == json.loads((test_data / "imagenet1k_classes.json").read_text())["wnids"]
    for name, first in (("imagenet_a", [6, 11, 13]), ("imagenet_r", [1, 2, 4])):
        classes = scored_classes(TASKS[name])
        assert classes is not None and classes[:3] == first
        assert classes == sorted(set(classes)) and len(classes) == 200
    assert scored_classes(TASKS["imagenet_v2"]) is None


def test_real_labels_are_joined_by_name(test_data: Path) -> None:
    """Each of the 50,000 lists belongs to the image of its number, in whatever order the images come."""
    lists = json.loads((test_data / "real.json").read_text())
    order = [49_999, 0, 17, 25_000]
    names = [f"ILSVRC2012_val_{number + 1:08d}" for number in order]
    assert real_labels(names) == [lists[number] for number in order]
    assert real_labels([f"val/n01751748/{name}" for name in names]) == real_labels(names)  # as folders give them
    everything = real_labels([f"ILSVRC2012_val_{number + 1:08d}" for number in range(50_000)])
    assert everything == lists and sum(not found for found in everything) == 3_163
    with pytest.raises(UserError, match="'n01440764_18' is not an ImageNet validation image"):
        real_labels(["n01440764_18"])
