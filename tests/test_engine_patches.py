"""DeepSpeed's patches: each works, and is still needed. A DeepSpeed that behaves otherwise fails here by name."""

import logging
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.engine.patches
import pretrain.engine.step
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.loader import train_batches
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
    pretrain.engine.step.after_start = lambda timeout_s, zero: None
    return group_timeouts(config)


def test_deepspeed_makes_groups_without_the_timeout(config: Config) -> None:
    """Why it is patched: left alone, its groups wait for 30 minutes. When this fails, the patch can go."""
    assert 1800.0 in run_ranks(unpatched_timeouts, 1, config)[0]


def throughput_timer(config: Config) -> bool:
    return start(config)._engine.tput_timer.config.enabled


def test_no_timer_waits_for_the_device(config: Config) -> None:
    """DeepSpeed's throughput timer, on by default, synchronises twice per micro-batch."""
    assert run_ranks(throughput_timer, 1, config) == [False]


def warnings_with_sgd(config: Config, patched: bool) -> list[str]:
    if not patched:
        pretrain.engine.patches._without_false_alarm = lambda: None
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    deepspeed.utils.logger.addHandler(listener)
    start(changed(config, optim__name="sgd"))
    return told


@pytest.mark.parametrize("patched", [True, False])
def test_no_false_alarm_about_the_optimizer(config: Config, patched: bool) -> None:
    """DeepSpeed calls SGD untested, on the console of every fine-tuning. When it does not, the patch can go."""
    (told,) = run_ranks(warnings_with_sgd, 1, config, patched)
    assert any("untested optimizer" in line for line in told) != patched


# --- the step --------------------------------------------------------------------------------------------------------


def steps_with_faults(config: Config, patched: bool) -> list[Any]:
    """12 steps, clipped; the loss is NaN on the last rank in one, a gradient infinite on the first in another."""
    if not patched:
        pretrain.engine.patches._lighten_step = lambda zero: None
        pretrain.engine.patches._lighten_unsharded_step = lambda: None
    engine = start(config)
    plain_loss, data, told, step = pretrain.engine.step.per_image_loss, open_data(config), [], 0

    def loss_with_faults(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if step == 7 and ranks.is_main():
            logits.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        nan = float("nan") if step == 4 and ranks.rank() == ranks.world_size() - 1 else 1.0
        return plain_loss(logits, *arguments) * nan

    pretrain.engine.step.per_image_loss = loss_with_faults
    batches = train_batches(data.train, data.order, engine.plan, config, 0)
    for step in range(1, 13):
        result = engine.train_step(next(batches), lr=1e-2)
        told.append((result.sums.tolist() if step != 4 else None, result.applied, float(result.grad_norm)))
    parts = {part.name: part.values.tolist() for part in [*engine.weights(), *engine.moments()]}
    return [told, parts, engine.state()]


class LargestBuffer(TorchDispatchMode):
    """The most elements of a tensor that is made empty while it is entered."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if str(function) == "aten.empty.memory_format":
            self.elements = max(self.elements, result.numel())
        return result


def largest_buffer(config: Config) -> int:
    engine, data = start(config), open_data(config)
    with LargestBuffer() as largest:
        engine.train_step(next(train_batches(data.train, data.order, engine.plan, config, 0)), lr=1e-3)
    return largest.elements


@pytest.mark.parametrize(
    ("stage", "micro", "has_bucket"),
    [
        (1, 64, False),
        pytest.param(2, 64, False, marks=pytest.mark.slow),
        pytest.param(1, 5, False, marks=pytest.mark.slow),  # another class of DeepSpeed's
        pytest.param(2, 5, True, marks=pytest.mark.slow),  # its reduction is what adds up micro-batches
    ],
)
def test_one_rank_has_no_bucket(stage: int, micro: int, has_bucket: bool, config: Config) -> None:
    """What it reduces nothing through is not allocated: 1 GB of a GPU."""
    changes: dict[str, Any] = {"engine__zero_stage": stage, "engine__max_micro_batch_size": micro}
    (elements,) = run_ranks(largest_buffer, 1, changed(config, engine__precision="bf16", **changes))
    assert elements == 500_000_000 if has_bucket else elements < 1_000_000, elements


# Ranks, stage, precision, images of a micro-batch. One rank averages nothing; bf16 in micro-batches on stage 1 is a
# class of DeepSpeed's own.
LAYOUTS = [(2, 2, "fp32", 2), (2, 3, "fp32", 64), (2, 1, "bf16", 64), (1, 1, "fp32", 5)]
SLOW_LAYOUTS = [(2, 1, "fp32", 64), (2, 3, "bf16", 64), (2, 1, "bf16", 2), (1, 2, "fp32", 5)]
LONG_LAYOUTS = [(1, 1, "bf16", 64), (1, 1, "bf16", 5), (1, 2, "bf16", 5), (1, 3, "fp32", 5), (2, 2, "bf16", 2)]
LONG_LAYOUTS += [(3, 1, "fp32", 64), (3, 2, "bf16", 2), (3, 1, "bf16", 2), (3, 3, "fp32", 2)]


@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS),
        *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG_LAYOUTS),
    ],
    ids=lambda layout: "-".join(map(str, layout)),
)
def test_the_light_step_has_the_same_bits(layout: tuple[int, int, str, int], config: Config) -> None:
    """One to three ranks, also with micro-batches: losses, norms, weights, moments; both faults are skipped by all."""
    world_size, stage, precision, micro = layout
    of_layout = {"engine__zero_stage": stage, "engine__precision": precision, "engine__max_micro_batch_size": micro}
    config = changed(config, **of_layout, optim__clip_norm=0.05, model__drop_path=0.1)
    ours, theirs = (run_ranks(steps_with_faults, world_size, config, patched) for patched in (True, False))
    for (told, parts, state), (their_told, their_parts, their_state) in zip(ours, theirs, strict=True):
        assert told == their_told and state == their_state
        assert [number for number, (_, applied, _) in enumerate(told, 1) if not applied] == [4, 7]
        assert parts == their_parts and state["optimizer_step"] == 10
