"""Google's .npz files, read and written: vision_transformer, as published and as today's code names it, and big_vision.

Recognised by their keys, never by the file's name; the architecture is inferred from the shapes.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pretrain.config import MAX_DEPTH, ModelConfig, stride_of
from pretrain.errors import UserError
from pretrain.json_files import Fields, read_json
from pretrain.log import warn
from pretrain.models.claims import building
from pretrain.models.equivalent import (
    for_minus_one_to_one,
    named_architecture,
    tensor_shapes,
    with_learned_positions,
    without_layer_scale,
)
from pretrain.models.npz_file import read_npz, rows_of, write_npz
from pretrain.models.tensors import (
    MAX_JSON_BYTES,
    LazyTensor,
    Part,
    Weights,
    file_in,
    readable,
    tensors_from,
    tensors_to,
)


class Naming(NamedTuple):
    """Where the kinds of file differ."""

    norm1: str
    attention: str
    norm2: str
    mlp: str
    positions: str
    class_row: bool  # the positions have a row for the class token
    flat_group_norm: bool  # its scale is [C]; published files have [1, 1, 1, C]


_TODAY = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
_BEFORE_LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
_IN_ENCODER = "Transformer/posembed_input/pos_embedding"
NAMINGS = {
    "released": Naming(*_BEFORE_LINEN, _IN_ENCODER, class_row=True, flat_group_norm=False),
    "pre_linen": Naming(*_BEFORE_LINEN, "pos_embedding", class_row=False, flat_group_norm=False),  # old big_vision
    "vit_jax": Naming(*_TODAY, _IN_ENCODER, class_row=True, flat_group_norm=True),
    "big_vision": Naming(*_TODAY, "pos_embedding", class_row=False, flat_group_norm=True),
}
_SCANNED = "Transformer/encoderblock/"
_MAX_STAGES = 10  # of a trunk: each halves the side of its map


def read_google(path: Path, image_size: int | None = None) -> Weights:
    """Returns the weights of an .npz file of vision_transformer or big_vision.

    image_size: for big_vision's files of fixed positions (sincos2d), which do not hold it; 224 if None, with a warning.
    Raises UserError for a file that is no ViT's, or whose tensors are not exactly those of its architecture.
    """
    prefix, arrays = _without_prefix(read_npz(path), path)
    arrays = _without_old_places(_unscanned(arrays, prefix, path))
    naming = NAMINGS[_naming(arrays)]
    config, num_classes = _architecture(arrays, naming, path, image_size)
    if problems := list(config.problems()):
        raise UserError(f"{path}: {'; '.join(problems)}")
    with building(path, len(arrays)):
        keys, shapes = google_keys(config, num_classes, naming), tensor_shapes(config, num_classes)
    tensors = tensors_from(arrays, keys, shapes, path)
    return Weights(
        source=path,
        model=config,
        tensors=tensors,
        num_classes=num_classes,
        class_names=_read_names(class_names_file(path)),
        eval_transform=_transform(naming),
        interpolation="bilinear",
    )


def _transform(naming: Naming) -> str:
    """The evaluation transform of the code that uses such names."""
    return "vit" if naming.class_row else "big_vision"


def write_google(weights: Weights, path: Path, naming: str) -> None:
    """Writes an .npz file, and warns of what it has no place for.

    Raises UserError when Google's code has no such model.
    """
    _warn_of_lost(weights, _transform(NAMINGS[naming]))
    weights = for_google(weights, naming)
    keys = google_keys(weights.model, weights.num_classes, NAMINGS[naming])
    write_npz(path, tensors_to(weights.tensors, keys))
    if weights.class_names:
        class_names_file(path).write_text(json.dumps(list(weights.class_names), indent=1) + "\n", encoding="utf-8")


def _warn_of_lost(weights: Weights, transform: str) -> None:
    lost = []
    if weights.eval_transform != transform:
        lost.append(f"for eval_transform={weights.eval_transform}: who reads it takes {transform}")
    if weights.loss == "sigmoid":
        lost.append("for the loss, sigmoid: who reads it takes softmax")
    if lost:
        warn(f"{weights.source}: an .npz has no place {', nor '.join(lost)}")


def class_names_file(path: Path) -> Path:
    """Returns the file of class names of NAME.npz, which has no place for them: NAME.classes.json."""
    return path.with_name(f"{path.stem}.classes.json")


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    with readable(file_in(path.parent, path.name)):
        return Fields({"names": read_json(path, max_bytes=MAX_JSON_BYTES)}, str(path)).texts("names")


def for_google(weights: Weights, naming: str) -> Weights:
    """Returns the same function in a form that the file can hold. Raises UserError, with the reason, when it cannot."""
    config = weights.model
    reason = None
    if config.timm_name is not None:
        reason = "Google's code has no such model"
    elif config.gelu == "exact":
        reason = "Google's code computes the tanh approximation of GELU, these weights were trained with the exact one"
    elif config.pooling == "map" and naming != "big_vision":
        reason = "vision_transformer has no MAP head; big_vision has"
    elif config.trunk_units is not None and naming == "big_vision":
        reason = "big_vision has no hybrids; vision_transformer has"
    elif setting := config.other_form():
        reason = f"the blocks of Google's public code are the plain ViT's, not those of {setting}"
    if reason:
        raise UserError(f"{weights.source}: cannot be written as {naming} .npz: {reason}")
    weights = without_layer_scale(for_minus_one_to_one(weights))
    if naming == "big_vision" and config.positions == "sincos2d" and config.positions_at == "stem":
        return weights
    return with_learned_positions(weights, class_row=NAMINGS[naming].class_row)


# --- what a file holds -----------------------------------------------------------------------------------------------


def _without_prefix(arrays: dict[str, LazyTensor], path: Path) -> tuple[str, dict[str, LazyTensor]]:
    for prefix in ("opt/target/", "params/img/", "params/", "img/"):
        inside = {name.removeprefix(prefix): t for name, t in arrays.items() if name.startswith(prefix)}
        if "embedding/kernel" in inside:
            beside = [name for name in arrays if not name.startswith((prefix, "opt/"))]
            if beside:  # an optimizer's state is expected beside weights; a text tower deserves a warning
                warn(f"{path}: only {prefix} is read; {len(beside)} tensors beside it are not, as {beside[0]}")
            return prefix, inside
    return "", arrays


def _unscanned(arrays: dict[str, LazyTensor], prefix: str, path: Path) -> dict[str, LazyTensor]:
    """Blocks stacked along a leading axis (big_vision, scan=True) as single ones."""
    result = {}
    for name, tensor in arrays.items():
        if _SCANNED not in name:
            result[name] = tensor
            continue
        if not tensor.shape or not 0 < tensor.shape[0] <= MAX_DEPTH or 0 in tensor.shape:
            raise UserError(
                f"{path}: {prefix + name} has shape {tensor.shape}, expected blocks first, 1 to {MAX_DEPTH}"
            )
        for number, row in enumerate(rows_of(path, prefix + name, tensor)):
            result[name.replace(_SCANNED, f"Transformer/encoderblock_{number}/")] = row
    return result


def _without_old_places(arrays: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Renames parts of big_vision's older files: positions inside the encoder, and the MAP head's parts beside it."""
    old = {"Transformer/pos_embedding": "pos_embedding"}
    if "probe" in arrays:
        inlined = ("probe", "MlpBlock_0/", "MultiHeadDotProductAttention_0/", "LayerNorm_0/")
        old |= {name: f"MAPHead_0/{name}" for name in arrays if name.startswith(inlined)}
    return {old.get(name, name): tensor for name, tensor in arrays.items()}


