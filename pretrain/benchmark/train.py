"""The training step, timed: one row for a model, eager or compiled."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from pretrain.benchmark.cells import NUM_CLASSES, cell_config
from pretrain.benchmark.measure import build_engine, on_meta, plan_cell, random_batch, step_times_ms, summary_ms
from pretrain.models.profile import num_parameters, train_flops
from pretrain.provenance import versions
from pretrain.train.meter import peak_memory_bytes

# Dense bf16, from data sheets; the figures with 2:4 sparsity are twice as high and mean nothing here.
PEAK_TFLOP_PER_S = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def measure(model: str, compiled: bool, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row of a cell; options: of tools/benchmark.py train."""
    plan = plan_cell(options)
    config = cell_config(
        model,
        options["image_size"],
        plan.batch,
        options["precision"],
        compile=compiled,
        checkpoint_activations=options["checkpoint_activations"],
    )
    engine, batch = build_engine(config, plan.device), random_batch(config, plan.device)

    began = time.perf_counter()
    first_loss = engine.train_step(batch, 1e-4).sums[0].item() / plan.batch
    first_step_s = time.perf_counter() - began
    for _ in range(plan.warmup - 1):
        engine.train_step(batch, 1e-4)
    times_ms = step_times_ms(lambda: engine.train_step(batch, 1e-4), plan.steps, plan.device.type == "cuda")
    images_per_s = 1000 * plan.batch / statistics.median(times_ms)
    tflop_per_s = images_per_s * train_flops(config.model, NUM_CLASSES) / 1e12
    peak = next((value for part, value in PEAK_TFLOP_PER_S.items() if part in plan.name), None)
    yield {
        "model": model,
        "image_size": config.model.image_size,
        "parameters": num_parameters(on_meta(config)),
        "batch_per_rank": plan.batch,
        "precision": f"{config.engine.precision} weights and activations, fp32 master weights and moments",
        "zero_stage": config.engine.zero_stage,
        "compile": compiled,
        "checkpoint_activations": config.engine.checkpoint_activations,
        "data": "random, on the device",
        "images_per_s": round(images_per_s, 3),
        "ms_per_step": summary_ms(times_ms),
        "tflop_per_s": round(tflop_per_s, 4),
        "mfu": round(tflop_per_s / peak, 4) if peak else None,
        "peak_tflop_per_s": peak,
        "memory_gb": round(peak_memory_bytes(plan.device) / 1e9, 3),
        "first_step_s": round(first_step_s, 2),
        "first_loss": round(first_loss, 5),
        "steps": plan.steps,
        "device": plan.name,
        "versions": versions(),
    }
