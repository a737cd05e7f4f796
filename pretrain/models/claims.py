"""Compares what a file claims of its model with fixed limits and with its tensors, before the model is built.

A config.json of a hundred bytes can ask for a million blocks, or for tables of positions larger than the memory.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from pretrain.config import MAX_CLASSES, MAX_WIDTH
from pretrain.errors import UserError
from pretrain.json_files import brief
from pretrain.models.build import outline
from pretrain.models.equivalent import own_tensors
from pretrain.models.tensors import LazyTensor, Weights, check_keys, readable
from pretrain.models.vit import grid_of

MAX_ARGUMENTS = 256  # values of a model's settings, those inside lists and objects too; timm's own have up to 60
MAX_LETTERS = 200  # of one of them
MAX_PATCHES = 1 << 16  # of an image: 4096 pixels in patches of 16; attention takes time and memory by their square
MAX_TABLE_BYTES = 256 << 20  # tables that are computed, not stored; relative offsets at 576 patches: 32 MB in 12 blocks


def check_arguments(values: Mapping[str, Any], source: str) -> None:
    """Raises UserError for settings of a model that no model has: too many, too long, numbers beyond every width."""
    level, count = list(values.items()), 0
    while level:
        count += len(level)
        if count > MAX_ARGUMENTS:
            raise UserError(f"{source}: has more than {MAX_ARGUMENTS} values, which no model takes")
        for key, value in level:
            if isinstance(value, str) and len(value) > MAX_LETTERS:
                raise UserError(f"{source}.{brief(key)}: has {len(value)} letters, expected at most {MAX_LETTERS}")
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{source}.{brief(key)} is {value}: references and resolvers are not allowed")
            if not isinstance(value, str | int | float | list | tuple | Mapping | None):
                raise UserError(f"{source}.{brief(key)} is a {type(value).__name__}, expected numbers and texts")
            # The code that builds a model adds up lists of depths.
            numbers = value if isinstance(value, list | tuple) else [value]
            largest = MAX_CLASSES if key == "num_classes" else MAX_WIDTH
            total = sum(abs(number) for number in numbers if isinstance(number, int | float))
            if not total <= largest:  # nor is NaN
                summed = "" if numbers is not value else " in all"
                raise UserError(f"{source}.{key} is {brief(value)}, expected at most {largest}{summed}")
        level = [
            (key, inner)
            for key, value in level
            if isinstance(value, list | tuple | Mapping)
            for inner in (value.values() if isinstance(value, Mapping) else value)
        ]


@contextmanager
def building(source: Path, num_tensors: int) -> Iterator[None]:
    """Limits the models that are built within, as a file describes them: no more modules and parameters than the
    tensors in the file can fill.

    Raises UserError as soon as there are more, and for whatever a library raises at what the file says.
    """
    left = 8 * num_tensors + 2000  # parameters and modules: a ViT has 3 for each tensor, and timm's may be built twice

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{source}: describes a far larger model than its {num_tensors} tensors are")

    with ExitStack() as hooks, readable(source, Exception):
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook):
            hooks.callback(register(count).remove)
        yield


def check_tensors(weights: Weights) -> None:
    """Raises UserError, naming a tensor, unless the weights are exactly those of their architecture.

    Nothing of the model's size is allocated for it.
    """
    if weights.model.timm_name is None and (patches := math.prod(grid_of(weights.model))) > MAX_PATCHES:
        raise UserError(f"{weights.source}: cuts images into {patches} patches, expected at most {MAX_PATCHES}")
    with building(weights.source, len(weights.tensors)):
        model = outline(weights.model, weights.num_classes)
    check_fit(own_tensors(model), weights.tensors, weights.source)
    saved = model.state_dict().keys()
    tables = [buffer for name, buffer in model.named_buffers() if name not in saved]
    if (num_bytes := sum(table.nbytes for table in tables)) > MAX_TABLE_BYTES:
        told = f"needs tables of {num_bytes:,} bytes beside its tensors, expected at most {MAX_TABLE_BYTES:,}"
        raise UserError(f"{weights.source}: {told}")


def check_fit(
    own: Mapping[str, torch.Tensor], given: Mapping[str, LazyTensor], source: Path, hints: Mapping[str, str] = {}
) -> None:
    """Raises UserError, naming one, unless a model's own tensors and the given ones have the same names and shapes.

    hints: what to do about a tensor of another shape, by name.
    """
    check_keys(source, found=given.keys(), needed=own.keys())
    for name, tensor in own.items():
        if tuple(tensor.shape) != given[name].shape:
            shapes = f"{given[name].shape}, expected {tuple(tensor.shape)}"
            raise UserError(f"{source}: {name} has shape {shapes}{hints.get(name, '')}")
        if tensor.is_floating_point() and not given[name].is_float:
            raise UserError(f"{source}: {name} holds whole numbers, expected floating-point numbers")
