"""Ready for CUDA without a GPU: the code runs on fake tensors that say they lie on "cuda".

Shapes, types and devices are worked out as on a GPU, values are not; whatever joins a tensor of the host with one of
the device raises. Not shown: the backward pass, which needs a CUDA context, collectives, kernels, streams.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.checkpoint import behind
from pretrain.checkpoint.behind import FileCopy, HostCopies, host_bytes
from pretrain.cluster import agreement
from pretrain.cluster.local import on_cpu
from pretrain.config import ModelConfig, Normalisation, OptimConfig
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, single_labels
from pretrain.data.mix import Mix, mixed
from pretrain.data.order import BatchPlan
from pretrain.engine import patches, step
from pretrain.engine.fp8 import train_in_fp8
from pretrain.engine.frozen import FrozenStatistics
from pretrain.engine.layers import LargestLogits, LayerNorms
from pretrain.engine.slices import Part
from pretrain.engine.step import Engine
from pretrain.errors import StorageError
from pretrain.evaluation.classification import _answered, among, logits_of
from pretrain.evaluation.features import pre_logits, raw_pixels
from pretrain.losses import num_correct, per_image_loss
from pretrain.models.build import outline
from pretrain.optim import (
    Lamb,
    Pieces,
    adamw_update,
    build_optimizer,
    lamb_direction,
    lion_update,
    moment_dtypes,
    sgd_update,
)

CUDA = torch.device("cuda:0")
NUM_CLASSES, BATCH, SIDE = 7, 4, 16
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def asks_for_a_driver() -> bool:
    """Whether this torch asks CUDA's driver even of fake tensors."""
    with FakeTensorMode():
        try:
            torch.empty(2, 2, device=CUDA)[:, None]
        except RuntimeError:
            return True
    return False


pytestmark = pytest.mark.skipif(asks_for_a_driver(), reason="this torch asks CUDA's driver even of fake tensors")


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Every tensor of a test is a fake one; what comes from numpy and bytes is made one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def tiny(**changes: Any) -> ModelConfig:
    shape = {"width": 32, "depth": 3, "mlp_dim": 64, "heads": 2, "image_size": SIDE, "patch_size": 8}
    return ModelConfig(**{"name": "Ti", **shape, **changes})


def model_of(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """A model whose tensors lie on the device; their initial values would be drawn on the host."""
    config = ModelConfig(**changes) if "timm" in changes.get("name", "") else tiny(**changes)
    with unset_fake_temporarily():  # timm's builders compare values
        model = outline(config, NUM_CLASSES)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=CUDA))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kept, device=CUDA)
    return model


def batch_on_host(labels_per_image: int = 1) -> Batch:
    classes, weights = single_labels(torch.zeros(BATCH, dtype=torch.int64))
    classes, weights = classes.expand(-1, labels_per_image), weights.expand(-1, labels_per_image)
    images = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8)
    numbers = torch.arange(BATCH)
    return Batch(images, classes, weights, torch.ones(BATCH, dtype=torch.bool), numbers, numbers, [])


def on_cuda(*tensors: torch.Tensor) -> None:
    assert [tensor.device for tensor in tensors] == [CUDA] * len(tensors)


