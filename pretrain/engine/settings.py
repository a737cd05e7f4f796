"""DeepSpeed's configuration, derived from ours, and checks of what this machine can do."""

import os
import shutil
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.config import Config
from pretrain.data.order import BatchPlan
from pretrain.engine.fp8 import check_fp8
from pretrain.errors import UserError
from pretrain.sizes import bucket_elements

MIN_LOSS_SCALE = 1  # of fp16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def deepspeed_config(
    config: Config, plan: BatchPlan, world_size: int, largest_parameter: int, num_parameters: int
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, derived from ours; every key that we rely on is written out.

    Omitting keys is not safe: DeepSpeed silently ignores unknown ones, and clips at 1.0 if clipping is not set.
    largest_parameter: its number of elements; num_parameters: that of all parameters.
    """
    precision = config.engine.precision
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch * plan.accumulation * world_size,  # masked slots included
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": MIN_LOSS_SCALE,
        },
        # Several bf16 micro-batches are accumulated in float32: bf16 would lose small addends.
        "data_types": {"grad_accum_dtype": "fp32" if plan.accumulation > 1 and precision == "bf16" else None},
        # None: DeepSpeed sums gradients over ranks in the model's type.
        "communication_data_type": "fp32" if config.engine.reduce_dtype == "fp32" else None,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": config.engine.overlaps(world_size),  # DeepSpeed's default under ZeRO 3 is on
            "reduce_bucket_size": bucket_elements(config.engine, world_size, largest_parameter, num_parameters),
            "round_robin_gradients": False,  # True would make the map of owned slices wrong
            "reduce_scatter": True,
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # on by default: waits for the device twice per micro-batch
    }


def told_of_overlap(config: Config, plan: BatchPlan, world_size: int) -> str:
    """Returns a log line if engine.overlap_reduction is set but has no effect, else ""."""
    why = ""
    if world_size == 1:
        why = "one rank sums nothing"
    elif config.engine.zero_stage == 1 and config.engine.precision == "bf16" and plan.accumulation > 1:
        why = "ZeRO 1 in bf16 with several micro-batches sums once, behind the last one; engine.zero_stage=2 overlaps"
    return f"engine.overlap_reduction=true has no effect: {why}" if config.engine.overlap_reduction and why else ""


def check_machine(config: Config) -> None:
    """Raises UserError for what this machine cannot do: a precision, like fp16 on most CPUs, fp8, or compiling."""
    check_precision(config)
    check_fp8(config)
    # More names than in engine/compiling.py, which has Triton's: on a CPU torch runs a C++ compiler.
    names = [os.environ.get("CC"), os.environ.get("CXX"), "cc", "gcc", "g++", "clang", "clang++"]
    asked = config.engine.compile
    if asked in (True, "max-autotune") and not any(map(shutil.which, filter(None, names))):
        raise UserError(
            f"engine.compile={str(asked).lower()}: torch.compile needs a C and C++ compiler, and none is found: apt "
            "install build-essential (or set CC and CXX), or set engine.compile=false"
        )


def check_precision(config: Config) -> None:
    """Raises UserError for a precision that this machine has no instructions for, like fp16 on most CPUs."""
    accelerator: Any = get_accelerator()  # it is annotated as None
    precision, on_gpu = config.engine.precision, accelerator.device_name() == "cuda"
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if on_gpu:  # by default torch also counts slow emulation, as on a V100 or T4
        supported["bf16"] = lambda: torch.cuda.is_bf16_supported(including_emulation=False)
    if precision in supported and not supported[precision]():
        device = torch.cuda.get_device_name() if on_gpu else "this CPU"
        others = "bf16 or fp32" if precision == "fp16" else "fp16 or fp32"
        raise UserError(f"engine.precision={precision}: {device} has no instructions for it; choose {others}")
