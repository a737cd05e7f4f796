"""The training step with DeepSpeed: accumulation, clipping, weight averages, and the state for a checkpoint.

DeepSpeed clips the gradient and steps the optimizer inside `self._engine.step()`, as settings.py configures it.
slices.py knows where its slices of weights and moments are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import nn

from pretrain.checkpoint.layout import Slice
from pretrain.checkpoint.read import CheckpointReader, check_names
from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import Config
from pretrain.data.images import to_float
from pretrain.data.loader import Batch
from pretrain.data.order import BatchPlan
from pretrain.engine.ahead import CopyAhead
from pretrain.engine.clock import ForwardClock
from pretrain.engine.compiling import compiles, keep_compiled, start_compilers
from pretrain.engine.device_memory import (
    LAYERS,
    fitting,
    never_fits,
    no_longer_fits,
    raised_as_out_of_memory,
)
from pretrain.engine.filling import fill
from pretrain.engine.fp8 import train_in_fp8
from pretrain.engine.frozen import FrozenStatistics
from pretrain.engine.host_memory import keep_freed_memory
from pretrain.engine.kernels import choose_kernels
from pretrain.engine.layers import MAX_IMAGES, LargestLogits, LayerNorms
from pretrain.engine.patches import after_start, before_start
from pretrain.engine.settings import DTYPES, MIN_LOSS_SCALE, check_precision, deepspeed_config, told_of_overlap
from pretrain.engine.slices import OwnedSlices
from pretrain.engine.versions import reading_inside, step_is_known
from pretrain.errors import ConfigError, UserError
from pretrain.losses import num_correct, per_image_loss
from pretrain.models.build import Values, compile_blocks, held_values
from pretrain.models.profile import num_parameters
from pretrain.models.rates import rate_scales
from pretrain.models.vit import VisionTransformer
from pretrain.models.weights import classifier_names
from pretrain.optim import PIECE_ELEMENTS, Lamb, build_optimizer, moment_dtypes, set_rate

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's fp16 loss scaler


class StepResult(NamedTuple):
    """What a training step reports. `sums` stays on the device until it is logged: reading it waits for the device."""

    sums: torch.Tensor  # float64 [3]: loss, correct answers, valid images, added up over this rank's share
    grad_norm: Any  # global, before clipping; a number or a tensor; meaningless when not applied
    applied: bool  # False: not finite somewhere, so skipped on all ranks
    searches_scale: bool = False  # fp16: with a loss scale that could still be lowered


class Engine:
    """A model in training. All ranks build it from equal weights.

    values: initial values of a model on "meta", iterated twice if it trains in lower precision; None: the model's own.
    """

    def __init__(
        self, model: nn.Module, config: Config, plan: BatchPlan, device: torch.device, values: Values | None = None
    ) -> None:
        check_precision(config)
        told_of_kernels = choose_kernels(config, device)
        self.plan, self.device, self.ahead = plan, device, CopyAhead(device)
        self.mark: Callable[[str], AbstractContextManager[Any]] = nullcontext  # around the parts of a step, for a trace
        self._forward_clock: AbstractContextManager[Any] = nullcontext()
        self._fits = False  # whether a micro-batch has fitted into the GPU's memory
        self.dtype = DTYPES[config.engine.precision]
        self._loss = config.loss, config.label_smoothing, config.label_threshold  # last arguments of per_image_loss
        self._normalisation = config.data.normalisation
        # DeepSpeed averages gradients over ranks and micro-batches; this makes each image weigh 1 / global_batch,
        # however uneven the split (docs/training.md).
        self._loss_weight = ranks.world_size() * plan.accumulation / config.data.global_batch
        self.num_parameters = num_parameters(model)  # before ZeRO 3 partitions them
        if config.engine.checkpoint_activations:
            _checkpoint_activations(model)
        if config.engine.fp8:
            train_in_fp8(model)
        self.compiled, told_of_compiling = compiles(config, device)
        if self.compiled:
            keep_compiled()
            start_compilers()
            compile_blocks(model, tuned=config.engine.compile == "max-autotune")
        self._frozen = FrozenStatistics(model)
        decay = config.optim.layer_decay
        scales = rate_scales(model, decay) if decay < 1 else None
        optimizer = build_optimizer(config.optim, model, classifier_names(model), scales)
        largest = max(parameter.numel() for parameter in model.parameters())
        self.deepspeed_config = deepspeed_config(config, plan, ranks.world_size(), largest, self.num_parameters)
        told = told_of_compiling, told_of_kernels, told_of_overlap(config, plan, ranks.world_size())
        self.told = [line for line in told if line]
        before_start()
        values = values or held_values(model)
        with reading_inside():
            fill(model, values, self.dtype, device, self.deepspeed_config)
        if self.dtype == torch.float32:
            values = None  # exact already: no second pass, and no need to hold the old values
        # Any: this file uses DeepSpeed's internals, which its types do not cover.
        engine, zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.deepspeed_config, dist_init_required=False
        )
        self._engine: Any = engine
        self._zero: Any = zero
        self._module = model
        self._moments = moment_dtypes(config.optim)
        self._average_decay = config.optim.average_decay
        with reading_inside():
            self._finish_start(config, values)

    def _finish_start(self, config: Config, exact: Values | None) -> None:
        """Patches DeepSpeed's step, and creates the optimizer state, exact master weights and averages.

        Reads all of DeepSpeed's internals that a checkpoint or a resume will read, to refuse what it cannot read now.
        """
        self._optimizer: Any = self._zero.optimizer
        self._frozen.refresh_model(self.dtype)
        self._owned = OwnedSlices(self._module, self._zero, config.engine.zero_stage, self._moments)
        names = [name for name, _ in self._module.named_parameters()]
        self.layers = LayerNorms(self._owned, self._optimizer, names)
        if isinstance(self._optimizer, Lamb):
            self._owned.tell_pieces(self._optimizer)
        after_start(config.engine.timeout_s, self._zero)
        self._engine.eval()  # so that train_step switches to training, and freezes the statistics
        self._owned.set_optimizer_state(step=0)
        if exact:
            self._start_from(exact)
        elif not step_is_known():
            self._owned.refresh_model()  # a release that cannot do it is refused now, not at the first resume
        # They start as the initial weights; each is keyed by the flat tensor whose average it is.
        kept = self._owned.flat_tensors() if self._average_decay else []
        self._averages = {flat: flat.detach().clone() for flat in kept}
        self.state()
        self.check()
        if self.device.type == "cpu":
            keep_freed_memory()  # not sooner: what the start frees is not needed again

    @torch.no_grad()
    def _start_from(self, exact: Values) -> None:
        """Sets the master weights to exact float32 values: DeepSpeed takes them from the model, which is rounded."""
        trained = {part.name: part for part in self._trained()}
        for name, value in exact():
            if name in trained:  # this rank owns something of it
                part = trained[name]
                part.values.copy_(value.view(-1).narrow(0, part.offset, part.values.numel()))
        self._owned.refresh_model()

    # --- training ---

    def train_step(self, batch: Batch, lr: float) -> StepResult:
        """Takes one optimizer step on this rank's share of a global batch, micro-batch by micro-batch.

        Raises DeviceMemoryError, on this rank alone, when the GPU's memory does not hold a micro-batch. If it has
        held one before, the size is not to blame, and another try may succeed: exit code 75.
        """
        try:
            with raised_as_out_of_memory():
                result = self._train_step(batch, lr)
            self._fits = True
            return result
        except torch.OutOfMemoryError as error:
            told = no_longer_fits if self._fits else never_fits
            raise told(self.plan.micro_batch, error) from error

    def _train_step(self, batch: Batch, lr: float) -> StepResult:
        set_rate(self._optimizer, lr)
        if not self._module.training:  # train() visits every module
            self._engine.train()
            self._frozen.freeze()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        searches_scale = (self.loss_scale or 0) > MIN_LOSS_SCALE
        for micro in batch.split(self.plan.micro_batch):
            with self.mark("forward"):
                images = to_float(micro.images, self.dtype, self._normalisation)
                with self._forward_clock:
                    logits = self._engine(images)
                target = micro.labels, micro.label_weights
                losses = per_image_loss(logits, *target, *self._loss)
                loss = torch.where(micro.valid, losses, 0.0).sum()
            with self.mark("backward"):
                self._engine.backward(_poison_unless_finite(loss) * self._loss_weight)
            with self.mark("optimizer"):
                self._engine.step()
            with torch.no_grad():
                sums += torch.stack([loss, num_correct(logits, *target, micro.valid), micro.valid.sum()])
        applied = self._engine.was_step_applied()
        if applied:
            self._update_averages()
        return StepResult(sums, self._engine.get_global_grad_norm(), applied, searches_scale)

    @torch.no_grad()
    def _update_averages(self) -> None:
        for flat, average in self._averages.items():
            average.lerp_(flat, 1 - self._average_decay)  # decay * average + (1 - decay) * weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights, if any, into the model, and at the end the trained ones back, bit for bit.

        A collective. An error inside leaves the averages in the model: other ranks may not have the same error, and
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
            self._owned.refresh_model()
            self.check()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of uint8 images [B, 3, H, W], without dropout. A collective under ZeRO-3.

        Raises DeviceMemoryError, on this rank alone, when the GPU's memory does not hold them; so does `features`.
        """
        with fitting("evaluation.batch_size", len(images)):
            return self._logits(images)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        self._engine.eval()
        return self._engine(to_float(images, self.dtype, self._normalisation))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the head's input for uint8 images [B, 3, H, W], [B, D], without dropout. A collective under ZeRO-3.

        Runs the whole forward pass: ZeRO-3 gathers weights where modules are called, and no other way is as safe.
        """
        inputs: list[torch.Tensor] = []
        head = _head_of(self._module)
        with head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(1))):
            # Compiled code would not call the hook.
            with torch.compiler.set_stance("force_eager"), fitting("evaluation.batch_size", len(images)):
                self._logits(images)
        (found,) = inputs
        return found

    @torch.no_grad()
    def layer_numbers(self, batch: Batch, result: StepResult) -> dict[str, float]:
        """Returns the layers' norms in the step that `self.layers` has watched, and the largest attention logits.

        The logits are from an extra forward pass with the new weights, on the rank's first images, without dropout;
        attentions are numbered in the order of their calls. A collective. Waits for the device.
        """
        numbers = self.layers.read(result.grad_norm if result.applied else None)
        most = min(MAX_IMAGES, self.plan.micro_batch, int(batch.valid.sum()))
        images = batch.images[batch.valid][:most] if most else batch.images[:1]  # every rank has to take part
        # Compiled code would bypass LargestLogits.
        with torch.compiler.set_stance("force_eager"), LargestLogits() as largest, fitting(LAYERS, len(images)):
            self._logits(images.to(self.device))
        own = watchdog.from_device(lambda: torch.stack(largest.found).tolist()) if largest.found else []
        of_ranks = agreement.gather(own)
        return numbers | {f"layers/attention.{n}/max_logit": max(logits) for n, logits in enumerate(zip(*of_ranks))}

    def on_forward(self, note: Callable[[float], None]) -> None:
        """Makes each training forward pass give its seconds to `note`, on a GPU those of an earlier pass."""
        self._forward_clock = ForwardClock(note, self.device)

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale, None in other precisions."""
        return float(self._zero.loss_scaler.cur_scale) if self.dtype == torch.float16 else None

    # --- what a checkpoint holds ---

    def weights(self) -> list[Slice]:
        """Returns the float32 master weights that this rank owns, on rank 0 the frozen statistics too; views."""
        return self._trained() + (self._frozen.slices() if ranks.is_main() else [])

    def _trained(self) -> list[Slice]:
        return [part.slice_of(part.flat) for part in self._owned.parts()]

    def moments(self) -> list[Slice]:
        """Returns the optimizer's moments of the same slices, named MOMENT/PARAMETER; views."""
        states = self._optimizer.state
        return [part.slice_of(states[part.flat][m], f"{m}/") for part in self._owned.parts() for m in self._moments]

    def averages(self) -> list[Slice]:
        """Returns the Polyak averages of the same slices, none when they are not kept; views, to be written."""
        frozen = self._frozen.slices() if self._averages and ranks.is_main() else []
        return self._averaged() + frozen

    def _averaged(self) -> list[Slice]:
        return [part.slice_of(self._averages[part.flat]) for part in self._owned.parts() if self._averages]

    def state(self) -> dict[str, Any]:
        """Returns what is not a tensor: the optimizer's step count and the loss scaler."""
        counts = [self._optimizer.state[flat]["step"] for flat in self._owned.flat_tensors()]
        steps = set(torch.stack(counts).tolist()) if counts else set()  # one wait for the device
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
        self._owned.set_optimizer_state(step=state["optimizer_step"], clear_weights=True)
        agreement.together(lambda: self._fill_all(reader))
        for name, value in (state.get("loss_scaler") or {}).items():
            if self.dtype == torch.float16 and name in _SCALER_STATE:
                setattr(self._zero.loss_scaler, name, value)
        self._owned.refresh_model()
        self._frozen.refresh_model(self.dtype)
        self.check()

    def load_generators(self, states: dict[str, torch.Tensor]) -> bool:
        """Restores random states; returns False when there are none for this rank and device."""
        if "cpu" not in states or (self.device.type == "cuda" and "cuda" not in states):
            return False
        try:
            torch.set_rng_state(states["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"], self.device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"a checkpoint's random states are not torch's ({error})") from None
        return True

    def check(self) -> None:
        """Asserts that the model holds the owned slices, rounded: see OwnedSlices."""
        self._owned.check()

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self._engine.destroy()

    def _fill_all(self, reader: CheckpointReader) -> None:
        self._fill(reader, self._trained() + self._frozen.slices(), "weights")
        self._fill(reader, self.moments(), "optimizer")
        if self._averages:
            self._fill(reader, self._averaged(), "average")

    def _fill(self, reader: CheckpointReader, parts: list[Slice], kind: str) -> None:
        names = [name for name, _ in self._engine.module.named_parameters()]
        prefixes = [f"{moment}/" for moment in self._moments] if kind == "optimizer" else [""]
        frozen = self._frozen.names if kind != "optimizer" else []
        check_names(reader, [prefix + name for prefix in prefixes for name in names] + frozen, kind)
        reader.read_into(*parts, kind=kind)


def _head_of(model: nn.Module) -> nn.Module:
    """The module that turns features into logits."""
    return model.get_submodule(min(classifier_names(model)).rpartition(".")[0])


def _poison_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """Returns the loss, or NaN where it is not finite, so that its gradients are NaN and every rank skips the step.

    An infinite loss can have finite gradients. No communication, no waiting for the device.
    """
    return loss * torch.where(loss.isfinite(), 1.0, float("nan"))


def _checkpoint_activations(model: nn.Module) -> None:
    if isinstance(model, VisionTransformer):
        model.checkpoint_activations = True
        return
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AssertionError, AttributeError):  # what timm raises for models without it
        raise ConfigError(
            "engine.checkpoint_activations: timm does not recompute this model's activations; set it to false, and "
            "engine.max_micro_batch_size lower if memory is short"
        ) from None
