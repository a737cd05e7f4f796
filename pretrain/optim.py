"""The optimizers, their parameter groups, and the learning rate as a pure function of the step.

ZeRO cuts the weights into flat tensors, without the shapes of matrices. AdamW, SGD and Lion work element by element and
do not need them; LAMB needs norms of whole parameters, and is told where these are in the flat tensors.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from pretrain.config import OptimConfig

PIECE_ELEMENTS = 1 << 24  # per piece of an update: 64 MB for each temporary, however large the flat tensor


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head_decay_multiplier: float = 1.0,
    head: Collection[str] = (),
    rate_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Returns the groups: kernels with weight decay, the head's kernel with its multiple, everything else without.

    Kernels are tensors of two and more dimensions named `*.weight`, as big_vision's mask `.*/kernel$`: biases, norms,
    class tokens, probes and positions are not. The head (`head`: names of its tensors) has a group of its own only when
    its decay differs. `rate_scales` (1 where a tensor has none) become the groups' `lr_scale`, see `set_rate`: each
    different scale has its own set of groups. Empty groups are left out.
    """
    decays = {"kernels": weight_decay, "others": 0.0, "head": weight_decay * head_decay_multiplier}
    members: dict[tuple[float, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.endswith(".weight"):
            kind = "others"
        else:
            kind = "head" if name in head and head_decay_multiplier != 1.0 else "kernels"
        members.setdefault(((rate_scales or {}).get(name, 1.0), kind), []).append(parameter)
    return [
        {"params": members[scale, kind], "weight_decay": decay, "lr_scale": scale}
        for scale in sorted({scale for scale, _ in members})
        for kind, decay in decays.items()
        if (scale, kind) in members
    ]


def moment_dtypes(config: OptimConfig) -> dict[str, torch.dtype]:
    """Returns what the optimizer keeps per element, by name. The second moment is always float32 (Scaling ViT, 3.4)."""
    first = torch.bfloat16 if config.moment_dtype == "bf16" else torch.float32
    return {"exp_avg": first, "exp_avg_sq": torch.float32} if config.name in ("adamw", "lamb") else {"momentum": first}


def build_optimizer(
    config: OptimConfig,
    model: nn.Module,
    head: Collection[str] = (),
    rate_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Returns the optimizer over the model's parameter groups; `set_rate` gives them the rate before each step.

    head: names of the head's tensors, for `head_decay_multiplier`. rate_scales: by the names of tensors, for
    `layer_decay`; None: one rate for all.
    """
    groups = parameter_groups(
        model,
        config.weight_decay,
        head_decay_multiplier=config.head_decay_multiplier,
        head=head,
        rate_scales=rate_scales,
    )
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw" and config.moment_dtype == "fp32":
        # Fused: one pass over memory, on CPUs too; otherwise ten, with temporaries as large as the flat tensors.
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    moments = moment_dtypes(config)
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, moments=moments, betas=betas, eps=config.eps)
    settings: dict[str, dict[str, Any]] = {
        "adamw": {"update": adamw_update, "betas": betas, "eps": config.eps},
        "sgd": {"update": sgd_update, "momentum": config.momentum},
        "lion": {"update": lion_update, "betas": betas},
    }
    return ElementwiseOptimizer(groups, lr=config.lr, moments=moments, **settings[config.name])


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Calls `update(weights, gradients, moments, step, **group)` in place on pieces of each flattened parameter.

    Moments are kept in the dtypes of `moments`. `step` counts the steps from 1; it is kept on the CPU, so that
    reading it is no host sync.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        update: Callable[..., None],
        moments: dict[str, torch.dtype],
        **defaults: Any,
    ) -> None:
        super().__init__(groups, defaults)
        self._update, self._moments = update, moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        self._update_all()

    def _update_all(self) -> None:
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    state["step"] += 1
                    tensors = [parameter, parameter.grad, *(state[name] for name in self._moments)]
                    pieces = (tensor.view(-1).split(PIECE_ELEMENTS) for tensor in tensors)
                    for weights, gradients, *moments in zip(*pieces):
                        self._update(weights, gradients, moments, int(state["step"]), **options)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self._moments.items()}
        return state


class Pieces(NamedTuple):
    """Which pieces of the model's parameters a flat tensor holds."""

    spans: list[tuple[int, int]]  # first element and number of elements of each piece; the rest is padding
    numbers: torch.Tensor  # int64 [pieces], on the flat tensor's device: the index of each piece's parameter


class Lamb(ElementwiseOptimizer):
    """LAMB (arXiv 1904.00962) as in timm and apex (FusedLAMB): AdamW's step, decay included, times a trust ratio.

    The ratio is the norm of a whole parameter over that of its step, and 1 where either is 0; parameters without decay
    have no ratio. Each tensor counts as a whole parameter unless `share` has said what it holds. A step overwrites the
    gradients with its directions, to save a copy of all weights: DeepSpeed drops, zeroes or overwrites them afterwards.
    """

    def __init__(self, groups: list[dict[str, Any]], *, moments: dict[str, torch.dtype], **defaults: Any) -> None:
        super().__init__(groups, update=lamb_direction, moments=moments, **defaults)
        self._pieces: Mapping[torch.Tensor, Pieces] = {}
        self._num_parameters = 0
        self._add_up: Callable[[torch.Tensor], Any] | None = None

    def share(
        self,
        pieces: Mapping[torch.Tensor, Pieces],
        num_parameters: int,
        add_up: Callable[[torch.Tensor], Any] | None,
    ) -> None:
        """Tells which pieces of the model's `num_parameters` parameters the flat tensors hold.

        add_up: sums a tensor over the ranks, in place; None: one rank has all. It is called once in each step of groups
        that decay, even by a rank that owns nothing of them.
        """
        self._pieces, self._num_parameters, self._add_up = pieces, num_parameters, add_up

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, which becomes the direction of its step."""
        assert closure is None
        self._update_all()
        decaying: list[tuple[torch.Tensor, float]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["weight_decay"]:
                    decaying.append((parameter, group["lr"]))
                elif parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
        if decaying:
            self._step_by_ratio(decaying)

    def _step_by_ratio(self, decaying: list[tuple[torch.Tensor, float]]) -> None:
        """weights -= rate * ratio * direction, for tensors with their rates."""
        weights, directions, rates = list[torch.Tensor](), list[torch.Tensor](), list[float]()
        for flat, rate in decaying:
            assert flat.grad is not None
            for start, numel in self._pieces[flat].spans if self._pieces else [(0, flat.numel())]:
                weights.append(flat.view(-1).narrow(0, start, numel))
                directions.append(flat.grad.view(-1).narrow(0, start, numel))
                rates.append(rate)
        squares = _squares([*weights, *directions], decaying[0][0].device).view(2, -1)
        if self._add_up:
            numbers = torch.cat([self._pieces[flat].numbers for flat, _ in decaying])
            sums = squares.new_zeros(2, self._num_parameters).index_copy_(1, numbers, squares)
            self._add_up(sums)
            squares = sums.index_select(1, numbers)
        of_weights, of_directions = squares.sqrt()
        ratios = torch.where((squares > 0).all(0), of_weights / of_directions, 1.0).float()
        for piece, direction, ratio, rate in zip(weights, directions, ratios.unbind(), rates):
            piece.addcmul_(direction, ratio, value=-rate)


def _squares(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of squares of each tensor, float64 [tensors]."""
    if not tensors:  # this rank owns nothing of the group
        return torch.zeros(0, dtype=torch.float64, device=device)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)  # type: ignore[attr-defined]  # torch hides it
    return torch.stack(norms).square_()


def lamb_direction(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    moments: list[torch.Tensor],
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **_: Any,
) -> None:
    """Overwrites the gradients with the direction of AdamW's step, decay included; the weights do not change."""
    updated, root = _adam_moments(gradients, moments, step, betas, eps)
    torch.mul(weights, weight_decay, out=gradients).addcdiv_(updated, root, value=1 / (1 - betas[0] ** step))


def adamw_update(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    moments: list[torch.Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **_: Any,
) -> None:
    """Adam with decoupled weight decay (torch's convention); the first moment has any dtype, the second one float32."""
    updated, root = _adam_moments(gradients, moments, step, betas, eps)
    weights.mul_(1 - lr * weight_decay).addcdiv_(updated, root, value=-lr / (1 - betas[0] ** step))


def _adam_moments(
    gradients: torch.Tensor, moments: list[torch.Tensor], step: int, betas: tuple[float, float], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Updates Adam's moments; returns new tensors: the first, and the root of the bias-corrected second one plus eps.

    The first one is returned before it is rounded to its dtype, as optax's scale_by_adam(mu_dtype) uses it.
    """
    first, second = moments
    updated = gradients.mul(1 - betas[0]).add_(_decayed(first, betas[0]))
    first.copy_(updated)
    second.mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    return updated, second.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)


def sgd_update(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    moments: list[torch.Tensor],
    step: int,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    **_: Any,
) -> None:
    """SGD with momentum, m = momentum * m + g, without Nesterov; the decay is decoupled, unlike in torch's SGD."""
    (kept,) = moments
    updated = gradients + _decayed(kept, momentum)
    kept.copy_(updated)
    weights.mul_(1 - lr * weight_decay).add_(updated, alpha=-lr)


def lion_update(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    moments: list[torch.Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    **_: Any,
) -> None:
    """Lion (arXiv 2302.06675, Algorithm 2): the sign of an interpolation of momentum and gradient, decoupled decay."""
    (kept,) = moments
    direction = gradients.mul(1 - betas[0]).add_(_decayed(kept, betas[0])).sign_()
    weights.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
    kept.copy_(direction.copy_(gradients).mul_(1 - betas[1]).add_(_decayed(kept, betas[1])))


def _decayed(moment: torch.Tensor, beta: float) -> torch.Tensor:
    """beta * moment, in the moment's dtype. In bfloat16 beta is rounded too, 0.9 to 0.8984375, as in Google's code."""
    return moment * _rounded(beta, moment.dtype)


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=dtype))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group the step's rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    """Returns the rate of `step` (from 0; the first step of a warm-up has rate 0).

    The schedules of google-research/big_vision (utils.create_learning_rate_schedule) and vision_transformer: a linear
    warm-up, times the schedule, times a linear cooldown to 0 over the last `cooldown_steps`.
    """
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    warm = min(1.0, step / warmup) if warmup else 1.0
    cool = min(1.0, (total_steps - step) / cooldown) if cooldown else 1.0
    return warm * _scheduled_rate(config, total_steps, step) * cool


def _scheduled_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    warmup = config.warmup_steps
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
    if config.schedule == "cosine":
        return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.end_lr + (config.lr - config.end_lr) * (1 - progress) ** config.power
    if config.schedule == "rsqrt":
        return config.lr / math.sqrt(1 + (max(0, step - warmup) + config.shift_steps) / config.timescale_steps)
    if config.schedule == "stair":
        passed = [factor for at, factor in zip(config.stair_steps, config.stair_multipliers) if step >= at]
        return config.lr * (passed[-1] if passed else 1.0)
    return config.lr
