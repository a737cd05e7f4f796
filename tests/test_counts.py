"""What a training step costs beside its arithmetic, counted: launches, waits for the device, collectives, graphs.

Each ceiling is what the step needs today, with its reason. Whoever adds a storm of launches, a value read from the
device, a collective or a graph break fails here; three of the tests plant one.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.engine.patches
import pretrain.engine.step
from pretrain.cluster import ranks
from pretrain.config import Config, ModelConfig
from pretrain.data.loader import Batch, single_labels
from pretrain.data.order import plan_batch
from pretrain.engine.step import Engine
from pretrain.evaluation.classification import predict_all
from pretrain.models.build import build_model, compile_blocks
from pretrain.models.vit import Block
from pretrain.optim import ElementwiseOptimizer

NUM_CLASSES = 7
VIEWS = ("view", "detach", "alias", "t.default", "transpose", "slice", "select", "as_strided", "unbind", "narrow")
VIEWS += ("expand", "split", "chunk", "permute", "unsqueeze", "squeeze", "_unsafe_view", "lift_fresh")
# Of a tensor on a GPU each of these waits until the GPU has computed it, or for a copy from memory that is not pinned.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "unique", "equal")
READS += ("new_tensor",)
MAKES = (torch.tensor, torch.as_tensor, torch.from_numpy)


class Counts(TorchFunctionMode):
    """Counts what is called while it is entered: `ops` by name, and `waits` by what causes them.

    On CPUs nothing waits; so calls count that would. Tensors of `on_host` (the optimizer's counters of steps) are on
    the CPU in any run.
    """

    def __init__(self, on_host: Any = ()) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._on_host = {id(tensor) for tensor in on_host}
        self._below = _Operations(self)

    def __enter__(self) -> "Counts":
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        of_host = bool(args) and id(args[0]) in self._on_host
        if (name in READS and not of_host) or (function in MAKES and kwargs.get("device") is not None):
            self.waits[name] += 1
        return function(*args, **kwargs)

    @property
    def launches(self) -> int:
        """Operations that a GPU would be given, without views and collectives."""
        return sum(count for name, count in self.ops.items() if not name.startswith("c10d"))

    @property
    def collectives(self) -> int:
        """Calls of the process group."""
        return sum(count for name, count in self.ops.items() if name.startswith("c10d"))


class _Operations(TorchDispatchMode):
    """What Counts cannot see: operations that C++ code calls, of the backward pass too."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if not name.startswith(tuple(f"aten.{view}" for view in VIEWS)):
            self._counts.ops[name] += 1
        if name.startswith(("aten.nonzero", "aten.masked_select", "aten._unique", "aten.repeat_interleave.Tensor")):
            self._counts.waits[name] += 1
        if name.startswith(("aten.index.", "aten.index_put")) and any(
            getattr(i, "dtype", None) == torch.bool for i in args[1]
        ):
            self._counts.waits[name] += 1  # a mask: how many it takes is asked of the device
        return function(*args, **(kwargs or {}))


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """24 blocks, bf16, stochastic depth, clipping, averages, normalisation of other weights: what a step may need."""
    shards = make_shards(tmp_path_factory.mktemp("shards") / "squares")
    everything: dict[str, Any] = {"model__drop_path": 0.1, "optim__average_decay": 0.9, "data__global_batch": 64}
    everything |= {"data__mean": [0.485, 0.456, 0.406], "data__std": [0.229, 0.224, 0.225]}
    return tiny_config(shards, Path("unused"), model__depth=24, engine__precision="bf16", **everything)


def fake_engine(config: Config, world_size: int) -> Engine:
    """The real engine as rank 0 of so many, the others are torch's fake process group: their values are missing."""
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    device = ranks.start(60)
    plan = plan_batch(config.data.global_batch, world_size, config.engine.max_micro_batch_size)
    return Engine(build_model(config.model, NUM_CLASSES), config, plan, device)


def batch_of(config: Config, engine: Engine) -> Batch:
    """Random images, as many as the rank takes in a step."""
    slots = engine.plan.micro_batch * engine.plan.accumulation
    images = torch.randint(0, 256, (slots, 3, config.model.image_size, config.model.image_size), dtype=torch.uint8)
    labels = torch.arange(slots) % NUM_CLASSES
    return Batch(images, *single_labels(labels), torch.ones(slots, dtype=torch.bool), labels, labels, [])


def counts_of_a_step(config: Config, world_size: int, planted: str | None) -> dict[str, Any]:
    """Counts of the fourth step, of the optimizer's part of it, of the check before a save, of norms of layers."""
    if planted == "launches":
        pretrain.engine.patches._lighten_step = lambda zero: None
    engine = fake_engine(config, world_size)
    batch = batch_of(config, engine)
    for _ in range(3):  # in its first steps ZeRO 3 writes down in which order modules need their weights
        engine.train_step(batch, lr=1e-3)
    ours = isinstance(engine._optimizer, ElementwiseOptimizer)  # torch's AdamW counts its steps on the device
    counters = [state["step"] for state in engine._optimizer.state.values()] if ours else []
    step, plain_step, whole = Counts(), engine._engine.step, Counts(counters)
    if planted == "wait":
        plain_loss = pretrain.engine.step.per_image_loss
        pretrain.engine.step.per_image_loss = lambda logits, *more: (
            plain_loss(logits, *more) * float(logits.isfinite().all())
        )
    if planted == "collective":
        module: Any = engine._module
        module.register_forward_hook(lambda *_: dist.all_reduce(torch.zeros(1)))

    def counted() -> None:
        with step:
            plain_step()

    engine._engine.step = counted
    with whole:
        result = engine.train_step(batch, lr=1e-3)
    assert result.applied
    engine._engine.step = plain_step
    check, watched = Counts(), Counts(counters)
    with check:
        engine.check()
    with watched, engine.layers.watched(True):
        engine.train_step(batch, lr=1e-3)
    return {
        "check": dict(check.waits),
        "watched": dict(watched.waits),
        "step": step.launches,
        "launches": whole.launches,
        "waits": dict(whole.waits),
        "collectives": {name: count for name, count in whole.ops.items() if name.startswith("c10d")},
    }


# World size, stage, images of a micro-batch (of 64 over all ranks); launches of the optimizer's step, waits for the
# device and collectives, at most. ZeRO 1 and 2: two groups of parameters, of each norm, pieces joined, cast, clipped,
# stepped on and cast back. One wait: whether the norm is finite, which all must know before they step. Collectives: the
# gradients, the norm, the weights of each group; with ZeRO 2 gradients once per micro-batch. On one rank only the norm.
# ZeRO 3 copies parameter by parameter, and on several ranks gathers those that it keeps whole between steps one by one:
# small ones, which here are all 296. All ceilings are measured ones and a little more.
CEILINGS = [
    ((1, 1, 64), 60, 1, 1),
    ((64, 2, 64), 60, 1, 4),
]
SLOW_CEILINGS = [
    ((8, 2, 2), 60, 1, 7),
    ((1, 1, 16), 60, 1, 1),
    ((8, 3, 64), 670, 1, 2 + 296),
]
LONG_CEILINGS = [
    ((1, 2, 64), 60, 1, 1),
    ((1, 3, 64), 370, 1, 2),
    ((8, 1, 64), 60, 1, 4),
    ((8, 1, 2), 60, 1, 4),
    ((8, 2, 64), 60, 1, 4),
    ((64, 1, 64), 60, 1, 4),
]


@pytest.mark.parametrize(
    ("layout", "most_launches", "most_waits", "most_collectives"),
    [
        *CEILINGS,
        *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_CEILINGS),
        *(pytest.param(*row, marks=pytest.mark.long) for row in LONG_CEILINGS),
    ],
    ids=str,
)
def test_a_step_costs_no_more_than_it_must(
    layout: tuple[int, int, int], most_launches: int, most_waits: int, most_collectives: int, config: Config
) -> None:
    """24 blocks on 1, 8 and 64 ranks, of which rank 0 is counted, also in micro-batches."""
    found = counted(config, layout)
    assert found["step"] <= most_launches, found
    assert sum(found["waits"].values()) <= most_waits, found
    assert sum(found["collectives"].values()) <= most_collectives, found
    assert sum(found["check"].values()) == 1 and found["watched"] == found["waits"], found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "most_launches", "most_collectives"), [((1, 1, 64), 1070, 1), ((64, 2, 64), 1020, 54)], ids=str
)
def test_rates_by_layer_cost_a_group_for_each(
    layout: tuple[int, int, int], most_launches: int, most_collectives: int, config: Config
) -> None:
    """26 layers of 24 blocks, kernels and the rest: 52 groups in place of two, each of some 20 launches; one wait."""
    found = counted(changed(config, optim__layer_decay=0.75), layout)
    assert found["step"] <= most_launches, found
    assert sum(found["waits"].values()) <= 1, found
    assert sum(found["collectives"].values()) <= most_collectives, found


