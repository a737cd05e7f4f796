"""Measures a device without a model: name and memory, matrix products, attention by kernel, clocks and power."""

import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.benchmark.measure import step_times_ms
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.engine.settings import DTYPES
from pretrain.provenance import processor
from pretrain.sizes import num_tokens
from pretrain.train.meter import peak_memory_bytes

_PEAK_SHAPE = 1024, 4096  # width and MLP of the products for timm's models, whose own are not known: L's
_REPEATS = 10  # of which the median is taken
_ATTENTIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_THROTTLES = {  # NVML's bits, as nvidia-smi names them
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
}


def measure() -> Iterator[dict[str, Any]]:
    """Yields the device's name and the bytes of its memory, 0 for a CPU."""
    if not ranks.has_gpu():
        yield {"row": "device", "name": processor(), "bytes": 0}
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    yield {"row": "device", "name": torch.cuda.get_device_name(), "bytes": memory}


def measured_peak(config: Config, batch: int, device: torch.device) -> dict[str, float]:
    """Returns this device's TFLOP/s in the MLP's matrix products alone, [tokens, width] x [width, mlp] and back.

    On random numbers: constant ones flip few bits, so that a GPU needs less power and clocks higher.
    """
    plain = config.model.timm_name is None
    width, mlp_dim = (config.model.shape.width, config.model.shape.mlp_dim) if plain else _PEAK_SHAPE
    tokens = batch * (config.model.image_size // (config.model.patch_size if plain else 16)) ** 2
    draw = _drawn(config, device)
    x, up, down = draw(tokens, width), draw(width, mlp_dim), draw(mlp_dim, width)
    product: Callable[[], torch.Tensor] = torch.no_grad()(lambda: x @ up @ down)
    product()
    median_ms = statistics.median(step_times_ms(product, _REPEATS, device.type == "cuda"))
    return {"measured_peak_tflop_per_s": round(4 * tokens * width * mlp_dim / median_ms / 1e9, 4)}


def attention_ms(config: Config, batch: int, device: torch.device) -> dict[str, float | None] | None:
    """Times one block's attention, forward and backward, by each of torch's kernels; None for timm's models.

    A kernel's time is None where it does not exist for the device, shape or precision, or does not fit into memory.
    """
    if config.model.timm_name is not None:
        return None
    width, _, _, heads = config.model.shape
    tokens, draw = num_tokens(config.model), _drawn(config, device)
    # [B, T, heads, D / heads] as a block's layer writes them, seen as [B, heads, T, D / heads].
    q, k, v, gradient = (draw(batch, tokens, heads, width // heads).transpose(1, 2) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def step() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

    found: dict[str, float | None] = {}
    for name, backend in _ATTENTIONS.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # on why a kernel is not available
                step()
                times_ms = step_times_ms(step, _REPEATS, device.type == "cuda")
            found[name] = round(statistics.median(times_ms), 4)
        except RuntimeError:  # no such kernel, or out of memory
            found[name] = None
    return found


def _drawn(config: Config, device: torch.device) -> Callable[..., torch.Tensor]:
    """Returns a function that draws normal tensors in the precision of the activations, seeded with 0."""
    generator, dtype = torch.Generator(device).manual_seed(0), DTYPES[config.engine.precision]
    return lambda *size: torch.randn(size, generator=generator, dtype=dtype, device=device)


def memory_of_steps_gb(device: torch.device) -> dict[str, float | None]:
    """Returns this process's peak memory in use, and what the allocator has held at most of a GPU's, with gaps."""
    reserved = round(torch.cuda.max_memory_reserved(device) / 1e9, 3) if device.type == "cuda" else None
    return {"memory_gb": round(peak_memory_bytes(device) / 1e9, 3), "memory_reserved_gb": reserved}


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Returns the clock, the power (over the last second) and what throttles the clock; None without NVML's answer.

    Call it right after the work, since an idle GPU clocks down.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # of nvidia-ml-py, which is no dependency
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_w": round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1),
            "throttled_by": [name for bit, name in _THROTTLES.items() if reasons & bit],
        }
    except (pynvml.NVMLError, AttributeError):  # a part of a GPU (MIG), a container without rights, an old torch
        return None
