"""Chooses among torch's GPU kernels: the fastest attention, or kernels that add up in a fixed order."""

import os
from typing import Any

import torch
import torch.compiler.config
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.config import Config
from pretrain.sizes import num_tokens

_HOPPER = 9, 0  # compute capability
_LEAST_CUDNN = 91501  # older ones read past the keys if their number is not a multiple of 128 (pytorch#169849)
# With at most two blocks of keys, each gradient is the sum of two numbers, equal in either order. Measured on an H100
# for head widths 64 and 80.
_ORDERED_TOKENS, _ORDERED_HEAD_WIDTH = 256, 80
_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_TOLD = (
    "gradients are added up in any order on a GPU, by attention for these tokens or heads or by convolutions, so that "
    "a resumed run equals an uninterrupted one up to rounding; engine.deterministic=true asks for one order, and takes "
    "longer"
)
_own_tag: str = torch.compiler.config.cache_key_tag  # as the user set it
_held: Any = None  # the context manager, entered for good: the priority of attentions ends with it


def choose_kernels(config: Config, device: torch.device) -> str:
    """Chooses this process's kernels on a GPU; returns a log line if equal steps may differ by rounding, else "".

    On an H100 cuDNN's attention takes 0.72 of FlashAttention's time for 197 tokens. Both add up the queries' gradients
    over blocks of keys in no fixed order (docs/results.md, "One H100").
    """
    global _held
    if device.type != "cuda":
        return ""
    deterministic = config.engine.deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    on_hopper = torch.cuda.get_device_capability(device) == _HOPPER  # elsewhere it was not measured
    cudnn = on_hopper and not deterministic and (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN
    if cudnn and _held is None:
        _held = sdpa_kernel(_FASTEST, set_priority=True)
        _held.__enter__()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    # Otherwise the cache would return code that was compiled with another attention.
    torch.compiler.config.cache_key_tag = f"{_own_tag} cudnn attention" if cudnn else _own_tag
    return "" if deterministic or _is_ordered(config) else _TOLD


def _is_ordered(config: Config) -> bool:
    """Whether equal steps give equal bits; False for timm's models, whose number of tokens is not known, and for
    hybrids: cuDNN may add up the gradient of a convolution in any order.
    """
    if config.model.timm_name is not None or config.model.trunk_units is not None:
        return False
    width, _, _, heads = config.model.shape
    few = num_tokens(config.model) <= _ORDERED_TOKENS and width // heads <= _ORDERED_HEAD_WIDTH
    return few and config.model.positions != "relative"  # their gradient is a scatter-add, in no fixed order
