"""Shapes of models by name, and the section `model`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from omegaconf import MISSING

from pretrain.config.checks import did_you_mean, outside, timm_models
from pretrain.errors import ConfigError


class VitShape(NamedTuple):
    """Width of a token, number of blocks, width of the MLP's hidden layer, attention heads."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


class VitForm(NamedTuple):
    """What a block computes, beside its shape: the settings of the same names."""

    parallel_blocks: bool
    qk_norm: bool
    qkv_bias: bool
    rms_norm: bool


PLAIN_FORM = VitForm(parallel_blocks=False, qk_norm=False, qkv_bias=True, rms_norm=False)
# arXiv 2302.05442, section 2: parallel layers, QK normalisation, no biases in QKV projections and norms, no centring.
VIT_FORMS = {"22B": VitForm(parallel_blocks=True, qk_norm=True, qkv_bias=False, rms_norm=True)}

# ViT paper, Table 1; Ti, S, M, So400m, g, G, e from google-research/big_vision models/vit.py (Scaling ViT, T. 2); 22B
# from its paper, Table 1.
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
# (ViT paper, 4.1). The files published as R+Ti/16 have tokens of 32 pixels: a stem of stride 4 and 8x8 patches.
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

# Pixels per side of a patch that a name may give; any other number is a typo.
NAMED_PATCH_SIZES = (4, 8, 14, 16, 28, 32)

# Far above every known ViT: a file with larger numbers is no model, and would take minutes to refuse.
MAX_DEPTH, MAX_WIDTH = 1024, 65_536
MAX_IMAGE_SIZE = 4096  # pixels
MAX_CLASSES = 1 << 20  # ImageNet-21k has 21,841, Landmarks 203,094


OF_TIMM = ("name", "image_size", "num_classes", "dropout", "drop_path")  # settings that a timm: model takes


def stride_of(trunk_units: list[int] | None) -> int:
    """Returns a trunk's stride in pixels: 4 for the stem, doubled by each stage but the first; 1 without a trunk."""
    return 1 if trunk_units is None else 4 * 2 ** max(0, len(trunk_units) - 1)


class NamedModel(NamedTuple):
    """What one of timm's or Google's names stands for."""

    name: str
    patch_size: int
    image_size: int | None


def named_model(name: str) -> NamedModel | None:
    """Returns what `vit_base_patch16_384`, `vit_base_r50_s16_224`, `B/16`, `ViT-B_16` or `R50+ViT-B_16` mean, or None.

    Only the shape: the activation, the pooling and the rest are this config's own settings. With such a name image_size
    may be set too, but not to the default: load_config, which knows what was given, refuses that.
    """
    plain = _without_tag(name)
    if match := re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_(\d+)", plain):
        if match[1] in TIMM_SIZES and int(match[2]) in NAMED_PATCH_SIZES and not int(match[3]) % int(match[2]):
            return NamedModel(TIMM_SIZES[match[1]], int(match[2]), int(match[3]))
    if match := re.fullmatch(r"(vit_[a-z]+_r\d*_s\d+(?:_p8)?)_(\d+)", plain):
        if match[1] in TIMM_HYBRIDS:
            return NamedModel(*TIMM_HYBRIDS[match[1]], int(match[2]))
    if match := re.fullmatch(r"(?:(R\d*)[+_])?(?:ViT-)?([A-Za-z0-9]+)[/_](\d+)", name):
        full = f"{match[1]}+{match[2]}" if match[1] else match[2]
        if (full in VIT_SHAPES or full in HYBRIDS) and int(match[3]) in NAMED_PATCH_SIZES:
            return NamedModel(full, 32 if full == "R+Ti" else int(match[3]), None)
    return None


def _without_tag(name: str) -> str:
    return name.partition(".")[0]  # vit_base_patch16_224.augreg_in21k: the tag names weights


def _meant(name: str) -> str:
    """A hint at what an unknown name may have meant: another patch size, a model of timm, or a similar known name."""
    sizes = [*VIT_SHAPES, *HYBRIDS]
    size, _, patch = name.partition("/")
    if size in sizes and patch.isdecimal():
        return f"; for patches of {patch} pixels write model.name={size} model.patch_size={patch}"
    if near := did_you_mean(name, sizes):
        return f".{near}"
    of_timm = timm_models()
    if (plain := _without_tag(name)) in of_timm:
        return f"; {plain} is timm's: write model.name=timm:{plain}"
    return f".{near}" if (near := did_you_mean(plain, [_as_written(known) for known in of_timm])) else ""


def _as_written(timm_name: str) -> str:
    return timm_name if named_model(timm_name) else f"timm:{timm_name}"


