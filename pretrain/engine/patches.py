"""Patches DeepSpeed where it does not do what we need.

`before_start` is called before deepspeed.initialize, `after_start` after it. Each patch has a test that fails when
DeepSpeed changes: tests/test_engine_patches.py. The step is lightened only in the one release whose step is known
(versions.STEP_OF); others compute the same bits with more kernel launches.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger

from pretrain.engine.versions import step_is_known


def before_start() -> None:
    """Applies what has to be in place when DeepSpeed starts."""
    _without_compiler()
    _without_false_alarm()
    _without_memory_lines()
    _free_memory_by_torch(get_accelerator())
    if step_is_known():
        _lighten_unsharded_step()


def after_start(timeout_s: int, zero: Any) -> None:
    """Patches DeepSpeed and its ZeRO optimizer once they have started."""
    _set_group_timeouts(timeout_s)
    # At the smallest loss scale DeepSpeed would end the process; here it skips the step, and the journal counts these.
    scaler: Any = getattr(zero, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False
    if step_is_known():
        _lighten_step(zero)
        _overlap_without_waiting(zero)


def _without_compiler() -> None:
    """Keeps DeepSpeed from compiling its shared-memory op on CPUs, which takes a minute and a compiler; gloo will do.

    The table of ops is replaced because the first access to DeepSpeed's own tests every op, which starts a compiler.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}  # type: ignore[index]  # a plain dict


def _without_false_alarm() -> None:
    """Hides the warning that optimizers other than Adam are untested with ZeRO: SGD, Lion and LAMB are tested here."""
    deepspeed_logger.addFilter(_is_no_false_alarm)  # adding it again has no effect


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def _without_memory_lines() -> None:
    """Keeps BF16_Optimizer from printing memory around each group of parameters: with layer_decay, dozens of lines."""
    bf16_optimizer.see_memory_usage = lambda message, force=False: None


def _free_memory_by_torch(accelerator: Any) -> None:
    """Makes DeepSpeed ask torch for a GPU's free memory. If pynvml is installed, it asks NVML, for which it takes
    CUDA_VISIBLE_DEVICES for numbers: with the names that SLURM gives parts of a GPU, the start would fail.
    """
    if accelerator.device_name() == "cuda":
        accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def _set_group_timeouts(timeout_s: int) -> None:
    """Sets the timeout of all of this process's groups. DeepSpeed creates groups without one, which wait 30 minutes."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def _lighten_step(zero: Any) -> None:
    """Replaces the per-tensor work of `step`, thousands of launches for a deep model, by a few, with the same bits.

    Stages 1 and 2 test every gradient for non-finite values, although the norm shows them too, and step() rejects such
    a norm itself. They and stage 3 compute norms one by one, and set parameters to addresses that they have already.
    fp16 is left alone: its search for a loss scale has not been tried with this. DeepSpeed has another class for bf16
    with several micro-batches on stage 1: see `_lighten_unsharded_step`.
    """
    if getattr(zero, "dtype", None) == torch.float16:
        return
    if type(zero) is DeepSpeedZeroOptimizer:
        zero.check_overflow = lambda partition_gradients=True: None
        zero.scaled_global_norm = lambda norm_type=2: _global_norm(zero)
        zero.unscale_and_clip_grads = partial(_unscale_and_clip, zero)
        zero._update_model_bit16_weights = lambda group_index: None
        # Otherwise each backward pass starts by asking the graph, for every parameter, how many gradients to expect.
        # Its end does not depend on that number: autograd reports it (queue_post_backward_callback).
        zero.should_refresh_expected_hook_count = lambda: False
        if dist.get_world_size(zero.dp_process_group) == 1 and not _adds_up_while_reducing(zero):
            # Skips the mean over one rank, which would copy every gradient twice, through a bucket that each backward
            # pass allocates: of as many elements as the model has, up to 500 million.
            zero.reduce_ready_partitions_and_remove_grads = lambda param, i: None
            zero.reduce_bucket_size = 1
    elif type(zero) is DeepSpeedZeroOptimizer_Stage3:
        zero._get_norm_groups = lambda: _norms_of_stage_3(zero)
        zero._unflatten_partitioned_parameters = lambda sub_group_id: None


def _overlap_without_waiting(zero: Any) -> None:
    """Keeps stages 1 and 2 from a host sync at the end of each backward pass that overlaps with reductions."""
    if type(zero) is DeepSpeedZeroOptimizer and zero.overlap_comm:
        zero.independent_gradient_partition_epilogue = partial(
            _end_backward, zero, zero.independent_gradient_partition_epilogue
        )


def _end_backward(zero: Any, epilogue: Callable[[], None]) -> None:
    """DeepSpeed's epilogue, but the step's stream waits for the reduction stream, instead of the host for both.

    Memory freed from here on is reused only after that wait: buckets belong to the step's stream, and each reduction
    begins by waiting for the step's stream.
    """
    accelerator: Any = get_accelerator()  # it is annotated as None
    zero.reduce_ipg_grads()
    if not accelerator.resolves_data_dependency():  # a CPU has no streams
        accelerator.current_stream().wait_stream(zero.reduction_stream)
    zero.overlap_comm = False  # so that the epilogue does not wait; nothing is left to reduce
    epilogue()
    zero.overlap_comm = True


def _adds_up_while_reducing(zero: Any) -> bool:
    """Whether the reduction also accumulates micro-batches, in float32: bf16 on stage 2."""
    return any(zero._use_compact_grad_partition_buffer(group) for group in range(len(zero.bit16_groups)))


def _global_norm(zero: Any) -> torch.Tensor:
    """The norm of all gradients of all ranks, float32; not finite if a gradient is not."""
    squares = []
    for group, params in enumerate(zero.params_in_partition):
        gradients = [g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        squares.append(_sum_of_squares(gradients[: len(params)], zero.device).float())
    total = torch.stack(squares)
    dist.all_reduce(total, group=zero.dp_process_group)
    return torch.linalg.vector_norm(total.sqrt())


def _norms_of_stage_3(zero: Any) -> list[torch.Tensor]:
    """The norm of each parameter group's gradients, float64; not finite if a gradient is not."""
    groups = range(len(zero.fp16_groups))
    total = torch.stack([_sum_of_squares(list(zero.averaged_gradients[group]), zero.device) for group in groups])
    dist.all_reduce(total, group=zero._get_param_partition_group(zero.fp16_groups[0][0]))
    return list((total**0.5).unbind())


