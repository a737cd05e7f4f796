"""The loops that are compared: ours, timm's, plain PyTorch; each is a function that takes a step on random images.

All do the same work: the same shape of model, batch and classes, AdamW with the same settings, gradient clipping.
Ours can also train on real images.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.benchmark.cells import NUM_CLASSES, RANDOM
from pretrain.benchmark.measure import build_engine, random_batch
from pretrain.benchmark.parts import PartClock, watch_collectives, watch_engine
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, train_batches
from pretrain.models.build import build_model, compile_blocks
from pretrain.optim import parameter_groups
from pretrain.train.datasets import open_data

Step = Callable[[], Any]  # takes a step; returns the loss, or a tensor that begins with it


def build_loop(kind: str, config: Config, device: torch.device, clock: PartClock) -> Step:
    """Returns the step of a loop; kind: of cells.LOOPS."""
    if kind == "ours":
        return _our_loop(config, device, clock)
    batch = random_batch(config, device)
    build = _plain_loop if kind == "plain" else partial(_timm_loop, same_gelu=kind == "timm-tanh")
    return build(config, batch, device, clock)


def _our_loop(config: Config, device: torch.device, clock: PartClock) -> Step:
    """The engine's step; on real images, the batch after next is taken after the step, as in the training loop."""
    watch_collectives(clock)
    if str(config.data.train) == RANDOM:
        engine, batch = build_engine(config, device), random_batch(config, device)
        watch_engine(clock, engine)
        return lambda: engine.train_step(batch, config.optim.lr).sums[0]
    data = open_data(config)
    engine = build_engine(config, device, data.num_classes)
    watch_engine(clock, engine)
    batches = train_batches(data.train, data.order, engine.plan, config, 0)
    held = [next(batches), next(batches)]

    def step() -> torch.Tensor:
        with clock.part("copy"):
            batch = engine.ahead.take(*held)
        result = engine.train_step(batch, config.optim.lr)
        with clock.part("data"):
            held[:] = held[1], next(batches)
        if held[1].error is not None:
            raise held[1].error
        return result.sums[0]

    return step


def _timm_loop(config: Config, batch: Batch, device: torch.device, clock: PartClock, same_gelu: bool) -> Step:
    """The step of timm's train.py, reimplemented.

    Float32 weights and autocast for bf16 (its --amp --amp-dtype bfloat16), AdamW from timm's factory, the loss read in
    every step, --clip-grad. Its GELU is the erf form, which differs from the paper's; same_gelu: ours instead.
    --torchcompile compiles the whole model. On several ranks it is DDP.
    """
    import timm  # takes 2 s, and only peers need it
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.utils import dispatch_clip_grad  # pyright: ignore[reportPrivateImportUsage]

    width, depth, mlp_dim, heads = config.model.shape
    form: Any = {"act_layer": "gelu_tanh"} if same_gelu else {}
    model: Any = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=NUM_CLASSES,
        img_size=config.model.image_size,
        patch_size=config.model.patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_dim / width,
        **form,
    ).to(device)
    decay, betas = config.optim.weight_decay, tuple(config.optim.betas)
    optimizer = create_optimizer_v2(model, "adamw", lr=config.optim.lr, weight_decay=decay, betas=betas)
    parameters = list(model.parameters())
    model = _distributed(model)
    if config.engine.compile:
        model = torch.compile(model)
    images = (batch.images.float() / 127.5 - 1.0).to(device)  # timm's loader yields floats
    loss_function, autocast = nn.CrossEntropyLoss(), _autocast(config, device)

    def step() -> float:
        model.train()
        with clock.part("forward"), autocast():
            loss = loss_function(model(images), batch.labels[:, 0])
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            dispatch_clip_grad(parameters, value=config.optim.clip_norm, mode="norm")
            optimizer.step()
        value = loss.item()
        with clock.part("optimizer"):
            optimizer.zero_grad()
        return value

    return step


def _plain_loop(config: Config, batch: Batch, device: torch.device, clock: PartClock) -> Step:
    """Our model in plain PyTorch, the step that anyone would write: DDP on several ranks, autocast for bf16."""
    model: Any = build_model(config.model, NUM_CLASSES).to(device)
    if config.engine.compile:
        compile_blocks(model)
    groups = parameter_groups(model, config.optim.weight_decay)
    betas = (config.optim.betas[0], config.optim.betas[1])
    fused = True if device.type == "cuda" else None  # torch's own choice on CPUs
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps, fused=fused)
    parameters = list(model.parameters())
    model = _distributed(model)
    autocast = _autocast(config, device)

    def step() -> torch.Tensor:
        model.train()
        with clock.part("forward"), autocast():
            images = to_float(batch.images, torch.float32, config.data.normalisation)
            loss = F.cross_entropy(model(images).float(), batch.labels[:, 0])
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def _distributed(model: nn.Module) -> nn.Module:
    if ranks.world_size() == 1:
        return model
    assert dist.is_initialized()
    return nn.parallel.DistributedDataParallel(model)


def _autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if config.engine.precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)
