"""The evaluation tasks of the ViT paper as rows of one table: what a set is, where it comes from, how it is scored.

`TASKS[name]` says what preparing, fine-tuning and reporting need to know of a task; `PAPER_ROWS` holds the published
results. A new task is a new row. docs/tasks.md explains the choices.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import archives
from pretrain.data.archives import Splits
from pretrain.data.order import words
from pretrain.data.tfrecord import Features
from pretrain.errors import UserError
from pretrain.evaluation import vtab_labels as labels

NATURAL, SPECIALISED, STRUCTURED = "natural", "specialised", "structured"


@dataclass(frozen=True)
class FineTuning:
    """The paper's protocol on a task: SGD with momentum 0.9, cosine to 0, batch 512, no weight decay, clipping at 1.

    Source: ViT, appendix B.1.1 and Table 4; warm-ups from the authors' code (big_vision, configs/transfer.py).
    """

    steps: int
    warmup_steps: int
    lr_grid: tuple[float, ...]
    dev_fraction: float | None  # of train, held out to choose the learning rate; None: the split `val` is for that
    image_size: int = 384  # Table 2 takes 512 for L/16 and 518 for H/14 on ImageNet, and Polyak averaging
    batch_size: int = 512


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    name: str
    num_classes: int  # of the labels and the logits
    splits: Mapping[str, str]  # folder below OUT -> TFDS slice: train and val to learn, the last one to score
    num_samples: Mapping[str, int]  # of the official splits; other counts are not comparable with papers
    tfds: str  # builder[/config]:version
    url: str
    licence: str  # as its authors state it
    finetuning: FineTuning | None  # None: scored with the model that was fine-tuned on ImageNet
    tested_on: str  # "real" images, or "synthetic records" only, since the set was not at hand
    group: str | None = None  # of VTAB
    label: Callable[[Features], int] = labels.stored_label  # of a TFDS record
    image: Callable[[bytes], bytes] | None = None  # what TFDS's image needs before it can be seen
    originals: Callable[[Path], Splits] | None = None  # reads the authors' files; None: TFDS records or packs only
    class_names: tuple[str, ...] = ()  # where they are the same in every source
    metric: str = "top1"  # "real": a prediction is right when it is one of the image's ReaL labels
    official_metric: str = "top1"  # of the set's authors, where it differs from the paper's
    data_of: str | None = None  # the task whose data this one is scored on
    scored_wnids: str | None = None  # imagenet_a, imagenet_r: only the logits of these 200 classes count

    @property
    def test_split(self) -> str:
        """The split that is scored."""
        return list(self.splits)[-1]


def task_folder(task: Task, root: Path) -> Path:
    """Returns where the splits of a task lie below the folder of all tasks: root/vtab/eurosat/test/manifest.json."""
    return root / (task.data_of or task.name)


def prepare_command(task: Task, root: Path) -> str:
    """Returns the command that prepares a task's data."""
    return f"python tools/make_shards.py --task {task.data_of or task.name} SOURCE {task_folder(task, root)}"


def missing(task: Task, root: Path, splits: Sequence[str] = ()) -> str | None:
    """Returns one line that says which splits (default: all) a task lacks and how to get them; None: all are there."""
    folder = task_folder(task, root)
    absent = [split for split in splits or task.splits if not (folder / split / "manifest.json").exists()]
    if not absent:
        return None
    return (
        f"{task.name}: no {', '.join(absent)} in {folder}; get the set from {task.url} ({task.licence}; TFDS "
        f"{task.tfds}), then: {prepare_command(task, root)}"
    )


def task(name: str) -> Task:
    """Returns a row of the table. Raises UserError when there is none of that name."""
    if name not in TASKS:
        raise UserError(f"{name!r} is not a task; there are {', '.join(TASKS)}")
    return TASKS[name]


def scored_classes(task: Task) -> list[int] | None:
    """Returns the classes whose logits count, in order; None: all. Of ImageNet-A and -R, 200 of the 1000 do."""
    if task.scored_wnids is None:
        return None
    return [archives.wnids().index(wnid) for wnid in archives.wnids(task.scored_wnids)]


