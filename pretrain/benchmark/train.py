"""Times the training step: one row for a model and a loop, eager or compiled."""

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from pretrain.benchmark.cells import NUM_CLASSES, RANDOM_IMAGES
from pretrain.benchmark.device import attention_ms, gpu_state, measured_peak, memory_of_steps_gb
from pretrain.benchmark.kernels import kernels_of
from pretrain.benchmark.loops import build_loop
from pretrain.benchmark.measure import Plan, config_of_run, plan_cell, step_times_ms, summary_ms
from pretrain.benchmark.parts import PartClock
from pretrain.cluster import agreement, ranks
from pretrain.config import Config
from pretrain.gpus import mfu, peak_flops
from pretrain.models.build import outline
from pretrain.models.profile import num_parameters, train_flops
from pretrain.provenance import commit, versions


def measure(model: str, compiled: bool, options: dict[str, Any], loop: str = "ours") -> Iterator[dict[str, Any]]:
    """Yields the rows of a cell; options: of tools/benchmark.py train; loop: of cells.LOOPS, or several with spaces.

    options["paced"]: takes a round of steps for each line on stdin, until it ends. Several loops take each round in
    turn, every second one in reverse.
    """
    plan = plan_cell(options)
    loops = []
    for kind in loop.split():
        config = config_of_run(model, options, plan, compile=compiled, fp8=options["fp8"] and kind == "ours")
        loops.append(_Loop(kind, config, plan))
    for number, _ in enumerate(_starts(options["paced"])):
        for each in loops if number % 2 == 0 else reversed(loops):
            each.take_round()
        if options["paced"]:
            _tell(number + 1)
    memory_gb = memory_of_steps_gb(plan.device)  # before the measurements without the model
    for each in loops:
        row = {"model": model, **each.row(options), **memory_gb, "steps": plan.steps, "device": plan.name}
        yield row | {"versions": versions(), "commit": commit()}


class _Loop:
    """A loop that has warmed up, and the times of its rounds."""

    def __init__(self, kind: str, config: Config, plan: Plan) -> None:
        self._kind, self._config, self._plan = kind, config, plan
        self._gpu = plan.device.type == "cuda"
        self._step = build_loop(kind, config, plan.device, clock := PartClock(self._gpu))
        self._clock = clock
        self._rounds: list[list[float]] = []
        self._parts: list[dict[str, float]] = []
        self._states: list[dict[str, Any] | None] = []
        began = time.perf_counter()
        self._first_loss = float(self._step()) / (plan.batch if kind == "ours" else 1)
        self._first_step_s = time.perf_counter() - began
        for _ in range(plan.warmup - 1):
            self._step()

    def take_round(self) -> None:
        """Takes the steps of a round."""
        self._clock.read_ms()
        self._rounds.append(step_times_ms(self._step, self._plan.steps, self._gpu))
        self._states.append(gpu_state(self._plan.device))
        self._parts.append({name: ms / self._plan.steps for name, ms in self._clock.read_ms().items()})

    def row(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the row: what was measured, and further measurements of device and kernels, taken now."""
        config, plan, ours = self._config, self._plan, self._kind == "ours"
        return {
            "loop": self._kind,
            "image_size": config.model.image_size,
            "parameters": num_parameters(outline(config.model, NUM_CLASSES)),
            "batch_per_rank": plan.batch,
            "ranks": ranks.world_size(),
            "precision": _precision(self._kind, config),
            "zero_stage": config.engine.zero_stage if ours else None,
            "compile": config.engine.compile,
            "checkpoint_activations": config.engine.checkpoint_activations,
            "data": options["data"] or RANDOM_IMAGES,
            **_rates(config, plan.batch, [ms for times in self._rounds for ms in times], plan.name),
            **measured_peak(config, plan.batch, plan.device),
            # Where the time of a step goes.
            "attention_ms": attention_ms(config, plan.batch, plan.device) if ours else None,
            **(kernels_of(self._step, self._gpu) if options["kernels"] else {}),
            "rounds_ms": [round(statistics.median(times), 3) for times in self._rounds],
            "rounds_gpu": self._states,
            "parts_ms": {
                name: round(statistics.median(part[name] for part in self._parts), 3) for name in self._parts[0]
            },
            "first_step_s": round(self._first_step_s, 2),
            "first_loss": round(self._first_loss, 5),
        }


def _starts(paced: bool) -> Iterator[None]:
    """Yields once or, if paced, once for each line on rank 0's stdin."""
    if not paced:
        yield
        return
    _tell(0)
    while agreement.gather(bool(sys.stdin.readline()) if ranks.is_main() else None)[0]:
        yield


def _tell(rounds_done: int) -> None:
    if ranks.is_main():
        print(rounds_done, flush=True)


def _precision(loop: str, config: Config) -> str:
    precision = config.engine.precision
    if loop == "ours":
        products = "fp8 products in blocks, " if config.engine.fp8 else ""
        return f"{products}{precision} weights and activations, fp32 master weights and moments"
    return precision if precision == "fp32" else f"fp32 weights, autocast to {precision}"


def _rates(config: Config, batch: int, times_ms: list[float], device: str) -> dict[str, Any]:
    """Returns the images per second of all ranks, and the FLOP/s and MFU of one of them."""
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
