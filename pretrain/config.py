"""Every setting of a pretraining run, once: its name, type, unit and default.

A YAML file names only what differs from the defaults; `key=value` overrides come last. `load_config` hands on one
plain `Config`; no omegaconf type leaves this file. It imports nothing heavier: tools read configs without torch.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.errors import ConfigError


class VitShape(NamedTuple):
    """Width of a token, number of blocks, width of the MLP's hidden layer, attention heads."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


# ViT paper, Table 1; Ti, S, M, So400m, g, G, e from google-research/big_vision models/vit.py (Scaling ViT, T. 2); 22B:
# the plain shape of that width, not the parallel blocks of its paper.
VIT_SHAPES = {
    "Ti": VitShape(192, 12, 768, 3),
    "S": VitShape(384, 12, 1536, 6),
    "M": VitShape(512, 12, 2048, 8),
    "B": VitShape(768, 12, 3072, 12),
    "L": VitShape(1024, 24, 4096, 16),
    "So400m": VitShape(1152, 27, 4304, 16),
    "H": VitShape(1280, 32, 5120, 16),
    "g": VitShape(1408, 40, 6144, 16),
    "G": VitShape(1664, 48, 8192, 16),
    "e": VitShape(1792, 56, 15360, 16),
    "22B": VitShape(6144, 48, 24576, 48),
}

# Hybrids: the Transformer, and the ResNet units per stage by patch_size. Stage 4 of a /16 gives its units to stage 3
# (ViT paper, B.1.1). The files published as R+Ti/16 have tokens of 32 pixels: a stem of stride 4 and 8x8 patches.
HYBRIDS: dict[str, tuple[str, dict[int, list[int]]]] = {
    "R+Ti": ("Ti", {32: []}),
    "R26+S": ("S", {32: [2, 2, 2, 2], 16: [2, 2, 4]}),
    "R26+B": ("B", {32: [2, 2, 2, 2], 16: [2, 2, 4]}),
    "R50+B": ("B", {32: [3, 4, 6, 3], 16: [3, 4, 9]}),
    "R50+L": ("L", {32: [3, 4, 6, 3], 16: [3, 4, 9]}),
}

TIMM_SIZES = {
    "tiny": "Ti",
    "small": "S",
    "medium": "M",
    "base": "B",
    "large": "L",
    "so400m": "So400m",
    "huge": "H",
    "giant": "g",
    "gigantic": "G",
}
TIMM_HYBRIDS = {
    "vit_tiny_r_s16_p8": ("R+Ti", 32),
    "vit_small_r26_s32": ("R26+S", 32),
    "vit_base_r26_s32": ("R26+B", 32),
    "vit_base_r50_s16": ("R50+B", 16),
    "vit_large_r50_s32": ("R50+L", 32),
}


EVAL_CROP_LIMITS = (0.1, 1)  # of data.eval_crop

# Far above every known ViT: numbers of somebody's file beyond them are no model, and would take minutes to refuse.
MAX_DEPTH, MAX_WIDTH = 1024, 65_536


def stride_of(trunk_units: list[int] | None) -> int:
    """Returns the pixels per side of a position of a trunk's map: 4 for the stem, times 2 per stage but the first."""
    return 1 if trunk_units is None else 4 * 2 ** max(0, len(trunk_units) - 1)


class NamedModel(NamedTuple):
    """What a name of timm's or Google's says."""

    name: str
    patch_size: int
    image_size: int | None


def named_model(name: str) -> NamedModel | None:
    """Returns what `vit_base_patch16_384`, `vit_base_r50_s16_224`, `B/16`, `ViT-B_16` or `R50+ViT-B_16` mean, or None.

    Only the shape: the activation, the pooling and the rest are this config's own settings. Beside such a name another
    image_size may be given.
    """
    plain = name.partition(".")[0]  # vit_base_patch16_224.augreg_in21k: the tag names weights
    if match := re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_(\d+)", plain):
        if match[1] in TIMM_SIZES:
            return NamedModel(TIMM_SIZES[match[1]], int(match[2]), int(match[3]))
    if match := re.fullmatch(r"(vit_[a-z]+_r\d*_s\d+(?:_p8)?)_(\d+)", plain):
        if match[1] in TIMM_HYBRIDS:
            return NamedModel(*TIMM_HYBRIDS[match[1]], int(match[2]))
    if match := re.fullmatch(r"(?:(R\d*)[+_])?(?:ViT-)?([A-Za-z0-9]+)[/_](\d+)", name):
        full = f"{match[1]}+{match[2]}" if match[1] else match[2]
        if full in VIT_SHAPES or full in HYBRIDS:
            return NamedModel(full, 32 if full == "R+Ti" else int(match[3]), None)
    return None


