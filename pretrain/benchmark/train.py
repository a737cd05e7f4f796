"""The training step, timed: one row for a model and a loop, eager or compiled."""

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from pretrain.benchmark.cells import NUM_CLASSES, RANDOM_IMAGES, cell_config
from pretrain.benchmark.device import attention_ms, gpu_state, measured_peak, memory_of_steps_gb
from pretrain.benchmark.kernels import kernels_of
from pretrain.benchmark.loops import Step, build_loop
from pretrain.benchmark.measure import Plan, on_meta, plan_cell, step_times_ms, summary_ms
from pretrain.benchmark.parts import PartClock
from pretrain.cluster import agreement, ranks
from pretrain.config import Config
from pretrain.gpus import mfu, peak_flops
from pretrain.models.profile import num_parameters, train_flops
from pretrain.provenance import commit, versions


def measure(model: str, compiled: bool, options: dict[str, Any], loop: str = "ours") -> Iterator[dict[str, Any]]:
    """Yields the row of a cell; options: of tools/benchmark.py train, loop: of cells.LOOPS.

    options["paced"]: the steps are taken in rounds, one for each line that comes on stdin, until it ends.
    """
    plan = plan_cell(options)
    gpu = plan.device.type == "cuda"
    config = cell_config(
        model,
        options["image_size"],
        plan.batch * ranks.world_size(),
        options["precision"],
        data={"train": options["data"], "workers": options["workers"]} if options["data"] else None,
        compile=compiled,
        checkpoint_activations=options["checkpoint_activations"],
        zero_stage=options["zero_stage"],
        fp8=options["fp8"] and loop == "ours",
        max_micro_batch_size=plan.batch,
    )
    step = build_loop(loop, config, plan.device, clock := PartClock(gpu))
    began = time.perf_counter()
    first_loss = float(step()) / (plan.batch if loop == "ours" else 1)
    first_step_s = time.perf_counter() - began
    for _ in range(plan.warmup - 1):
        step()
    rounds, parts, states = [], [], []
    for _ in _starts(options["paced"]):
        clock.read_ms()
        rounds.append(step_times_ms(step, plan.steps, gpu))
        states.append(gpu_state(plan.device))
        parts.append({name: ms / plan.steps for name, ms in clock.read_ms().items()})
        if options["paced"]:
            _tell({"round": len(rounds)})
    memory_gb = memory_of_steps_gb(plan.device)  # before what is measured beside the model
    yield {
        "model": model,
        "loop": loop,
        "image_size": config.model.image_size,
        "parameters": num_parameters(on_meta(config)),
        "batch_per_rank": plan.batch,
        "ranks": ranks.world_size(),
        "precision": _precision(loop, config),
        "zero_stage": config.engine.zero_stage if loop == "ours" else None,
        "compile": compiled,
        "checkpoint_activations": config.engine.checkpoint_activations,
        "data": options["data"] or RANDOM_IMAGES,
        **_rates(config, plan.batch, [ms for times in rounds for ms in times], plan.name),
        **measured_peak(config, plan.batch, plan.device),
        **_details(step, config, plan, loop, options["kernels"]),
        "rounds_ms": [round(statistics.median(times), 3) for times in rounds],
        "rounds_gpu": states,
        "parts_ms": {name: round(statistics.median(part[name] for part in parts), 3) for name in parts[0]},
        **memory_gb,
        "first_step_s": round(first_step_s, 2),
        "first_loss": round(first_loss, 5),
        "steps": plan.steps,
        "device": plan.name,
        "versions": versions(),
        "commit": commit(),
    }


def _details(step: Step, config: Config, plan: Plan, loop: str, kernels: bool) -> dict[str, Any]:
    """What tells where the time of a step goes; measured behind it."""
    gpu = plan.device.type == "cuda"
    attention = attention_ms(config, plan.batch, plan.device) if loop == "ours" else None
    return {"attention_ms": attention, **(kernels_of(step, gpu) if kernels else {})}


def _starts(paced: bool) -> Iterator[None]:
    """Yields once, or paced once for each line that rank 0 is given."""
    if not paced:
        yield
        return
    _tell({"round": 0})
    while agreement.gather(bool(sys.stdin.readline()) if ranks.is_main() else None)[0]:
        yield


def _tell(message: dict[str, Any]) -> None:
    if ranks.is_main():
        print(message["round"], flush=True)


def _precision(loop: str, config: Config) -> str:
    precision = config.engine.precision
    if loop == "ours":
        products = "fp8 products in blocks, " if config.engine.fp8 else ""
        return f"{products}{precision} weights and activations, fp32 master weights and moments"
    return precision if precision == "fp32" else f"fp32 weights, autocast to {precision}"


def _rates(config: Config, batch: int, times_ms: list[float], device: str) -> dict[str, Any]:
    """Images per second of all ranks; FLOP/s of one of them."""
    median_ms = statistics.median(times_ms)
    tflop_per_s = 1000 * batch / median_ms * train_flops(config.model, NUM_CLASSES) / 1e12
    peak, share = peak_flops(device), mfu(1e12 * tflop_per_s, device)
    return {
        "images_per_s": round(1000 * batch * ranks.world_size() / median_ms, 3),
        "ms_per_step": summary_ms(times_ms),
        "tflop_per_s": round(tflop_per_s, 4),
        "mfu": round(share, 4) if share else None,
        "peak_tflop_per_s": peak and peak / 1e12,
    }
