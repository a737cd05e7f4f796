"""From a model's config to an initialised `nn.Module`: the ViT of this package, or any model of timm."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pretrain.config import ModelConfig
from pretrain.errors import ConfigError
from pretrain.models.vit import VisionTransformer, init_parameter, init_weights

# Each call yields the names and float32 values of a model's parameters, one at a time, in the model's order.
Values = Callable[[], Iterator[tuple[str, torch.Tensor]]]

_TIMM_RATES = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}  # what timm calls them -> fields of ModelConfig


def build_model(config: ModelConfig, num_classes: int, seed: int = 0) -> nn.Module:
    """Returns the model in float32 on the CPU, the same weights on every rank for one seed.

    Raises ConfigError when timm does not know `timm:NAME`.
    """
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator: leave it as it was
        if config.timm_name is not None:
            return _build_timm(config, num_classes, seed)
        model = VisionTransformer(config, num_classes)
    init_weights(model, config, torch.Generator().manual_seed(seed))
    return model


def outline(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the model on "meta": names, shapes and types of its tensors, without their memory or values.

    Raises ConfigError when timm does not know `timm:NAME`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if config.timm_name is not None:
            return _build_timm(config, num_classes, seed=0)
        return VisionTransformer(config, num_classes)


def build_without_values(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the model with its parameters on "meta", its buffers on the CPU; for `drawn_values` to fill. Not timm's.

    The constructor makes one parameter at a time, and its memory is freed before the next one.
    """
    assert config.timm_name is None, "timm's constructors draw their values"

    def without_value(module: nn.Module, name: str, made: nn.Parameter) -> Any:
        return nn.Parameter(made.to("meta"))

    hook = register_module_parameter_registration_hook(without_value)
    try:
        return VisionTransformer(config, num_classes)
    finally:
        hook.remove()


def drawn_values(model: nn.Module, config: ModelConfig, seed: int) -> Values:
    """Returns the values that `build_model` would give the model's parameters."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # before ZeRO 3 partitions them

    def draw() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.empty(shape)
            init_parameter(name, value, config, generator)
            yield name, value

    return draw


def zero_values(model: nn.Module) -> Values:
    """Returns zeros for the model's parameters: what they are until a checkpoint is loaded."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return lambda: ((name, torch.zeros(shape)) for name, shape in shapes.items())


def held_values(model: nn.Module) -> Values:
    """Returns the values that the model's parameters have now; views, no copies."""
    held = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    return lambda: iter(held)


def _build_timm(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    import timm  # 2 s to import: only where it is used

    assert config.timm_name is not None
    if config.timm_name not in timm.list_models():
        near = timm.list_models(f"*{config.timm_name}*")[:3]
        near = near or difflib.get_close_matches(config.timm_name, timm.list_models())
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise ConfigError(f"model.name: timm has no model {config.timm_name!r}{hint}")
    options = timm_options(config)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' state, too
    try:
        return timm.create_model(config.timm_name, num_classes=num_classes, **options)
    except TypeError as error:  # for options that some constructors do not take
        key = next((ours for theirs, ours in _TIMM_RATES.items() if f"'{theirs}'" in str(error)), None)
        if key is None:
            raise
        raise ConfigError(f"model.{key}: timm's {config.timm_name} has none; leave it at 0") from None


def timm_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the arguments, beyond the class count, with which timm builds `config`'s model."""
    assert config.timm_name is not None
    size = config.image_size
    options: dict[str, Any] = {"img_size": size} if _takes_image_size(config.timm_name, size) else {}
    return options | {theirs: rate for theirs, ours in _TIMM_RATES.items() if (rate := getattr(config, ours))}


def _takes_image_size(name: str, image_size: int) -> bool:
    """Whether timm's model takes img_size, as transformers do; convolutional networks take any image and refuse it.

    Only building the model tells, its name does not. On "meta" that takes some 50 ms and no memory.
    """
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return False
    return True


def compile_blocks(model: nn.Module, *, tuned: bool = False) -> None:
    """Compiles each block of a ViT on its own: seconds instead of minutes, and parameter names stay as they are.

    Each batch size has its own code; there are two, training's and evaluation's, to which batches are filled up.
    Otherwise the second would be compiled for any size, and a run that resumes with a validation would train with other
    kernels.

    timm's blocks draw their stochastic depth inside, and stages differ: each may be its own graph, for both sizes.

    tuned: with the fastest of several kernels, which the compiler times. Not with CUDA graphs: each block would need
    one, and its gradients, in the graph's memory, would be overwritten while DeepSpeed still holds them.
    """
    mode = "max-autotune-no-cudagraphs" if tuned else None
    blocks = getattr(model, "blocks", None)
    parts = list(blocks) if isinstance(blocks, nn.Sequential) else [model]
    if not isinstance(model, VisionTransformer):
        limit = 2 * len(parts) + 2  # beyond it the compiler silently leaves blocks uncompiled
        torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    for module in parts:
        module.compile(dynamic=False, mode=mode)
