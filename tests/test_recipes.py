"""The recipes of configs/ say what the papers say: files, documented overrides and headers against tables written here.

A header documents each further model as one line, `#   model | days | score | overrides`, and AugReg's grid as lines
`#   kind name | overrides`. They are read out of the files as a user would copy them.
"""

import itertools
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import timm

from pretrain.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DEIT3, DEIT3_21K = "deit3_imagenet1k", "deit3_imagenet21k"  # with tests of their own: nothing of them is Google's
# Recipes of this project: no paper to compare with.
OWN = {"demo", "demo_digits", "photos_s16", "timm_convnext_tiny", "tiny_imagenet_ti8"}

# Images to train on: JFT and ImageNet-21k as the authors count them (ViT 4.1; vision_transformer#28), less the held-out
# ones (big_vision configs/vit_i21k.py: full[51200:]; vit_s16_i1k.py: train[:99%]).
JFT, I21K, I1K, I1K_99 = 303_000_000 - 51_200, 12_400_000 - 51_200, 1_281_167, 1_268_355


class Protocol(NamedTuple):
    """What all lines of a file share. Weight decay is torch's, times the learning rate."""

    source: str
    scored: str  # where the scores are from, as the header says
    images: int  # per epoch; 0: counted in steps
    schedule: str
    clip_norm: float  # 0: none
    head_bias: float
    num_classes: int | None  # None: as many as the data has
    eval_transform: str
    end_lr: float = 0.0
    loss: str = "sigmoid"
    global_batch: int = 4096
    moment_dtype: str = "fp32"
    pooling: str = "token"
    positions: str = "learned"


# big_vision's files for ImageNet-1k and -21k keep the first moment in bf16 and clip to 1; ViT Table 3 clips ImageNet-1k
# only. end_lr and the bias of -10: vision_transformer#2; the sigmoid loss: #34.
_BIG_VISION = {"clip_norm": 1.0, "moment_dtype": "bf16", "eval_transform": "big_vision"}
_LINEAR = {"schedule": "linear", "end_lr": 1e-5, "clip_norm": 0.0, "eval_transform": "vit"}
_VIT, _AUGREG = "arXiv 2010.11929", "arXiv 2106.10270"
PROTOCOLS = {
    "paper_jft300m": Protocol(_VIT, "ViT Table 6", JFT, head_bias=-10.0, num_classes=None, **_LINEAR),
    "paper_imagenet21k": Protocol(_VIT, "ViT Table 5", I21K, head_bias=-10.0, num_classes=21843, **_LINEAR),
    "paper_imagenet1k": Protocol(  # loss and bias: big_vision configs/vit_i1k.py
        _VIT, "ViT Table 5", I1K, "cosine", clip_norm=1.0, head_bias=-6.9, num_classes=1000, eval_transform="vit"
    ),
    "bit_jft300m": Protocol(  # timm's networks have no setting for the bias
        _VIT, "ViT Table 6", JFT, head_bias=0.0, num_classes=None, **_LINEAR
    ),
    "augreg_imagenet21k": Protocol(
        _AUGREG, "README of vision_transformer", I21K, "cosine", head_bias=-10.0, num_classes=21843, **_BIG_VISION
    ),
    "augreg_imagenet1k": Protocol(_AUGREG, "timm", I1K_99, "cosine", head_bias=-6.9, num_classes=1000, **_BIG_VISION),
    "plain_s16_imagenet1k": Protocol(
        "arXiv 2205.01580",
        "Tables 1 and 2",
        I1K_99,
        "cosine",
        head_bias=0.0,
        num_classes=1000,
        loss="softmax",
        global_batch=1024,
        pooling="gap",
        positions="sincos2d",
        **_BIG_VISION,
    ),
    "scaling_g14": Protocol(  # big_vision configs/proj/scaling_laws/train_vit_g.py
        "arXiv 2106.04560",
        "in the paper, for G/14",
        0,
        "rsqrt",
        head_bias=-10.0,
        num_classes=None,
        global_batch=16384,
        pooling="map",
        **_BIG_VISION,
    ),
}


class Line(NamedTuple):
    """One model of a file: what its paper says about it alone."""

    model: str
    epochs: int | None  # None: the paper counts steps
    lr: float
    weight_decay: float
    dropout: float
    representation: int | None  # units of the tanh layer: the width (vision_transformer#124)
    score: float | None  # ImageNet top-1 in per cent; None: not published for these settings
    level: str = "none"  # of AugReg's augmentation