def _naming(arrays: Mapping[str, LazyTensor]) -> str:
    if any("/MlpBlock_3/" in name for name in arrays):
        return "pre_linen" if "pos_embedding" in arrays else "released"
    is_vit_jax = NAMINGS["vit_jax"].positions in arrays or "conv_root/kernel" in arrays  # big_vision has no hybrids
    return "vit_jax" if is_vit_jax else "big_vision"


def _architecture(
    arrays: Mapping[str, LazyTensor], names: Naming, path: Path, image_size: int | None
) -> tuple[ModelConfig, int]:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in arrays:
            raise UserError(f"{path}: has no tensor {name}; it is not a Vision Transformer of Google's, or incomplete")
        if len(arrays[name].shape) != axes:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}, expected {axes} axes")
        if 0 in arrays[name].shape:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}, which holds no values")
        return arrays[name].shape

    side, _, _, width = shape("embedding/kernel", 4)
    block = "Transformer/encoderblock_0"
    _, heads, _ = shape(f"{block}/{names.attention}/query/kernel", 3)
    _, mlp_dim = shape(f"{block}/{names.mlp}/Dense_0/kernel", 2)
    depth = _count(arrays, "Transformer/encoderblock_", 0, path)
    trunk = _trunk_units(arrays, path)
    stride = stride_of(trunk)
    pooling = "map" if "MAPHead_0/probe" in arrays else "token" if "cls" in arrays else "gap"
    settings = {
        "patch_size": side * stride,
        "pooling": pooling,
        "representation_size": shape("pre_logits/kernel", 2)[1] if "pre_logits/kernel" in arrays else None,
        "trunk": trunk,
        "trunk_width": shape("conv_root/kernel", 4)[3] if trunk is not None else 64,
    }
    if names.positions in arrays or names is not NAMINGS["big_vision"]:
        rows = shape(names.positions, 3)[1]
        # big_vision's older files have a row for the class token too; its reader tells by the number of rows
        class_row = pooling == "token" and (names.class_row or math.isqrt(rows) ** 2 != rows)
        grid = math.isqrt(max(rows - class_row, 0))
        if grid * grid != rows - class_row or not grid:
            raise UserError(f"{path}: {names.positions} has {rows - class_row} patches, which is no square")
        settings |= {"image_size": grid * side * stride, "class_position": class_row or pooling != "token"}
    else:  # fixed positions are not stored; a file that lost its learned ones looks the same
        size = image_size or 224 // side * side
        if image_size is None:
            told = f"has no {names.positions}: taken as sincos2d at {size} pixels"
            warn(f"{path}: {told}; give the image size if it is another")
        settings |= {"positions": "sincos2d", "image_size": size}
    num_classes = shape("head/kernel", 2)[1] if "head/kernel" in arrays else 0
    return named_architecture(width, depth, mlp_dim, heads, **settings), num_classes