@dataclass
class ModelConfig:
    name: str = MISSING  # Ti S M B L So400m H g G e 22B, a hybrid as R50+B, a name as B/16 or timm's, or timm:NAME
    image_size: int = 224  # height and width of the model's input, pixels
    patch_size: int = 16  # pixels of the input per side of a token; must divide image_size
    width: int | None = None  # channels of a token; null: the named size's
    depth: int | None = None  # number of blocks; null: the named size's
    mlp_dim: int | None = None  # hidden channels of a block's MLP; null: the named size's
    heads: int | None = None  # attention heads; must divide width; null: the named size's
    trunk: list[int] | None = None  # ResNet units per stage before the patches, []: its stem only; null: as named
    trunk_width: int = 64  # channels of the trunk's stem, a multiple of 32
    pooling: Literal["token", "gap", "map"] = "token"  # class token (the paper), mean of all tokens, or attention (MAP)
    positions: Literal["none", "learned", "learned2d", "relative", "sincos2d"] = "learned"  # ViT paper, D.4
    positions_at: Literal["stem", "every_layer", "shared"] = "stem"  # once; a table per block; one table at each block
    class_position: bool = True  # learned positions have a row for the class token: the paper; false: big_vision
    gelu: Literal["tanh", "exact"] = "tanh"  # tanh: Google's code; exact: timm's default
    representation_size: int | None = None  # units of the tanh layer before the head (paper: the width); null: none
    num_classes: int | None = None  # outputs of the head; null: as many as the training manifest has classes
    head_bias: float = 0.0  # initial bias of the head; -10 for ImageNet-21k and -6.9 for ImageNet with the sigmoid loss
    dropout: float = 0.0  # after each dense layer but q, k, v, and after the positions (paper, B.1)
    drop_path: float = 0.0  # stochastic depth: probability of the last block, rising linearly from 0

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and (named := named_model(self.name)):
            for key, said in (("patch_size", named.patch_size), ("image_size", named.image_size)):
                if said is None or getattr(self, key) == said:
                    continue
                if key == "patch_size" and self.patch_size != ModelConfig.patch_size:
                    raise ConfigError(f"model.patch_size is {self.patch_size}, but {self.name} has {said}; remove one")
                if getattr(self, key) == getattr(ModelConfig, key):  # another image_size wins
                    setattr(self, key, said)
            self.name = named.name

    @property
    def timm_name(self) -> str | None:
        """NAME of `timm:NAME`, None for the ViT of this package."""
        return self.name.removeprefix("timm:") if self.name.startswith("timm:") else None

    @property
    def shape(self) -> VitShape:
        """The named size, with what width, depth, mlp_dim and heads override."""
        named = VIT_SHAPES[HYBRIDS[self.name][0] if self.name in HYBRIDS else self.name]
        return VitShape(*(named[i] if own is None else own for i, own in enumerate(self._own_shape())))

    def _own_shape(self) -> tuple[int | None, ...]:
        return self.width, self.depth, self.mlp_dim, self.heads

    @property
    def trunk_units(self) -> list[int] | None:
        """Units of each ResNet stage of a hybrid, [] for its stem alone, None for a plain ViT."""
        if self.trunk is not None or self.name not in HYBRIDS:
            return self.trunk
        return HYBRIDS[self.name][1].get(self.patch_size)

    @property
    def trunk_stride(self) -> int:
        """Pixels per side of one position of the map that is cut into patches; 1 without a trunk."""
        return stride_of(self.trunk_units)

    def problems(self) -> Iterator[str]:
        if self.timm_name is not None:
            own = ("name", "image_size", "num_classes", "dropout", "drop_path")
            for f in fields(self):
                if f.name not in own and getattr(self, f.name) != f.default:
                    yield f"model.{f.name} has no effect on {self.name}; remove it"
        elif self.name not in VIT_SHAPES and self.name not in HYBRIDS:
            hint = _hint(self.name, [*VIT_SHAPES, *HYBRIDS])
            names = ", ".join([*VIT_SHAPES, *HYBRIDS])
            yield f"model.name is {self.name!r}, expected one of {names}, a name as B/16 or timm's, or timm:NAME.{hint}"
        else:
            yield from self._vit_problems()
        if self.num_classes is not None and self.num_classes < 1:
            yield f"model.num_classes is {self.num_classes}, expected at least 1"
        yield from _outside(self, "model", dropout=(0, 0.99), drop_path=(0, 0.99), image_size=(1, 4096))
        yield from _outside(self, "model", head_bias=(-1e3, 1e3))

    def _vit_problems(self) -> Iterator[str]:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            yield f"model.image_size ({self.image_size}) is not a multiple of model.patch_size ({self.patch_size})"
        if min(self.shape) < 1:
            yield f"model: width, depth, mlp_dim and heads must be positive, they are {tuple(self.shape)}"
        elif self.shape.depth > MAX_DEPTH or max(self.shape.width, self.shape.mlp_dim) > MAX_WIDTH:
            shape = f"depth {self.shape.depth}, width {self.shape.width} and mlp_dim {self.shape.mlp_dim}"
            yield f"model: {shape} are too much: at most {MAX_DEPTH} blocks, {MAX_WIDTH} channels"
        elif self.shape.width % self.shape.heads:
            yield f"model.width ({self.shape.width}) is not a multiple of model.heads ({self.shape.heads})"
        if self.positions == "sincos2d" and (self.shape.width % 4 or self.shape.width < 8):
            yield f"model.width ({self.shape.width}) is not a multiple of 4 from 8 on, which positions=sincos2d needs"
        if self.positions == "learned2d" and self.shape.width % 2:
            yield f"model.width ({self.shape.width}) is odd, which positions=learned2d cannot halve"
        if self.positions_at != "stem" and self.positions not in ("learned", "learned2d"):
            yield f"model.positions_at={self.positions_at} is for learned and learned2d, not for {self.positions}"
        if self.representation_size is not None and self.representation_size < 1:
            yield f"model.representation_size is {self.representation_size}, expected at least 1, or null for none"
        if self.name in HYBRIDS and self.trunk is None and self.patch_size not in HYBRIDS[self.name][1]:
            sizes = " or ".join(str(size) for size in HYBRIDS[self.name][1])
            known_as = " (published as R+Ti/16, its tokens cover 32 pixels)" if self.name == "R+Ti" else ""
            yield f"model.patch_size is {self.patch_size}, {self.name} has {sizes}{known_as}"
        elif self.trunk_units is not None and self.patch_size % self.trunk_stride:
            yield f"model.patch_size ({self.patch_size}) is not a multiple of the trunk's stride, {self.trunk_stride}"
        if self.trunk is not None and any(units < 1 for units in self.trunk):
            yield f"model.trunk is {self.trunk}, expected at least one unit per stage"
        if self.trunk is not None and sum(self.trunk) > MAX_DEPTH:
            yield f"model.trunk has {sum(self.trunk)} units, expected at most {MAX_DEPTH}"
        if self.trunk_width < 32 or self.trunk_width % 32:
            yield f"model.trunk_width is {self.trunk_width}, expected a multiple of 32: GroupNorm has 32 groups"
        if self.trunk_units is None and self.trunk_width != ModelConfig.trunk_width:
            yield f"model.trunk_width ({self.trunk_width}) has no effect: {self.name} has no trunk; set model.trunk"


