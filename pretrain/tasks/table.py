"""The evaluation tasks of the ViT paper as rows of one table: what a set is, where it comes from, how it is scored.

`TASKS[name]` says what preparing, fine-tuning and reporting need to know of a task. A new task is a new row.
docs/tasks.md explains the choices. The table is read before torch is imported, so that a misspelt name or missing data
is reported at once: the readers of images and labels are named here and defined in readers.py.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.checks import did_you_mean
from pretrain.errors import UserError
from pretrain.tasks.public_files import PUBLIC

NATURAL, SPECIALISED, STRUCTURED = "natural", "specialised", "structured"


@dataclass(frozen=True)
class FineTuning:
    """The paper's protocol on a task: SGD with momentum 0.9, cosine to 0, batch 512, no weight decay, clipping at 1.

    Source: ViT, appendix B.1.1 and Table 4; warm-ups from the authors' code (big_vision, configs/transfer.py). VTAB's
    warm-up, crops and flips are those of Scaling ViT, whose steps, rate, batch and pixels are the same:
    google-research/scenic, scenic/projects/baselines/plainvit/configs/vtab_plainvit_config.py, read at 4a38d475.
    """

    steps: int
    warmup_steps: int
    lr_grid: tuple[float, ...]
    dev_fraction: float | None  # of train, held out to choose the learning rate; None: the split `val` is for that
    image_size: int = 384  # Table 2 takes 512 for L/16 and 518 for H/14 on ImageNet, and Polyak averaging
    batch_size: int = 512
    crops: bool = True  # false: training sees the whole image, because a crop may change the label
    flips: bool = True  # false: no mirror images in training


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
    label: str = "stored_label"  # of a TFDS record: a row of readers.LABELS
    image: str | None = None  # what TFDS's image needs before it can be seen: a row of readers.IMAGES
    originals: str | None = None  # reads the authors' files: a row of readers.READERS; None: TFDS records or packs
    is_imagenet: bool = False  # its classes are ImageNet's, called by their WordNet ids in every source
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
        + (" (--download in place of SOURCE gets it)" if (task.data_of or task.name) in PUBLIC else "")
    )


def check_any_there(missing_of: Iterable[str | None], root: Path) -> list[str]:
    """Returns the lines on incomplete sets. Raises UserError when all sets that were asked for are incomplete.

    missing_of: a line for each of them, None where it is complete.
    """
    asked = list(missing_of)
    lines = [line for line in asked if line]
    if lines and len(lines) == len(asked):
        some = f"none of {len(lines)} sets is in {root}; the first: " if len(lines) > 1 else "no data: "
        raise UserError(f"{some}{lines[0]}")
    return lines


def task(name: str) -> Task:
    """Returns a row of the table. Raises UserError when there is none of that name."""
    if name not in TASKS:
        raise UserError(f"{name!r} is not a task.{did_you_mean(name, TASKS)} There are {', '.join(TASKS)}")
    return TASKS[name]


# --- the table -------------------------------------------------------------------------------------------------------

_IMAGENET = FineTuning(20_000, 500, (0.003, 0.01, 0.03, 0.06), dev_fraction=0.01)
_CIFAR = FineTuning(10_000, 500, (0.001, 0.003, 0.01, 0.03), dev_fraction=0.02)
_SMALL = FineTuning(500, 100, (0.001, 0.003, 0.01, 0.03), dev_fraction=0.1)
_VTAB = FineTuning(2_500, 200, (0.01,), dev_fraction=None)

_RESEARCH = "none stated, research use assumed"
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/cifar.html"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


def _imagenet_variant(name: str, count: int, tfds: str, url: str, **more: Any) -> Task:
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
        originals=name,
        is_imagenet=True,
        **more,
    )


def _own(name: str, classes: int, num_samples: dict[str, int], tfds: str, protocol: FineTuning, **more: Any) -> Task:
    """A row of the paper's own six sets."""
    splits = {split: "validation" if split == "val" else split for split in num_samples}
    return Task(name, classes, splits, num_samples, tfds, finetuning=protocol, **more)


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
    tested_on: str = "synthetic records",
    crops: bool = True,
    flips: bool = True,
    **more: Any,
) -> Task:
    """A row of VTAB-1k: 800 training and 200 validation images, the first ones in TFDS's order."""
    return Task(
        name=f"vtab/{name}",
        group=group,
        num_classes=classes,
        tfds=tfds,
        splits={"train": "train[:800]", "val": val, "trainval": f"train[:800]+{val}", "test": test},
        num_samples={"train": 800, "val": 200, "trainval": 1000, "test": num_test},
        url=url,
        licence=licence,
        finetuning=replace(_VTAB, crops=crops, flips=flips),
        tested_on=tested_on,
        **more,
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
        {"train": 1_281_167, "val": 50_000},
        "imagenet2012:*.*.*",
        _IMAGENET,
        url="https://image-net.org/challenges/LSVRC/2012/",
        licence="non-commercial research, registration",
        originals="imagenet",
        is_imagenet=True,
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
    ),
    _imagenet_variant(
        "imagenet_a",
        7_500,
        "imagenet_a:*.*.*",
        "https://github.com/hendrycks/natural-adv-examples",
        scored_wnids="imagenet_a",
    ),
    _imagenet_variant(
        "imagenet_r",
        30_000,
        "imagenet_r:*.*.*",
        "https://github.com/hendrycks/imagenet-r",
        scored_wnids="imagenet_r",
    ),
    _imagenet_variant(
        "imagenet_sketch",
        50_889,
        "imagenet_sketch:*.*.*",
        "https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    _own(
        "cifar10",
        10,
        {"train": 50_000, "test": 10_000},
        "cifar10:*.*.*",
        _CIFAR,
        url=_KRIZHEVSKY,
        licence=_RESEARCH,
        originals="cifar10",
        tested_on="real",
    ),
    _own(
        "cifar100",
        100,
        {"train": 50_000, "test": 10_000},
        "cifar100:*.*.*",
        _CIFAR,
        url=_KRIZHEVSKY,
        licence=_RESEARCH,
        originals="cifar100",
        tested_on="synthetic records",
    ),
    _own(
        "pets",
        37,
        {"train": 3_680, "test": 3_669},
        "oxford_iiit_pet:*.*.*",
        _SMALL,
        url=f"{_OXFORD}/pets/",
        licence="CC BY-SA 4.0",
        originals="pets",
        official_metric="mean_per_class",
        tested_on="synthetic records",
    ),
    _own(
        "flowers",
        102,
        # The authors' code trains on the 1,020 of `train`; the set's 1,020 for validation stay unused.
        {"train": 1_020, "val": 1_020, "test": 6_149},
        "oxford_flowers102:*.*.*",
        _SMALL,
        url=f"{_OXFORD}/flowers/102/",
        licence=_RESEARCH,
        originals="flowers",
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
        originals="vtab/cifar100",
        tested_on="real",
    ),
    _vtab(
        *("dtd", NATURAL, 47, "dtd:3.*.*", _VAL, "test", 1_880, f"{_OXFORD}/dtd/", "research only"),
        originals="vtab/dtd",
    ),
    _vtab(
        *("flowers102", NATURAL, 102, "oxford_flowers102:2.*.*", _VAL, "test", 6_149),
        *(f"{_OXFORD}/flowers/102/", _RESEARCH),
        originals="vtab/flowers102",
        official_metric="mean_per_class",
    ),
    _vtab(
        *("pets", NATURAL, 37, "oxford_iiit_pet:3.*.*", "train[2944:3144]", "test", 3_669),
        *(f"{_OXFORD}/pets/", "CC BY-SA 4.0"),
        originals="vtab/pets",
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
        originals="vtab/eurosat",
        tested_on="real",
    ),
    _vtab(
        *("resisc45", SPECIALISED, 45, "resisc45:3.*.*", "train[18900:19100]", "train[25200:]", 6_300),
        *("https://www.tensorflow.org/datasets/catalog/resisc45", _RESEARCH),
        originals="vtab/resisc45",
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
    _vtab("clevr_count", STRUCTURED, 8, *_CLEVR, *_CLEVR_FROM, label="clevr_count", crops=False),
    _vtab("clevr_distance", STRUCTURED, 6, *_CLEVR, *_CLEVR_FROM, label="clevr_distance", crops=False),
    _vtab(
        *("dmlab", STRUCTURED, 6, "dmlab:2.0.1", _VAL, "test", 22_735),
        *("https://www.tensorflow.org/datasets/catalog/dmlab", "none stated"),
        crops=False,
    ),
    _vtab(
        *("dsprites_location", STRUCTURED, 16, *_DSPRITES, *_DSPRITES_FROM),
        label="dsprites_x_position",
        image="visible_sprite",
        crops=False,
        flips=False,
    ),
    _vtab(
        *("dsprites_orientation", STRUCTURED, 16, *_DSPRITES, *_DSPRITES_FROM),
        label="dsprites_orientation",
        image="visible_sprite",
        flips=False,
    ),
    _vtab(
        *("kitti_distance", STRUCTURED, 4, "kitti:3.1.0", _VAL, "test", 711),
        *("https://www.cvlibs.net/datasets/kitti/", "CC BY-NC-SA 3.0"),
        label="kitti_vehicle_distance",
        crops=False,
    ),
    _vtab("smallnorb_azimuth", STRUCTURED, 18, *_NORB, *_NORB_FROM, label="smallnorb_azimuth", flips=False),
    _vtab("smallnorb_elevation", STRUCTURED, 9, *_NORB, *_NORB_FROM, label="smallnorb_elevation"),
)
TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
VTAB = tuple(row.name for row in _ROWS if row.group)  # in the order of the paper's Table 9


# --- scores ----------------------------------------------------------------------------------------------------------


def vtab_means(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns the flat mean over VTAB tasks as "vtab", and the means of the groups that have one, by their names.

    VTAB's score is the flat mean over all 19 of `VTAB`; the mean of the three group means, which some report, is
    another number. A mean over fewer tasks must be reported as such.
    """
    members = {"vtab": [name for name in VTAB if name in scores]}
    for group in (NATURAL, SPECIALISED, STRUCTURED):
        members[group] = [name for name in members["vtab"] if TASKS[name].group == group]
    return {name: statistics.fmean(scores[member] for member in found) for name, found in members.items() if found}
