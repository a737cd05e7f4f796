"""Weights on disk: read from a run, a checkpoint or a converted folder; written as a folder that timm loads."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.checkpoint import CheckpointReader, newest_valid, read_state, validate
from pretrain.config import Config, ModelConfig, config_from_dict
from pretrain.errors import UserError
from pretrain.models.build import build_model, timm_options

OURS = "pretrain"  # the key of config.json under which a converted folder keeps what timm's keys cannot say
_TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant", "G": "gigantic"}


@dataclass(frozen=True)
class Weights:
    """A trained model: its architecture, its float32 tensors by timm's names, and what it needs to be used."""

    source: Path
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    num_classes: int
    class_names: tuple[str, ...]  # empty when unknown
    eval_crop: float  # as in DataConfig
    interpolation: str  # as in DataConfig
    loss: str = "softmax"  # with which it was trained


def load_model(path: Path | str) -> nn.Module:
    """Returns the model of a run, a checkpoint or a converted folder, float32, in evaluation mode.

    It takes images [B, 3, H, W] in [-1, 1] and returns logits [B, classes]. Raises UserError when the weights are
    missing, damaged or do not fit.
    """
    weights = read_weights(Path(path))
    model = build_model(weights.model, weights.num_classes)
    load_tensors(model, weights)
    return model.eval()


def read_weights(path: Path) -> Weights:
    """Reads a run (its newest valid checkpoint), a checkpoint step-N, or a folder written by tools/convert.py."""
    if (path / "config.json").is_file():
        return _read_timm_folder(path)
    if (path / "checkpoints").is_dir():
        checkpoint = newest_valid(path / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{path}: has no checkpoint yet")
        return _read_checkpoint(checkpoint)
    if (path / "MANIFEST.json").is_file():
        validate(path)
        return _read_checkpoint(path)
    what = "not found" if not path.exists() else "is neither a run, nor a checkpoint, nor a converted folder"
    raise UserError(f"{path}: {what}; expected a folder with checkpoints/, MANIFEST.json or config.json in it")


def load_tensors(model: nn.Module, weights: Weights, *, new_head: bool = False) -> None:
    """Copies weights into a model; every tensor of one must be in the other, with its shape.

    new_head: leave the model's classifier as it is. Raises UserError naming what does not fit.
    """
    own = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    given = weights.tensors
    if new_head:
        head = classifier_names(model)
        own, given = ({n: t for n, t in d.items() if n not in head} for d in (own, given))
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{weights.source}: tensors missing: {missing[:3] or 'none'}, not in the model: {extra[:3] or 'none'}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != given[name].shape:
                hint = "; set init_new_head=true to start a new head" if name in classifier_names(model) else ""
                shapes = f"{tuple(given[name].shape)} in {weights.source}, {tuple(tensor.shape)} in the model"
                raise UserError(f"{name}: shape {shapes}{hint}")
            tensor.copy_(given[name])


def classifier_names(model: nn.Module) -> set[str]:
    """Returns the names of the head's tensors."""
    names = getattr(model, "default_cfg", {}).get("classifier", "head")  # timm names it per model
    prefixes = (names,) if isinstance(names, str) else tuple(names)
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in prefixes}


def _read_checkpoint(path: Path) -> Weights:
    config = checkpoint_config(path)
    with _readable(path):
        state, reader = read_state(path), CheckpointReader(path)
        kind = "average" if reader.shapes("average") else "weights"  # what a run with averages is meant to end with
        return Weights(
            source=path,
            model=config.model,
            tensors={name: reader.tensor(name, kind) for name in reader.shapes(kind)},
            num_classes=state["num_classes"],
            class_names=tuple(state["class_names"]),
            eval_crop=config.data.eval_crop,
            interpolation=config.data.interpolation,
            loss=config.loss,
        )


def checkpoint_config(path: Path) -> Config:
    """Returns the config with which a checkpoint was trained."""
    with _readable(path / "state.json"):
        return config_from_dict(read_state(path)["config"], f"{path}/state.json")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What cannot be read is the user's file, not our defect: one line, which names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def _read_timm_folder(path: Path) -> Weights:
    with _readable(path / "config.json"):
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if OURS not in values:
            raise UserError(f"{path}/config.json: has no {OURS!r} entry: it was not written by tools/convert.py")
        ours = values[OURS]
        model = ModelConfig(**{field.name: ours["model"][field.name] for field in fields(ModelConfig)})
        if problems := list(model.problems()):
            raise UserError(f"{path}/config.json: {'; '.join(problems)}")
        num_classes, class_names = int(values["num_classes"]), tuple(values.get("label_names", ()))
        use = float(ours["eval_crop"]), str(ours["interpolation"]), str(ours["loss"])
    with _readable(path / "model.safetensors"):
        tensors = _without_fixed_positions(load_file(path / "model.safetensors"), model)
    return Weights(path, model, tensors, num_classes, class_names, *use)


def write_timm_folder(weights: Weights, out: Path) -> None:
    """Writes config.json and model.safetensors, from which `timm.create_model("local-dir:OUT", pretrained=True)` builds
    the same function: same logits for the same input. The folder appears complete or not at all.
    """
    temporary = out.with_name(f".tmp-{out.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    tensors = dict(weights.tensors)
    if (
        weights.model.timm_name is None and weights.model.positions == "sincos2d"
    ):  # timm has no such table: as a learned one
        tensors["pos_embed"] = build_model(weights.model, weights.num_classes).get_buffer("pos_embed")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary / "model.safetensors",
        {"format": "pt"},
    )
    (temporary / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads
    (temporary / "config.json").write_text(json.dumps(_timm_config(weights), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out)


def _timm_config(weights: Weights) -> dict[str, Any]:
    config, size = weights.model, weights.model.image_size
    vit = config.timm_name is None
    values = {
        "architecture": _architecture(config) if vit else config.timm_name,
        "num_classes": weights.num_classes,
        "model_args": _vit_arguments(config) if vit else timm_options(config),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": vit,
            "interpolation": weights.interpolation,
            "crop_pct": weights.eval_crop,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": weights.num_classes,
            **({"first_conv": "patch_embed.proj", "classifier": "head"} if vit else {}),
        },
        OURS: {
            "model": asdict(config),
            "eval_crop": weights.eval_crop,
            "interpolation": weights.interpolation,
            "loss": weights.loss,
        },
    }
    if vit:
        values |= {"num_features": config.shape.width, "global_pool": values["model_args"]["global_pool"]}
    if weights.class_names:
        values["label_names"] = list(weights.class_names)
    return values


def _architecture(config: ModelConfig) -> str:
    """The entry of timm on which the arguments build; any ViT entry serves, the nearest one reads best."""
    import timm

    name = f"vit_{_TIMM_SIZES.get(config.name, '')}_patch{config.patch_size}_224"
    return name if name in timm.list_models("vit_*") else "vit_base_patch16_224"


def _vit_arguments(config: ModelConfig) -> dict[str, Any]:
    width, depth, mlp_dim, heads = config.shape
    ratio = mlp_dim / width
    token = config.pooling == "token"
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width,  # timm truncates
        "class_token": token,
        "global_pool": "token" if token else "avg",
        "fc_norm": False,  # the norm comes before the pooling
        "no_embed_class": config.positions == "sincos2d",  # the fixed table has no row for the class token
        "act_layer": "gelu_tanh" if config.gelu == "tanh" else "gelu",
    }


def _without_fixed_positions(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    if config.timm_name is None and config.positions == "sincos2d":
        tensors.pop("pos_embed", None)
    return tensors
