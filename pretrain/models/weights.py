"""The entry point for weights: whatever holds a Vision Transformer becomes a model, or is refused with the reason."""

import hashlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pretrain.checkpoint.find import read_newest, refusing_vanished, validate
from pretrain.checkpoint.read import CheckpointReader, read_state
from pretrain.config import MAX_CLASSES, Config, DataConfig, ModelConfig, config_from_dict
from pretrain.config.model import VitForm, VitShape
from pretrain.data.classes import names_of_head
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.models import by_name
from pretrain.models.build import build_model
from pretrain.models.claims import check_fit, check_tensors
from pretrain.models.equivalent import classifier_names, own_tensors, resized
from pretrain.models.formats import READABLE
from pretrain.models.google import read_google
from pretrain.models.tensors import LazyTensor, Weights, file_in, finite, read_fields, readable, use_in
from pretrain.models.timm_checkpoint import read_timm_checkpoint
from pretrain.models.timm_folder import read_timm_folder
from pretrain.models.torch_files import is_torch_file
from pretrain.models.transformers_folder import PROCESSOR, is_of_transformers, read_transformers_folder
from pretrain.storage import sha256

_PICKLES = (".pkl", ".pickle")
_OF_WEIGHTS = r"config\.json$|\.safetensors|\.bin$|\.pth"  # names of files in a folder


def load_model(path: Path | str, image_size: int | None = None) -> nn.Module:
    """Returns the model of a run, a checkpoint, a folder of ours, timm's or transformers', a Google .npz, or a .pth.

    It is float32 and in evaluation mode, takes images [B, 3, H, W] and returns logits [B, classes], or the head's input
    where there is no head. Its images are (x - mean) / std of pixels x in [0, 1], with mean and std of
    `read_weights(path)`: in [-1, 1], except for timm: models and hybrids of other ones, and runs that set data.mean.
    image_size: pixels, when not the trained ones; learned positions are resized.
    Raises UserError when the weights are missing, damaged or do not fit.
    """
    return model_of(read_weights(Path(path), image_size))


def model_of(weights: Weights) -> nn.Module:
    """Returns the model in evaluation mode. Raises UserError when the tensors are not those of its architecture."""
    model = build_model(weights.model, weights.num_classes)
    load_tensors(model, weights)
    return model.eval()


def read_weights(path: Path, image_size: int | None = None, of_run: str | None = None) -> Weights:
    """Reads a run (its newest valid checkpoint), a checkpoint step-N, a folder of ours, timm's, transformers', .npz.

    Weights by name (timm:NAME, hf-hub:OWNER/NAME, google:NAME) are fetched first, unless they are in the cache.
    of_run: "trained" or "average", of a run or checkpoint; None: the average where it keeps one.
    Raises UserError unless its tensors are exactly those of its architecture, before anything of their size is built.
    """
    weights = _read(path, image_size, of_run)
    check_tensors(weights)
    return weights if image_size is None else resized(weights, image_size)


def _read(path: Path, image_size: int | None, of_run: str | None) -> Weights:
    if of_run is not None and not any((path / name).exists() for name in ("checkpoints", "MANIFEST.json")):
        raise UserError(f"{path}: is no run or checkpoint, of which --weights {of_run} could choose; leave it out")
    if by_name.is_name(path):
        path = by_name.fetched(path)
    if is_torch_file(path):
        beside = (path.parent / "config.json").is_file()
        return replace(_read_folder(path.parent, path), source=path) if beside else read_timm_checkpoint(path)
    if (path / "config.json").is_file():
        return _read_folder(path)
    if (path / "checkpoints").is_dir():
        weights = read_newest(path / "checkpoints", partial(_read_checkpoint, of_run=of_run))
        if weights is None:
            raise UserError(f"{path}: has no checkpoint yet")
        return weights
    if (path / "MANIFEST.json").is_file():
        validate(path)
        return _read_checkpoint(path, of_run)
    if path.suffix == ".npz" and path.is_file():
        return read_google(path, image_size)
    raise UserError(f"{path}: {_why_not(path)}")


def _read_folder(path: Path, file: Path | None = None) -> Weights:
    """Of transformers, timm or ours, by its config.json."""
    is_transformers = is_of_transformers(read_fields(path, "config.json"))
    return read_transformers_folder(path, file) if is_transformers else read_timm_folder(path, file)


def _why_not(path: Path) -> str:
    expected = f"expected {READABLE}"
    if not path.exists():
        return f"not found; {expected}"
    if path.suffix in _PICKLES:
        return "is a pickle, which may execute code: save its tensors as safetensors beside a config.json"
    if (path / "latest").is_file() or list(path.glob("*mp_rank_*")):
        return "is DeepSpeed's own checkpoint, a pickle that may execute code: tools/convert.py has --trust-pickle"
    if path.suffix == ".safetensors":
        return "its tensors do not tell their architecture: give the folder, with config.json in it"
    if (path / "starts.jsonl").is_file():
        return "is a run without checkpoints: it has not saved yet, or tools/finetune.py only chose a rate with it"
    if runs := sorted(folder.parent for folder in path.glob("*/checkpoints")):
        return f"holds runs; give one of them, as {runs[0]}"
    return f"is none of what can be read; {expected}"


