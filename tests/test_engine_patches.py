"""DeepSpeed's patches: each works, and is still needed. A DeepSpeed that behaves otherwise fails here by name."""

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import cuda_accelerator, get_accelerator
from deepspeed.runtime.zero import stage_1_and_2
from ranks import run_ranks
from tiny import NUM_CLASSES, changed, make_shards, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.engine.patches
import pretrain.engine.step
import pretrain.sizes
from pretrain.cluster import ranks, watchdog
from pretrain.config import Config
from pretrain.data.loader import train_batches
from pretrain.engine.step import Engine
from pretrain.models.build import build_model
from pretrain.models.profile import num_parameters
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data


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


def test_gpus_may_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes CUDA_VISIBLE_DEVICES for numbers if pynvml is installed. When it does not, the patch can go."""
    nvml = SimpleNamespace(nvmlDeviceGetHandleByIndex=lambda _: None, NVMLError=Exception)
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-3f1c1a5e-7cb8-5a3b-8c1e-5d2a8f7c0b11")
    accelerator = cuda_accelerator.CUDA_Accelerator()
    with pytest.raises(ValueError, match="invalid literal"):
        accelerator.available_memory()
    pretrain.engine.patches._free_memory_by_torch(accelerator)
    assert accelerator.available_memory() == 5


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


def printed_at_start(config: Config, patched: bool) -> str:
    if not patched:
        pretrain.engine.patches._without_memory_lines = lambda: None
    with redirect_stdout(io.StringIO()) as printed:
        start(config)
    return printed.getvalue()


@pytest.mark.parametrize("patched", [True, False])
def test_no_lines_of_memory_for_each_group(config: Config, patched: bool) -> None:
    """Three lines before and three behind each group buried the run's own. When DeepSpeed prints none, it can go."""
    of_groups = changed(config, engine__precision="bf16", engine__max_micro_batch_size=2, optim__layer_decay=0.75)
    (printed,) = run_ranks(printed_at_start, 1, of_groups, patched)
    assert (printed.count("CPU Virtual Memory") > 2) != patched
    assert not patched or "group" not in printed and "MA " not in printed, printed


def times_gradients_are_counted(config: Config, patched: bool) -> int:
    if not patched:
        pretrain.engine.patches._lighten_step = lambda zero: None
    plain, counted = stage_1_and_2.count_used_parameters_in_backward, []

    def counting(parameters: Any) -> int:
        counted.append(len(parameters))
        return plain(parameters)

    stage_1_and_2.count_used_parameters_in_backward = counting
    engine, data = start(config), open_data(config)
    batches = train_batches(data.train, data.order, engine.plan, config, 0)
    for _ in range(2):
        assert engine.train_step(next(batches), 1e-3).applied
    return len(counted)


@pytest.mark.parametrize("patched", [True, False])
def test_no_step_counts_its_gradients(config: Config, patched: bool) -> None:
    """DeepSpeed asks the graph for every parameter, once per backward pass. When it does not, the patch can go."""
    assert run_ranks(times_gradients_are_counted, 1, config, patched) == [0 if patched else 2]


# --- the step --------------------------------------------------------------------------------------------------------


def steps_with_faults(config: Config, patched: bool) -> list[Any]:
    """12 steps, clipped; the loss is NaN on the last rank in one, a gradient infinite on the first in another."""
    pretrain.sizes.OVERLAPPED_BUCKET_ELEMENTS = 0  # so the largest parameter's: several buckets
    if not patched:
        pretrain.engine.patches._lighten_step = lambda zero: None
        pretrain.engine.patches._lighten_unsharded_step = lambda: None
        plain = pretrain.engine.step.deepspeed_config
        pretrain.engine.step.deepspeed_config = lambda *sizes: plain(*sizes[:-1], 10**9)  # the bucket of a large model
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
    whole = num_parameters(build_model(config.model, NUM_CLASSES))  # DeepSpeed's own bucket would be 500 million
    assert elements == whole if has_bucket else elements < whole, elements


Layout = tuple[int, int, str, int]  # ranks, stage, precision, images of a micro-batch


