"""Folders of `config.json` and `model.safetensors`: what timm writes and loads, and our own with everything in it."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from pretrain.config import (
    EVAL_CROP_LIMITS,
    MAX_CLASSES,
    TIMM_HYBRIDS,
    TIMM_SIZES,
    ModelConfig,
    model_from_dict,
    stride_of,
)
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief
from pretrain.log import warn
from pretrain.models.build import timm_options
from pretrain.models.claims import building, check_arguments
from pretrain.models.equivalent import (
    for_minus_one_to_one,
    has_patch_convolution,
    kernels_for_timm,
    kernels_from_timm,
    named_architecture,
    own_tensors,
    tensor_shapes,
    with_learned_positions,
)
from pretrain.models.positions import sincos2d
from pretrain.models.tensors import (
    OURS,
    LazyTensor,
    Weights,
    check_keys,
    few,
    is_whole,
    kept_use,
    number_as_text,
    per_channel,
    read_fields,
    square,
    use_of,
    write_safetensors,
)
from pretrain.models.torch_files import tensors_in
from pretrain.models.vit import NORM_EPS, grid_of

_LAYOUTS = ("timm", "pretrain")  # of the tensors in a folder of ours
_TRANSFORMS = {"center": "timm", "squash": "timm_squash", "border": "timm_border"}  # by timm's crop_mode
# Keys of config.json beyond those of timm's PretrainedCfg, which old files have at the top level.
_TOP_KEYS = {"architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg"}
_TOP_KEYS |= {"label_names", "label_descriptions", "labels"}
_PIXELS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")  # of pretrained_cfg
_RESIZES_ITSELF = "dinov2"  # in names: trained with positions resized as timm does it (bicubic), not as our ViT does
_RATES = ("drop_rate", "drop_path_rate", "drop_block_rate")  # endings of arguments for training only: proj_drop_rate
# Arguments of timm.create_model that name files and addresses, which a folder may not choose.
_NOT_ARCHITECTURE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def read_timm_folder(path: Path, file: Path | None = None) -> Weights:
    """Returns the weights of a folder that tools/convert.py or timm wrote. Raises UserError when it cannot be used.

    file: the one with its tensors, if it has not one of the usual names.
    """
    values = read_fields(path, "config.json")
    if not values.values.keys() & {OURS, "architecture"}:
        raise UserError(f"{values.source}: is neither timm's nor of tools/convert.py: no 'architecture' in it")
    tensors = tensors_in(path, file)
    return _ours(path, values, tensors) if OURS in values.values else read_foreign(path, values, tensors)


def _ours(path: Path, values: Fields, tensors: dict[str, LazyTensor]) -> Weights:
    ours = Fields(values.part(OURS).values, f"{values.source}: {OURS}")
    check_arguments(ours.part("model").values, f"{values.source}: model")
    model = model_from_dict(ours.values["model"], values.source)
    if problems := list(model.problems()):
        raise UserError(f"{values.source}: {'; '.join(problems)}")
    num_classes, layout = values.integer("num_classes", 0, MAX_CLASSES), ours.text("layout", "timm")
    if layout not in _LAYOUTS:
        raise UserError(f"{values.source}: {OURS}.layout is {brief(layout)}, expected one of {', '.join(_LAYOUTS)}")
    use = use_of(ours, "layout", "model")
    weights = Weights(path, model, tensors, num_classes, _label_names(values, num_classes), **use)
    if layout == "timm":
        if model.timm_name is None and model.positions == "sincos2d":  # written as a table, for timm
            weights = replace(weights, tensors={name: t for name, t in tensors.items() if name != "pos_embed"})
        if model.trunk_units is not None:
            weights = kernels_from_timm(weights)
    return weights


def read_foreign(path: Path, values: Fields, tensors: dict[str, LazyTensor]) -> Weights:
    """Returns weights that timm wrote: our ViT where it computes the same function, else timm's own model.

    values: of config.json. Raises UserError when they, or the tensors, are not of one model.
    """
    import timm
    from timm.models._input import get_model_args

    name, arguments = values.text("architecture"), _arguments(values)
    cfg = values.part("pretrained_cfg") if values.values.get("pretrained_cfg") else values
    _warn_of_unknown_keys(values, cfg)
    usual_size, use = _preprocessing(cfg)
    if name not in timm.list_models():
        raise UserError(f"{path}: timm has no model {brief(name)}")
    num_classes = cfg.integer("num_classes", 0, MAX_CLASSES, 0)
    for said in (values, Fields(arguments, f"{values.source}: model_args")):  # the innermost one counts
        num_classes = said.integer("num_classes", 0, MAX_CLASSES, num_classes)
    others = {k: v for k, v in arguments.items() if k != "num_classes" and not k.endswith(_RATES)}
    with building(Path(values.source), len(tensors)), torch.device("meta"):
        theirs = timm.create_model(name, num_classes=num_classes, **others)
        model = None if _RESIZES_ITSELF in name else _as_ours(theirs, num_classes)
        usual = get_model_args(timm.create_model(name)) if model is None else {}
    if model is None:
        if special := {k: v for k, v in others.items() if k != "img_size" and usual.get(k) != v}:
            raise UserError(
                f"{path}: model_args has {brief(special)}; a model of timm's that is not a plain ViT is built here as "
                f"its name {name} says, with another img_size, num_classes and rates of dropping at most"
            )
        size = others.get("img_size")
        model = ModelConfig(name=f"timm:{name}", image_size=square(size, "img_size", path) if size else usual_size)
    weights = Weights(path, model, tensors, num_classes, _label_names(values, num_classes), **use)
    check_keys(path, found=tensors.keys(), needed=own_tensors(theirs).keys())
    if model.trunk_units is not None:
        weights = kernels_from_timm(weights)
    # A border around the image has the mean's colour: then the mean is kept.
    keeps = weights.eval_transform == "timm_border" or not has_patch_convolution(model)
    return weights if keeps else for_minus_one_to_one(weights)


def _arguments(values: Fields) -> dict[str, Any]:
    """Returns what timm.create_model is to be called with. Raises UserError for what a folder may not choose."""
    if not values.values.get("model_args"):
        return {}
    arguments = dict(values.part("model_args").values)
    if foreign := arguments.keys() & _NOT_ARCHITECTURE:
        raise UserError(f"{values.source}: model_args has {sorted(foreign)}, which reads other files: remove it")
    check_arguments(arguments, f"{values.source}: model_args")
    return arguments


def _preprocessing(cfg: Fields) -> tuple[int, dict[str, Any]]:
    """Returns what timm's evaluation transform does: pixels of the input's side, and fields of Weights.

    By timm's own reading of a pretrained_cfg, its defaults included.
    """
    from timm.data.config import resolve_data_config

    given = {key: cfg.values[key] for key in _PIXELS if cfg.values.get(key)}
    found = Fields(resolve_data_config(pretrained_cfg={"architecture": ""} | given), cfg.source)  # it requires that key
    size = found.values["input_size"]
    if not isinstance(size, list | tuple) or not all(map(is_whole, size)) or len(size) not in (2, 3):
        found.wrong("input_size", "channels, height and width")
    channels, *sides = size
    if channels != 3:
        raise UserError(f"{cfg.source}: input_size is {list(size)}: images here have 3 channels")
    if found.text("crop_mode") not in _TRANSFORMS:
        found.wrong("crop_mode", f"one of {', '.join(_TRANSFORMS)}")
    use = {
        "eval_transform": _TRANSFORMS[found.text("crop_mode")],
        "eval_crop": found.number("crop_pct", *EVAL_CROP_LIMITS),
        "interpolation": found.text("interpolation"),
        "mean": per_channel(found, "mean"),
        "std": per_channel(found, "std"),
    }
    used = {"input_size": list(size), "crop_pct": use["eval_crop"]}
    tests = {key: cfg.values.get(f"test_{key}") or value for key, value in used.items()}
    if tests != used:
        warn(f"{cfg.source}: timm's validate.py evaluates by {brief(tests)}; here it is as in training: {brief(used)}")
    return square(sides, "input_size", cfg.source), use


def _warn_of_unknown_keys(values: Fields, cfg: Fields) -> None:
    """Warns of unknown keys, which may change the pixels or the function in a way that is not done here."""
    from timm.models import PretrainedCfg

    of_images, top, inner = {field.name for field in fields(PretrainedCfg)}, values.values.keys(), cfg.values.keys()
    unknown = inner - of_images - _TOP_KEYS if cfg is values else (inner - of_images) | (top - _TOP_KEYS)
    if unknown:
        warn(f"{values.source}: {few(sorted(unknown))}: not known here, and not done")


def _label_names(values: Fields, num_classes: int) -> tuple[str, ...]:
    """Returns the class names, () if there are none: from a list, or from an object by number as timm has it."""
    names = values.values.get("label_names")
    if isinstance(names, dict) and names:
        numbers = [str(number) for number in range(num_classes)]
        if num_classes and not names.keys() <= set(numbers):
            values.wrong("label_names", "a list of texts, or an object of texts by their numbers")
        names = [names.get(number, number) for number in numbers]
    if isinstance(names, list):
        names = [number_as_text(name) for name in names]
    return Fields({"label_names": names}, values.source).texts("label_names", ()) if num_classes else ()


def _as_ours(theirs: Any, num_classes: int) -> ModelConfig | None:
    """Returns the config of our model that computes what timm's does, None when there is none."""
    if not _is_plain_vit(theirs):
        return None
    first = theirs.blocks[0]
    gelu = {"GELU": "exact", "GELUTanh": "tanh"}.get(type(first.mlp.act).__name__)
    pooling = {"token": "token", "avg": "gap", "map": "map"}.get(theirs.global_pool)
    if gelu is None or pooling is None:
        return None
    tensors = own_tensors(theirs)
    norms = {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)}
    if norms != {NORM_EPS} or (pooling == "gap" and theirs.cls_token is not None):
        return None
    trunk = _trunk_of(theirs.patch_embed)
    sides, sizes = theirs.patch_embed.proj.kernel_size, theirs.patch_embed.img_size
    if len({*sides}) != 1 or len({*sizes}) != 1:
        return None
    config = named_architecture(
        theirs.embed_dim,
        len(theirs.blocks),
        first.mlp.fc1.out_features,
        first.attn.num_heads,
        image_size=sizes[0],
        patch_size=sides[0] * stride_of(trunk),
        pooling=pooling,
        positions="none" if theirs.pos_embed is None else "learned",
        class_position=pooling != "token" or not theirs.no_embed_class,
        gelu=gelu,
        trunk=trunk,
        layer_scale=getattr(first.ls1, "init_values", None),  # of timm's LayerScale; else it is an Identity
    )
    if list(config.problems()):
        return None
    same = tensor_shapes(config, num_classes) == {name: tuple(t.shape) for name, t in tensors.items()}
    return config if same else None