def results_folder(weights: Path, name: str) -> Path:
    """Returns the folder of results on weights: in the run or the converted folder, so that reports find them.

    For a checkpoint, it is in the checkpoint's run; for a file such as an .npz, in a folder of the file's name beside
    it; for weights by name, which are in a cache, in a folder of their name in the current folder.
    """
    if by_name.is_name(weights):
        return Path(by_name.folder_name(weights)) / name
    if weights.parent.name == "checkpoints":
        weights = weights.parent.parent
    return (weights.with_suffix("") if weights.is_file() else weights) / name


def weights_sha256(source: Path, of_run: str | None = None) -> str:
    """Returns the SHA-256 of what `Weights.source` names; a checkpoint's manifest holds the checksums of its files.

    of_run: of `Weights`; a checkpoint's trained weights are told from its average.
    Of a folder: its config.json and tensors, not results that may lie beside them. Of a file of PyTorch's: with the
    JSON files beside it by which it is read. Raises UserError when unreadable.
    """
    total = hashlib.sha256()
    with readable(source):
        if (source / "MANIFEST.json").is_file():
            files = [source / "MANIFEST.json"]
            total.update(b"trained" if of_run == "trained" else b"")
        elif source.is_dir():
            names = sorted(path.name for path in source.iterdir() if re.search(_OF_WEIGHTS, path.name))
            files = [
                path for path in (file_in(source, name) for name in names) if path.is_file()
            ]  # not a pipe, which would block
        else:
            beside = ("config.json", PROCESSOR) if is_torch_file(source) else ()
            files = [source, *(file_in(source.parent, name) for name in beside if (source.parent / name).is_file())]
        for path in files:
            total.update(path.name.encode() + bytes.fromhex(sha256(path)))
    return total.hexdigest()


def check_same_function(weights: Weights, config: ModelConfig, data: DataConfig) -> None:
    """Raises UserError for other settings of the model: by some the tensors still fit, but compute another function."""
    if not weights.normalisation.is_near(data.normalisation):
        was, now = (
            f"data.mean={list(mean)} data.std={list(std)}".replace(", ", ",")
            for mean, std in (weights.normalisation, data.normalisation)
        )
        raise UserError(f"{weights.source}: was trained on images of {was}, not of {now}; set them as they were")
    if weights.model.timm_name is not None or config.timm_name is not None:
        return
    settings = ("patch_size", "pooling", "positions", "positions_at", "gelu")
    pairs = {f"model.{name}": (getattr(weights.model, name), getattr(config, name)) for name in settings}
    forms = zip(VitForm._fields, weights.model.form, config.form)
    shapes = zip(VitShape._fields, weights.model.shape, config.shape)
    pairs |= {f"model.{name}": (was, now) for name, was, now in (*forms, *shapes)}
    scaled = weights.model.layer_scale, config.layer_scale
    if None in scaled:  # two numbers give the same function: the trained factors are in the tensors
        pairs["model.layer_scale"] = scaled
    if different := [f"{key} is {now}, was {was}" for key, (was, now) in pairs.items() if was != now]:
        raise UserError(f"{weights.source}: was trained as another model: {'; '.join(different)}; set it as it was")


def load_tensors(model: nn.Module, weights: Weights, *, new_head: bool = False) -> None:
    """Copies weights into a model; every tensor of one must be in the other, with its shape.

    new_head: leave the model's classifier as it is, and drop a representation layer that it does not have. Raises
    UserError naming what does not fit.
    """
    own, given = own_tensors(model), dict(weights.tensors)
    if new_head:
        head = classifier_names(model) | {name for name in given if name.startswith("pre_logits.") and name not in own}
        own = {name: tensor for name, tensor in own.items() if name not in head}
        given = {name: tensor for name, tensor in given.items() if name not in head}
    hints = dict.fromkeys(classifier_names(model), "; set init_new_head=true to start a new head")
    check_fit(own, given, weights.source, hints)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name].read())


def _read_checkpoint(path: Path, of_run: str | None) -> Weights:
    with refusing_vanished(path), readable(path):
        config = checkpoint_config(path)
        state, reader = Fields.of(read_state(path), f"{path}/state.json"), CheckpointReader(path)
        num_classes, names = state.integer("num_classes", 1, MAX_CLASSES), state.texts("class_names")
        if reader.shapes("average"):
            of_run = of_run or "average"  # what a run with averages is meant to end with
        elif of_run == "average":
            raise UserError(f"{path}: keeps no average (optim.average_decay): leave out --weights average")
        else:
            of_run = None
        kind = "average" if of_run == "average" else "weights"
        return Weights(
            source=path,
            model=config.model,
            tensors={
                name: LazyTensor(tuple(shape), partial(_checkpoint_tensor, path, name, kind))
                for name, shape in reader.shapes(kind).items()
            },
            num_classes=num_classes,
            class_names=names_of_head(names, num_classes),
            of_run=of_run,
            **use_in(config),
        )


def _checkpoint_tensor(path: Path, name: str, kind: str) -> torch.Tensor:
    # A reader for each tensor: it keeps its files mapped, and what was read of them counts as this process's memory.
    with refusing_vanished(path), readable(path):
        return finite(CheckpointReader(path).tensor(name, kind), name, path)


def checkpoint_config(path: Path) -> Config:
    """Returns the config with which a checkpoint was trained."""
    with readable(path / "state.json"):
        return config_from_dict(read_state(path)["config"], f"{path}/state.json")