class NoCopies(TorchDispatchMode):
    """Raises where values go from the host to the device or back, and where the device is asked how many are not zero.

    For each of these a step waits: memory of the host that is not pinned is copied behind all that was launched before.
    tests/test_counts.py, on CPUs, cannot tell such a copy from a cast.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        assert not name.startswith("aten.nonzero"), f"{name} waits for the device"
        result = function(*args, **(kwargs or {}))
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source, target = args[name.startswith("aten.copy_")].device.type, result.device.type
            assert source == target, f"{name} from {source} to {target}"
        return result


def engine_of(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """An engine around a model on the device, less DeepSpeed: whose part calls the model, and takes no step."""
    engine: Any = object.__new__(Engine)
    model = model_of(dtype, **changes)

    class Stub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.module(images)

        def backward(self, loss: torch.Tensor) -> None:
            on_cuda(loss)

        def step(self) -> None:
            pass

        def was_step_applied(self) -> bool:
            return True

        def get_global_grad_norm(self) -> torch.Tensor:
            return torch.ones((), device=CUDA)

    flat = torch.zeros(1000, device=CUDA)
    engine.mark, engine._forward_clock = nullcontext, nullcontext()
    engine._engine, engine._module, engine._optimizer = Stub(), model, SimpleNamespace(param_groups=[{"lr_scale": 1.0}])
    engine.plan, engine.device, engine.dtype = BatchPlan(BATCH // 2, 2, 0), CUDA, dtype
    engine._loss, engine._normalisation = ("softmax", 0.1, None), IMAGENET
    engine._loss_weight, engine._frozen = 0.5, FrozenStatistics(model)
    engine._average_decay, engine._averages = 0.9, {flat: flat.clone()}
    engine._owned = SimpleNamespace(refresh_model=lambda: None, check=lambda: None)
    return engine


VARIANTS: list[Any] = [
    {},
    {"drop_path": 0.1, "dropout": 0.1},
    {"positions": "relative"},
    {"positions": "sincos2d", "pooling": "gap", "representation_size": 16},
    {"positions": "learned2d", "positions_at": "every_layer"},
    {"pooling": "map", "positions_at": "shared"},
    {"trunk": [1], "image_size": 32, "patch_size": 16},
    pytest.param({"name": "timm:test_vit", "image_size": 32}, marks=pytest.mark.slow),
]


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_models_stay_on_the_device(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """Training and evaluation, features and logits of each variant."""
    model = model_of(dtype, **changes)
    side = changes.get("image_size", SIDE)
    images = torch.zeros(BATCH, 3, side, side, dtype=torch.uint8, device=CUDA)
    on_cuda(model.train()(to_float(images, dtype, IMAGENET)), model.eval()(to_float(images, dtype)))
    if dtype == torch.float32:
        on_cuda(logits_of(model, IMAGENET)(images), pre_logits(model)(images), among(logits_of(model), [1, 3])(images))


@torch.no_grad()
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_fp8_is_given_what_a_gpu_multiplies() -> None:
    """Both sides in the order that its kernels want, sizes in multiples of 16; tokens are any number."""
    model = model_of()
    with unset_fake_temporarily():
        train_in_fp8(model)
    images = torch.zeros(BATCH - 1, 3, SIDE, SIDE, dtype=torch.bfloat16, device=CUDA)
    with NoCopies():
        on_cuda(model.train()(images))
    model.blocks[0].mlp.fc1 = nn.Linear(32, 72, device=CUDA, dtype=torch.bfloat16)  # type: ignore[index, union-attr]
    with unset_fake_temporarily():
        train_in_fp8(model)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        model(images)


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_and_counts_stay_on_the_device(kind: str, labels: int) -> None:
    """With and without smoothing, with one label and with mixed ones."""
    batch, logits = batch_on_host(labels).to(CUDA), torch.zeros(BATCH, NUM_CLASSES, device=CUDA, dtype=torch.bfloat16)
    for smoothing in (0.0, 0.1):
        on_cuda(per_image_loss(logits, batch.labels, batch.label_weights, kind, smoothing))
    on_cuda(num_correct(logits, batch.labels, batch.label_weights, batch.valid, top=5), raw_pixels(batch.images))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"drop_path": 0.1, "dropout": 0.1}, {"pooling": "map"}], ids=str)
def test_a_training_step_and_evaluation_stay_on_the_device(changes: dict[str, Any]) -> None:
    """The engine's own lines: a batch handed over, two micro-batches, sums, averages; prediction and features."""
    engine = engine_of(**changes)
    batch = batch_on_host(2).to(engine.device)
    on_cuda(*batch[:4])
    assert batch.index.device.type == "cpu"
    with NoCopies():
        on_cuda(engine.train_step(batch, 1e-3).sums)
        with engine.averaged():
            on_cuda(engine.predict(batch.images), engine.features(batch.images))


@torch.no_grad()
def test_answers_of_an_evaluation_come_to_the_host() -> None:
    """A batch that lies on the host goes over and back; its mask stays, and selects there."""
    answers = _answered(engine_of().predict, batch_on_host(), "softmax", CUDA, True)
    assert [answer.device.type for answer in answers] == ["cpu"] * 4


@torch.no_grad()
def test_largest_logits_stay_on_the_device() -> None:
    """One for each attention, also with a table of relative positions."""
    for changes in ({}, {"positions": "relative"}, {"pooling": "map"}):
        with LargestLogits() as largest:
            engine_of(**changes).predict(batch_on_host().to(CUDA).images)
        on_cuda(*largest.found)
        assert len(largest.found) == 3 + ("pooling" in changes)