def _is_plain_vit(theirs: Any) -> bool:
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(theirs, VisionTransformer) or not len(theirs.blocks):
        return False
    # Exactly this class: a block with another order of norms has the same tensors.
    return all(type(block) is Block for block in theirs.blocks) and hasattr(theirs.blocks[0].mlp, "act")


def _trunk_of(patch_embed: Any) -> list[int] | None:
    backbone = getattr(patch_embed, "backbone", None)
    return None if backbone is None else [len(stage.blocks) for stage in getattr(backbone, "stages", [])]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_own_folder(weights: Weights, out: Path) -> None:
    """Writes a folder that `load_model` reads: any model of ours, whole."""
    values = {"num_classes": weights.num_classes, OURS: _kept(weights, weights.model, "pretrain")}
    _write(out, values, weights)


def write_timm_folder(weights: Weights, out: Path) -> None:
    """Writes a folder from which `timm.create_model("local-dir:OUT", pretrained=True)` builds the same function.

    Raises UserError, with the reason, when timm has no such model.
    """
    written = for_timm(weights)
    tensors, model = dict(written.tensors), written.model
    if weights.model.timm_name is None and weights.model.positions == "sincos2d":
        table = sincos2d(*grid_of(model), model.shape.width)
        tensors["pos_embed"] = LazyTensor(tuple(table.shape), lambda: table)
        model = weights.model
    values = _timm_values(written) | {OURS: _kept(weights, model, "timm")}
    _write(out, values, replace(written, tensors=tensors))