def in_layouts(layouts: list[Layout], slow: list[Layout], long: list[Layout]) -> pytest.MarkDecorator:
    """A test's `layout`, one after the other."""
    marked = [pytest.param(layout, marks=pytest.mark.slow) for layout in slow]
    marked += [pytest.param(layout, marks=pytest.mark.long) for layout in long]
    return pytest.mark.parametrize("layout", [*layouts, *marked], ids=lambda layout: "-".join(map(str, layout)))


def of_layout(config: Config, layout: Layout, **changes: Any) -> Config:
    """The config, trained so."""
    _, stage, precision, micro = layout
    settings = {"engine__zero_stage": stage, "engine__precision": precision, "engine__max_micro_batch_size": micro}
    return changed(config, **settings, **changes)


# One rank averages nothing; bf16 in micro-batches on stage 1 is a
# class of DeepSpeed's own.
LAYOUTS = [(2, 2, "fp32", 2), (2, 3, "fp32", 64), (2, 1, "bf16", 64), (1, 1, "fp32", 5)]
SLOW_LAYOUTS = [(2, 1, "fp32", 64), (2, 3, "bf16", 64), (2, 1, "bf16", 2), (1, 2, "fp32", 5)]
LONG_LAYOUTS = [(1, 1, "bf16", 64), (1, 1, "bf16", 5), (1, 2, "bf16", 5), (1, 3, "fp32", 5), (2, 2, "bf16", 2)]
LONG_LAYOUTS += [(3, 1, "fp32", 64), (3, 2, "bf16", 2), (3, 1, "bf16", 2), (3, 3, "fp32", 2)]


@in_layouts(LAYOUTS, SLOW_LAYOUTS, LONG_LAYOUTS)
def test_the_light_step_has_the_same_bits(layout: Layout, config: Config) -> None:
    """One to three ranks, also with micro-batches: losses, norms, weights, moments; both faults are skipped by all."""
    world_size, config = layout[0], of_layout(config, layout, optim__clip_norm=0.05, model__drop_path=0.1)
    ours, theirs = (run_ranks(steps_with_faults, world_size, config, patched) for patched in (True, False))
    for (told, parts, state), (their_told, their_parts, their_state) in zip(ours, theirs, strict=True):
        assert told == their_told and state == their_state
        assert [number for number, (_, applied, _) in enumerate(told, 1) if not applied] == [4, 7]
        assert parts == their_parts and state["optimizer_step"] == 10


# --- reductions beside the backward pass -----------------------------------------------------------------------------


def steps_beside(config: Config, overlapped: bool) -> list[Any]:
    """The same steps, with reductions beside the backward pass or behind it, in buckets of the same size."""
    if not overlapped:
        inner = pretrain.engine.step.deepspeed_config

        def behind(*arguments: Any) -> dict[str, Any]:
            values = inner(*arguments)
            values["zero_optimization"]["overlap_comm"] = False
            return values

        pretrain.engine.step.deepspeed_config = behind
    return steps_with_faults(config, patched=True)


# As above. Not ZeRO 1 on three ranks, which fills its buckets in another order then: where in a bucket an element lies
# decides in which order three numbers are added up.
BESIDE = [(2, 1, "bf16", 64), (3, 2, "fp32", 2)]
SLOW_BESIDE = [(2, 3, "bf16", 64), (2, 2, "bf16", 2), (2, 1, "fp32", 2), (1, 1, "fp32", 5)]
LONG_BESIDE = [(3, 3, "fp32", 2), (3, 2, "bf16", 64), (2, 1, "bf16", 2), (1, 2, "bf16", 5)]


@in_layouts(BESIDE, SLOW_BESIDE, LONG_BESIDE)
def test_overlapped_reductions_have_the_same_bits(layout: Layout, config: Config) -> None:
    """As the test of the light step. On a CPU nothing runs beside anything: it is the bookkeeping that is shown."""
    world_size, config = layout[0], of_layout(config, layout, optim__clip_norm=0.05, engine__overlap_reduction=True)
    beside, behind = (run_ranks(steps_beside, world_size, config, overlapped) for overlapped in (True, False))
    assert beside == behind