@dataclass
class DataConfig:
    train: Path = MISSING  # manifest.json of the training shards, or the folder that holds it
    val: Path | None = None  # manifest of validation shards; null: the held-out samples, if any
    held_out: int = 0  # samples of `train` kept for validation, the same ones for every seed; needs val=null
    global_batch: int = MISSING  # samples per step over all ranks; part of the recipe, never of the machine
    crop: Literal["random_resized", "inception"] = "random_resized"  # torchvision's, or TensorFlow's (the paper)
    crop_area: tuple[float, float] = (0.08, 1.0)  # of a crop: share of the image's area; Google's code: 0.05 to 1
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # of a crop: width / height
    flip: float = 0.5  # probability of a horizontal flip; 0 for characters and other things that are not symmetric
    randaugment_layers: int = 0  # operations of RandAugment per image; 0: none
    randaugment_magnitude: float = 10.0  # of RandAugment's operations, in TensorFlow's scale of 0 to 10 and beyond
    mixup: float = 0.0  # p of mixup's Beta(p, p), one draw per step; 0: none
    cutmix: float = 0.0  # p of CutMix's Beta(p, p), one draw per step; with mixup too, a coin chooses; 0: none
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # of crops, and of eval_transform=timm and =transformers
    antialias: bool = True  # when crops are made smaller; false: as Google's code
    eval_transform: Literal["timm", "vit", "big_vision", "fewshot", "transformers"] = "timm"  # see docs/data.md
    eval_crop: float = 0.875  # evaluation: side of the central crop / side of the resized image; vit has no crop
    max_bad_fraction: float = 0.001  # stop when more of the samples seen cannot be used (from 10,000 seen, 100 bad)
    workers: int = 4  # loader processes per rank; 0 reads in the training process
    prefetch: int = 2  # steps that each loader process prepares ahead

    def problems(self) -> Iterator[str]:
        if self.val is not None and self.held_out:
            yield f"data.held_out ({self.held_out}) and data.val ({self.val}) are both set; choose one"
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < float("inf"):
                yield f"data.{name} is ({low}, {high}), expected 0 < low <= high"
        if self.eval_transform == "vit" and self.eval_crop != DataConfig.eval_crop:
            yield f"data.eval_crop ({self.eval_crop}) has no effect: eval_transform=vit does not crop"
        if self.crop_area[1] > 1:
            yield f"data.crop_area is ({self.crop_area[0]}, {self.crop_area[1]}); an image has no more than 1.0"
        yield from _outside(
            self, "data", global_batch=(1, 1 << 24), held_out=(0, 1 << 40), flip=(0, 1), eval_crop=EVAL_CROP_LIMITS
        )
        yield from _outside(self, "data", max_bad_fraction=(0, 1), workers=(0, 256), prefetch=(1, 256))
        yield from _outside(self, "data", randaugment_layers=(0, 16), randaugment_magnitude=(0, 30))
        yield from _outside(self, "data", mixup=(0, 1e3), cutmix=(0, 1e3))