def real_labels(names: Sequence[str]) -> list[list[int]]:
    """Returns the ReaL labels of ImageNet validation images by name; an empty list means that one is not scored.

    Folders in front of a name do not count: val/n01751748/ILSVRC2012_val_00000001 is ILSVRC2012_val_00000001. The
    lists are those of google-research/reassessed-imagenet, as timm ships them. Raises UserError on another name.
    """
    lists = json.loads(package_files("timm.data").joinpath("_info", "imagenet_real_labels.json").read_text())
    by_name = {f"ILSVRC2012_val_{number:08d}": found for number, found in enumerate(lists, start=1)}
    bare = [name.rpartition("/")[2] for name in names]
    unknown = next((name for name, key in zip(names, bare) if key not in by_name), None)
    if unknown is not None:
        raise UserError(f"{unknown!r} is not an ImageNet validation image (ILSVRC2012_val_00000001): ReaL needs names")
    return [by_name[key] for key in bare]


# --- the table -------------------------------------------------------------------------------------------------------

_IMAGENET = FineTuning(20_000, 500, (0.003, 0.01, 0.03, 0.06), dev_fraction=0.01)
_CIFAR = FineTuning(10_000, 500, (0.001, 0.003, 0.01, 0.03), dev_fraction=0.02)
_SMALL = FineTuning(500, 100, (0.001, 0.003, 0.01, 0.03), dev_fraction=0.1)
# The warm-up of VTAB runs is not published. 500 is the default of the authors' code (vision_transformer).
_VTAB = FineTuning(2_500, 500, (0.01,), dev_fraction=None)

_RESEARCH = "none stated, research use assumed"
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/cifar.html"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


def _variant(folder_names: Sequence[str]) -> Callable[[Path], Splits]:
    """The reader of an ImageNet variant, whose folders are classes: numbers, or WordNet ids in ImageNet's order."""

    def read(source: Path) -> Splits:
        index = {wnid: number for number, wnid in enumerate(archives.wnids())}
        classes = {name: index.get(name, number) for number, name in enumerate(folder_names)}
        return {"test": archives.class_folders(source, classes)}

    return read


def _seeded(read: Callable[[Path], Splits], num_test: int = 0) -> Callable[[Path], Splits]:
    """The reader of a VTAB set's original files: 800 + 200 images by a seed, since TFDS's order is not theirs.

    read: gives `train` and maybe `val`, from which the 200 are then taken. num_test: taken from `train` too, behind the
    1,000, where the authors have no test split; 0: they have one.
    """

    def splits(source: Path) -> Splits:
        found = read(source)
        shuffled = {}
        for split, originals in found.items():
            plan = np.argsort(words(len(originals), "v1", "vtab", 0), kind="stable")
            shuffled[split] = [originals[number] for number in plan]
        train, val = shuffled["train"][:800], shuffled.get("val", shuffled["train"][800:])[:200]
        test = shuffled["train"][1000:][:num_test] if num_test else found["test"]
        return {"train": train, "val": val, "trainval": train + val, "test": test}

    return splits


def _class_folders(num_classes: int, num_test: int) -> Callable[[Path], Splits]:
    """The reader of a VTAB set that its authors give as one folder for each class, without splits."""
    return _seeded(lambda source: {"train": archives.sorted_class_folders(source, num_classes)}, num_test)


def _imagenet_variant(name: str, count: int, tfds: str, url: str, folder_names: Sequence[str], **more: Any) -> Task:
    return Task(
        name=name,
        num_classes=1000,
        splits={"test": "test"},
        num_samples={"test": count},
        tfds=tfds,
        url=url,
        licence="MIT for the list; images as found on the web",
        finetuning=None,
        tested_on="synthetic records",
        originals=_variant(folder_names),
        class_names=archives.wnids(),
        **more,
    )


def _own(name: str, classes: int, train: int, test: int, tfds: str, protocol: FineTuning, **more: Any) -> Task:
    """A row of the paper's own six sets."""
    values: dict[str, Any] = {
        "splits": {"train": "train", "test": "test"},
        "num_samples": {"train": train, "test": test},
    }
    return Task(name=name, num_classes=classes, tfds=tfds, finetuning=protocol, **(values | more))


def _vtab(
    name: str,
    group: str,
    classes: int,
    tfds: str,
    val: str,
    test: str,
    num_test: int,
    url: str,
    licence: str,
    **more: Any,
) -> Task:
    """A row of VTAB-1k: 800 training and 200 validation images, the first ones in TFDS's order."""
    tested: dict[str, Any] = {"tested_on": "synthetic records"}
    return Task(
        name=f"vtab/{name}",
        group=group,
        num_classes=classes,
        tfds=tfds,
        splits={"train": "train[:800]", "val": val, "trainval": f"train[:800]+{val}", "test": test},
        num_samples={"train": 800, "val": 200, "trainval": 1000, "test": num_test},
        url=url,
        licence=licence,
        finetuning=_VTAB,
        **(tested | more),
    )


