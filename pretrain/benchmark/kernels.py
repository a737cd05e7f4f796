"""Where the time of a step goes, kernel by kernel, by torch's profiler."""

import re
from collections.abc import Callable
from typing import Any

import torch

from pretrain.benchmark.measure import step_times_ms

_MOST = 40  # kernels that are listed
_STEPS = 5  # traced
# Patterns of kernel names: cuBLAS, cuDNN, FlashAttention, Triton, torch, and torch's operators on a CPU.
_GROUPS = {
    "compiled": "triton",
    "attention": "flash|fmha|attention|sdpa|cudnn::fusion",
    "optimizer": "adam|multi_tensor_apply|lpnorm",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|\baten::(add|ba|b)?mm\b|conv|cudnn",
    "copies": "memcpy|memset",
    "collectives": "nccl|gloo",
}
REST, IDLE = "other", "idle"


def group_of(kernel: str) -> str:
    """Returns the group of a kernel, by its name."""
    return next((group for group, names in _GROUPS.items() if re.search(names, kernel, re.IGNORECASE)), REST)


def kernels_of(step: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """Returns a step's milliseconds by group, time without a kernel as "idle", and kernels by name, longest first.

    On a GPU only kernels are recorded, which costs the host little; on a CPU, torch's operators.
    """
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], acc_events=True) as trace:
        times_ms = step_times_ms(step, _STEPS, gpu)
    kernels = []
    for found in trace.key_averages():
        us = found.self_device_time_total if gpu else found.self_cpu_time_total
        if us:
            ms = us / 1000 / _STEPS
            kernels.append({"kernel": found.key, "group": group_of(found.key), "calls": found.count / _STEPS, "ms": ms})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    groups = {name: 0.0 for name in [*_GROUPS, REST]}
    for kernel in kernels:
        groups[kernel["group"]] += kernel["ms"]
    if gpu:
        groups[IDLE] = max(0.0, sum(times_ms) / _STEPS - sum(groups.values()))
    return {
        "kernel_groups_ms": {name: round(ms, 3) for name, ms in groups.items()},
        "kernels": [kernel | {"ms": round(kernel["ms"], 4)} for kernel in kernels[:_MOST]],
    }