@dataclass
class OptimConfig:
    name: Literal["adamw", "sgd", "lion"] = "adamw"  # elementwise optimizers only: ZeRO flattens tensors
    lr: float = MISSING  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam's two moments; Lion: of its update and of its momentum
    eps: float = 1e-8  # adamw: added to the root of the second moment
    momentum: float = 0.9  # sgd: m = momentum * m + gradient
    moment_dtype: Literal["fp32", "bf16"] = "fp32"  # of the first moment; bf16: rounded as in big_vision
    weight_decay: float = 0.0  # torch's convention (times lr), on kernels only; big_vision's wd / lr (docs/training.md)
    head_decay_multiplier: float = 1.0  # of the head's kernel: Scaling ViT decays it 100 times as much
    clip_norm: float = 1.0  # global gradient norm is clipped to this; 0: no clipping
    schedule: Literal["cosine", "linear", "rsqrt", "constant", "stair"] = "cosine"  # decay after the warm-up
    warmup_steps: int = 0  # the rate rises linearly from 0 in this many steps
    cooldown_steps: int = 0  # the rate falls linearly to 0 in the last steps, whatever the schedule; constant: WSD
    end_lr: float = 0.0  # linear: the rate at the last step (vision_transformer uses 1e-5)
    power: float = 1.0  # linear: of the remaining share, (1 - progress) ^ power
    timescale_steps: int = 10_000  # rsqrt: lr / sqrt(1 + (max(step, warmup) + shift - warmup) / timescale)
    shift_steps: int = 0  # rsqrt: see there; above 0 the peak is below lr
    stair_steps: list[int] = field(default_factory=list)  # stair: from each of these steps on ...
    stair_multipliers: list[float] = field(default_factory=list)  # ... the rate is lr times this
    average_decay: float = 0.0  # Polyak average = decay * average + (1 - decay) * weights each step; 0: none

    def problems(self) -> Iterator[str]:
        yield from _outside(self, "optim", lr=(0, 1e3), eps=(0, 1), weight_decay=(0, 1e3), clip_norm=(0, 1e9))
        yield from _outside(self, "optim", warmup_steps=(0, 1 << 40), end_lr=(0, 1e3), timescale_steps=(1, 1 << 40))
        yield from _outside(self, "optim", cooldown_steps=(0, 1 << 40), shift_steps=(0, 1 << 40), power=(0.01, 100))
        yield from _outside(self, "optim", head_decay_multiplier=(0, 1e4), average_decay=(0, 0.9999999))
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            yield f"optim.betas is {tuple(self.betas)}, momentum {self.momentum}, expected numbers in 0 <= beta < 1"
        uses = (
            ("schedule", ("linear",), ("end_lr", "power")),
            ("schedule", ("rsqrt",), ("timescale_steps", "shift_steps")),
            ("schedule", ("stair",), ("stair_steps", "stair_multipliers")),
            ("name", ("adamw", "lion"), ("betas",)),
            ("name", ("adamw",), ("eps",)),
            ("name", ("sgd",), ("momentum",)),
        )
        changed = dict(non_defaults(self))
        for key, users, names in uses:
            for name in names:
                if getattr(self, key) not in users and name in changed:
                    told = f"optim.{name} ({changed[name]}) is used by {' and '.join(users)} only"
                    yield f"{told}, not by optim.{key}={getattr(self, key)}"
        if "head_decay_multiplier" in changed and not self.weight_decay:
            yield f"optim.head_decay_multiplier ({self.head_decay_multiplier}) has no effect: optim.weight_decay is 0"
        increasing = all(a < b for a, b in zip(self.stair_steps, self.stair_steps[1:]))
        if len(self.stair_steps) != len(self.stair_multipliers) or not increasing:
            yield (
                f"optim.stair_steps {self.stair_steps} and stair_multipliers {self.stair_multipliers}: expected "
                "rising steps and as many multipliers"
            )
        if any(not 0 <= multiplier < float("inf") for multiplier in self.stair_multipliers):
            yield f"optim.stair_multipliers is {self.stair_multipliers}, expected numbers from 0 on"
        if self.name == "lion" and self.betas == (0.9, 0.999):
            yield "optim.betas is Adam's (0.9, 0.999); Lion's are (0.9, 0.99): set optim.betas"


