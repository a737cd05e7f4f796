"""Folders of Hugging Face transformers' ViT: `ViTForImageClassification`, and `ViTModel` for weights without a head."""

import json
from pathlib import Path
from typing import Any

from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.models.equivalent import (
    for_minus_one_to_one,
    named_architecture,
    tensor_shapes,
    with_learned_positions,
)
from pretrain.models.tensors import (
    Part,
    Weights,
    read_safetensors,
    readable,
    tensors_from,
    tensors_to,
    write_safetensors,
)
from pretrain.models.vit import NORM_EPS

_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


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
        pooled = f"{prefix}pooler.dense.weight" in theirs
        if pooled and values.get("pooler_act", "tanh") != "tanh":
            raise UserError(f"{path}/config.json: pooler_act is {values['pooler_act']!r}, ours is tanh")
        config = named_architecture(
            *(values[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")),
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            gelu=_GELU[values["hidden_act"]],
            representation_size=theirs[f"{prefix}pooler.dense.weight"].shape[0] if pooled else None,
        )
        if problems := list(config.problems()):
            raise UserError(f"{path}/config.json: {'; '.join(problems)}")
        labels = {int(number): str(name) for number, name in (values.get("id2label") or {}).items()}
    names = tuple(labels.get(number, str(number)) for number in range(num_classes))
    if names == tuple(f"LABEL_{number}" for number in range(num_classes)):
        names = ()
    tensors = tensors_from(theirs, _keys(config, num_classes), tensor_shapes(config, num_classes), path)
    mean, std, interpolation = _preprocessing(path)
    weights = Weights(path, config, tensors, num_classes, names, eval_transform="vit", interpolation=interpolation)
    return for_minus_one_to_one(weights, mean, std)


def _preprocessing(path: Path) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    half = (0.5, 0.5, 0.5)
    if not (path / "preprocessor_config.json").exists():
        return half, half, "bilinear"
    with readable(path / "preprocessor_config.json"):
        values = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
        interpolation = "bicubic" if values.get("resample") == _RESAMPLE["bicubic"] else "bilinear"
        return tuple(values.get("image_mean", half)), tuple(values.get("image_std", half)), interpolation


def write_transformers_folder(weights: Weights, out: Path) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, with the names that transformers saves.

    Raises UserError, with the reason, when its ViT is another function.
    """
    weights = for_transformers(weights)
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
    }


def _preprocessor(weights: Weights) -> dict[str, Any]:
    size = weights.model.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _RESAMPLE[weights.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
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