def _sum_of_squares(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not gradients:  # this rank owns nothing of the group
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)  # type: ignore[attr-defined]  # torch hides it
    return torch.stack(norms).pow(2).sum()


def _unscale_and_clip(zero: Any, grad_groups_flat: list[torch.Tensor], total_norm: torch.Tensor) -> None:
    """DeepSpeed's, without a test of the norm that step() has made already and that costs a host sync per group."""
    if zero.clip_grad == 0.0 and zero.loss_scale == 1.0:
        return
    scale = zero.loss_scale
    if zero.clip_grad > 0.0:
        scale = torch.clamp((total_norm / zero.loss_scale + 1e-6) / zero.clip_grad, min=1.0) * zero.loss_scale
    for gradient in grad_groups_flat:
        gradient.data.mul_(1.0 / scale)


def _lighten_unsharded_step() -> None:
    """The same for BF16_Optimizer, whose norm and clipping are module-level functions; in float32, as there."""
    bf16_optimizer.get_global_norm_of_tensors = _unsharded_norm
    bf16_optimizer.clip_tensors_by_global_norm = _clip_unsharded


def _unsharded_norm(input_tensors: list[torch.Tensor], norm_type: float = 2, mpu: Any = None) -> torch.Tensor:
    """The norm of the gradients, which each rank has in full. step() rejects one that is not finite."""
    assert mpu is None, "tensors are not split over ranks"
    norms = torch._foreach_norm(input_tensors, norm_type, dtype=torch.float32)  # type: ignore[attr-defined]  # as above
    return torch.stack(norms).pow(norm_type).sum().pow(1.0 / norm_type)


def _clip_unsharded(
    input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: Any = None
) -> torch.Tensor:
    """DeepSpeed's, without the test whether anything has to be clipped, which is a host sync."""
    scale = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)  # 1: they stay as they are
    torch._foreach_mul_(input_tensors, scale)  # type: ignore[attr-defined]  # as above
    return global_norm
