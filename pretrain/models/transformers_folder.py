"""Folders of Hugging Face transformers' ViT: `ViTForImageClassification`, and `ViTModel` for weights without a head."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.config import (
    MAX_CLASSES,
    MAX_DEPTH,
    MAX_WIDTH,
    MINUS_ONE_TO_ONE,
    DataConfig,
    ModelConfig,
    Normalisation,
    choices_of,
)
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief
from pretrain.log import warn
from pretrain.models.claims import building
from pretrain.models.equivalent import (
    for_minus_one_to_one,
    named_architecture,
    tensor_shapes,
    with_learned_positions,
    without_layer_scale,
)
from pretrain.models.tensors import (
    INTERPOLATIONS,
    OURS,
    LazyTensor,
    Part,
    Weights,
    few,
    is_whole,
    kept_use,
    number_as_text,
    per_channel,
    read_fields,
    square,
    tensors_from,
    tensors_to,
    use_of,
    write_safetensors,
)
from pretrain.models.torch_files import tensors_in
from pretrain.models.vit import NORM_EPS

PROCESSOR = "preprocessor_config.json"  # how its images are seen
_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_LOSSES = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}  # by problem_type
_SQUASH, _SHORTEST = "transformers", "transformers_shortest"  # eval_transform of what its processors do
# Defaults of DeiT's processor, which its file may leave out.
_OF_DEIT = {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": INTERPOLATIONS["bicubic"]}
# Keys that are read, or that change neither the pixels nor the function; of any other there is a warning.
_PROCESSOR_KEYS = set(
    "do_resize size default_to_square resample do_center_crop crop_size do_rescale rescale_factor do_normalize "
    "image_mean image_std image_processor_type feature_extractor_type processor_class do_convert_rgb data_format "
    "input_data_format return_tensors device disable_grouping _valid_processor_keys _processor_class".split()
)
_CONFIG_KEYS = {OURS} | set(
    "architectures model_type hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "image_size patch_size num_channels qkv_bias layer_norm_eps pooler_act pooler_output_size encoder_stride "
    "hidden_dropout_prob attention_probs_dropout_prob initializer_range id2label label2id num_labels problem_type "
    "dtype torch_dtype transformers_version _name_or_path _attn_implementation _attn_implementation_autoset "
    "return_dict finetuning_task output_attentions output_hidden_states torchscript use_bfloat16 use_cache "
    "gradient_checkpointing chunk_size_feed_forward is_encoder_decoder is_decoder tie_word_embeddings "
    "task_specific_params".split()
)
_RESIZED_BY = choices_of(DataConfig, "interpolation")  # what both sides know


def is_of_transformers(values: Fields) -> bool:
    """Returns whether a folder's config.json is of transformers' ViT; timm's and ours are not.

    Raises UserError where it is of another model of transformers.
    """
    kind = values.values.get("model_type")
    if kind in (None, "vit"):
        return kind == "vit"
    if values.values.keys() & {OURS, "architecture"}:  # timm's models, as transformers wraps them
        return False
    raise UserError(
        f"{values.source}: is transformers' {brief(kind)}; of transformers only ViT is read; "
        "timm has such weights as timm:NAME"
    )


def read_transformers_folder(path: Path, file: Path | None = None) -> Weights:
    """Returns the weights of a ViT saved by transformers. Raises UserError when it is another model, or incomplete.

    file: the one with its tensors, if it has not one of the usual names.
    """
    values = read_fields(path, "config.json")
    _check_function(values)
    theirs = tensors_in(path, file)
    prefix = "vit." if any(name.startswith("vit.") for name in theirs) else ""
    num_classes, names = _classes(values, theirs)
    config = _architecture(values, theirs, prefix, path)
    with building(path, len(theirs)):
        keys, shapes = _keys(config, num_classes, prefix), tensor_shapes(config, num_classes)
    tensors = tensors_from(theirs, keys, shapes, path)
    use, processors = _preprocessing(path, config.image_size)
    if OURS in values.values:  # a run's own transform, which the processor cannot express
        use |= use_of(Fields(values.part(OURS).values, f"{values.source}: {OURS}"))
    if problem_type := values.text("problem_type", ""):  # perhaps of training after ours
        if problem_type not in _LOSSES:
            raise UserError(f"{values.source}: problem_type is {brief(problem_type)}: no classes, so no probabilities")
        use["loss"] = _LOSSES[problem_type]
    own = Normalisation(use.get("mean", MINUS_ONE_TO_ONE.mean), use.get("std", MINUS_ONE_TO_ONE.std))
    weights = replace(Weights(path, config, tensors, num_classes, names, **use), **processors._asdict())
    return replace(weights, **own._asdict()) if own.is_near(processors) else for_minus_one_to_one(weights)


def _check_function(values: Fields) -> None:
    """Raises UserError for a setting of a function other than ours; warns of unknown keys."""
    if values.text("hidden_act", "") not in _GELU:
        values.wrong("hidden_act", "GELU")
    if (epsilon := values.number("layer_norm_eps", 0, 1, 1e-12)) != NORM_EPS:
        warn(
            f"{values.source}: layer_norm_eps {epsilon} becomes {NORM_EPS}, which Google's own weights were trained "
            "with; logits move by some 1e-5"
        )
    if unknown := sorted(values.values.keys() - _CONFIG_KEYS):
        warn(f"{values.source}: {few(unknown)}: not known here, and not done")


def _classes(values: Fields, theirs: Mapping[str, LazyTensor]) -> tuple[int, tuple[str, ...]]:
    """Returns the number of classes, 0 without a head, and their names."""
    kinds = values.texts("architectures", ())
    if "ViTForImageClassification" not in kinds and (kinds or "classifier.weight" not in theirs):
        return 0, ()
    labels = values.part("id2label") if values.values.get("id2label") else None
    if labels is None:
        return values.integer("num_labels", 1, MAX_CLASSES, 2), ()
    num_classes = len(labels.values)
    if num_classes > MAX_CLASSES:
        raise UserError(f"{labels.source}: has {num_classes:,} classes, expected at most {MAX_CLASSES:,}")
    labels = Fields({key: number_as_text(name) for key, name in labels.values.items()}, labels.source)
    numbers = map(str, range(num_classes))
    names = tuple(labels.text(number) if number in labels.values else number for number in numbers)
    is_named = names != tuple(f"LABEL_{number}" for number in range(num_classes))
    return num_classes, names if is_named else ()


def _architecture(values: Fields, theirs: Mapping[str, LazyTensor], prefix: str, path: Path) -> ModelConfig:
    pooler = f"{prefix}pooler.dense.weight"
    pooled = not prefix and pooler in theirs  # ViTForImageClassification has no pooler: there it is unknown
    if pooled and len(theirs[pooler].shape) != 2:
        raise UserError(f"{path}: {pooler} has shape {theirs[pooler].shape}, expected 2 axes")
    if pooled and values.text("pooler_act", "tanh") != "tanh":
        raise UserError(f"{values.source}: pooler_act is {brief(values.values['pooler_act'])}, ours is tanh")
    config = named_architecture(
        values.integer("hidden_size", 1, MAX_WIDTH),
        values.integer("num_hidden_layers", 1, MAX_DEPTH),
        values.integer("intermediate_size", 1, MAX_WIDTH),
        values.integer("num_attention_heads", 1, MAX_WIDTH),
        image_size=square(values.values.get("image_size"), "image_size", values.source),
        patch_size=square(values.values.get("patch_size"), "patch_size", values.source),
        gelu=_GELU[values.text("hidden_act")],
        representation_size=theirs[pooler].shape[0] if pooled else None,
        qkv_bias=None if values.flag("qkv_bias", True) else False,  # None: as the named size, which has them
    )
    if problems := list(config.problems()):
        raise UserError(f"{values.source}: {'; '.join(problems)}")
    return config


def _preprocessing(path: Path, image_size: int) -> tuple[dict[str, Any], Normalisation]:
    """Returns what ViTImageProcessor does: fields of Weights, and its normalisation."""
    values = Fields({}, str(path / PROCESSOR))
    if (path / PROCESSOR).exists():
        values = read_fields(path, PROCESSOR)
    else:
        warn(
            f"{path}: has no {PROCESSOR}: taken are the defaults of transformers' ViT (mean and deviation 0.5, "
            "squashed, bilinear), which need not be what it was trained with"
        )
    if unknown := sorted(values.values.keys() - _PROCESSOR_KEYS):
        warn(f"{values.source}: {few(unknown)}: not known here, and not done")
    if "DeiT" in values.text("image_processor_type", values.text("feature_extractor_type", "")):
        values = Fields(_OF_DEIT | values.values, values.source)
    numbers = {INTERPOLATIONS[name]: name for name in _RESIZED_BY}
    resample = values.integer("resample", 0, 5, INTERPOLATIONS["bilinear"])
    if resample not in numbers:
        values.wrong("resample", "one of " + ", ".join(f"{number} ({name})" for number, name in numbers.items()))
    mean, std = (0.0,) * 3, (1.0,) * 3
    if values.flag("do_normalize", True):
        mean, std = per_channel(values, "image_mean", 0.5), per_channel(values, "image_std", 0.5)
    if min(std) <= 0:
        values.wrong("image_std", "three numbers above 0")
    scale = 255 * values.number("rescale_factor", 1e-6, 1e6, 1 / 255) if values.flag("do_rescale", True) else 255
    scaled = Normalisation(tuple(value / scale for value in mean), tuple(value / scale for value in std))
    return _resizing(values, image_size) | {"interpolation": numbers[resample]}, scaled


def _resizing(fields: Fields, image_size: int) -> dict[str, Any]:
    """Returns eval_transform and eval_crop: images are squashed, or their shorter sides resized, then cropped."""
    values, path = {key: value for key, value in fields.values.items() if value is not None}, fields.source
    size, why = values.get("size", image_size), "not known here"
    shortest = size.get("shortest_edge") if isinstance(size, dict) and set(size) == {"shortest_edge"} else None
    if is_whole(size) and not fields.flag("default_to_square", True):
        shortest = size
    try:
        resized = square(size if shortest is None else shortest, "size", path)
        kept = square(values.get("crop_size", image_size), "crop_size", path)
    except UserError as error:
        resized, kept, why = 0, 0, str(error).removeprefix(f"{path}: ")
    crops = fields.flag("do_center_crop", False)
    if kept == image_size and (crops or resized == kept) and resized >= kept and fields.flag("do_resize", True):
        if shortest is not None and not crops:
            warn(f"{path}: size {size} without do_center_crop is not square; evaluation crops the central square")
        return {"eval_transform": _SQUASH if shortest is None else _SHORTEST, "eval_crop": kept / resized}
    found = ", ".join(
        f"{key} {brief(values[key])}" for key in ("do_resize", "size", "do_center_crop", "crop_size") if key in values
    )
    warn(f"{path}: {found}: {why}; evaluation squashes images to the model's {image_size} pixels")
    return {"eval_transform": _SQUASH, "eval_crop": 1.0}


def write_transformers_folder(weights: Weights, out: Path) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, with the names that transformers saves.

    Raises UserError, with the reason, when its ViT is another function.
    """
    weights = for_transformers(weights)
    if weights.eval_transform not in (_SQUASH, _SHORTEST):
        warn(
            f"{weights.source}: transformers' processors do not have eval_transform={weights.eval_transform}, by which "
            "these weights were evaluated, and to which the tools here keep; written is the nearest"
        )
    out.mkdir(parents=True, exist_ok=True)
    keys = _keys(weights.model, weights.num_classes, "vit." if weights.num_classes else "")
    write_safetensors(out / "model.safetensors", tensors_to(weights.tensors, keys))
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
    elif setting := config.other_form():
        reason = f"the blocks of its ViT are the plain ViT's, not those of {setting}"
    if reason:
        raise UserError(f"{weights.source}: cannot be written for transformers: {reason}")
    return with_learned_positions(without_layer_scale(weights), class_row=True)


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
        **({"problem_type": {of: name for name, of in _LOSSES.items()}[weights.loss]} if weights.loss else {}),
        OURS: kept_use(weights),  # transformers keeps keys that it does not know
    }


def _preprocessor(weights: Weights) -> dict[str, Any]:
    size, ours = weights.model.image_size, weights.eval_transform
    squashes = ours in (_SQUASH, "vit", "fewshot", "timm_squash")
    resized = size if ours == "vit" else round(size / weights.eval_crop)
    resample = "bilinear" if ours in ("vit", "fewshot") else weights.interpolation  # these transforms fix it
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    kind = "DeiTImageProcessor" if squashes else "BitImageProcessor"  # which resizes the shorter side
    return {
        "image_processor_type": "ViTImageProcessor" if squashes and resized == size else kind,
        "do_resize": True,
        "size": {"height": resized, "width": resized} if squashes else {"shortest_edge": resized},
        **(crop if resized != size or not squashes else {}),
        "resample": INTERPOLATIONS[resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
    }


def _keys(config: ModelConfig, num_classes: int, prefix: str) -> dict[str, list[Part]]:
    """Returns, for each of our tensors, those of transformers, under the names that it saves (not those in memory)."""
    shapes = tensor_shapes(config, num_classes)
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
