"""Gives a model its initial values one parameter at a time: rounded, and under ZeRO 3 partitioned before the next.

So no rank holds the whole model in float32, and under ZeRO 3 a rank holds only its partition and one whole parameter.
"""

from typing import Any

import deepspeed
import torch
from torch import nn

from pretrain.models.build import Values


@torch.no_grad()
def fill(
    model: nn.Module, values: Values, dtype: torch.dtype, device: torch.device, deepspeed_config: dict[str, Any]
) -> None:
    """Gives each parameter its value in `dtype` on the device. A collective under ZeRO 3.

    The parameters stay the same objects, because the optimizer may hold them already: it is built first, as it needs
    their shapes, which ZeRO 3 removes.
    """
    parameters, cut = dict(model.named_parameters()), None
    for name, value in values():
        parameter = parameters.pop(name)
        _put(parameter, value.to(device, dtype))
        if deepspeed_config["zero_optimization"]["stage"] == 3:
            cut = _cut_up(parameter, cut, deepspeed_config)
    assert not parameters, parameters.keys()
    model.to(device)  # buffers


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if parameter.is_meta:
        torch.utils.swap_tensors(parameter, nn.Parameter(value))
    else:
        parameter.data = value


def _cut_up(parameter: Any, first: Any, deepspeed_config: dict[str, Any]) -> Any:
    """Partitions a parameter as deepspeed.initialize would; returns the first parameter that was partitioned."""
    if first is None:
        deepspeed.init_distributed(dist_init_required=False)  # Init checks the config's batch sizes against the ranks
        deepspeed.zero.Init(nn.ParameterList([parameter]), config_dict_or_path=deepspeed_config)
        return parameter
    first.convert_to_zero_parameters([parameter])  # as Init has done with the first, without reading the config again
    return first
