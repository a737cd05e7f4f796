"""How a model gets its first values: one parameter at a time, rounded, and under ZeRO 3 cut up before the next one.

So no rank holds the whole model in float32, and under ZeRO 3 no more of it than its part and one parameter.
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

    The parameters stay the same objects, which an optimizer may hold already: it asks for their shapes, which ZeRO 3
    takes away.
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
    """Leaves this rank's part of a parameter, as deepspeed.initialize would; returns the first that was cut."""
    if first is None:
        deepspeed.init_distributed(dist_init_required=False)  # it counts the ranks in the batch that the config names
        deepspeed.zero.Init(nn.ParameterList([parameter]), config_dict_or_path=deepspeed_config)
        return parameter
    first.convert_to_zero_parameters([parameter])  # as Init has done with the first, without reading the config again
    return first
