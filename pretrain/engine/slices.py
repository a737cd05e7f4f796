"""Reads DeepSpeed's internals: which elements of each parameter this rank owns and where; refreshes the model.

This is right for the tested version only; `check` verifies it after the start, before each save and after each load.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.checkpoint.layout import Slice
from pretrain.cluster import watchdog
from pretrain.optim import Lamb, Pieces


@dataclass(frozen=True)
class Part:
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


class OwnedSlices:
    """The map from a model's parameters to the flat tensors of DeepSpeed's ZeRO optimizer, on this rank."""

    def __init__(self, module: nn.Module, zero: Any, stage: int, moments: dict[str, torch.dtype]) -> None:
        self._module, self._zero, self._stage = module, zero, stage
        self._optimizer: Any = zero.optimizer
        self.moments = moments  # dtypes of the optimizer's state, by name

    def parts(self) -> list[Part]:
        """Returns what this rank owns of each parameter, in the model's order."""
        parts = (self._owned_part(name, p) for name, p in self._module.named_parameters())
        return [part for part in parts if part is not None]

    def _owned_part(self, name: str, parameter: Any) -> Part | None:
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
            held_at, owned_at = mapping.lp_fragment_address, mapping.hp_fragment_address
            offset, start, numel = held_at.start, owned_at.start, held_at.numel
            shape = tuple(parameter.shape)
            held = parameter.detach().view(-1)[offset : offset + numel]
        return Part(name, shape, offset, flat, start, numel, held) if numel else None

    def flat_tensors(self) -> list[torch.Tensor]:
        """Returns the float32 tensors that the optimizer steps on."""
        if self._stage == 3:  # param_groups are empty between steps
            return list(self._zero.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def tell_pieces(self, optimizer: Lamb) -> None:
        """Tells LAMB where each parameter is in the flat tensors, and how to sum over ranks; zeroes the padding.

        Called once, after the start: during a step DeepSpeed shows the optimizer one group at a time. Padding is
        uninitialised memory, and ZeRO 3 may read what LAMB leaves in the padding of the gradients: those of a group of
        one tensor are a buffer into which the next step copies its own without padding, and whose norm it takes whole.
        """
        places = {name: number for number, (name, _) in enumerate(self._module.named_parameters())}
        of_flat: dict[torch.Tensor, list[Part]] = {flat: [] for flat in self.flat_tensors()}
        for part in self.parts():
            of_flat[part.flat].append(part)
        pieces = {
            flat: Pieces(
                [(part.start, part.numel) for part in parts],
                torch.tensor([places[part.name] for part in parts], dtype=torch.int64, device=flat.device),
            )
            for flat, parts in of_flat.items()
        }
        for flat, (spans, _) in pieces.items():
            end = 0
            for start, numel in [*sorted(spans), (flat.numel(), 0)]:
                flat.data[end:start].zero_()
                end = start + numel
        group = self._zero.dp_process_group
        add_up = partial(dist.all_reduce, group=group) if dist.get_world_size(group) > 1 else None
        optimizer.share(pieces, len(places), add_up)

    def set_optimizer_state(self, step: float, clear_weights: bool = False) -> None:
        """Creates zero moments and the step count, which the optimizer itself would create only in its first step."""
        group = self._optimizer.param_groups[0]
        for flat in self.flat_tensors():
            state = self._optimizer.state[flat]
            on_device = group.get("fused") or group.get("capturable")  # keys of torch's AdamW
            state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")
            for name, dtype in self.moments.items():
                if name in state:  # the tensor is kept: DeepSpeed has views of it
                    state[name].zero_()
                else:
                    state[name] = torch.zeros_like(flat, dtype=dtype)
            if clear_weights:
                flat.data.zero_()  # padding is uninitialised memory

    def refresh_model(self) -> None:
        """Copies the master weights into the model, rounded to its precision."""
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()
        else:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._zero.update_lp_params()

    def check(self) -> None:
        """Asserts that the model holds the owned slices, rounded: DeepSpeed's maps have been wrong before.

        One host sync, not one per parameter: training waits for this check before each save.
        """
        parts, equal = self.parts(), []
        for part in parts:
            held, owned = part.model_values, part.slice_of(part.flat).values
            assert held.shape == owned.shape, f"{part.name}: {held.shape} of {owned.shape}"
            equal.append((held == owned.to(held.dtype)).all())
        same: list[bool] = watchdog.from_device(lambda: torch.stack(equal).tolist()) if parts else []
        wrong = [part.name for part, equals in zip(parts, same) if not equals]
        assert not wrong, f"{wrong[0]}: the owned float32 slice is not what the model holds"