def test_norms_of_layers_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients, when the optimizer has them, and of weights; over the ranks they are added up in one go."""
    flat, names = nn.Parameter(torch.zeros(100, device=CUDA)), ("blocks.0.norm.weight", "head.bias")
    parts = [Part(name, (50,), 0, flat, 50 * n, 50, torch.zeros(50, device=CUDA)) for n, name in enumerate(names)]
    optimizer = torch.optim.SGD([flat])
    owned: Any = SimpleNamespace(parts=lambda: parts, flat_tensors=lambda: [flat])
    layers = LayerNorms(owned, optimizer, names)
    flat.grad = torch.zeros(100, device=CUDA)
    with layers.watched(True):
        optimizer.step()

    def added_up(sums: torch.Tensor) -> Any:
        on_cuda(sums)
        assert sums.shape == (2, 2)
        return SimpleNamespace(sqrt=lambda: [1.0, 2.0]), None

    monkeypatch.setattr(agreement, "add_up", added_up)
    assert layers.read(None) == {"layers/blocks.0/weight_norm": 1.0, "layers/head/weight_norm": 2.0}


@torch.no_grad()
@pytest.mark.parametrize("mix", [Mix(0.7, None), Mix(0.75, (0, 0, 8, 8))], ids=["mixup", "cutmix"])
def test_mixed_images_stay_on_the_device(mix: Mix) -> None:
    """The loader mixes on the host; nothing of it is bound to that."""
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8, device=CUDA)
    on_cuda(mixed(image, image.clone(), mix))


UPDATES: dict[str, tuple[Callable[..., None], list[torch.dtype]]] = {
    "adamw": (adamw_update, [torch.bfloat16, torch.float32]),
    "sgd": (sgd_update, [torch.bfloat16]),
    "lion": (lion_update, [torch.bfloat16]),
    "lamb": (lamb_direction, [torch.bfloat16, torch.float32]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UPDATES)
def test_updates_stay_on_the_device(name: str) -> None:
    """Each optimizer's own arithmetic, with a first moment in bf16."""
    update, dtypes = UPDATES[name]
    weights, gradients = torch.zeros(100, device=CUDA), torch.zeros(100, device=CUDA)
    moments = [torch.zeros(100, dtype=dtype, device=CUDA) for dtype in dtypes]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}
    update(weights, gradients, moments, 1, **settings)
    on_cuda(weights, *moments)


@torch.no_grad()
def test_lambs_norms_stay_on_the_device() -> None:
    """Of pieces that a rank owns, and of none; what ranks add up too."""
    flat, nothing = (nn.Parameter(torch.zeros(100, device=CUDA)) for _ in range(2))
    group: dict[str, Any] = {"weight_decay": 0.1, "lr": 1e-3}
    groups = [{"params": [flat], **group}, {"params": [nothing], **group}]
    optimizer = Lamb(groups, moments=moment_dtypes(OptimConfig(name="lamb", lr=1)), betas=(0.9, 0.999), eps=1e-8)
    numbers = {
        flat: torch.zeros(2, dtype=torch.int64, device=CUDA),
        nothing: torch.zeros(0, dtype=torch.int64, device=CUDA),
    }
    spans = {flat: [(0, 50), (60, 30)], nothing: []}
    optimizer.share({each: Pieces(spans[each], numbers[each]) for each in spans}, 3, on_cuda)
    for members in (groups[:1], groups[1:]):  # as DeepSpeed shows them
        optimizer.param_groups = members
        for each in members:
            each["params"][0].grad = torch.zeros(100, device=CUDA)
        optimizer.step()
    on_cuda(flat, *(state["exp_avg"] for state in optimizer.state.values()))


@torch.no_grad()
def test_adamw_is_fused_and_counts_on_the_device() -> None:
    """torch's own, as it is chosen for weights on a GPU; a step of it waits for nothing."""
    optimizer = build_optimizer(OptimConfig(lr=1e-3, weight_decay=0.1), model_of(torch.float32))
    assert optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    on_cuda(*(tensor for state in optimizer.state.values() for tensor in state.values()))