def _count(names: Iterable[str], beginning: str, first: int, path: Path) -> int:
    """Returns how many parts BEGINNING0/, BEGINNING1/ ... the names contain, numbered from `first`.

    Raises UserError when one of them is missing: the largest number alone could claim any size.
    """
    pattern = re.compile(re.escape(beginning) + r"(\d+)/")
    told = {match[1] for name in names if (match := pattern.match(name))}
    for number in range(first, first + len(told)):
        if str(number) not in told:
            largest = max(told, key=lambda digits: (len(digits), digits))
            raise UserError(f"{path}: tensors missing: {beginning}{number}, though there is {beginning}{largest}")
    return len(told)


def _trunk_units(arrays: Mapping[str, LazyTensor], path: Path) -> list[int] | None:
    if "conv_root/kernel" not in arrays:
        return None
    stages = _count(arrays, "block", 1, path)
    if stages > _MAX_STAGES:
        raise UserError(f"{path}: its trunk has {stages} stages, expected at most {_MAX_STAGES}")
    return [_count(arrays, f"block{stage}/unit", 1, path) for stage in range(1, 1 + stages)]


# --- the key map -----------------------------------------------------------------------------------------------------


def google_keys(config: ModelConfig, num_classes: int, names: Naming) -> dict[str, list[Part]]:
    """Returns, for each of our tensors, the arrays that hold it (reference: vision_transformer checkpoint.py)."""
    shapes, keys = tensor_shapes(config, num_classes), {}
    for module, places in _places(config, names).items():
        for leaf in ("", ".weight", ".bias"):
            if (name := module + leaf) in shapes:
                shape = (shapes[name][0] // len(places), *shapes[name][1:])
                keys[name] = [_part(place, leaf, shape, config.shape.heads, names) for place in places]
    return keys


def _places(config: ModelConfig, names: Naming) -> dict[str, list[str]]:
    """The places of our modules and lone tensors, if the model has them; several places hold one matrix of ours."""
    places = _trunk_places(config.trunk_units or [])
    places |= {"patch_embed.proj": ["embedding"], "cls_token": ["cls"], "pos_embed": [names.positions]}
    for number in range(config.shape.depth):
        block = f"Transformer/encoderblock_{number}"
        attention = f"{block}/{names.attention}"
        in_block = {
            "norm1": [f"{block}/{names.norm1}"],
            "attn.qkv": [f"{attention}/query", f"{attention}/key", f"{attention}/value"],
            "attn.proj": [f"{attention}/out"],
            "norm2": [f"{block}/{names.norm2}"],
            "mlp.fc1": [f"{block}/{names.mlp}/Dense_0"],
            "mlp.fc2": [f"{block}/{names.mlp}/Dense_1"],
        }
        places |= {f"blocks.{number}.{module}": inside for module, inside in in_block.items()}
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    return places | {
        "norm": ["Transformer/encoder_norm"],
        "attn_pool.latent": ["MAPHead_0/probe"],
        "attn_pool.q": [f"{attention}/query"],
        "attn_pool.kv": [f"{attention}/key", f"{attention}/value"],
        "attn_pool.proj": [f"{attention}/out"],
        "attn_pool.norm": ["MAPHead_0/LayerNorm_0"],
        "attn_pool.mlp.fc1": ["MAPHead_0/MlpBlock_0/Dense_0"],
        "attn_pool.mlp.fc2": ["MAPHead_0/MlpBlock_0/Dense_1"],
        "pre_logits": ["pre_logits"],
        "head": ["head"],
    }


def _trunk_places(units: list[int]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    trunk = "patch_embed.backbone"

    def put(ours: str, theirs: str, number: str) -> None:
        """A convolution and its norm; `number` is 1, 2, 3, _root or _proj."""
        suffix = number if number.isdigit() else ""
        places[f"{ours}.conv{suffix}"] = [f"{theirs}conv{number}"]
        places[f"{ours}.norm{suffix}"] = [f"{theirs}gn{number}"]

    put(f"{trunk}.stem" if units else trunk, "", "_root")
    for stage, num_units in enumerate(units):
        for unit in range(num_units):
            ours, theirs = f"{trunk}.stages.{stage}.blocks.{unit}", f"block{stage + 1}/unit{unit + 1}/"
            put(f"{ours}.downsample", theirs, "_proj")
            for number in "123":
                put(ours, theirs, number)
    return places


def _part(place: str, leaf: str, shape: tuple[int, ...], heads: int, names: Naming) -> Part:
    """The array of our tensor of this shape. Kernels to heads are [D, heads, D / heads], from [heads, D / heads, D]."""
    if not leaf:
        return Part(place, shape)
    if len(shape) == 4:
        return Part(f"{place}/kernel", (shape[2], shape[3], shape[1], shape[0]), "conv")
    module = place.rpartition("/")[2]
    outputs = (heads, shape[0] // heads) if module in ("query", "key", "value") else shape[:1]
    if len(shape) == 2:
        inputs = (heads, shape[1] // heads) if module == "out" else shape[1:]
        return Part(f"{place}/kernel", inputs + outputs, "dense")
    if module.startswith("gn") and not names.flat_group_norm:
        outputs = (1, 1, 1, *outputs)
    return Part(f"{place}/{'scale' if leaf == '.weight' else 'bias'}", outputs)
