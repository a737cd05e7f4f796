"""DeepSpeed around the model: precision, ZeRO 1-3, accumulation, clipping, and the slices of a checkpoint.

The only file that knows DeepSpeed. What it reads of DeepSpeed's inside is named in `_owned_parts` and `load`, holds for
the tested version alone, and is guarded by `check` after initialisation, before each save and after each load.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: no search for one, no warning

import deepspeed
from deepspeed.accelerator import get_accelerator

from pretrain.checkpoint.layout import Slice
from pretrain.checkpoint.read import CheckpointReader, check_names
from pretrain.cluster import agreement, ranks
from pretrain.config import Config
from pretrain.data.images import to_float
from pretrain.data.loader import Batch
from pretrain.data.order import BatchPlan
from pretrain.errors import UserError
from pretrain.losses import num_correct, per_image_loss
from pretrain.models.build import compile_blocks
from pretrain.models.weights import classifier_names
from pretrain.optim import PIECE_ELEMENTS, build_optimizer, moment_dtypes

TESTED_VERSION = "0.19.8"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's fp16 loss scaler


def deepspeed_config(config: Config, plan: BatchPlan, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, derived from ours; every key that we rely on is written out.

    Defaults are no help: unknown keys are ignored silently, and clipping is 1.0 when it is not named.
    """
    precision = config.engine.precision
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch * plan.accumulation * world_size,  # masked slots included
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        # Several bf16 micro-batches are added up in float32: bf16 would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32" if plan.accumulation > 1 and precision == "bf16" else None},
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": False,
            "round_robin_gradients": False,  # makes the map of owned slices wrong
            "reduce_scatter": True,
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def check_precision(config: Config) -> None:
    """Raises UserError when DeepSpeed would refuse the precision on this machine, as fp16 on most CPUs."""
    accelerator: Any = get_accelerator()  # its types say None
    precision = config.engine.precision
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        device = torch.cuda.get_device_name() if accelerator.device_name() == "cuda" else "this CPU"
        others = "bf16 or fp32" if precision == "fp16" else "fp16 or fp32"
        raise UserError(f"engine.precision={precision}: {device} has no instructions for it; choose {others}")


class StepResult(NamedTuple):
    """What a training step tells. `sums` stays on the device until it is logged: reading it waits for the device."""

    sums: torch.Tensor  # float64 [3]: loss, correct answers, valid images, added up over this rank's share
    grad_norm: Any  # global, before clipping; a number or a tensor; meaningless when not applied
    applied: bool  # False: not finite somewhere, so skipped on all ranks


@dataclass(frozen=True)
class _Part:
    """A piece of a parameter that this rank owns, inside a flat float32 tensor that the optimizer steps on."""

    name: str
    shape: tuple[int, ...]
    offset: int  # in the flattened parameter
    flat: torch.Tensor
    start: int  # in `flat`
    numel: int
    model_values: torch.Tensor  # the same elements as the model holds them, in its precision

    def slice_of(self, flat: torch.Tensor, prefix: str = "") -> Slice:
        values = flat.detach().view(-1).narrow(0, self.start, self.numel)
        return Slice(prefix + self.name, self.shape, self.offset, values)