@dataclass
class EngineConfig:
    zero_stage: int = 1  # 1: shards optimizer state; 2: and gradients; 3: and weights. 0 is refused (wrong in bf16)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and activations; master weights are always fp32
    max_micro_batch_size: int = 256  # images per rank and forward pass, at most: what fits in memory
    compile: bool = False  # torch.compile each block: faster on GPUs, minutes at the start
    checkpoint_activations: bool = False  # recompute each block in the backward pass: less memory, about 30 % slower
    timeout_s: int = 600  # a collective that takes longer fails the run instead of hanging it

    def problems(self) -> Iterator[str]:
        if self.zero_stage == 0:
            yield (
                "engine.zero_stage is 0: DeepSpeed's stage 0 decays weights before the first step in bf16 and lets "
                "one NaN batch poison the weights; use 1, also on a single GPU"
            )
        elif self.zero_stage not in (1, 2, 3):
            yield f"engine.zero_stage is {self.zero_stage}, expected 1, 2 or 3"
        yield from _outside(self, "engine", max_micro_batch_size=(1, 1 << 20), timeout_s=(1, 86_400))


@dataclass
class EvalConfig:
    every_steps: int = 1000  # evaluate on the validation set after this many steps, and at the end; 0: never
    batch_size: int = 256  # images per rank and forward pass
    fewshot_train: Path | None = None  # manifest of labelled images, of any classes, to draw shots from; null: none
    fewshot_test: Path | None = None  # manifest of images of the same classes, to test the regressions on
    fewshot_shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])  # images per class, of each regression
    fewshot_every_steps: int = 0  # after this many steps, and at the end; 0: as often as every_steps
    knn: bool = False  # also score nearest neighbours, on the same features

    @property
    def features_every_steps(self) -> int:
        """After how many steps few-shot accuracy is measured, and at the end; 0: never."""
        return (self.fewshot_every_steps or self.every_steps) if self.fewshot_train else 0

    def problems(self) -> Iterator[str]:
        yield from _outside(self, "evaluation", every_steps=(0, 1 << 40), batch_size=(1, 1 << 20))
        yield from _outside(self, "evaluation", fewshot_every_steps=(0, 1 << 40))
        if (self.fewshot_train is None) != (self.fewshot_test is None):
            there, absent = ("train", "test") if self.fewshot_train else ("test", "train")
            yield f"evaluation.fewshot_{there} is set but fewshot_{absent} is null; few-shot needs both"
        if self.knn and self.fewshot_train is None:
            yield "evaluation.knn needs images: set evaluation.fewshot_train and fewshot_test"
        if self.fewshot_every_steps and self.fewshot_train is None:
            yield f"evaluation.fewshot_every_steps ({self.fewshot_every_steps}) has no effect: fewshot_train is null"
        if self.fewshot_train is not None and not self.features_every_steps:
            yield "evaluation.fewshot_train is set but would never be used: set every_steps or fewshot_every_steps"
        shots = self.fewshot_shots
        if not shots or min(shots) < 1 or sorted(set(shots)) != shots:
            yield f"evaluation.fewshot_shots is {shots}, expected rising numbers from 1 on"


