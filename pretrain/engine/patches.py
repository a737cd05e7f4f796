"""What DeepSpeed 0.19.8 does otherwise than we need, and is made to do.

`before_start` comes before deepspeed.initialize, `after_start` behind it. Each patch has a test that fails when
DeepSpeed changes: tests/test_engine_patches.py.
"""

import os
from datetime import timedelta

import deepspeed
import torch.distributed as dist


def before_start() -> None:
    """What has to be so when DeepSpeed starts."""
    _without_compiler()


def after_start(timeout_s: int) -> None:
    """What DeepSpeed has to be given once it has started."""
    _set_group_timeouts(timeout_s)


def _without_compiler() -> None:
    """Keeps DeepSpeed from compiling its shared-memory op on CPUs, which takes a minute and a compiler; gloo serves."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _set_group_timeouts(timeout_s: int) -> None:
    """Gives every group of this process the timeout. DeepSpeed makes groups without one, which wait for 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.set_timeout(timedelta(seconds=timeout_s), group)
