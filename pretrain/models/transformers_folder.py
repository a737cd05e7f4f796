"""Folders of Hugging Face transformers' ViT: `ViTForImageClassification`, and `ViTModel` for weights without a head."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config import MINUS_ONE_TO_ONE, DataConfig, ModelConfig, Normalisation, choices_of
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.models.equivalent import (
    for_minus_one_to_one,
    named_architecture,
    tensor_shapes,
    with_learned_positions,
)
from pretrain.models.tensors import (
    INTERPOLATIONS,
    OURS,
    Part,
    Weights,
    kept_use,
    read_safetensors,
    readable,
    tensors_from,
    tensors_to,
    use_of,
    write_safetensors,
)
from pretrain.models.vit import NORM_EPS

_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_RESIZED_BY = choices_of(DataConfig, "interpolation")  # what both sides know


def read_transformers_folder(path: Path) -> Weights:
    """Returns the weights of a ViT saved by transformers. Raises UserError when it is another model, or incomplete."""
    with readable(path / "config.json"):
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if values.get("hidden_act") not in _GELU:
            raise UserError(f"{path}/config.json: hidden_act is {values.get('hidden_act')!r}, expected GELU")
        if not values.get("qkv_bias", True):
            raise UserError(f"{path}/config.json: qkv_bias is false: our attention has biases")
        if values.get("layer_norm_eps", 1e-12) != NORM_EPS:
            warn(
                f"{path}: layer_norm_eps {values.get('layer_norm_eps', 1e-12)} becomes {NORM_EPS}, which Google's own "
                "weights were trained with; logits move by some 1e-5"
            )
        classifies = "ViTForImageClassification" in values["architectures"]
        num_classes = len(values.get("id2label", {0: "", 1: ""})) if classifies else 0
    files = [name for name in ("model.safetensors", "model.safetensors.index.json") if (path / name).exists()]
    if not files:
        raise UserError(f"{path}: has no model.safetensors; a .bin is a pickle, which may execute code: save it anew")
    theirs = read_safetensors(path / files[0])
    prefix = "vit." if classifies else ""
    with readable(path / "config.json"):
        pooler = f"{prefix}pooler.dense.weight"
        pooled = not classifies and pooler in theirs  # ViTForImageClassification has no pooler: there it is unknown
        if pooled and len(theirs[pooler].shape) != 2:
            raise UserError(f"{path}: {pooler} has shape {theirs[pooler].shape}, expected 2 axes")
        if pooled and values.get("pooler_act", "tanh") != "tanh":
            raise UserError(f"{path}/config.json: pooler_act is {values['pooler_act']!r}, ours is tanh")
        config = named_architecture(
            *(values[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")),
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            gelu=_GELU[values["hidden_act"]],
            representation_size=theirs[pooler].shape[0] if pooled else None,
        )
        if problems := list(config.problems()):
            raise UserError(f"{path}/config.json: {'; '.join(problems)}")
        labels = {int(number): str(name) for number, name in (values.get("id2label") or {}).items()}
    names = tuple(labels.get(number, str(number)) for number in range(num_classes))
    if names == tuple(f"LABEL_{number}" for number in range(num_classes)):
        names = ()
    tensors = tensors_from(theirs, _keys(config, num_classes), tensor_shapes(config, num_classes), path)
    with readable(path / "preprocessor_config.json"):
        use, mean, std = _preprocessing(path / "preprocessor_config.json", config.image_size)
    with readable(path / "config.json"):  # a run's own transform, which the processor could not say, came along
        use |= use_of(values.get(OURS, {}), path / "config.json")
    own = Normalisation(use.get("mean", MINUS_ONE_TO_ONE.mean), use.get("std", MINUS_ONE_TO_ONE.std))
    weights = replace(Weights(path, config, tensors, num_classes, names, **use), mean=mean, std=std)
    return replace(weights, **own._asdict()) if own.is_near(Normalisation(mean, std)) else for_minus_one_to_one(weights)


class _Preprocessing(NamedTuple):
    """What ViTImageProcessor does: fields of Weights, and the mean and deviation of a pixel in [0, 1]."""

    use: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _preprocessing(path: Path, image_size: int) -> _Preprocessing:
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    numbers = {INTERPOLATIONS[name]: name for name in _RESIZED_BY}
    resample = values.get("resample", INTERPOLATIONS["bilinear"])
    if resample not in numbers:
        expected = ", ".join(f"{number} ({name})" for number, name in numbers.items())
        raise UserError(f"{path}: resample is {resample}, expected one of {expected}")
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True):
        mean, std = values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"{path}: image_mean is {mean} and image_std {std}, expected three numbers, deviations above 0")
    scale = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255
    use = {"eval_transform": "transformers", "interpolation": numbers[resample]}
    return _Preprocessing(
        use | {"eval_crop": _crop(values, path, image_size)},
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
    )


def _crop(values: dict[str, Any], path: Path, image_size: int) -> float:
    """Returns the side of the central crop, of DeiT's processor, as a share of the side that images are squashed to."""

    def side(name: str) -> Any:
        size = values.get(name, image_size)
        square = isinstance(size, dict) and size.get("height") == size.get("width")
        return size["height"] if square and "height" in size else size

    resized, kept = side("size"), side("crop_size") if values.get("do_center_crop") else side("size")
    if kept == image_size and isinstance(resized, int) and resized >= kept and values.get("do_resize", True):
        return kept / resized
    found = ", ".join(
        f"{key} {values[key]}" for key in ("do_resize", "size", "do_center_crop", "crop_size") if key in values
    )
    warn(f"{path}: {found}: not known here; evaluation squashes images to the model's {image_size} pixels")
    return 1.0