@dataclass
class LogConfig:
    every_steps: int = 50  # steps between two lines of the console, metrics.jsonl and TensorBoard
    samples: bool = False  # append the (epoch, index) of every sample to samples-RANK.jsonl: proof of order, 20 B each

    def problems(self) -> Iterator[str]:
        yield from _outside(self, "log", every_steps=(1, 1 << 40))


@dataclass
class CheckpointConfig:
    every_steps: int = 1000  # save after this many steps, at the end, and when asked to stop
    keep_last: int = 2  # newest checkpoints kept; at least 2, so that one may turn out damaged
    keep_every_steps: int = 0  # checkpoints of these steps are kept for ever; 0: none
    keep_best: bool = False  # also keep the one with the best validation top-1, of those saved at an evaluation

    def problems(self) -> Iterator[str]:
        yield from _outside(self, "checkpoint", every_steps=(1, 1 << 40), keep_last=(2, 1 << 20))
        yield from _outside(self, "checkpoint", keep_every_steps=(0, 1 << 40))


@dataclass
class Config:
    name: str = MISSING  # of the run; its folder is output/name
    output: Path = Path("runs")  # folder of all runs
    seed: int = 0  # of initialisation, order of samples, augmentation and dropout
    total_steps: int = MISSING  # optimizer steps of the whole run; a step is one global batch
    loss: Literal["softmax", "sigmoid"] = "softmax"  # cross-entropy; sigmoid: summed over classes (ImageNet-21k, JFT)
    label_smoothing: float = 0.0  # share of each target that is spread evenly over all classes
    init_from: Path | None = None  # start from these weights: anything that load_model reads, at model.image_size
    init_new_head: bool = False  # with init_from: leave the head at its initial zeros, e.g. for other classes
    branch_from: Path | None = None  # go on from another run's checkpoint, optimizer state and all: to cool it down
    model: ModelConfig = field(default_factory=ModelConfig)  # what is trained
    data: DataConfig = field(default_factory=DataConfig)  # on what
    optim: OptimConfig = field(default_factory=OptimConfig)  # how
    engine: EngineConfig = field(default_factory=EngineConfig)  # with which machinery
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # validation during training
    log: LogConfig = field(default_factory=LogConfig)  # what is written down
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # what is kept

    def __post_init__(self) -> None:
        problems = [problem for part in _parts(self) for problem in part.problems()]
        problems += _outside(self, "", total_steps=(1, 1 << 40), seed=(0, (1 << 63) - 1), label_smoothing=(0, 0.99))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            problems.append(f"name is {self.name!r}; it names a folder: letters, digits, '.', '_' and '-'")
        if self.optim.warmup_steps > self.total_steps:
            problems.append(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is larger than total_steps ({self.total_steps}); "
                "the peak learning rate would never be reached"
            )
        if self.optim.warmup_steps + self.optim.cooldown_steps > self.total_steps:
            problems.append(
                f"optim.warmup_steps ({self.optim.warmup_steps}) and cooldown_steps ({self.optim.cooldown_steps}) "
                f"overlap: total_steps is {self.total_steps}"
            )
        if self.optim.stair_steps and self.optim.stair_steps[-1] >= self.total_steps:
            problems.append(
                f"optim.stair_steps {self.optim.stair_steps} go beyond the last of total_steps ({self.total_steps}); "
                "remove what is never reached"
            )
        if self.init_from is not None and self.branch_from is not None:
            problems.append(
                f"init_from ({self.init_from}) and branch_from ({self.branch_from}) are both set; choose one"
            )
        if self.init_new_head and self.init_from is None:
            problems.append("init_new_head needs init_from, which is null")
        if problems:
            raise ConfigError("; ".join(problems))


