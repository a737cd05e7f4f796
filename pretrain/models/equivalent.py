"""Turns weights into others that compute the same function: position tables and kernels that a format can hold."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pretrain.config import HYBRIDS, MINUS_ONE_TO_ONE, VIT_SHAPES, ModelConfig
from pretrain.config.model import VIT_FORMS
from pretrain.errors import UserError
from pretrain.models.build import outline
from pretrain.models.hybrid import STD_EPS
from pretrain.models.positions import learned2d_table, resize_axis, resize_table, sincos2d
from pretrain.models.tensors import LazyTensor, Weights, readable
from pretrain.models.vit import grid_of

TIMM_STD_VARIANCE = 1e-8  # what timm's hybrids add to the variance


def tensor_shapes(config: ModelConfig, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor of a model's checkpoint, without its memory."""
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(outline(config, num_classes)).items()}


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters of a model, and the buffers that it saves."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def classifier_names(model: nn.Module) -> set[str]:
    """Returns the names of the head's tensors."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"  # timm names it per model
    prefixes = (names,) if isinstance(names, str) else tuple(names)
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in prefixes}


def named_architecture(width: int, depth: int, mlp_dim: int, heads: int, **others: Any) -> ModelConfig:
    """Returns the config of a plain ViT or hybrid of this shape, by its name where it has one."""
    shape, trunk = (width, depth, mlp_dim, heads), others.get("trunk")
    for name, (size, trunks) in HYBRIDS.items():
        if shape == VIT_SHAPES[size] and trunk == trunks.get(others["patch_size"]) and trunk is not None:
            del others["trunk"]
            return ModelConfig(name=name, **others)
    for name, named in VIT_SHAPES.items():
        if shape == named and name not in VIT_FORMS:  # those names imply another form
            return ModelConfig(name=name, **others)
    return ModelConfig(name="Ti", width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, **others)


def changed(weights: Weights, tensors: Mapping[str, LazyTensor], **model: Any) -> Weights:
    """Returns the weights with other tensors and other settings of their model."""
    return replace(weights, tensors=tensors, model=replace(weights.model, **model))


def mapped(tensor: LazyTensor, shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
    """Returns a tensor that is read through a function."""
    return LazyTensor(shape, lambda: function(tensor.read()))


# --- positions -------------------------------------------------------------------------------------------------------


def resized(weights: Weights, image_size: int) -> Weights:
    """Returns the weights for images of another size: learned positions are resized as Google does it.

    Raises UserError for relative positions, whose raster offsets mean other distances on another grid.
    """
    config = weights.model
    if image_size == config.image_size:
        return weights
    if config.timm_name is not None:
        return _resized_by_timm(weights, image_size)
    new = replace(config, image_size=image_size)
    if problems := list(new.problems()):
        raise UserError(f"{weights.source}: at {image_size} pixels: {'; '.join(problems)}")
    if config.positions == "relative":
        raise UserError(f"{weights.source}: relative positions fit {config.image_size} pixels only, not {image_size}")
    old_grid, new_grid = grid_of(config), grid_of(new)
    tensors = dict(weights.tensors)
    for name, tensor in weights.tensors.items():
        if name.endswith("pos_embed.x") or name.endswith("pos_embed.y"):
            size = new_grid.width if name.endswith("x") else new_grid.height
            tensors[name] = mapped(tensor, (size, tensor.shape[1]), lambda t, size=size: resize_axis(t, size))
        elif name.endswith("pos_embed"):
            rows = tensor.shape[1] - old_grid.height * old_grid.width + new_grid.height * new_grid.width
            shape = (1, rows, tensor.shape[2])
            tensors[name] = mapped(tensor, shape, lambda t: resize_table(t, old_grid, new_grid))
    return replace(weights, tensors=tensors, model=new)


def _resized_by_timm(weights: Weights, image_size: int) -> Weights:
    """The weights of a timm: model as timm itself loads them at another size. It needs all tensors in memory."""
    new = changed(weights, weights.tensors, image_size=image_size)
    model = outline(new.model, weights.num_classes)
    needed = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    if all(weights.tensors[name].shape == shape for name, shape in needed.items() if name in weights.tensors):
        return new
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    where = f"{weights.source}: {weights.model.name} at {image_size} pixels"
    if convert is None:
        raise UserError(f"{where}: timm does not resize its tensors; known is {weights.model.image_size}")
    with readable(weights.source):
        tensors = dict(convert({name: tensor.read() for name, tensor in weights.tensors.items()}, model))
    for name, shape in needed.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UserError(f"{where}: timm leaves {name} {tuple(tensors[name].shape)}, expected {shape}")
    return replace(new, tensors={n: LazyTensor(tuple(t.shape), lambda t=t: t) for n, t in tensors.items()})


def with_learned_positions(weights: Weights, *, class_row: bool) -> Weights:
    """Returns the same function with one learned table [1, patches, D], or with a row for the class token before them.

    Fixed, 2-D and absent positions become a table; a class row is folded into the class token, or added as zeros.
    Raises UserError where there is no such table: positions at each block, or relative.
    """
    config = weights.model
    if config.positions == "relative" or config.positions_at != "stem":
        kind = "relative" if config.positions == "relative" else f"{config.positions_at.replace('_', ' ')} of"
        raise UserError(f"{weights.source}: has {kind} positions, for which the target has no place")
    table = _patch_table(weights)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("pos_embed")}
    settings = {"positions": "learned", "positions_at": "stem", "class_position": class_row}
    if config.pooling != "token":
        return changed(weights, tensors | {"pos_embed": table}, **settings | {"class_position": True})
    cls, width = weights.tensors["cls_token"], config.shape.width
    has_row = config.positions == "learned" and config.class_position
    if has_row and class_row:
        return weights
    if has_row:
        whole = weights.tensors["pos_embed"]
        tensors["cls_token"] = LazyTensor(cls.shape, lambda: cls.read() + whole.read()[:, :1])
    elif class_row:
        patches = table
        zero = torch.zeros(1, 1, width)
        table = LazyTensor((1, patches.shape[1] + 1, width), lambda: torch.cat([zero, patches.read()], dim=1))
    return changed(weights, tensors | {"pos_embed": table}, **settings)


def _patch_table(weights: Weights) -> LazyTensor:
    """The positions of the patches alone, [1, patches, D]."""
    config, tensors, grid = weights.model, weights.tensors, grid_of(weights.model)
    shape = (1, grid.height * grid.width, config.shape.width)
    if config.positions == "learned":
        slots = tensors["pos_embed"].shape[1] - shape[1]
        return mapped(tensors["pos_embed"], shape, lambda t: t[:, slots:])
    if config.positions == "learned2d":
        x, y = tensors["pos_embed.x"], tensors["pos_embed.y"]
        return LazyTensor(shape, lambda: learned2d_table(x.read(), y.read()))
    if config.positions == "sincos2d":
        return LazyTensor(shape, lambda: sincos2d(*grid, shape[2]))
    return LazyTensor(shape, lambda: torch.zeros(shape))


# --- heads, kernels, pixels ------------------------------------------------------------------------------------------


def without(weights: Weights, *parts: str) -> Weights:
    """Returns the weights without their "head", or without "pre_logits" (the representation layer), or both."""
    left_out = part_names(weights, *parts)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in left_out}
    model = replace(weights.model, representation_size=None) if "pre_logits" in parts else weights.model
    if "head" not in parts:
        return replace(weights, tensors=tensors, model=model)
    return replace(weights, tensors=tensors, model=model, num_classes=0, class_names=())


def part_names(weights: Weights, *parts: str) -> set[str]:
    """Returns the names of the tensors of "head", "pre_logits", or both; timm names the head per model."""
    names = {name for name in weights.tensors if name.partition(".")[0] in parts}
    if "head" not in parts or weights.model.timm_name is None:
        return names
    return classifier_names(outline(weights.model, weights.num_classes))


def kernels_for_timm(weights: Weights) -> Weights:
    """Returns weights whose trunk kernels, standardised by timm's rule, equal ours standardised by Google's.

    (w - mean) / sqrt(var + 1e-8) of timm's hybrids against (w - mean) / (std + 1e-5): scaling each output channel makes
    them equal, where a plain copy moves logits by 2e-5 to 5e-5.
    """
    return _trunk_kernels(weights, lambda var: TIMM_STD_VARIANCE**0.5 / (2 * STD_EPS * var.sqrt() + STD_EPS**2).sqrt())


def kernels_from_timm(weights: Weights) -> Weights:
    """Returns the weights whose trunk kernels do under Google's rule what the given ones do under timm's."""
    return _trunk_kernels(weights, lambda var: STD_EPS / ((var + TIMM_STD_VARIANCE).sqrt() - var.sqrt()))


def _trunk_kernels(weights: Weights, factor: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    def scaled(kernel: torch.Tensor) -> torch.Tensor:
        wide = kernel.double()
        variance, mean = torch.var_mean(wide, dim=(1, 2, 3), correction=0, keepdim=True)
        return ((wide - mean) * factor(variance)).float()

    tensors = {
        name: mapped(tensor, tensor.shape, scaled) if ".backbone." in name and len(tensor.shape) == 4 else tensor
        for name, tensor in weights.tensors.items()
    }
    return replace(weights, tensors=tensors)


def for_minus_one_to_one(weights: Weights) -> Weights:
    """Returns the weights for images in [-1, 1], where they were trained on (x - mean) / std with x in [0, 1].

    The patch convolution absorbs the difference, exactly, since patches have no padding. Raises UserError without one.
    """
    mean, std = weights.normalisation
    is_so = weights.normalisation.is_near(MINUS_ONE_TO_ONE)
    weights = replace(weights, **MINUS_ONE_TO_ONE._asdict())
    if is_so:
        return weights
    if not has_patch_convolution(weights.model):
        raise UserError(
            f"{weights.source}: expects images of mean {mean} and deviation {std}; the target has them in [-1, 1], and "
            "only a patch convolution can take over the difference"
        )
    kernel, bias = weights.tensors["patch_embed.proj.weight"], weights.tensors["patch_embed.proj.bias"]
    scale = (0.5 / torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
    shift = ((0.5 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
    turned = {
        "patch_embed.proj.weight": mapped(kernel, kernel.shape, lambda k: (k.double() * scale).float()),
        "patch_embed.proj.bias": LazyTensor(
            bias.shape, lambda: (bias.read().double() + (kernel.read().double() * shift).sum((1, 2, 3))).float()
        ),
    }
    return replace(weights, tensors={**weights.tensors, **turned})


def without_layer_scale(weights: Weights) -> Weights:
    """Returns the same function without LayerScale: a branch's last layer takes over the factors of its channels."""
    if weights.model.layer_scale is None:
        return weights
    tensors = {name: t for name, t in weights.tensors.items() if not name.endswith(".gamma")}
    for block in range(weights.model.shape.depth):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = weights.tensors[f"blocks.{block}.{scale}.gamma"]
            for name in (f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"):  # [D, ...]
                tensors[name] = mapped(tensors[name], tensors[name].shape, partial(_scaled_rows, gamma))
    return changed(weights, tensors, layer_scale=None)


def _scaled_rows(factors: LazyTensor, values: torch.Tensor) -> torch.Tensor:
    return (values.double() * factors.read().double().view(-1, *[1] * (values.dim() - 1))).float()


def has_patch_convolution(config: ModelConfig) -> bool:
    """Returns whether the first layer is a plain convolution with a bias: in every ViT of this package but hybrids."""
    return config.timm_name is None and config.trunk_units is None