_VAL = "validation[:200]"
_CLEVR = ("clevr:3.*.*", "train[63000:63200]", "validation", 15_000)
_CLEVR_FROM = ("https://cs.stanford.edu/people/jcjohns/clevr/", "CC BY 4.0")
_DSPRITES = ("dsprites:2.*.*", "train[589824:590024]", "train[663552:]", 73_728)
_DSPRITES_FROM = ("https://github.com/deepmind/dsprites-dataset", "Apache-2.0")
_NORB = ("smallnorb:2.*.*", "test[:200]", "test[50%:]", 12_150)
_NORB_FROM = ("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/", "research only")

_ROWS = (
    _own(
        "imagenet",
        1000,
        1_281_167,
        50_000,
        "imagenet2012:*.*.*",
        _IMAGENET,
        splits={"train": "train", "val": "validation"},
        num_samples={"train": 1_281_167, "val": 50_000},
        url="https://image-net.org/challenges/LSVRC/2012/",
        licence="non-commercial research, registration",
        originals=archives.imagenet,
        class_names=archives.wnids(),
        tested_on="real",
    ),
    Task(
        name="real",
        num_classes=1000,
        splits={"val": "validation"},
        num_samples={"val": 50_000},
        tfds="imagenet2012:*.*.*",
        url="https://image-net.org/challenges/LSVRC/2012/ and https://github.com/google-research/reassessed-imagenet",
        licence="images as imagenet; labels Apache-2.0",
        finetuning=None,
        tested_on="real",
        metric="real",
        data_of="imagenet",
    ),
    _imagenet_variant(
        "imagenet_v2",
        10_000,
        "imagenet_v2/matched-frequency:*.*.*",
        "https://github.com/modestyachts/ImageNetV2 (matched-frequency)",
        [str(number) for number in range(1000)],
    ),
    _imagenet_variant(
        "imagenet_a",
        7_500,
        "imagenet_a:*.*.*",
        "https://github.com/hendrycks/natural-adv-examples",
        archives.wnids("imagenet_a"),
        scored_wnids="imagenet_a",
    ),
    _imagenet_variant(
        "imagenet_r",
        30_000,
        "imagenet_r:*.*.*",
        "https://github.com/hendrycks/imagenet-r",
        archives.wnids("imagenet_r"),
        scored_wnids="imagenet_r",
    ),
    _imagenet_variant(
        "imagenet_sketch",
        50_889,
        "imagenet_sketch:*.*.*",
        "https://github.com/HaohanWang/ImageNet-Sketch",
        archives.wnids(),
    ),
    _own(
        "cifar10",
        10,
        50_000,
        10_000,
        "cifar10:*.*.*",
        _CIFAR,
        url=_KRIZHEVSKY,
        licence=_RESEARCH,
        originals=lambda source: archives.cifar(source, 10),
        tested_on="real",
    ),
    _own(
        "cifar100",
        100,
        50_000,
        10_000,
        "cifar100:*.*.*",
        _CIFAR,
        url=_KRIZHEVSKY,
        licence=_RESEARCH,
        originals=lambda source: archives.cifar(source, 100),
        tested_on="synthetic records",
    ),
    _own(
        "pets",
        37,
        3_680,
        3_669,
        "oxford_iiit_pet:*.*.*",
        _SMALL,
        url=f"{_OXFORD}/pets/",
        licence="CC BY-SA 4.0",
        originals=archives.pets,
        official_metric="mean_per_class",
        tested_on="synthetic records",
    ),
    _own(
        "flowers",
        102,
        1_020,
        6_149,
        "oxford_flowers102:*.*.*",
        _SMALL,
        # The authors' code trains on the 1,020 of `train`; the set's 1,020 for validation stay unused.
        splits={"train": "train", "val": "validation", "test": "test"},
        num_samples={"train": 1_020, "val": 1_020, "test": 6_149},
        url=f"{_OXFORD}/flowers/102/",
        licence=_RESEARCH,
        originals=archives.flowers,
        official_metric="mean_per_class",
        tested_on="synthetic records",
    ),
    _vtab(
        *("caltech101", NATURAL, 102, "caltech101:3.*.*", "train[2754:2954]", "test", 6_084),
        *("https://data.caltech.edu/records/mzrjq-6wc02", "CC BY 4.0"),
        official_metric="mean_per_class",
    ),
    _vtab(
        *("cifar100", NATURAL, 100, "cifar100:3.*.*", "train[45000:45200]", "test", 10_000, _KRIZHEVSKY, _RESEARCH),
        originals=_seeded(lambda source: archives.cifar(source, 100)),
        tested_on="real",
    ),
    _vtab(
        *("dtd", NATURAL, 47, "dtd:3.*.*", _VAL, "test", 1_880, f"{_OXFORD}/dtd/", "research only"),
        originals=_seeded(archives.dtd),
    ),
    _vtab(
        *("flowers102", NATURAL, 102, "oxford_flowers102:2.*.*", _VAL, "test", 6_149),
        *(f"{_OXFORD}/flowers/102/", _RESEARCH),
        originals=_seeded(archives.flowers),
        official_metric="mean_per_class",
    ),
    _vtab(
        *("pets", NATURAL, 37, "oxford_iiit_pet:3.*.*", "train[2944:3144]", "test", 3_669),
        *(f"{_OXFORD}/pets/", "CC BY-SA 4.0"),
        originals=_seeded(archives.pets),
        official_metric="mean_per_class",
    ),
    _vtab(
        *("sun397", NATURAL, 397, "sun397/tfds:4.*.*", _VAL, "test", 21_750),
        *("https://vision.princeton.edu/projects/2010/SUN/", _RESEARCH),
    ),
    _vtab(
        *("svhn", NATURAL, 10, "svhn_cropped:3.*.*", "train[65931:66131]", "test", 26_032),
        *("http://ufldl.stanford.edu/housenumbers/", "non-commercial"),
    ),
    _vtab(
        *("patch_camelyon", SPECIALISED, 2, "patch_camelyon:2.*.*", _VAL, "test", 32_768),
        *("https://github.com/basveeling/pcam", "CC0"),
    ),
    _vtab(
        *("eurosat", SPECIALISED, 10, "eurosat/rgb:2.*.*", "train[16200:16400]", "train[21600:]", 5_400),
        *("https://github.com/phelber/EuroSAT", "MIT"),
        originals=_class_folders(10, num_test=5_400),
        tested_on="real",
    ),
    _vtab(
        *("resisc45", SPECIALISED, 45, "resisc45:3.*.*", "train[18900:19100]", "train[25200:]", 6_300),
        *("https://www.tensorflow.org/datasets/catalog/resisc45", _RESEARCH),
        originals=_class_folders(45, num_test=6_300),
    ),
    _vtab(
        "diabetic_retinopathy",
        SPECIALISED,
        5,
        "diabetic_retinopathy_detection/btgraham-300:3.*.*",
        *(_VAL, "test", 42_670),
        "https://www.kaggle.com/c/diabetic-retinopathy-detection/data",
        "competition rules, manual download",
        official_metric="quadratic_kappa",
    ),
    _vtab("clevr_count", STRUCTURED, 8, *_CLEVR, *_CLEVR_FROM, label=labels.clevr_count),
    _vtab("clevr_distance", STRUCTURED, 6, *_CLEVR, *_CLEVR_FROM, label=labels.clevr_distance),
    _vtab(
        *("dmlab", STRUCTURED, 6, "dmlab:2.0.1", _VAL, "test", 22_735),
        *("https://www.tensorflow.org/datasets/catalog/dmlab", "none stated"),
    ),
    _vtab(
        *("dsprites_location", STRUCTURED, 16, *_DSPRITES, *_DSPRITES_FROM),
        label=labels.dsprites_x_position,
        image=labels.visible_sprite,
    ),
    _vtab(
        *("dsprites_orientation", STRUCTURED, 16, *_DSPRITES, *_DSPRITES_FROM),
        label=labels.dsprites_orientation,
        image=labels.visible_sprite,
    ),
    _vtab(
        *("kitti_distance", STRUCTURED, 4, "kitti:3.1.0", _VAL, "test", 711),
        *("https://www.cvlibs.net/datasets/kitti/", "CC BY-NC-SA 3.0"),
        label=labels.kitti_vehicle_distance,
    ),
    _vtab("smallnorb_azimuth", STRUCTURED, 18, *_NORB, *_NORB_FROM, label=labels.smallnorb_azimuth),
    _vtab("smallnorb_elevation", STRUCTURED, 9, *_NORB, *_NORB_FROM, label=labels.smallnorb_elevation),
)
TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
VTAB = tuple(row.name for row in _ROWS if row.group)  # in the order of the paper's Table 9


