"""DeepSpeed's patches: each works, and is still needed. A DeepSpeed that behaves otherwise fails here by name."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import make_shards, tiny_config

import pretrain.engine.step
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.engine.step import Engine
from pretrain.train.datasets import open_data
from pretrain.train.run import build_engine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of an engine on one rank, whose groups must fail after 77 s."""
    shards = make_shards(tmp_path_factory.mktemp("shards") / "squares")
    return tiny_config(shards, Path("unused"), engine__timeout_s=77)


def start(config: Config) -> Engine:
    device = ranks.start(60)
    return build_engine(config, open_data(config), device, from_scratch=True)


def shm_op(config: Config) -> Any:
    start(config)
    return deepspeed.comm.comm.cdb.shm_comm_op


def test_no_compiler_needed(config: Config) -> None:
    """DeepSpeed's CPU op, which would be compiled for a minute, is not built."""
    assert run_ranks(shm_op, 1, config) == [None]


def shm_op_in_table(config: Config) -> bool:
    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_deepspeed_would_compile_its_op(config: Config) -> None:
    """Why it is patched: DeepSpeed's table says that the op can be built here. When it does not, the patch can go."""
    assert run_ranks(shm_op_in_table, 1, config) == [True]


def group_timeouts(config: Config) -> list[float]:
    start(config)
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_timeout(config: Config) -> None:
    """Also the groups that DeepSpeed makes, which would wait for 30 minutes."""
    assert set(run_ranks(group_timeouts, 1, config)[0]) == {77.0}


def unpatched_timeouts(config: Config) -> list[float]:
    pretrain.engine.step.after_start = lambda timeout_s: None
    return group_timeouts(config)


def test_deepspeed_makes_groups_without_the_timeout(config: Config) -> None:
    """Why it is patched: left alone, its groups wait for 30 minutes. When this fails, the patch can go."""
    assert 1800.0 in run_ranks(unpatched_timeouts, 1, config)[0]


def throughput_timer(config: Config) -> bool:
    return start(config)._engine.tput_timer.config.enabled


def test_no_timer_waits_for_the_device(config: Config) -> None:
    """DeepSpeed's throughput timer, on by default, synchronises twice per micro-batch."""
    assert run_ranks(throughput_timer, 1, config) == [False]