def for_timm(weights: Weights) -> Weights:
    """Returns the same function in a form that timm can hold. Raises UserError, with the reason, when it cannot."""
    config = weights.model
    if config.timm_name is not None:
        return weights
    if setting := config.other_form():
        raise UserError(
            f"{weights.source}: cannot be written for timm: its ViT has the plain ViT's blocks, "
            f"not those of {setting}; --to pretrain holds them"
        )
    if config.representation_size is not None:
        raise UserError(
            f"{weights.source}: timm has no representation layer (tanh before the head), without which logits are "
            "others; --without head pre_logits writes the body alone"
        )
    if config.trunk_units is not None:
        if _timm_hybrid(config) is None:
            name = f"{config.name}/{config.patch_size}"
            raise UserError(f"{weights.source}: timm has no hybrid {name} with trunk {config.trunk_units}")
        weights = kernels_for_timm(weights)
    class_row = config.pooling == "token" and config.positions == "learned" and config.class_position
    return with_learned_positions(weights, class_row=class_row)


def _timm_hybrid(config: ModelConfig) -> str | None:
    for timm_name, (name, patch_size) in TIMM_HYBRIDS.items():
        if config.trunk_width == 64 and config.patch_size == patch_size:
            if config.trunk_units == ModelConfig(name=name, patch_size=patch_size).trunk_units:
                return f"{timm_name}_224"
    return None