@torch.no_grad()
def test_the_light_step_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of all stages, of a rank that owns nothing too, and both ways of clipping."""
    monkeypatch.setattr(dist, "all_reduce", lambda total, group=None: on_cuda(total))
    gradients = [torch.zeros(10, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    shared: dict[str, Any] = {"device": CUDA, "clip_grad": 1.0, "loss_scale": 1.0, "dp_process_group": None}
    shared |= {"averaged_gradients": {0: gradients, 1: []}, "fp16_groups": [[None], [None]]}
    zero = SimpleNamespace(
        **shared, params_in_partition=[gradients, []], _get_param_partition_group=lambda parameter: None
    )
    norm = patches._global_norm(zero)
    on_cuda(norm, *patches._norms_of_stage_3(zero), patches._unsharded_norm(gradients))
    patches._unscale_and_clip(zero, gradients, norm)
    on_cuda(patches._clip_unsharded(gradients, 1.0, norm), *gradients)


@torch.no_grad()
def test_a_checkpoints_slices_are_copied_to_the_host() -> None:
    """Views of flat tensors on the device; what is written lies in host memory."""
    flat = torch.zeros(100, device=CUDA)
    part = Part("head.weight", (5, 4), 0, flat, 10, 20, torch.zeros(20, device=CUDA, dtype=torch.bfloat16))
    piece = part.slice_of(flat)
    on_cuda(piece.values)
    copy = FileCopy({piece.name: piece.values}, pinned=False)  # pinned memory needs a context
    copy.take({piece.name: piece.values})
    assert copy._bytes.device.type == "cpu"


@pytest.mark.parametrize(
    ("elements", "taken"), [(100, 512), (1 << 27, 1 << 29), ((1 << 28) - 30, 1 << 30), (3 << 27, 1 << 30)]
)
def test_pinned_copies_are_counted_as_they_are_taken(
    elements: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator of pinned memory rounds up to a power of two: room for the file's bytes alone is not enough."""
    files = {"weights": {"w": torch.empty(elements, dtype=torch.float16, device=CUDA)}}
    assert host_bytes(files["weights"]) == taken
    on_host = {"w": torch.empty(elements, dtype=torch.float16)}
    assert 2 * elements < host_bytes(on_host) < 2 * elements + 200
    monkeypatch.setattr(behind, "free_memory_bytes", lambda: 3 * host_bytes(files["weights"]) - 1)
    monkeypatch.setattr(behind.ranks, "ranks_here", lambda: 3)
    with pytest.raises(StorageError, match="of host memory are free"):
        HostCopies().take(files)


TF32 = """
import torch
from pretrain.cluster import ranks

def modes():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

before = modes()
ranks.start(60)
print(before, modes(), torch.get_float32_matmul_precision())
"""


def test_fp32_is_not_rounded_to_tf32() -> None:
    """Neither convolutions, where it is torch's default, nor products, where NVIDIA's containers ask for it: in
    whatever has joined a process group.
    """
    variables = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": os.pathsep.join(sys.path), **on_cpu(1)}
    words = [sys.executable, "-W", "error", "-c", TF32]
    told = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, timeout=100)
    assert told.stdout.strip() == "(True, True) (False, False) highest", told.stderr


# --- what is planted is found ----------------------------------------------------------------------------------------


def on_host_targets(engine: Any) -> None:
    engine.train_step(batch_on_host(), 1e-3)


def on_host_averages(engine: Any) -> None:
    flat = next(iter(engine._averages))
    engine._averages = {flat: torch.zeros(1000)}
    engine._update_averages()


def on_host_parameter(engine: Any) -> None:
    engine._module.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    engine.predict(torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8, device=CUDA))


def on_host_moment(engine: Any) -> None:
    weights, gradients = torch.zeros(2, 9, device=CUDA)
    adamw_update(weights, gradients, [torch.zeros(9), torch.zeros(9)], 1, lr=1, betas=(0, 0), eps=1, weight_decay=0)


@torch.no_grad()
@pytest.mark.parametrize("planted", [on_host_targets, on_host_averages, on_host_parameter, on_host_moment])
def test_a_mixture_of_host_and_device_is_found(planted: Callable[[Any], None]) -> None:
    """A batch that was not handed over, averages, a parameter and a moment that were left on the host."""
    engine = engine_of()
    with pytest.raises(RuntimeError, match="two different devices|same device"):
        planted(engine)


COPIES: dict[str, Callable[[torch.Tensor], Any]] = {
    "to": lambda losses: losses + torch.zeros(len(losses)).to(losses.device),
    "back": lambda losses: losses.to("cpu"),
    "new_tensor": lambda losses: losses + losses.new_tensor([0.5]),
    "tensor": lambda losses: losses + torch.tensor([0.5], device=losses.device),
    "copy_": lambda losses: losses.clone().copy_(torch.zeros(len(losses))),
    "where": lambda losses: torch.where(losses > 0),
    "nonzero": lambda losses: losses.nonzero(),
}


@torch.no_grad()
@pytest.mark.parametrize("planted", COPIES)
def test_a_copy_inside_a_step_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to write one, between the losses and their sum."""
    engine, batch, plain = engine_of(), batch_on_host().to(CUDA), step.per_image_loss

    def with_copy(*given: Any) -> torch.Tensor:
        losses = plain(*given)
        COPIES[planted](losses)
        return losses

    monkeypatch.setattr(step, "per_image_loss", with_copy)
    with pytest.raises(AssertionError, match="from c|waits for the device"), NoCopies():
        engine.train_step(batch, 1e-3)
