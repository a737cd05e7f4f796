"""The evaluation tasks of the ViT paper as rows of one table: what a set is, where it comes from, how it is scored.

`TASKS[name]` says what preparing, fine-tuning and reporting need to know of a task. A new task is a new row.
docs/tasks.md explains the choices.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.permutation import words
from pretrain.errors import UserError
from pretrain.shards.archives import Splits
from pretrain.shards.class_folders import class_folders, sorted_class_folders
from pretrain.shards.imagenet import imagenet, wnids
from pretrain.shards.originals import cifar, dtd, flowers, pets
from pretrain.shards.tfrecord import Features
from pretrain.tasks import vtab_labels as labels

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
        index = {wnid: number for number, wnid in enumerate(wnids())}
        classes = {name: index.get(name, number) for number, name in enumerate(folder_names)}
        return {"test": class_folders(source, classes)}

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
    return _seeded(lambda source: {"train": sorted_class_folders(source, num_classes)}, num_test)


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
        class_names=wnids(),
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
        originals=imagenet,
        class_names=wnids(),
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
        wnids("imagenet_a"),
        scored_wnids="imagenet_a",
    ),
    _imagenet_variant(
        "imagenet_r",
        30_000,
        "imagenet_r:*.*.*",
        "https://github.com/hendrycks/imagenet-r",
        wnids("imagenet_r"),
        scored_wnids="imagenet_r",
    ),
    _imagenet_variant(
        "imagenet_sketch",
        50_889,
        "imagenet_sketch:*.*.*",
        "https://github.com/HaohanWang/ImageNet-Sketch",
        wnids(),
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
        originals=lambda source: cifar(source, 10),
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
        originals=lambda source: cifar(source, 100),
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
        originals=pets,
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
        originals=flowers,
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
        originals=_seeded(lambda source: cifar(source, 100)),
        tested_on="real",
    ),
    _vtab(
        *("dtd", NATURAL, 47, "dtd:3.*.*", _VAL, "test", 1_880, f"{_OXFORD}/dtd/", "research only"),
        originals=_seeded(dtd),
    ),
    _vtab(
        *("flowers102", NATURAL, 102, "oxford_flowers102:2.*.*", _VAL, "test", 6_149),
        *(f"{_OXFORD}/flowers/102/", _RESEARCH),
        originals=_seeded(flowers),
        official_metric="mean_per_class",
    ),
    _vtab(
        *("pets", NATURAL, 37, "oxford_iiit_pet:3.*.*", "train[2944:3144]", "test", 3_669),
        *(f"{_OXFORD}/pets/", "CC BY-SA 4.0"),
        originals=_seeded(pets),
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