VIT_TABLE_3 = {
    "paper_jft300m": [
        Line("B/16", 7, 8e-4, 0.1, 0.0, 768, 84.15),
        Line("B/32", 7, 8e-4, 0.1, 0.0, 768, 80.73),
        Line("L/32", 7, 6e-4, 0.1, 0.0, 1024, 84.37),
        Line("L/16", 7, 4e-4, 0.1, 0.0, 1024, 86.30),
        Line("L/16", 14, 4e-4, 0.1, 0.0, 1024, 87.12),
        Line("H/14", 14, 3e-4, 0.1, 0.0, 1280, 88.08),
        Line("R50+B/32", 7, 8e-4, 0.1, 0.0, 768, 84.90),
        Line("R50+B/16", 7, 8e-4, 0.1, 0.0, 768, 85.58),
        Line("R50+L/32", 7, 2e-4, 0.1, 0.0, 1024, 85.68),
        Line("R50+L/16", 7, 4e-4, 0.1, 0.0, 1024, 86.60),
        Line("R50+L/16", 14, 4e-4, 0.1, 0.0, 1024, 87.12),
    ],
    "bit_jft300m": [
        Line("R50x1", 7, 1e-3, 0.1, 0.0, None, 77.54),
        Line("R101x1", 7, 8e-4, 0.1, 0.0, None, 80.67),
        Line("R152x2", 7, 6e-4, 0.1, 0.0, None, 84.97),
        Line("R152x2", 14, 6e-4, 0.1, 0.0, None, 85.56),
    ],
    "paper_imagenet21k": [
        Line("B/16", 90, 1e-3, 0.03, 0.1, 768, 83.97),
        Line("B/32", 90, 1e-3, 0.03, 0.1, 768, 81.28),
        Line("L/16", 90, 1e-3, 0.03, 0.1, 1024, 85.15),
        Line("L/16", 30, 1e-3, 0.03, 0.1, 1024, None),
        Line("L/32", 90, 1e-3, 0.03, 0.1, 1024, 80.99),
        Line("H/14", 90, 1e-3, 0.03, 0.1, 1280, 85.13),
        Line("R50+B/16", 90, 1e-3, 0.03, 0.1, 768, 85.08),  # B.1: hybrids are trained as their ViT
    ],
    "paper_imagenet1k": [
        Line("B/16", 300, 3e-3, 0.3, 0.1, 768, 77.91),
        Line("B/32", 300, 3e-3, 0.3, 0.1, 768, 73.38),
        Line("L/16", 300, 3e-3, 0.3, 0.1, 1024, 76.53),
        Line("L/32", 300, 3e-3, 0.3, 0.1, 1024, 71.16),
    ],
}
# The cells that the names of the published files tell: README of vision_transformer (i21k), timm (i1k); lines without a
# score: AugReg, Figure 4.
AUGREG = {
    "augreg_imagenet21k": [
        Line("B/16", 300, 1e-3, 0.1, 0.0, None, 85.49, "medium1"),
        Line("B/16", 30, 1e-3, 0.1, 0.0, None, None, "medium1"),
        Line("B/32", 300, 1e-3, 0.1, 0.0, None, 83.59, "light1"),
        Line("L/16", 300, 1e-3, 0.1, 0.0, None, 85.59, "strong1"),
        Line("S/16", 300, 1e-3, 0.03, 0.0, None, 83.73, "light1"),
        Line("S/32", 300, 1e-3, 0.1, 0.0, None, 79.58, "none"),
        Line("Ti/16", 300, 1e-3, 0.03, 0.0, None, 78.22, "none"),
        Line("R+Ti/16", 300, 1e-3, 0.03, 0.0, None, 75.40, "none"),
        Line("R26+S/32", 300, 1e-3, 0.1, 0.0, None, 83.85, "light1"),
        Line("R50+L/32", 300, 1e-3, 0.1, 0.1, None, 85.99, "medium1"),
    ],
    "augreg_imagenet1k": [
        Line("B/16", 300, 1e-3, 0.1, 0.1, None, 79.15, "strong2"),
        Line("B/32", 300, 1e-3, 0.1, 0.1, None, 74.91, "medium2"),
        Line("S/16", 300, 1e-3, 0.1, 0.0, None, 78.84, "medium2"),
        Line("S/32", 300, 1e-3, 0.1, 0.0, None, None, "medium1"),
        Line("Ti/16", 300, 1e-3, 0.1, 0.0, None, None, "light1"),
        Line("L/16", 300, 1e-3, 0.1, 0.1, None, None, "medium2"),
    ],
}
OTHERS = {
    "plain_s16_imagenet1k": [
        Line("S/16", 90, 1e-3, 0.1, 0.0, 384, 76.5, "light2"),
        Line("S/16", 150, 1e-3, 0.1, 0.0, 384, 78.5, "light2"),
        Line("S/16", 300, 1e-3, 0.1, 0.0, 384, 80.0, "light2"),
    ],
    "scaling_g14": [
        Line("g/14", None, 8e-4, 0.03, 0.0, None, None),
        Line("G/14", None, 8e-4, 0.03, 0.0, None, None),
    ],
}
LINES = VIT_TABLE_3 | AUGREG | OTHERS
LEVELS = {  # RandAugment's layers and magnitude, mixup's p: big_vision configs/vit_i21k.py, the same in vit_i1k.py
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}
SHAPES = {  # width, depth, mlp_dim, heads: ViT Table 1; Ti, S: AugReg Table 2; g, G: Scaling Table 2
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
}
TRUNKS = {  # ResNet units: ViT 4.1; R+Ti and R26: vision_transformer vit_jax/configs/models.py
    "R50+B/32": [3, 4, 6, 3],
    "R50+B/16": [3, 4, 9],
    "R50+L/32": [3, 4, 6, 3],
    "R50+L/16": [3, 4, 9],
    "R26+S/32": [2, 2, 2, 2],
    "R+Ti/16": [],
}
TIMM = {"R50x1": "resnetv2_50x1_bit", "R101x1": "resnetv2_101x1_bit", "R152x2": "resnetv2_152x2_bit"}
# Forward GMACs per image of what is not a plain ViT, at 224 px. timm's counts (its inference tables; BiT: torch's flop
# counter); R50+B/32, R50+L/16: exaFLOPs of ViT Table 6 (106, 859) / (6 x 7 epochs x 303M).
GMACS = {
    "R50+B/32": 8.33,
    "R50+B/16": 21.66,
    "R50+L/32": 19.58,
    "R50+L/16": 67.5,
    "R26+S/32": 3.56,
    "R+Ti/16": 0.44,
    "R50x1": 4.12,
    "R101x1": 7.84,
    "R152x2": 45.9,
}