def write_transformers_folder(weights: Weights, out: Path) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, with the names that transformers saves.

    Raises UserError, with the reason, when its ViT is another function.
    """
    weights = for_transformers(weights)
    if weights.eval_transform != "transformers":
        warn(
            f"{weights.source}: transformers' processor squashes images to a square, antialiased; these weights were "
            f"evaluated by eval_transform={weights.eval_transform}, to which the tools here keep"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors_to(weights.tensors, _keys(weights.model, weights.num_classes)))
    for name, values in (("config", _values(weights)), ("preprocessor_config", _preprocessor(weights))):
        (out / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def for_transformers(weights: Weights) -> Weights:
    """Returns the same function as transformers can hold it. Raises UserError, with the reason, when it cannot."""
    config, reason = weights.model, None
    if config.timm_name is not None:
        reason = f"its ViT is not {config.name}"
    elif config.pooling != "token":
        reason = "its ViT pools by the class token only"
    elif config.trunk_units is not None:
        reason = "its ViT has no ResNet trunk"
    elif config.representation_size is not None and weights.num_classes:
        reason = "ViTForImageClassification has no representation layer; --without head keeps it, in a ViTModel"
    elif weights.interpolation not in _RESIZED_BY:
        reason = f"its images are resized by {weights.interpolation}, known are {' and '.join(_RESIZED_BY)}"
    if reason:
        raise UserError(f"{weights.source}: cannot be written for transformers: {reason}")
    return with_learned_positions(weights, class_row=True)


def _values(weights: Weights) -> dict[str, Any]:
    config, (width, depth, mlp_dim, heads) = weights.model, weights.model.shape
    names = weights.class_names or tuple(f"LABEL_{number}" for number in range(weights.num_classes))
    return {
        "architectures": ["ViTForImageClassification" if weights.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp_dim,
        "num_attention_heads": heads,
        "hidden_act": "gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",  # the default is the exact one
        "layer_norm_eps": NORM_EPS,  # the default is 1e-12
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "encoder_stride": config.patch_size,
        "qkv_bias": True,
        "pooler_act": "tanh",
        "pooler_output_size": config.representation_size or width,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "dtype": "float32",
        OURS: kept_use(weights),  # transformers keeps keys that it does not know
    }


def _preprocessor(weights: Weights) -> dict[str, Any]:
    size = resized = weights.model.image_size
    if weights.eval_transform == "transformers":
        resized = round(size / weights.eval_crop)
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return {
        "image_processor_type": "ViTImageProcessor" if resized == size else "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": resized, "width": resized},
        **(crop if resized != size else {}),
        "resample": INTERPOLATIONS[weights.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
    }


def _keys(config: ModelConfig, num_classes: int) -> dict[str, list[Part]]:
    """Returns, for each of our tensors, those of transformers, under the names that it saves (not those in memory)."""
    shapes, prefix = tensor_shapes(config, num_classes), "vit." if num_classes else ""
    whole = {
        "cls_token": f"{prefix}embeddings.cls_token",
        "pos_embed": f"{prefix}embeddings.position_embeddings",
        "patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection",
        "norm": f"{prefix}layernorm",
        "pre_logits": f"{prefix}pooler.dense",
        "head": "classifier",
    }
    in_block = {
        "norm1": ["layernorm_before"],
        "attn.qkv": [f"attention.attention.{which}" for which in ("query", "key", "value")],
        "attn.proj": ["attention.output.dense"],
        "norm2": ["layernorm_after"],
        "mlp.fc1": ["intermediate.dense"],
        "mlp.fc2": ["output.dense"],
    }
    keys = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if name.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            theirs = [f"{prefix}encoder.layer.{number}.{part}.{leaf}" for part in in_block[inner]]
        else:
            theirs = [whole[name] if name in whole else f"{whole[module]}.{leaf}"]
        keys[name] = [Part(part, (shape[0] // len(theirs), *shape[1:])) for part in theirs]
    return keys