WAITS = "the process waits in "


class Stream:
    """A stream of a device that is not there: tells what waits for it, and runs nothing."""

    told: list[str] = []  # by all streams

    def __init__(self, name: str = "another") -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} stream waits for {other.name}")

    def synchronize(self) -> None:
        self.told.append(WAITS + sys._getframe(1).f_code.co_name)


class Event:
    """An event of such a stream; on a device that is behind none is over."""

    is_behind = False
    synchronize = Stream.synchronize

    def __init__(self) -> None:
        self.told = Stream.told

    def record(self) -> None: ...

    def query(self) -> bool:
        return not self.is_behind


class Told(TorchDispatchMode):
    """Tells collectives too, each with the stream that it is given to."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce" in str(function) and str(function).startswith("c10d"):
            Stream.told.append(f"{get_accelerator().current_stream().name} stream reduces")  # type: ignore[union-attr]
        return function(*args, **(kwargs or {}))


def pretend_streams() -> None:
    """Has DeepSpeed take this process's CPU for a device with streams, as a GPU is."""
    accelerator: Any = get_accelerator()
    streams = [Stream("main")]

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        setattr(accelerator, name, lambda: False)
    accelerator.current_stream, accelerator.default_stream = (lambda: streams[-1]), (lambda: streams[0])
    accelerator.stream, accelerator.synchronize = entered, Stream("device").synchronize
    type(accelerator).Stream, type(accelerator).Event = Stream, Event
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign,assignment]


def told_in_a_step(config: Config, patched: bool, is_behind: bool = False) -> list[str]:
    """What reduces and waits in the second step, as on a device with streams."""
    Event.is_behind = is_behind
    if not patched:
        pretrain.engine.patches._overlap_without_waiting = lambda zero: None
    pretrain.sizes.OVERLAPPED_BUCKET_ELEMENTS = 0
    pretend_streams()
    engine, data = start(config), open_data(config)
    batches = train_batches(data.train, data.order, engine.plan, config, 0)
    engine.train_step(next(batches), lr=1e-3)
    Stream.told.clear()
    with Told():
        engine.train_step(next(batches), lr=1e-3)
    return Stream.told


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_step_follows_reductions_without_waiting(stage: int, config: Config) -> None:
    """All run on a stream of their own, each behind the gradients; the stream of the step waits for the last one, and
    then comes the norm. The process does not wait; when DeepSpeed's own does not either, the patch can go.
    """
    config = changed(config, engine__zero_stage=stage, engine__overlap_reduction=True)
    for told in run_ranks(told_in_a_step, 2, config, True):
        *reductions, last, norm = told
        assert (last, norm) == ("main stream waits for another", "main stream reduces")
        each = ["another stream waits for main", "main stream waits for another", "another stream reduces"]
        assert len(reductions) > 2 * len(each) and reductions == each * (len(reductions) // 3)
    assert WAITS + "independent_gradient_partition_epilogue" in run_ranks(told_in_a_step, 2, config, False)[0]


@pytest.mark.parametrize("overlaps", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_zero_3_waits_for_the_device(overlaps: bool, config: Config) -> None:
    """Behind each micro-batch, and once for the weights that are kept whole between steps, which no count on a CPU
    shows. On a device that is behind also for buckets and weights of before. The watchdog knows all these places.
    """
    config = changed(config, engine__zero_stage=3, engine__max_micro_batch_size=2, engine__overlap_reduction=overlaps)
    behind_a_pass, of_weights = "independent_gradient_partition_epilogue", "_allgather_params_coalesced"
    found = waits(config, is_behind=False)
    assert found == {behind_a_pass: 3, of_weights: 1}
    found |= waits(config, is_behind=True)
    assert "__reduce_and_partition_ipg_grads" in found and set(found) <= watchdog._WAITS_FOR_DEVICE, found


def waits(config: Config, *, is_behind: bool) -> Counter[str]:
    told = run_ranks(told_in_a_step, 2, config, True, is_behind)[0]
    return Counter(line.removeprefix(WAITS) for line in told if line.startswith(WAITS))