class Documented(NamedTuple):
    """A line of a header."""

    days: float  # of one H100
    score: str
    overrides: list[str]


def header(name: str) -> str:
    """The comment on top of a config."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def documented_lines(name: str) -> dict[str, Documented]:
    """The models of a header: "L/16, 14 epochs" -> its line."""
    rows = re.findall(r"^#   (\S+, \S+ \S+) +\| +([\d.]+) +\| (\S+) +\| (.+)$", header(name), flags=re.MULTILINE)
    found = {
        model: Documented(float(days), score, [] if overrides == "(this file)" else overrides.split())
        for model, days, score, overrides in rows
    }
    assert len(found) == len(rows) == len(re.findall(r"^#   .*\|.*\|.*\|", header(name), flags=re.MULTILINE)) - 1
    return found


def documented_choices(name: str) -> dict[tuple[str, str], list[str]]:
    """The grid of a header: ("augmentation", "light1") -> overrides."""
    rows = re.findall(r"^#   (augmentation|decay|dropout) (\S+) +\| (\S+=.+)$", header(name), flags=re.MULTILINE)
    return {(kind, choice): overrides.split() for kind, choice, overrides in rows}


def label(line: Line) -> str:
    return f"{line.model}, {line.epochs} epochs" if line.epochs else f"{line.model}, 1M steps"


def config_of(name: str, overrides: list[str]) -> Config:
    return _config_of(name, tuple(overrides))


@cache  # each file and line is asked for by several tests; nobody changes what comes back
def _config_of(name: str, overrides: tuple[str, ...]) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def augmentation(config: Config) -> tuple[float, float, float]:
    return config.data.randaugment_layers, config.data.randaugment_magnitude, config.data.mixup


def gmacs(line: Line, classes: int, pooling: str, image_size: int = 224) -> float:
    """Multiply-adds of one image's forward pass, in thousand millions."""
    if line.model in GMACS:
        return GMACS[line.model]
    size, _, patch = line.model.partition("/")
    width, depth, mlp_dim, _ = SHAPES[size]
    patches = (image_size // int(patch)) ** 2
    tokens = patches + (pooling == "token")
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    return (patches * 3 * int(patch) ** 2 * width + depth * block + width * classes) / 1e9


def is_big(line: Line) -> bool:
    """Whether the headers assume an MFU of 30 % for the model, not 15 %."""
    return line.model[0] in "BLHgG"


def days_of_h100(line: Line, config: Config, classes: int, image_size: int = 224) -> float:
    """Training FLOPs over 989 TFLOP/s at the MFU that the headers assume."""
    images = config.total_steps * config.data.global_batch
    flops = 6e9 * gmacs(line, classes, config.model.pooling, image_size) * images
    return flops / (989e12 * (0.30 if is_big(line) else 0.15)) / 86_400


def second_step(name: str) -> Config:
    """The config of docs/recipes.md's command that goes on from a run of this recipe."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    command = re.search(rf"--config configs/{name}.yaml (name=.+?)\n```", text, flags=re.DOTALL)
    assert command is not None
    return config_of(name, command[1].replace("\\\n", " ").split())


CASES = [pytest.param(name, line, id=f"{name}-{label(line)}") for name in LINES for line in LINES[name]]


def test_every_config_loads_and_every_recipe_has_its_table() -> None:
    """No file of configs/ is broken, and none but this project's own escapes the tables of this file."""
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in names:
        load_config(CONFIGS / f"{name}.yaml")
    assert names - OWN - {DEIT3, DEIT3_21K} == set(LINES) == set(PROTOCOLS)


@pytest.mark.parametrize("name", LINES)
def test_documented_models_are_those_of_the_paper(name: str) -> None:
    """A header has a line for each model of the table, the first of them the file itself, and no other."""
    found = documented_lines(name)
    assert list(found) == [label(line) for line in LINES[name]]
    assert [not line.overrides for line in found.values()] == [True] + [False] * (len(found) - 1)


@pytest.mark.parametrize("name, line", CASES)
def test_numbers_of_the_paper(name: str, line: Line) -> None:
    """File and overrides together give the paper's optimizer, schedule, loss, regularization, data and steps."""
    protocol = PROTOCOLS[name]
    config = config_of(name, documented_lines(name)[label(line)].overrides)
    optim, data, model = config.optim, config.data, config.model
    assert (optim.lr, optim.weight_decay, optim.schedule) == (line.lr, line.weight_decay, protocol.schedule)
    assert (optim.end_lr, optim.clip_norm, optim.warmup_steps) == (protocol.end_lr, protocol.clip_norm, 10_000)
    assert (optim.name, optim.betas, optim.eps, optim.moment_dtype) == (
        "adamw", (0.9, 0.999), 1e-8, protocol.moment_dtype,
    )  # fmt: skip
    assert (config.loss, model.head_bias, config.label_smoothing) == (protocol.loss, protocol.head_bias, 0.0)
    assert (model.num_classes, model.pooling, model.positions) == (
        protocol.num_classes, protocol.pooling, protocol.positions,
    )  # fmt: skip
    assert (model.dropout, model.representation_size) == (line.dropout, line.representation)
    assert model.drop_path == (line.dropout if name in AUGREG else 0.0)
    assert augmentation(config)[::2] == LEVELS[line.level][::2]
    assert line.level == "none" or augmentation(config) == LEVELS[line.level]
    assert (data.global_batch, data.eval_transform) == (protocol.global_batch, protocol.eval_transform)
    if line.epochs:
        assert config.total_steps == round(line.epochs * protocol.images / protocol.global_batch)


@pytest.mark.parametrize("name, line", CASES)
def test_model_of_the_paper(name: str, line: Line) -> None:
    """The name gives the paper's shape: width, depth, MLP, heads, patch, ResNet units, at 224 px."""
    model = config_of(name, documented_lines(name)[label(line)].overrides).model
    assert model.image_size == 224
    if line.model in TIMM:
        assert model.timm_name == TIMM[line.model]
        return
    assert model.timm_name is None
    full, _, patch = line.model.partition("/")
    assert model.shape == SHAPES[full.rpartition("+")[2]]
    assert model.trunk_units == TRUNKS.get(line.model)
    assert model.patch_size == (32 if full == "R+Ti" else int(patch))
    assert (model.positions_at, model.gelu) == ("stem", "tanh")


@pytest.mark.parametrize("name", LINES)
def test_images_are_cropped_as_in_googles_code(name: str) -> None:
    """Inception crop of 5 to 100 %, bilinear without antialias, flips; evaluation at 224 of 256."""
    data = config_of(name, []).data
    assert (data.crop, data.crop_area, data.crop_ratio) == ("inception", (0.05, 1.0), (0.75, 1.33))
    assert (data.interpolation, data.antialias, data.flip, data.cutmix) == ("bilinear", False, 0.5, 0.0)
    assert data.eval_crop == 224 / 256


def test_the_public_splits_hold_out_what_big_vision_does() -> None:
    """1 % of ImageNet-1k where train[:99%] is meant, 51,200 images elsewhere; the paper's ImageNet-1k uses all."""
    held_out = {name: config_of(name, []).data.held_out for name in LINES}
    assert {name for name in LINES if held_out[name] == 12_812} == {"augreg_imagenet1k", "plain_s16_imagenet1k"}
    assert (held_out.pop("paper_imagenet1k"), I1K - 12_812) == (0, I1K_99)
    assert set(held_out.values()) == {12_812, 51_200}
    assert config_of("paper_imagenet1k", []).data.val == Path("data/imagenet1k_val")


@pytest.mark.parametrize("name", sorted(set(LINES) - {"scaling_g14"}))
def test_the_steps_tell_their_arithmetic(name: str) -> None:
    """The comment beside total_steps is right: epochs x (images - held out) / batch, for each number of epochs."""
    images, steps = told_steps(name)
    assert images == PROTOCOLS[name].images
    batch = config_of(name, []).data.global_batch
    assert steps == {line.epochs: round(line.epochs * images / batch) for line in LINES[name] if line.epochs}


def test_the_steps_of_own_photos_tell_theirs() -> None:
    """The comment beside total_epochs, for 100,000 photos; any number has as many epochs, less what is held out."""
    config, text = config_of("photos_s16", []), (CONFIGS / "photos_s16.yaml").read_text()
    steps = round(90 * (100_000 - config.data.held_out) / config.data.global_batch)
    assert (config.total_epochs, config.total_steps) == (90, 0) and f"{steps:_} steps" in text
    told = f"90 epochs x (100,000 - {config.data.held_out:,}) photos / {config.data.global_batch}"
    assert told in text and f"total_steps={steps:_})" in text


def told_steps(name: str) -> tuple[int, dict[int, int]]:
    """What the comment beside total_steps says, checked against the file: images of an epoch, epochs -> steps."""
    config = config_of(name, [])
    text = re.search(r"^total_steps: .*$", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    assert text is not None
    said = re.search(r"# (\d+) epochs x \(([\d,]+) - ([\d,]+)\) images / (\d+)", text[0])
    assert said is not None
    epochs, images, held_out, batch = (int(number.replace(",", "")) for number in said.groups())
    assert (held_out, batch) == (config.data.held_out, config.data.global_batch)
    steps = {epochs: config.total_steps}
    steps |= {int(n): int(s) for n, s in re.findall(r"; (\d+) epochs: ([\d_]+)", text[0])}
    return images - held_out, steps


@pytest.mark.parametrize("name", ["paper_imagenet21k", "augreg_imagenet21k"])
def test_the_shards_have_the_classes_of_the_head(name: str) -> None:
    """The command of the header names a list that timm has, a WordNet id for each output, sorted."""
    path = re.search(r" --classes \$\(python -c '(.+)'\)(/\S+)$", header(name), flags=re.MULTILINE)
    assert path is not None and path[1] == "import timm; print(timm.__path__[0])"
    ids = Path(f"{timm.__path__[0]}{path[2]}").read_text().split()
    assert len(ids) == config_of(name, []).model.num_classes and ids == sorted(set(ids))


def test_g14_has_its_schedule_and_its_heads_decay() -> None:
    """Scaling: 1M steps, rsqrt with a timescale of 10k, a cooldown of 50k, decay 0.03 and 3.0 on the head."""
    config = config_of("scaling_g14", [])
    assert (config.total_steps, config.optim.timescale_steps, config.optim.shift_steps) == (1_000_000, 10_000, 0)
    assert config.optim.cooldown_steps == 50_000
    assert config.optim.weight_decay * config.optim.head_decay_multiplier == pytest.approx(3.0)
    multipliers = {name: config_of(name, []).optim.head_decay_multiplier for name in LINES if name != "scaling_g14"}
    assert set(multipliers.values()) == {1.0}


@pytest.mark.parametrize("name", AUGREG)
def test_augregs_grid(name: str) -> None:
    """7 levels x 2 decays x 2 dropouts are documented, and each cell sets all of it, after any model's line."""
    choices = documented_choices(name)
    kinds = [{c: o for (kind, c), o in choices.items() if kind == k} for k in ("augmentation", "decay", "dropout")]
    assert [list(kind) for kind in kinds] == [list(LEVELS), ["0.03", "0.1"], ["0", "0.1"]]
    cells = list(itertools.product(*kinds))
    assert len(cells) == 28
    lines = itertools.cycle(documented_lines(name).values())
    for (level, decay, dropout), line in zip(cells, lines):
        cell = config_of(name, line.overrides + kinds[0][level] + kinds[1][decay] + kinds[2][dropout])
        assert augmentation(cell) == LEVELS[level]
        assert cell.optim.weight_decay == float(decay)
        assert cell.model.dropout == cell.model.drop_path == float(dropout)


@pytest.mark.parametrize("name, line", CASES)
def test_days_and_scores_of_the_header(name: str, line: Line) -> None:
    """Days are training FLOPs over 989 TFLOP/s at the MFU that the header assumes, to 2 %; scores are the papers'."""
    protocol = PROTOCOLS[name]
    said = documented_lines(name)[label(line)]
    assert f"{30 if is_big(line) else 15} %" in header(name)
    days = days_of_h100(line, config_of(name, said.overrides), protocol.num_classes or 1000)
    assert said.days == pytest.approx(days, rel=0.02)
    assert said.score == "none" if line.score is None else float(said.score) == line.score


@pytest.mark.parametrize(
    ("model", "image_size", "lr", "drop_path", "score"),
    [("S/16", 224, 4e-3, 0.05, 81.4), ("B/16", 192, 3e-3, 0.2, 83.8), ("L/16", 192, 3e-3, 0.45, 84.9)],
)
def test_deit3_is_its_authors_command(model: str, image_size: int, lr: float, drop_path: float, score: float) -> None:
    """The commands and the table of README_revenge.md, what main.py, augment.py, models_v2.py add to them.

    apex's LAMB clips to 1 by itself. Its loss is the mean over classes, so that norms and eps are 1/1000 of ours.
    """
    said = documented_lines(DEIT3)[f"{model}, 800 epochs"]
    config = config_of(DEIT3, said.overrides)
    optim, data, ours = config.optim, config.data, config.model
    assert (optim.name, optim.lr, optim.weight_decay, optim.betas) == ("lamb", lr, 0.05, (0.9, 0.999))
    assert (optim.eps, optim.clip_norm) == (pytest.approx(1000 * 1e-8), 1000 * 1.0)
    assert (optim.schedule, optim.end_lr, optim.average_decay) == ("cosine", 1e-5, 0.0)
    assert (data.repeats, data.global_batch) == (3, 2048 // 3 * 3)
    assert config.total_steps == round(800 * I1K / data.global_batch)
    assert optim.warmup_steps == round(5 * I1K / data.global_batch)
    assert (config.loss, config.label_threshold, config.label_smoothing) == ("sigmoid", 0.0, 0.0)
    assert (data.crop, data.crop_area, data.flip, data.interpolation) == ("random_resized", (0.08, 1), 0.5, "bicubic")
    assert (data.three_augment, data.color_jitter, data.mixup, data.cutmix) == (True, 0.3, 0.8, 1.0)
    assert (data.randaugment_layers, data.random_erasing, data.eval_crop) == (0, 0.0, 1.0)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert ours.shape == SHAPES[model[0]] and (ours.patch_size, ours.image_size) == (16, image_size)
    assert (ours.layer_scale, ours.drop_path, ours.drop_path_rule) == (1e-4, drop_path, "uniform")
    assert (ours.gelu, ours.class_position, ours.pooling, ours.dropout) == ("exact", False, "token", 0.0)
    assert ours.init == "deit"
    line = Line(model, 800, lr, 0.05, 0.0, None, score)
    assert said.days == pytest.approx(days_of_h100(line, config, 1000, image_size), rel=0.02)
    assert float(said.score) == score and told_steps(DEIT3) == (I1K, {800: config.total_steps})


def test_deit3_has_its_authors_second_step() -> None:
    """README_revenge.md's fine-tuning of B at 224 px: 20 epochs of 8 batches of 64, at main.py's least rate of 1e-5."""
    config = second_step(DEIT3)
    optim, data = config.optim, config.data
    assert (
        config.init_from == config.output / config_of(DEIT3, documented_lines(DEIT3)["B/16, 800 epochs"].overrides).name
    )
    assert (config.model.image_size, config.model.shape, config.model.drop_path) == (224, SHAPES["B"], 0.2)
    assert (optim.name, optim.lr, optim.end_lr, optim.weight_decay, optim.clip_norm) == ("adamw", 1e-5, 1e-5, 0.1, 0.0)
    assert (optim.eps, optim.betas, data.global_batch, data.repeats) == (1e-8, (0.9, 0.999), 64 * 8, 1)
    assert (config.total_steps, optim.warmup_steps) == (round(20 * I1K / 512), round(5 * I1K / 512))
    assert (config.loss, config.label_threshold, config.label_smoothing) == ("softmax", None, 0.1)
    assert (data.randaugment_layers, data.randaugment_magnitude, data.mixup, data.cutmix) == (2, 9, 0.8, 1.0)
    assert (data.three_augment, data.color_jitter, data.random_erasing, data.eval_crop) == (False, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("model", "drop_path", "score"), [("S/16", 0.05, 83.1), ("B/16", 0.1, 85.7), ("L/16", 0.3, 87.0)]
)
def test_deit3_on_imagenet21k_is_its_authors_command(model: str, drop_path: float, score: float) -> None:
    """The commands and the table of README_revenge.md; apex's LAMB clips to 1. Model and pixels are ImageNet-1k's."""
    said = documented_lines(DEIT3_21K)[f"{model}, 240 epochs"]
    config, small = config_of(DEIT3_21K, said.overrides), config_of(DEIT3, [])
    optim, data, images = config.optim, config.data, 14_197_122 - 51_200
    assert (optim.name, optim.lr, optim.weight_decay, optim.betas) == ("lamb", 1e-3, 0.02, (0.9, 0.999))
    assert (optim.eps, optim.clip_norm, optim.schedule, optim.end_lr) == (1e-8, 1.0, "cosine", 1e-5)
    assert (data.global_batch, data.repeats, data.held_out) == (2048, 1, 51_200)
    assert (config.total_steps, optim.warmup_steps) == (round(240 * images / 2048), round(5 * images / 2048))
    assert (config.loss, config.label_smoothing, config.label_threshold) == ("softmax", 0.1, None)
    assert (data.crop, data.flip, data.interpolation, data.antialias) == ("simple", 0.5, "bicubic", True)
    assert (data.three_augment, data.color_jitter, data.mixup, data.cutmix) == (True, 0.3, 0.0, 1.0)
    assert (data.randaugment_layers, data.random_erasing, data.eval_crop) == (0, 0.0, 1.0)
    assert data.normalisation == small.data.normalisation
    assert config.model.shape == SHAPES[model[0]] and config.model.drop_path == drop_path
    assert config.model.num_classes == 21_841
    assert replace(config.model, name="S", drop_path=0.05, num_classes=1000) == small.model
    line = Line(model, 240, 1e-3, 0.02, 0.0, None, score)
    assert said.days == pytest.approx(days_of_h100(line, config, 21_841), rel=0.02)
    assert float(said.score) == score and told_steps(DEIT3_21K) == (images, {240: config.total_steps})


def test_deit3_on_imagenet21k_has_its_authors_second_step() -> None:
    """README_revenge.md's fine-tuning of S on ImageNet-1k: 50 epochs of 2048 images, by the same means."""
    config, first = second_step(DEIT3_21K), config_of(DEIT3_21K, [])
    assert config.init_from == first.output / first.name and config.init_new_head
    assert (config.optim.lr, config.optim.warmup_steps) == (3e-4, round(5 * I1K / 2048))
    assert config.total_steps == round(50 * I1K / 2048)
    own = {"lr": first.optim.lr, "warmup_steps": first.optim.warmup_steps}
    assert replace(config.optim, **own) == first.optim
    assert config.model == replace(first.model, num_classes=1000)
    data = config_of(DEIT3, []).data
    assert (config.data.train, config.data.val, config.data.held_out) == (data.train, data.val, 0)
    assert replace(config.data, train=first.data.train, val=None, held_out=51_200) == first.data


@pytest.mark.parametrize("name", [*LINES, DEIT3, DEIT3_21K])
def test_headers_are_complete(name: str) -> None:
    """Each header tells source, data, command with its own path, hardware, time, score with source, deviations."""
    text = header(name)
    for word in ("data:", "command:", "hardware:", "time:", "score:", "deviations:"):
        assert len(re.findall(rf"^# {word} +\S", text, flags=re.MULTILINE)) == 1, word
    assert f"launch/pretrain.py --config configs/{name}.yaml [the overrides of one line below]" in text
    source, scored = ("arXiv 2204.07118", "README_revenge.md") if name in (DEIT3, DEIT3_21K) else PROTOCOLS[name][:2]
    assert source in text and "nothing was run" in text
    score = re.search(r"^# score: (.*?)^# deviations:", text, flags=re.MULTILINE | re.DOTALL)
    assert score is not None and scored in score[1]
    private = {"paper_jft300m", "bit_jft300m", "scaling_g14"}
    assert ("private data: not reproducible" in score[1]) == (name in private)
    assert ("# data:      private" in text) == (name in private)


@pytest.mark.parametrize("name", [*LINES, DEIT3, DEIT3_21K])
def test_a_header_makes_what_its_commands_read(name: str) -> None:
    """Sets of photos for training, validation and the final score; a score after fine-tuning has its command."""
    text, data = header(name), config_of(name, []).data
    wanted = {str(path) for path in (data.train, data.val) if path} | set(re.findall(r"--val (\S+)", text))
    if re.search(r"tools/(evaluate|finetune)\.py \S+ --tasks? imagenet", text):
        wanted.add("data/imagenet")
    made = set(re.findall(r"tools/make_shards\.py (?:--task imagenet )?[\w./]+ (data/\w+)", text))
    is_private = "private data" in text
    assert is_private or wanted == made
    if not is_private and "after fine-tuning at 384 px" in text:
        assert "tools/finetune.py runs/" in text


def test_runs_do_not_share_a_folder() -> None:
    """Every documented line is a run of its own name, which begins with its file's, so that none resumes another."""
    names = []
    for name in LINES:
        for line in documented_lines(name).values():
            names.append(config_of(name, line.overrides).name)
            assert names[-1].startswith(name.partition("_")[0])
    assert len(set(names)) == len(names) == len(CASES)


def test_machines_are_not_part_of_a_recipe() -> None:
    """Documented lines change the machine's settings only where a model needs smaller micro-batches."""
    for name in LINES:
        for line in documented_lines(name).values():
            engine = [text.partition("=")[0] for text in line.overrides if text.startswith("engine.")]
            assert set(engine) <= {"engine.max_micro_batch_size"}
        config = config_of(name, [])
        assert config.engine.precision == "bf16" and config.engine.compile == "auto"
        assert config.init_from is None and config.seed == 0


def test_timm_has_the_networks() -> None:
    """The baselines' names exist in timm, where a misspelt one would be found only when the run starts."""
    assert set(TIMM.values()) <= set(timm.list_models("resnetv2_*_bit"))


def test_the_guide_names_every_recipe() -> None:
    """docs/recipes.md has each file of configs/, and no file that is not there."""
    named = set(re.findall(r"configs/(\w+)\.yaml", (ROOT / "docs" / "recipes.md").read_text()))
    assert named == {path.stem for path in CONFIGS.glob("*.yaml")}
