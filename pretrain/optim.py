"""The optimizer's parameter groups and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Returns two groups: kernels with weight decay, everything else (biases, norms, cls, positions) without.

    Kernels are tensors of two and more dimensions named `*.weight`, as big_vision's mask `.*/kernel$`.
    """
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        is_kernel = parameter.ndim >= 2 and name.endswith(".weight")
        (kernels if is_kernel else others).append(parameter)
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW over the model's parameter groups; the rate is set before each step, see `learning_rate`."""
    fused = next(model.parameters()).is_cuda  # one kernel for all tensors: 1 % of a step on a GPU, same numbers
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused
    )


def learning_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    """Returns the rate of `step` (from 0; the first step of a warm-up has rate 0).

    The schedules of google-research/big_vision and vision_transformer: linear warm-up times cosine to 0, linear to
    `end_lr`, or rsqrt (base / sqrt(1 + (step - warmup) / timescale)).
    """
    warmup = config.warmup_steps
    warm = min(1.0, step / warmup) if warmup else 1.0
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
    if config.schedule == "cosine":
        rate = config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        rate = config.end_lr + (config.lr - config.end_lr) * (1 - progress)
    else:
        rate = config.lr / math.sqrt(1 + max(0, step - warmup) / config.timescale_steps)
    return warm * rate
