"""Freezes batch norm in a run that starts from weights: training and evaluation use the weights' own statistics.

Statistics over a rank's share of a batch would differ between ranks, and with the number of ranks; freezing them is
usual when fine-tuning with small batches. They are buffers, so DeepSpeed neither shards nor steps them.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.checkpoint.layout import Slice


def statistics_of(model: nn.Module) -> list[str]:
    """Returns the names of the buffers that are batch norm's statistics."""
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return [name for name, _ in model.named_buffers() if name.rpartition(".")[0] in norms]


class FrozenStatistics:
    """The statistics in float32, as a checkpoint holds them; the model has them rounded to its precision.

    To be created before DeepSpeed rounds the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.names = model, statistics_of(model)
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = dict(model.named_buffers())
        self._exact = {name: buffers[name].detach().to("cpu", torch.float32, copy=True) for name in self.names}

    def freeze(self) -> None:
        """Makes batch norm use the statistics without updating them; to be called after the model's train()."""
        for norm in self._norms:
            norm.eval()

    def slices(self) -> list[Slice]:
        """Returns each statistic whole; views, to be saved or filled. Counts of batches are floats here too."""
        return [Slice(name, tuple(value.shape), 0, value.view(-1)) for name, value in self._exact.items()]

    def refresh_model(self, dtype: torch.dtype) -> None:
        """Copies the slices into the model, in its precision: DeepSpeed rounds buffers on some ZeRO stages."""
        for name, value in self._exact.items():
            norm, _, key = name.rpartition(".")
            module = self._model.get_submodule(norm)
            held = getattr(module, key)
            setattr(module, key, value.to(held.device, dtype if held.is_floating_point() else held.dtype))
