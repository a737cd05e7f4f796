"""Which kernels a GPU takes where torch has several: the fastest attention, or those whose sums have one order."""

import os
from typing import Any

import torch
import torch.compiler.config
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.config import Config
from pretrain.sizes import num_tokens

_HOPPER = 9, 0  # compute capability
_ORDERED_TOKENS = 256  # up to two blocks of keys: their gradients are two numbers' sum, the same in either order
_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_held: Any = None  # torch's choice of attentions ends with it


def choose_kernels(config: Config, device: torch.device) -> str:
    """Has this process take its kernels on a GPU; returns a line where equal steps will differ by rounding, else none.

    On an H100 cuDNN's attention takes 0.72 of FlashAttention's time for 197 tokens, and torch would take that one. Both
    add up the queries' gradients over blocks of keys in any order: measured, docs/performance.md.
    """
    global _held
    if device.type != "cuda":
        return ""
    if config.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(False)
        return ""
    if torch.cuda.get_device_capability(device) == _HOPPER:
        if _held is None:
            _held = sdpa_kernel(_FASTEST, set_priority=True)
            _held.__enter__()
        # Else code that was compiled with another attention would be found in the cache.
        torch.compiler.config.cache_key_tag = "cudnn attention"
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)  # not measured there
    tokens = None if config.model.timm_name is not None else num_tokens(config.model)
    if tokens is None or tokens <= _ORDERED_TOKENS:
        return ""
    return (
        f"{tokens} tokens: attention's gradient is added up in any order on a GPU, so that a resumed run equals an "
        "uninterrupted one to rounding; engine.deterministic=true gives the same bits, and takes longer"
    )