def _kept(weights: Weights, model: ModelConfig, layout: str) -> dict[str, Any]:
    return {"layout": layout, "model": asdict(model)} | kept_use(weights)


def _write(out: Path, values: dict[str, Any], weights: Weights) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if weights.class_names:
        values["label_names"] = list(weights.class_names)
    write_safetensors(out / "model.safetensors", weights.tensors)
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _timm_values(weights: Weights) -> dict[str, Any]:
    config, size = weights.model, weights.model.image_size
    vit = config.timm_name is None
    first_conv = "patch_embed.proj"
    if config.trunk_units is not None:
        first_conv = "patch_embed.backbone.stem.conv" if config.trunk_units else "patch_embed.backbone.conv"
    values = {
        "architecture": _architecture(config) if vit else config.timm_name,
        "num_classes": weights.num_classes,
        "model_args": _vit_arguments(config) if vit else timm_options(config),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": vit,
            **_timm_transform(weights),
            "mean": list(weights.mean),
            "std": list(weights.std),
            "num_classes": weights.num_classes,
            **({"first_conv": first_conv, "classifier": "head"} if vit else {}),
        },
    }
    if vit:
        values |= {"num_features": config.shape.width, "global_pool": values["model_args"]["global_pool"]}
    return values


def _timm_transform(weights: Weights) -> dict[str, Any]:
    """The keys of timm's evaluation transform, or of the nearest to the weights' own, with a warning."""
    ours = weights.eval_transform
    if crop_mode := {transform: mode for mode, transform in _TRANSFORMS.items()}.get(ours):
        return {"interpolation": weights.interpolation, "crop_pct": weights.eval_crop, "crop_mode": crop_mode}
    squashes = ours in ("vit", "fewshot", "transformers")
    interpolation = {"vit": "bilinear", "fewshot": "bilinear", "big_vision": "box"}.get(ours, weights.interpolation)
    warn(
        f"{weights.source}: timm's transforms do not have eval_transform={ours}, by which these weights were evaluated "
        f"and to which the tools here keep; written is the nearest, crop_mode={'squash' if squashes else 'center'}"
    )
    return {
        "interpolation": interpolation,
        "crop_pct": 1.0 if ours == "vit" else weights.eval_crop,
        "crop_mode": "squash" if squashes else "center",
    }


def _architecture(config: ModelConfig) -> str:
    """The entry of timm that the arguments modify; any ViT entry would do, the nearest one reads best."""
    import timm

    if hybrid := _timm_hybrid(config) if config.trunk_units is not None else None:
        return hybrid
    sizes = {ours: timms for timms, ours in TIMM_SIZES.items()}
    name = f"vit_{sizes.get(config.name, '')}_patch{config.patch_size}_224"
    return name if name in timm.list_models("vit_*") else "vit_base_patch16_224"


def _vit_arguments(config: ModelConfig) -> dict[str, Any]:
    width, depth, mlp_dim, heads = config.shape
    ratio = mlp_dim / width
    return {
        "img_size": config.image_size,
        **({"patch_size": config.patch_size} if config.trunk_units is None else {}),  # a hybrid's name says it
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width,  # timm truncates
        "class_token": config.pooling == "token",
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[config.pooling],
        "fc_norm": False,  # the norm comes before the pooling
        "no_embed_class": not config.class_position,
        "act_layer": "gelu_tanh" if config.gelu == "tanh" else "gelu",
        **({} if config.layer_scale is None else {"init_values": config.layer_scale}),
    }