class Engine:
    """A model that trains. Built on all ranks from equal weights."""

    def __init__(self, model: nn.Module, config: Config, plan: BatchPlan, device: torch.device) -> None:
        if deepspeed.__version__ != TESTED_VERSION:
            raise UserError(
                f"deepspeed is {deepspeed.__version__}, but checkpoints read its inside: install {TESTED_VERSION}"
            )
        check_precision(config)
        self.plan, self.device = plan, device
        self.dtype = DTYPES[config.engine.precision]
        self._loss, self._label_smoothing, self._stage = config.loss, config.label_smoothing, config.engine.zero_stage
        # Each rank's gradient is averaged over ranks and micro-batches; this makes each image weigh 1 / global_batch,
        # however uneven the split (docs/training.md).
        self._loss_weight = ranks.world_size() * plan.accumulation / config.data.global_batch
        model.to(device)
        if config.engine.checkpoint_activations:
            _checkpoint_activations(model)
        if config.engine.compile:
            compile_blocks(model)
        optimizer = build_optimizer(config.optim, model, classifier_names(model))
        self.deepspeed_config = deepspeed_config(config, plan, ranks.world_size())
        _without_compiler()
        rounded = self.dtype != torch.float32
        exact = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if rounded}
        # Any: what this file uses of them is DeepSpeed's inside, which its types do not tell.
        engine, zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.deepspeed_config, dist_init_required=False
        )
        self._engine: Any = engine
        self._zero: Any = zero
        self._optimizer: Any = self._zero.optimizer
        self._module = model
        self._moments = moment_dtypes(config.optim)
        ranks.set_timeouts(config.engine.timeout_s)  # DeepSpeed has made groups of its own
        self._set_optimizer_state(step=0)
        if rounded:
            self._start_from(exact)
        self._average_decay = config.optim.average_decay
        # Of the initial weights; by the flat tensor that they are the average of.
        kept = self._flat_tensors() if self._average_decay else []
        self._averages = {flat: flat.detach().clone() for flat in kept}
        self.check()

    @torch.no_grad()
    def _start_from(self, exact: dict[str, torch.Tensor]) -> None:
        """Makes the master weights the given float32 ones: DeepSpeed takes them from the model's, rounded already."""
        for part in self.weights():
            part.values.copy_(exact[part.name].view(-1).narrow(0, part.offset, part.values.numel()))
        self._refresh_model()

    # --- training ---

    def train_step(self, batch: Batch, lr: float) -> StepResult:
        """Takes one optimizer step on this rank's share of a global batch, micro-batch by micro-batch."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for micro in batch.split(self.plan.micro_batch):
            logits = self._engine(to_float(micro.images, self.dtype))
            target = micro.labels, micro.label_weights
            losses = per_image_loss(logits, *target, self._loss, self._label_smoothing)
            loss = torch.where(micro.valid, losses, 0.0).sum()
            self._engine.backward(_poison_unless_finite(loss) * self._loss_weight)
            self._engine.step()
            with torch.no_grad():
                sums += torch.stack([loss, num_correct(logits, *target, micro.valid), micro.valid.sum()])
        applied = self._engine.was_step_applied()
        if applied:
            self._update_averages()
        return StepResult(sums, self._engine.get_global_grad_norm(), applied)

    @torch.no_grad()
    def _update_averages(self) -> None:
        for flat, average in self._averages.items():
            average.lerp_(flat, 1 - self._average_decay)  # decay * average + (1 - decay) * weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights, if any are kept, into the model, and the trained ones back, bit for bit.

        A collective. An error inside leaves the averages in the model: the ranks may not have met it together, and
        nothing of such a run is saved.
        """
        self._swap_averages()
        yield
        self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        for flat, average in self._averages.items():
            for weights, averages in zip(flat.view(-1).split(PIECE_ELEMENTS), average.view(-1).split(PIECE_ELEMENTS)):
                kept = weights.clone()  # a piece at a time: no second copy of all weights
                weights.copy_(averages)
                averages.copy_(kept)
        if self._averages:
            self._refresh_model()
            self.check()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of uint8 images [B, 3, H, W], without dropout. A collective under ZeRO-3."""
        self._engine.eval()
        return self._engine(to_float(images, self.dtype))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the head's input for uint8 images [B, 3, H, W], [B, D], without dropout. A collective under ZeRO-3.

        Through the whole forward pass: ZeRO-3 gathers weights where modules are called, and no other way is as safe.
        """
        self._engine.eval()
        inputs: list[torch.Tensor] = []
        note = _head_of(self._module).register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(1)))
        with torch.compiler.set_stance("force_eager"):  # compiled code does not look for a hook
            self._engine(to_float(images, self.dtype))
        note.remove()
        (found,) = inputs
        return found

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale, None in other precisions."""
        return float(self._zero.loss_scaler.cur_scale) if self.dtype == torch.float16 else None

    # --- what a checkpoint holds ---

    def weights(self) -> list[Slice]:
        """Returns the float32 master weights that this rank owns; views, to be written or filled."""
        return [part.slice_of(part.flat) for part in self._owned_parts()]

    def moments(self) -> list[Slice]:
        """Returns the optimizer's moments of the same slices, named MOMENT/PARAMETER; views."""
        states = self._optimizer.state
        return [part.slice_of(states[part.flat][m], f"{m}/") for part in self._owned_parts() for m in self._moments]

    def averages(self) -> list[Slice]:
        """Returns the Polyak averages of the same slices, none when they are not kept; views."""
        return [part.slice_of(self._averages[part.flat]) for part in self._owned_parts() if self._averages]

    def state(self) -> dict[str, Any]:
        """Returns what is not a tensor: the optimizer's step count and the loss scaler."""
        steps = {float(self._optimizer.state[flat]["step"]) for flat in self._flat_tensors()}
        assert len(steps) <= 1, steps
        scaler = self._zero.loss_scaler if self.dtype == torch.float16 else None
        return {
            "optimizer_step": max(agreement.gather(max(steps, default=0.0))),
            "loss_scaler": {name: getattr(scaler, name) for name in _SCALER_STATE} if scaler else None,
        }

    def generators(self) -> dict[str, torch.Tensor]:
        """Returns the states of the random generators that dropout draws from."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def load(self, reader: CheckpointReader, state: dict[str, Any]) -> None:
        """Restores weights, moments, averages and `state` from a checkpoint of any world size and ZeRO stage."""
        self._set_optimizer_state(step=state["optimizer_step"], clear_weights=True)
        self._fill(reader, self.weights(), "weights")
        self._fill(reader, self.moments(), "optimizer")
        if self._averages:
            self._fill(reader, self.averages(), "average")
        for name, value in (state["loss_scaler"] or {}).items():
            if self.dtype == torch.float16:
                setattr(self._zero.loss_scaler, name, value)
        self._refresh_model()
        self.check()

    def load_generators(self, states: dict[str, torch.Tensor]) -> bool:
        """Restores random states; returns False when there are none for this rank and device."""
        if "cpu" not in states or (self.device.type == "cuda" and "cuda" not in states):
            return False
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)
        return True

    def check(self) -> None:
        """Asserts that the model holds what the owned slices say, rounded: DeepSpeed's maps have been wrong before."""
        for part in self._owned_parts():
            owned = part.slice_of(part.flat).values
            assert torch.equal(part.model_values, owned.to(part.model_values.dtype)), (
                f"{part.name}: the owned float32 slice is not what the model holds"
            )

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self._engine.destroy()

    def _fill(self, reader: CheckpointReader, parts: list[Slice], kind: str) -> None:
        names = [name for name, _ in self._engine.module.named_parameters()]
        prefixes = [f"{moment}/" for moment in self._moments] if kind == "optimizer" else [""]
        check_names(reader, [prefix + name for prefix in prefixes for name in names], kind)
        for part in parts:
            reader.read_into(part, kind)

    def _owned_parts(self) -> list[_Part]:
        parts = (self._owned_part(name, p) for name, p in self._engine.module.named_parameters())
        return [part for part in parts if part is not None]

    def _owned_part(self, name: str, parameter: Any) -> _Part | None:
        if self._stage == 3:  # each parameter is cut into equal pieces, the last ones padded
            sub_group, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            offset = self._zero._get_param_partition_rank(parameter) * size
            numel = max(0, min(size, parameter.ds_numel - offset))
            flat, shape = self._zero.fp32_partitioned_groups_flat[sub_group], tuple(parameter.ds_shape)
            held = parameter.ds_tensor.detach().view(-1)[:numel]
        else:  # each group of parameters is one flat tensor, cut into equal pieces
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
            offset, start, numel = (
                mapping.lp_fragment_address.start,
                mapping.hp_fragment_address.start,
                mapping.lp_fragment_address.numel,
            )
            shape = tuple(parameter.shape)
            held = parameter.detach().view(-1)[offset : offset + numel]
        return _Part(name, shape, offset, flat, start, numel, held) if numel else None

    def _flat_tensors(self) -> list[torch.Tensor]:
        if self._stage == 3:  # param_groups are empty between steps
            return list(self._zero.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def _set_optimizer_state(self, step: float, clear_weights: bool = False) -> None:
        """Makes zero moments and the step count, which the optimizer itself would make in its first step only."""
        group = self._optimizer.param_groups[0]
        for flat in self._flat_tensors():
            state = self._optimizer.state[flat]
            on_device = group.get("fused") or group.get("capturable")  # keys of torch's AdamW
            state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")
            for name, dtype in self._moments.items():  # existing tensors are kept: DeepSpeed has views of them
                state[name].zero_() if name in state else state.__setitem__(name, torch.zeros_like(flat, dtype=dtype))
            if clear_weights:
                flat.data.zero_()  # padding is uninitialised memory

    def _refresh_model(self) -> None:
        """Makes the model hold the master weights, rounded to its precision."""
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()
        else:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._zero.update_lp_params()


def _head_of(model: nn.Module) -> nn.Module:
    """The module that turns features into logits."""
    return model.get_submodule(min(classifier_names(model)).rpartition(".")[0])


def _poison_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """Returns the loss, or NaN where it is not finite, so that its gradients are NaN and every rank skips the step.

    An infinite loss can have finite gradients. No communication, no waiting for the device.
    """
    return loss * torch.where(loss.isfinite(), 1.0, float("nan"))


def _checkpoint_activations(model: nn.Module) -> None:
    if hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing()  # type: ignore[operator]
    else:
        model.checkpoint_activations = True  # type: ignore[assignment]


def _without_compiler() -> None:
    """Keeps DeepSpeed from compiling its shared-memory op on CPUs, which takes a minute and a compiler; gloo serves."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
