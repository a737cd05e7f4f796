"""Computes the blocks' linear layers in fp8 with torchao: activations and weights in e4m3, output gradients in e5m2.

Each tensor has one scale, from its own largest value in this step. The parameters themselves do not change, so neither
ZeRO nor a checkpoint is affected. Weight gradients are still computed in bf16: they are sums over tokens, of which fp8
needs a multiple of 16 (an image has 197), and all of the rounding would reach the optimizer.

torchao rather than our own function over torch._scaled_mm: it compiles to one graph and avoids a bug in Triton that
stores NaN in compiled fp8 (triton-lang/triton#11111), which no test on a CPU would catch.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.errors import UserError

_LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def check_fp8(config: Config) -> None:
    """Raises UserError if engine.fp8 is set and this machine lacks what it needs. CPUs can compute it, slowly."""
    if not config.engine.fp8:
        return
    if find_spec("torchao") is None:
        raise UserError("engine.fp8=true: torchao is not installed; pip install 'torchao>=0.18', or engine.fp8=false")
    if ranks.has_gpu() and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        raise UserError(
            f"engine.fp8=true: {torch.cuda.get_device_name()} cannot multiply in fp8, which needs compute "
            "capability 8.9 (H100, H200, L40S, RTX 4090); set engine.fp8=false"
        )


def train_in_fp8(model: nn.Module) -> None:
    """Makes the linear layers of a ViT's blocks compute in fp8 in training; in evaluation they compute as before."""
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]  # optional, and takes seconds to import
        CastConfig,
        Float8LinearConfig,
        ScalingType,
        convert_to_float8_training,
    )

    as_it_is = ScalingType.DISABLED
    settings = Float8LinearConfig(
        cast_config_input_for_grad_weight=CastConfig(as_it_is, target_dtype=torch.float8_e4m3fn),
        cast_config_grad_output_for_grad_weight=CastConfig(as_it_is, target_dtype=torch.float8_e5m2),
    )
    blocks = model.get_submodule("blocks")
    convert_to_float8_training(blocks, config=settings)
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    kind = _only_in_training(type(layers[0]))
    for layer in layers:
        layer.__class__ = kind


def _only_in_training(kind: type[nn.Linear]) -> type[nn.Linear]:
    """A subclass of `kind`, torchao's linear layer, that is a plain linear layer in evaluation."""

    class OnlyInTraining(kind):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if self.training else F.linear(input, self.weight, self.bias)

    return OnlyInTraining