# --- scores ----------------------------------------------------------------------------------------------------------


def vtab_means(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns the flat mean over VTAB tasks as "vtab", and the means of the groups that have one, by their names.

    VTAB's score is the flat mean over all 19 of `VTAB`; the mean of the three group means, which some report, is
    another number. Whoever has fewer tasks must say so.
    """
    members = {"vtab": [name for name in VTAB if name in scores]}
    for group in (NATURAL, SPECIALISED, STRUCTURED):
        members[group] = [name for name in members["vtab"] if TASKS[name].group == group]
    return {name: statistics.fmean(scores[member] for member in found) for name, found in members.items() if found}


@dataclass(frozen=True)
class PaperRow:
    """Published results of one model: accuracy in percent by task, "vtab" being the mean over its 19."""

    model: str
    upstream: str  # what it was pretrained on; JFT-300M is private, so its rows cannot be reproduced
    source: str
    image_size: str  # of fine-tuning, in pixels; two: on ImageNet, and on all other tasks
    scores: Mapping[str, float]


_V1 = "arXiv 2010.11929 v1, as quoted elsewhere; not checked against its text"
_TABLE_2 = "arXiv 2010.11929 v2 (ICLR 2021), Table 2: means of 3 runs, Polyak averaging on ImageNet"
_TABLE_5 = "arXiv 2010.11929 v2 (ICLR 2021), Table 5"
_TABLE_9 = "arXiv 2010.11929 v2 (ICLR 2021), Table 9"
_COLUMNS = ("imagenet", "real", "cifar10", "cifar100", "pets", "flowers")


def _row(model: str, upstream: str, source: str, image_size: str, *scores: float, columns: Sequence[str]) -> PaperRow:
    return PaperRow(model, upstream, source, image_size, dict(zip(columns, scores, strict=True)))


PAPER_ROWS = (
    _row(
        *("H/14", "JFT-300M", _V1, "518, 384", 88.36, 90.77, 94.55, 77.16),
        columns=("imagenet", "real", "cifar100", "vtab"),
    ),
    *(
        _row(*row, columns=(*_COLUMNS, "vtab"))
        for row in (
            ("H/14", "JFT-300M", _TABLE_2, "518, 384", 88.55, 90.72, 99.50, 94.55, 97.56, 99.68, 77.63),
            ("L/16", "JFT-300M", _TABLE_2, "512, 384", 87.76, 90.54, 99.42, 93.90, 97.32, 99.74, 76.28),
            ("L/16", "ImageNet-21k", _TABLE_2, "512, 384", 85.30, 88.62, 99.15, 93.25, 94.67, 99.61, 72.72),
        )
    ),
    *(
        _row(*row, columns=_COLUMNS)
        for row in (
            ("B/16", "ImageNet", _TABLE_5, "384", 77.91, 83.57, 98.13, 87.13, 93.81, 89.49),
            ("B/32", "ImageNet", _TABLE_5, "384", 73.38, 79.56, 97.77, 86.31, 92.04, 85.43),
            ("L/16", "ImageNet", _TABLE_5, "384", 76.53, 82.19, 97.86, 86.35, 93.64, 89.66),
            ("L/32", "ImageNet", _TABLE_5, "384", 71.16, 77.83, 97.94, 87.07, 91.35, 86.36),
            ("B/16", "ImageNet-21k", _TABLE_5, "384", 83.97, 88.35, 98.95, 91.67, 94.43, 99.38),
            ("B/32", "ImageNet-21k", _TABLE_5, "384", 81.28, 86.63, 98.79, 91.97, 93.02, 99.11),
            ("L/16", "ImageNet-21k", _TABLE_5, "384", 85.15, 88.40, 99.16, 93.44, 94.73, 99.61),
            ("L/32", "ImageNet-21k", _TABLE_5, "384", 80.99, 85.65, 99.13, 93.04, 93.09, 99.19),
            ("H/14", "ImageNet-21k", _TABLE_5, "384", 85.13, 88.70, 99.27, 93.82, 94.82, 99.51),
        )
    ),
    *(
        _row(model, upstream, _TABLE_9, "384", *natural, *specialised, *structured, columns=VTAB)
        for model, upstream, natural, specialised, structured in (
            (
                *("H/14", "JFT-300M", (95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9), (83.3, 96.7, 91.4, 76.6)),
                (91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
            ),
            (
                *("L/16", "JFT-300M", (95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4), (83.6, 96.5, 89.7, 77.1)),
                (86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
            ),
            (
                *("L/16", "ImageNet-21k", (90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9), (82.5, 95.6, 85.2, 75.3)),
                (70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
            ),
        )
    ),
)