@pytest.mark.parametrize(
    ("layout", "most_launches", "most_collectives"),
    [
        ((1, 1, 64), 190, 1),
        ((64, 2, 64), 96, 5),
        pytest.param((8, 2, 2), 102, 8, marks=pytest.mark.slow),
        pytest.param((1, 1, 16), 168, 1, marks=pytest.mark.slow),
        pytest.param((8, 3, 64), 800, 3 + 296, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lamb_costs_a_launch_for_each_matrix(
    layout: tuple[int, int, int], most_launches: int, most_collectives: int, config: Config
) -> None:
    """The 98 matrices' pieces that a rank owns are stepped on one by one, each with its own ratio; norms of all of them
    are a launch. Beside AdamW's, one collective more, of the group that decays, on several ranks, and no wait.
    """
    found = counted(changed(config, optim__name="lamb"), layout)
    assert found["step"] <= most_launches, found
    assert sum(found["waits"].values()) <= 1 and found["watched"] == found["waits"], found
    assert sum(found["collectives"].values()) <= most_collectives, found


@pytest.mark.parametrize(
    ("layout", "most_collectives"), [((8, 1, 64), 4), pytest.param((8, 2, 2), 7, marks=pytest.mark.slow)], ids=str
)
def test_overlapped_reductions_cost_no_more(
    layout: tuple[int, int, int], most_collectives: int, config: Config
) -> None:
    """As above, where a bucket holds the whole model. What a GPU's streams wait for: tests/test_engine_patches.py."""
    found = counted(changed(config, engine__overlap_reduction=True), layout)
    assert found["step"] <= 60 and sum(found["waits"].values()) == 1, found
    assert sum(found["collectives"].values()) <= most_collectives, found


def test_an_evaluation_waits_for_its_answers_alone() -> None:
    """Best classes, their shares and losses, batch by batch; the mask of unread images is never asked of the device."""
    slots = torch.arange(6)
    images, valid = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), slots != 4
    batches = [Batch(images, *single_labels(slots), valid, slots, slots + 6 * n, []) for n in range(3)]
    with Counts() as counts:
        found = predict_all(lambda images: torch.eye(6), batches, loss="softmax", device=torch.device("cpu"))
    assert found is not None and len(found.index) == 3 * 5
    for of_host in ("numpy", "__bool__"):  # answers that have come, agreements
        del counts.waits[of_host]
    assert counts.waits == {"cpu": 3 * 3, "tolist": 1}  # the last one: counts, agreed on at the end


def counted(config: Config, layout: tuple[int, int, int], planted: str | None = None) -> dict[str, Any]:
    world_size, stage, micro = layout
    settings = {"engine__zero_stage": stage, "engine__max_micro_batch_size": micro}
    found = run_ranks(counts_of_a_step, 1, changed(config, **settings), world_size, planted)[0]
    print(f"{world_size} ranks, ZeRO {stage}, micro-batches of {micro}: {found}")
    return found


@pytest.mark.slow
def test_what_is_planted_is_counted(config: Config) -> None:
    """A value read in the loss counts once per micro-batch, a collective in the forward pass too; DeepSpeed's own step,
    without our patches, is the storm of launches that they are for: when it is none, they can go.
    """
    assert counted(config, (8, 2, 2), "wait")["waits"] == {"__float__": 4, "__bool__": 1}
    assert sum(counted(config, (8, 2, 2), "collective")["collectives"].values()) == 7 + 4
    assert counted(config, (1, 1, 64), "launches")["step"] > 3000


def test_waits_that_hide_are_counted() -> None:
    """One argument makes `torch.where` a search for what is true; `new_tensor` copies to where its tensor lies."""
    values = torch.arange(3.0)
    with Counts() as counts:
        torch.where(values > 0)
        values.nonzero()
        values.new_tensor([1.0])
    assert counts.waits == {"aten.nonzero.default": 2, "new_tensor": 1}


# --- graphs of the compiler ------------------------------------------------------------------------------------------


# The compiler looks at `.grad` of what it traces, and hides the warning from users by other means than a filter.
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Graphs:
    """A backend of torch.compile that runs each graph as it is, and counts graphs, their calls and sizes left open."""

    def __init__(self) -> None:
        self.graphs = self.calls = self.open_sizes = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        self.graphs += 1
        sizes = [size for given in example for size in getattr(given, "shape", [given])]
        self.open_sizes += sum(isinstance(size, torch.SymInt) for size in sizes)

        def called(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return called


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Stands where the compiler would: no C compiler is needed."""
    found, compile_module = Graphs(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compile_module(module, backend=found, **options)
    )
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def compiled(**changes: Any) -> Any:
    shape = {"width": 32, "depth": 24, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8}
    model = build_model(ModelConfig(**{"name": "Ti", **shape, **changes}), NUM_CLASSES)
    compile_blocks(model)
    return model


@QUIET
@pytest.mark.parametrize(
    "changes",
    [
        {"drop_path": 0.1},
        {"drop_path": 0.1, "drop_path_rule": "uniform", "layer_scale": 1e-4},
        pytest.param({"drop_path": 0.1, "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"positions": "relative"}, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.long)])
def test_all_blocks_share_a_graph_for_training_and_one_for_evaluation(
    recompute: bool, changes: dict[str, Any], graphs: Graphs
) -> None:
    """24 blocks, each with its own rate of stochastic depth: one graph each, which all blocks call in every pass."""
    model, images = compiled(**changes), torch.randn(4, 3, 16, 16)
    model.checkpoint_activations = recompute
    for _ in range(2):
        model.train()(images).sum().backward()
    assert (graphs.graphs, graphs.calls) == (1, 2 * 24 * (1 + recompute))
    with torch.no_grad():
        model.eval()(images)
    assert (graphs.graphs, graphs.calls) == (2, 2 * 24 * (1 + recompute) + 24)


@QUIET
@pytest.mark.parametrize("training_first", [True, False])
def test_all_of_timms_blocks_are_compiled(training_first: bool, graphs: Graphs) -> None:
    """Each has its stochastic depth inside, and a graph of its own: more than the compiler takes by itself. Else a run
    that resumes with a validation would train by other kernels than the undisturbed one.
    """
    model: Any = build_model(ModelConfig(name="timm:vit_tiny_patch16_224", image_size=32, drop_path=0.1), NUM_CLASSES)
    compile_blocks(model)
    for training in (training_first, not training_first):
        before = graphs.calls
        with torch.set_grad_enabled(training):
            model.train(training)(torch.randn(2, 3, 32, 32))
        assert graphs.calls - before == 12


@QUIET
@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["training_first", "evaluation_first"])
def test_each_size_of_a_batch_has_its_own_code(order: tuple[bool, bool], graphs: Graphs) -> None:
    """Training's batch and evaluation's, whichever comes first, as after a stop that cut a validation short: no graph
    is left open for other sizes, which would have other kernels than the undisturbed run.
    """
    model = compiled(depth=2, drop_path=0.1)
    for _ in range(2):
        for training in order:
            with torch.set_grad_enabled(training):
                model.train(training)(torch.randn(4 if training else 6, 3, 16, 16))
    assert (graphs.graphs, graphs.calls, graphs.open_sizes) == (2, 2 * 2 * 2, 0)


@pytest.mark.parametrize("tuned", [False, True])
def test_kernels_are_timed_where_that_is_asked_for(tuned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each block, and never in CUDA graphs: see compile_blocks."""
    found: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: found.append(options))
    shape = {"width": 32, "depth": 3, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8}
    compile_blocks(build_model(ModelConfig(name="Ti", **shape), NUM_CLASSES), tuned=tuned)
    assert found == [{"dynamic": False, "mode": "max-autotune-no-cudagraphs" if tuned else None}] * 3


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("planted", ["break", "constant"])
def test_a_graph_break_and_a_rate_inside_the_block_are_found(
    planted: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would make the test above fail: a value read inside a block, a number of its own in each block."""
    forward = Block.forward

    def broken(block: Any, x: torch.Tensor, kept: Any = None) -> torch.Tensor:
        if planted == "constant":
            return forward(block, x * block.rate, kept)
        return forward(block, x if x.sum().item() else x, kept)

    monkeypatch.setattr(Block, "forward", broken)
    model = compiled()
    for number, block in enumerate(model.blocks):
        block.rate = 1.0 + number
    model.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    assert graphs.graphs > 1 or graphs.calls < 24