@dataclass
class ModelConfig:
    """What is trained."""

    name: str = MISSING  # Ti S M B L So400m H g G e 22B, a hybrid like R50+B, a name like B/16 or timm's, or timm:NAME
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
    parallel_blocks: bool | None = None  # attention and MLP side by side, behind one norm; null: as the named size
    qk_norm: bool | None = None  # a norm of each head's queries and keys, before their product; null: as the named size
    qkv_bias: bool | None = None  # biases of a block's queries, keys and values; null: as the named size
    rms_norm: bool | None = None  # norms without centring and bias; null: as the named size (true for 22B alone)
    positions_at: Literal["stem", "every_layer", "shared"] = "stem"  # once; a table per block; one table at each block
    class_position: bool = True  # learned positions have a row for the class token: the paper; false: big_vision
    gelu: Literal["tanh", "exact"] = "tanh"  # tanh: Google's code; exact: timm's default
    representation_size: int | None = None  # units of the tanh layer before the head (paper: the width); null: none
    num_classes: int | None = None  # outputs of the head; null: as many as the training manifest has classes
    head_bias: float = 0.0  # initial bias of the head; -10 for ImageNet-21k and -6.9 for ImageNet with the sigmoid loss
    dropout: float = 0.0  # after each dense layer but q, k, v, and after the positions (paper, B.1)
    drop_path: float = 0.0  # stochastic depth: probability of the last block
    drop_path_rule: Literal["linear", "uniform"] = "linear"  # from 0 at the first block to it, or it at all (DeiT III)
    init: Literal["google", "deit"] = "google"  # first values; deit: dense kernels and positions N(0, 0.02), head too
    layer_scale: float | None = None  # first value of a factor per channel of each branch (DeiT III: 1e-4); null: none

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and (named := named_model(self.name)):
            if self.patch_size not in (ModelConfig.patch_size, named.patch_size):
                raise ConfigError(
                    f"model.patch_size is {self.patch_size}, but {self.name} has {named.patch_size}; remove one"
                )
            self.patch_size = named.patch_size
            if named.image_size is not None and self.image_size == ModelConfig.image_size:  # another one wins
                self.image_size = named.image_size
            self.name = named.name

    @property
    def timm_name(self) -> str | None:
        """NAME of `timm:NAME`, None for the ViT of this package."""
        return self.name.removeprefix("timm:") if self.name.startswith("timm:") else None

    @property
    def shape(self) -> VitShape:
        """The named size, where width, depth, mlp_dim and heads do not override it."""
        named = VIT_SHAPES[HYBRIDS[self.name][0] if self.name in HYBRIDS else self.name]
        own = self.width, self.depth, self.mlp_dim, self.heads
        return VitShape(*(named[i] if setting is None else setting for i, setting in enumerate(own)))

    @property
    def form(self) -> VitForm:
        """What a block computes: the named size's form, where the settings do not override it."""
        own = self.parallel_blocks, self.qk_norm, self.qkv_bias, self.rms_norm
        named = VIT_FORMS.get(self.name, PLAIN_FORM)
        return VitForm(*(named[i] if setting is None else setting for i, setting in enumerate(own)))

    def other_form(self) -> str | None:
        """Returns how this differs from the plain ViT's form, as "qk_norm=true qkv_bias=false"; None if not at all."""
        triples = zip(VitForm._fields, self.form, PLAIN_FORM)
        return " ".join(f"{name}={str(value).lower()}" for name, value, plain in triples if value != plain) or None

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
        """Yields a sentence for each thing that is wrong with the section."""
        if self.timm_name is not None:
            for f in fields(self):
                if f.name not in OF_TIMM and getattr(self, f.name) != f.default:
                    yield f"model.{f.name} has no effect on {self.name}; remove it"
        elif self.name not in VIT_SHAPES and self.name not in HYBRIDS:
            names = ", ".join([*VIT_SHAPES, *HYBRIDS])
            expected = f"one of {names}, a name like B/16, timm's, or timm:NAME"
            yield f"model.name is {self.name!r}, expected {expected}{_meant(self.name)}"
        else:
            yield from self._vit_problems()
        if self.num_classes is not None and not 1 <= self.num_classes <= MAX_CLASSES:
            yield f"model.num_classes is {self.num_classes}, expected 1 to {MAX_CLASSES}"
        yield from outside(self, "model", dropout=(0, 0.99), drop_path=(0, 0.99), image_size=(1, MAX_IMAGE_SIZE))
        yield from outside(self, "model", head_bias=(-1e3, 1e3), layer_scale=(1e-9, 10))

    def fp8_problems(self) -> list[str]:
        """Returns what forbids engine.fp8 for the model."""
        if self.timm_name is not None:
            return [f"engine.fp8 works with our own ViTs only, not with {self.name}"]
        width, _, mlp_dim, _ = self.shape
        if width % 16 or mlp_dim % 16:
            return [f"engine.fp8 needs multiples of 16: model.width is {width}, mlp_dim {mlp_dim}"]
        return []

    def _vit_problems(self) -> Iterator[str]:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            yield f"model.image_size ({self.image_size}) is not a multiple of model.patch_size ({self.patch_size})"
        if min(self.shape) < 1:
            yield f"model: width, depth, mlp_dim and heads must be positive, they are {tuple(self.shape)}"
        elif self.shape.depth > MAX_DEPTH or max(self.shape.width, self.shape.mlp_dim) > MAX_WIDTH:
            shape = f"depth {self.shape.depth}, width {self.shape.width} and mlp_dim {self.shape.mlp_dim}"
            yield f"model: {shape} are too large: at most {MAX_DEPTH} blocks, {MAX_WIDTH} channels"
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


def model_name(config: ModelConfig, *, with_size: bool = True) -> str:
    """Returns "ViT-B/16 at 224 px"; a named size whose width or depth was changed goes by its real shape.

    with_size: the pixels of its input too.
    """
    size = f" at {config.image_size} px" if with_size else ""
    if config.timm_name is not None:
        return f"timm's {config.timm_name}{size}"
    named = VIT_SHAPES.get(config.name)
    if config.trunk_units is not None or named is None or config.shape == named:
        return f"ViT-{config.name}/{config.patch_size}{size}"
    width, depth, _, heads = config.shape
    return f"ViT of width {width}, depth {depth}, {heads} heads, patches of {config.patch_size} px{size}"