# What a resumed run may change without becoming another run: where things lie, how often they are written, and how the
# same global batch is computed on the machine at hand. A longer total_steps is judged by `resume_differences`.
MAY_CHANGE = (
    "output",
    "init_from",
    "branch_from",
    "data.train",
    "data.val",
    "data.max_bad_fraction",
    "data.workers",
    "data.prefetch",
    "engine.zero_stage",
    "engine.max_micro_batch_size",
    "engine.compile",
    "engine.checkpoint_activations",
    "engine.timeout_s",
    "evaluation.every_steps",
    "evaluation.batch_size",
    "evaluation.fewshot_train",
    "evaluation.fewshot_test",
    "evaluation.fewshot_shots",
    "evaluation.fewshot_every_steps",
    "evaluation.knn",
    "log.every_steps",
    "log.samples",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
)

# What a run with branch_from may change besides, against the run that it goes on from: its name, its length, its rates.
BRANCH_MAY_CHANGE = (
    "name",
    "total_steps",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.cooldown_steps",
    "optim.end_lr",
    "optim.power",
    "optim.timescale_steps",
    "optim.shift_steps",
    "optim.stair_steps",
    "optim.stair_multipliers",
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of a YAML file, changed by `key=value` overrides.

    Raises ConfigError, one line that names the file or the override at fault, the key and a suggestion.
    """
    return _to_config(str(path), _read_yaml(Path(path)), overrides)


def config_from_dict(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of nested dicts, as `config_to_dict` writes them or less, changed by `key=value` overrides.

    Raises ConfigError when `values` is not one.
    """
    return _to_config(source, values, overrides)


def model_from_dict(values: Any, source: str) -> ModelConfig:
    """Returns the model's settings from a dict of JSON values, of which `source` names the place.

    Raises ConfigError, naming the key, for a setting or a value that ModelConfig does not have.
    """
    merged = _merge(OmegaConf.structured(Config), {"model": values}, source).model
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{source}: no value for {', '.join(missing)}")
    model = OmegaConf.to_object(merged)
    assert isinstance(model, ModelConfig)
    return model


def choices_of(part: type, name: str) -> tuple[str, ...]:
    """Returns the values that a setting of a section may have."""
    return get_args(get_type_hints(part)[name])


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON values."""
    return _plain(asdict(config))


def config_to_yaml(config: Config) -> str:
    """Returns the complete config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def resume_differences(saved: dict[str, Any], config: Config, also_free: Sequence[str] = ()) -> list[str]:
    """Returns what forbids to resume a run of config `saved` with `config`, one "key: was A, is B" each.

    also_free: keys that may differ besides MAY_CHANGE.
    """
    before, now = dict(_flatten(saved)), dict(_flatten(config_to_dict(config)))
    free = {*MAY_CHANGE, *also_free}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in free]
    endless = config.optim.schedule in ("rsqrt", "constant", "stair") and not config.optim.cooldown_steps
    if endless and config.total_steps >= before.get("total_steps", 0):
        keys = [key for key in keys if key != "total_steps"]  # no rate depends on the end
    return [f"{key}: was {before.get(key)}, is {now.get(key)}" for key in keys]


def _merge(merged: Any, values: Any, source: str) -> Any:
    """Returns `merged` changed by `values`, which may be of any shape. Raises ConfigError."""
    try:
        values = OmegaConf.create(values)
        plain = OmegaConf.to_container(values)
        _refuse_resolvers(source, plain)  # whoever wrote it: file, override, somebody's checkpoint
        if wrong := "; ".join(_wrong_shapes(plain, _schema())):
            raise ConfigError(f"{source}: {wrong}")
        return OmegaConf.merge(merged, values)
    except ConfigError:
        raise
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None


