"""A single file of PyTorch's, as timm's training writes it, which names its architecture; else a config.json must."""

from pathlib import Path
from typing import Any

import torch

from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.models.build import timm_options
from pretrain.models.claims import building, check_arguments
from pretrain.models.equivalent import classifier_names
from pretrain.models.tensors import Weights, per_channel, readable
from pretrain.models.timm_folder import read_foreign
from pretrain.models.torch_files import Saved, read_torch

_OF_TESTS = ("test_input_size", "test_crop_pct")  # of timm's own weights of this name, not of these
_KEPT = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of what timm resolves


def read_timm_checkpoint(path: Path) -> Weights:
    """Returns the weights of a file that timm's train.py, or another script with `arch` in its file, wrote.

    Raises UserError, with the way out, when the file does not name an architecture of timm's.
    """
    import timm

    saved = read_torch(path)
    full_name = str(saved.arguments.get("model") or saved.arch or "")[:100]
    name = full_name.partition(".")[0]
    if name not in timm.list_models():
        told = f"its arch, {full_name!r}, is no model of timm's" if full_name else "does not tell its architecture"
        raise UserError(f'{path}: {told}: put a config.json beside it, as {{"architecture": "vit_base_patch16_224"}}')
    if not {"mean", "crop_pct"} <= saved.arguments.keys():  # torchvision's script, too, names its models "resnet18"
        warn(f"{path}: does not tell how its images were seen; taken is what timm's {name} has as default")
    with readable(path):
        config = _as_config(full_name, saved, path)
    return read_foreign(path, Fields(config, str(path)), saved.tensors)


def _as_config(full_name: str, saved: Saved, path: Path) -> dict[str, Any]:
    """What timm would have written as config.json."""
    import timm
    from timm.data.config import resolve_data_config

    name, arguments = full_name.partition(".")[0], saved.arguments
    usual = timm.get_pretrained_cfg(full_name)
    cfg = usual.to_dict() if usual else {}
    given = {key: arguments[key] for key in ("img_size", *_KEPT) if arguments.get(key)}
    if sides := given.get("input_size"):  # timm's is channels, height and width; DeiT's and MAE's one number
        given["input_size"] = tuple(sides) if isinstance(sides, list | tuple) else (3, sides, sides)
    given |= {key: per_channel(Fields(given, str(path)), key) for key in ("mean", "std") if key in given}
    resolved = resolve_data_config(given, pretrained_cfg=cfg)
    model_args = dict(arguments.get("model_kwargs") or {})
    size = arguments.get("img_size")
    if "input_size" in given and not model_args.keys() & {"img_size", "dynamic_img_size"}:
        size = size or given["input_size"][-1]
    if size:
        check_arguments({"img_size": size}, f"{path}: args")
        with building(path, len(saved.tensors)):  # convolutional networks take images of any size, and no argument
            model_args |= timm_options(ModelConfig(name=f"timm:{name}", image_size=size))
    if arguments.get("gp"):
        model_args["global_pool"] = arguments["gp"]
    with torch.device("meta"):
        head = classifier_names(timm.create_model(name))
    classes = {saved.tensors[key].shape[0] for key in head if key in saved.tensors}
    return {
        "architecture": name,
        "num_classes": max(classes, default=0),
        "model_args": model_args,
        "pretrained_cfg": cfg | {key: resolved[key] for key in _KEPT} | dict.fromkeys(_OF_TESTS),
    }
