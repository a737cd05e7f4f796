"""Size and speed of a model: parameters, FLOPs and activations counted; forward pass and training step timed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from pretrain.benchmark.cells import NUM_CLASSES, cell_config
from pretrain.benchmark.measure import build_engine, plan_cell, random_batch, step_times_ms, summary_ms
from pretrain.benchmark.table import MAX_PARAMETERS_ON_CPU
from pretrain.config import Config
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, single_labels
from pretrain.engine.settings import DTYPES
from pretrain.losses import per_image_loss
from pretrain.models.build import build_model, outline
from pretrain.models.profile import forward_macs, num_parameters, train_flops
from pretrain.provenance import versions


def measure(model: str, image_size: int, pooling: str | None, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row with the counts, then with the forward pass, then training: a failure loses none before it."""
    plan = plan_cell(options)
    gpu = plan.device.type == "cuda"
    config = cell_config(model, image_size, plan.batch, options["precision"], pooling=pooling)
    limit = options["max_params"] or (None if gpu else MAX_PARAMETERS_ON_CPU)
    row = {
        "model": model,
        "image_size": image_size,
        "pooling": pooling,
        **counted(config, plan.device.type),
        "not_timed": None,
        "device": plan.name,
        "steps": plan.steps,
        "versions": versions(),
    }

    def timed(name: str, step: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(plan.warmup):
            step()
        times_ms = summary_ms(step_times_ms(step, plan.steps, gpu))
        return {f"{name}_ms": times_ms, f"{name}_images_per_s": round(1000 * plan.batch / times_ms["median"], 3)}

    yield row
    batch = random_batch(config, plan.device)
    row |= timed("forward", _forward(config, batch))
    if limit is not None and row["parameters"] > limit:
        yield {**row, "not_timed": f"training: more than {limit:,} parameters (--max-params)"}
        return
    yield row
    engine = build_engine(config, plan.device)
    yield {**row, **timed("train", lambda: engine.train_step(batch, 1e-4))}


def _forward(config: Config, batch: Batch) -> Callable[[], torch.Tensor]:
    """Returns a function for inference, with the weights in the precision of the activations."""
    dtype = DTYPES[config.engine.precision]
    network = build_model(config.model, NUM_CLASSES).to(batch.images.device, dtype).eval()
    return torch.inference_mode()(lambda: network(to_float(batch.images, dtype)))


def counted(config: Config, device: str) -> dict[str, Any]:
    """Returns the columns that are computed, not timed."""
    return {
        "parameters": num_parameters(outline(config.model, NUM_CLASSES)),
        "forward_flops": 2 * forward_macs(config.model, NUM_CLASSES),
        "train_flops": train_flops(config.model, NUM_CLASSES),
        "batch": config.data.global_batch,
        "precision": config.engine.precision,
        "activation_bytes": activation_bytes(config, device),
    }


def activation_bytes(config: Config, device: str) -> int:
    """Returns the bytes that a training step of `global_batch` images saves for its backward pass.

    Each storage counts once, parameters and buffers do not. Fake tensors of the device's type select its kernels (fused
    attention saves no attention matrix; with "meta" tensors it would be saved) but take neither memory nor time.
    """
    network = outline(config.model, NUM_CLASSES).to(DTYPES[config.engine.precision])
    size, side = config.data.global_batch, config.model.image_size
    saved: dict[int, torch.UntypedStorage] = {}  # references keep the keys unique

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # meta parameters, which become fake
        network = network.to_empty(device=device)
        own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
        images = torch.empty(size, 3, side, side, device=device, dtype=next(network.parameters()).dtype)
        labels = single_labels(torch.empty(size, device=device, dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = per_image_loss(network(images), *labels, config.loss).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for key, storage in saved.items() if key not in own)