def _wrong_shapes(values: Any, schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields what omegaconf refuses without naming the key or the value, or lets pass: sections and pairs."""
    for key, value in values.items():
        expected = schema.get(key)
        if isinstance(expected, dict):
            if isinstance(value, dict):
                yield from _wrong_shapes(value, expected, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key} is {value}, expected a section with {', '.join(expected)}"
        elif expected == "tuple[float, float]" and not isinstance(value, str):  # a string may refer to another key
            if not isinstance(value, list) or [type(item) in (int, float) for item in value] != [True, True]:
                yield f"{prefix}{key} is {value}, expected two numbers, for example [0.5, 1.0]"


def _to_config(source: str, values: Any, overrides: Sequence[str]) -> Config:
    merged, given = OmegaConf.structured(Config), set()
    for origin, part in [(source, values), *((text, _read_override(text)) for text in overrides)]:
        merged = _merge(merged, part, origin)
        given |= {key for key, _ in _flatten(OmegaConf.to_container(OmegaConf.create(part)))}
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"no value for {', '.join(missing)}; set it in the file or as KEY=VALUE")
        written = merged.model.name
        config = OmegaConf.to_object(merged)
        assert isinstance(config, Config)
        for key in ("image_size", "patch_size"):  # a name's own one replaces the default, and nothing else
            if f"model.{key}" in given and (value := merged.model[key]) != (said := getattr(config.model, key)):
                plain = f"model.name={config.model.name} with image_size and patch_size"
                raise ConfigError(f"model.{key} is {value}, but {written} has {said}; remove one, or give {plain}")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None
    return config


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: cannot be read ({_reason(error)}){_hint(path.name, near)}") from None
    try:
        values = OmegaConf.create(text)
    except AssertionError:  # omegaconf's answer to a file that holds one number
        values = None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return values


def _read_override(text: str) -> Any:
    key, equals, _ = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")) or key.startswith("-"):
        raise ConfigError(f"{text!r} is not an override; write KEY=VALUE, for example optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{text}: not a valid value: {' '.join(str(error).split())}") from None


def _refuse_resolvers(source: str, value: Any) -> None:
    # ${oc.env:NAME} would copy a secret into the saved config; plain ${key} references are fine. Parsed values are
    # searched: YAML has several ways to write a "$".
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_resolvers(source, item)
    elif isinstance(value, str) and "${" in re.sub(r"\$\{[\w.]+\}", "", value):
        raise ConfigError(f"{source}: {value!r}: ${{...:...}} resolvers are not allowed, only ${{key}}; give the value")


def _first_line(error: Exception) -> str:
    """The complete key, what is wrong with it, and a suggestion, from omegaconf's several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = [name for name, _ in _flatten(_schema())] + [
        part for part in _schema() if isinstance(_schema()[part], dict)
    ]
    if "not in" in lines[0] and key:
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f" Did you mean: '{near[0]}'?" if near else _hint(key, known)
        section = key.rpartition(".")[0] or "the config"
        return f"{key}: no such key in {section}.{hint}"
    return f"{key}: {lines[0]}" if key else lines[0]


def _schema() -> dict[str, Any]:
    """Every key of the config as nested dicts, with its type's name at the leaves."""

    def describe(cls: type) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {f.name: describe(hints[f.name]) if is_dataclass(hints[f.name]) else str(f.type) for f in fields(cls)}

    return describe(Config)


def non_defaults(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields key and value of each setting that differs from its default; what has no default always does."""
    for f in fields(part):
        value = getattr(part, f.name)
        if is_dataclass(value):
            yield from non_defaults(value, f"{prefix}{f.name}.")
        elif value != (f.default if f.default_factory is DATACLASS_MISSING else f.default_factory()):
            yield prefix + f.name, value


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parts(config: Config) -> list[Any]:
    return [getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))]


def _outside(part: Any, section: str, **limits: tuple[float, float]) -> Iterator[str]:
    """Yields a sentence for each named number of `part` that lies outside its (lowest, highest)."""
    for name, (low, high) in limits.items():
        value = getattr(part, name)
        if not low <= value <= high:
            yield f"{section}.{name}".lstrip(".") + f" is {value}, expected {low} to {high}"


def _hint(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean: '{near[0]}'?" if near else ""


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
