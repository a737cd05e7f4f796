"""Norms of gradients and weights per layer, and the largest logit per attention: to see where training is unstable.

Each rank adds up the slices that it owns, so that neither the ZeRO stage nor the number of ranks matters.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pretrain.cluster import agreement
from pretrain.engine.slices import OwnedSlices, Part

MAX_IMAGES = 16  # per rank whose logits are computed: those of a block, [images, heads, tokens, tokens], are in memory


def layer_of(name: str) -> str:
    """Returns "blocks.3" for a parameter "blocks.3.mlp.fc1.weight"; for one without a number its first word, "head"."""
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[: number + 1])


class LayerNorms:
    """The norms of a model's layers; nothing is done in a step that is not `watched`."""

    def __init__(self, owned: OwnedSlices, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
        self._owned, self._optimizer = owned, optimizer
        layers = dict.fromkeys(map(layer_of, names))
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._gradients = self._nothing()

    @contextmanager
    def watched(self, due: bool) -> Iterator[None]:
        """Context manager around a step: if `due`, records the norms of the gradients that the optimizer receives."""
        if not due:
            yield
            return
        self._gradients = self._nothing()
        parts = self._owned.parts()  # now: during a step DeepSpeed shows the optimizer one group at a time

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for flat in group["params"]:
                    self._add(self._gradients, [part for part in parts if part.flat is flat], flat.grad)

        hook = self._optimizer.register_step_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def read(self, grad_norm: Any) -> dict[str, float]:
        """Returns the norms over all ranks: of the weights, and of the step's gradients before clipping.

        grad_norm: of all gradients before clipping; the recorded norms are scaled to match it. None: a skipped step.
        """
        weights = self._nothing()
        for part in self._owned.parts():
            self._add(weights, [part], part.flat)
        of_weights, of_gradients = agreement.add_up(torch.stack([weights, self._gradients]))
        numbers = {"weight_norm": of_weights.sqrt()}
        if grad_norm is not None and of_gradients.any():
            numbers["grad_norm"] = of_gradients.sqrt() * (float(grad_norm) / of_gradients.sum().sqrt())
        return {
            f"layers/{layer}/{name}": float(values[place])
            for name, values in numbers.items()
            for layer, place in self._places.items()
        }

    def _nothing(self) -> torch.Tensor:
        """Zeros for sums of squares, float64 [layers]."""
        device = self._owned.flat_tensors()[0].device
        return torch.zeros(len(self._places), dtype=torch.float64, device=device)

    @torch.no_grad()
    def _add(self, sums: torch.Tensor, parts: list[Part], flat: torch.Tensor) -> None:
        for part in parts:
            norm = torch.linalg.vector_norm(part.slice_of(flat).values, dtype=torch.float64)
            sums[self._places[layer_of(part.name)]] += norm**2


class LargestLogits(TorchFunctionMode):
    """While active, appends the largest logit of each call of torch's attention to `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.found.append(_largest_logit(*args, **kwargs or {}))
        return function(*args, **kwargs or {})


def _largest_logit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """The largest logit of an attention with these arguments, in float32: fp16 has none beyond 65,504."""
    scaled = query.float() * (scale or 1 / math.sqrt(query.shape[-1]))
    logits = scaled @ key.float().transpose(-2, -1)  # [B, heads, T, T]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.amax()
