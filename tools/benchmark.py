"""Measures speed with the code that trains: engine, ZeRO 1, clipping and optimizer step included.

python tools/benchmark.py train --model B/16 L/16
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import VIT_SHAPES, Config, config_from_dict
from pretrain.errors import UserError

# Dense bf16, from data sheets; the figures with 2:4 sparsity are twice as high and mean nothing here.
PEAK_TFLOP_PER_S = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
NUM_CLASSES = 1000


def main() -> None:
    parser = cli.parser(
        "Times the real training step on random images. One JSON line per cell (model x compile), each in a fresh\n"
        "process: the median over --steps steps after --warmup steps. MFU counts 6 FLOPs per multiply-add of a\n"
        "forward pass, no recomputation, against the dense bf16 peak. --compile on needs a C compiler.",
        "python tools/benchmark.py train --model B/16 L/16 --compile on off",
    )
    parser.add_argument("what", choices=["train"], help="what to measure")
    parser.add_argument("--model", nargs="+", default=["B/16", "L/16"], metavar="NAME", help="SIZE/PATCH, or timm:NAME")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--batch", type=int, help="images per step (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], default=["off", "on"], help="cells to run")
    parser.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--warmup", type=int, help="steps before timing (default: 10 on a GPU, 2 on a CPU)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 40 on a GPU, 5 on a CPU)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--cell", help="internal: run one cell, given as JSON, in this process")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(_measure(**json.loads(arguments.cell))), flush=True)
        return
    options = {name: getattr(arguments, name) for name in ("image_size", "batch", "precision", "warmup", "steps")}
    options["checkpoint_activations"] = arguments.checkpoint_activations
    for model in arguments.model:
        _config(model, False, 8, options)  # a wrong name is told before the first cell runs
    for model in arguments.model:
        for compiled in arguments.compile:
            _run_cell({"model": model, "compiled": compiled == "on", "options": options}, arguments.out)


def _run_cell(cell: dict[str, Any], out: Path | None) -> None:
    # A fresh process per cell: what one leaves behind (compiler caches, allocator) must not reach the next.
    command = [sys.executable, __file__, "train", "--cell", json.dumps(cell)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{cell['model']}, compile {'on' if cell['compiled'] else 'off'}: {reason}")
    print(lines[-1], flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(lines[-1] + "\n")


def _config(model: str, compiled: bool, batch: int, options: dict[str, Any]) -> Config:
    if model.startswith("timm:"):
        shape: dict[str, Any] = {"name": model}
    else:
        name, slash, patch = model.partition("/")
        if name not in VIT_SHAPES or not slash or not patch.isdigit():
            raise UserError(
                f"--model {model}: expected SIZE/PATCH with SIZE one of {', '.join(VIT_SHAPES)}, or timm:NAME"
            )
        shape = {"name": name, "patch_size": int(patch)}
    engine = {"precision": options["precision"], "compile": compiled, "max_micro_batch_size": batch}
    values = {
        "name": "benchmark",
        "total_steps": 1_000_000,
        "model": {**shape, "image_size": options["image_size"]},
        "data": {"train": "random", "global_batch": batch},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "engine": {**engine, "checkpoint_activations": options["checkpoint_activations"]},
    }
    return config_from_dict(values, "benchmark")


def _measure(model: str, compiled: bool, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from pretrain import distributed
    from pretrain.data.loader import Batch, single_labels
    from pretrain.data.order import plan_batch
    from pretrain.engine import Engine
    from pretrain.models.build import build_model
    from pretrain.models.profile import num_parameters, train_flops
    from pretrain.run import versions
    from pretrain.train import peak_memory_bytes

    device = distributed.start(600)
    gpu = device.type == "cuda"
    size = options["batch"] or (128 if gpu else 8)
    warmup, steps = options["warmup"] or (10 if gpu else 2), options["steps"] or (40 if gpu else 5)
    config = _config(model, compiled, size, options)
    network = build_model(config.model, NUM_CLASSES)
    parameters = num_parameters(network)
    engine = Engine(network, config, plan_batch(size, 1, size), device)
    side, generator = config.model.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    batch = Batch(images, *single_labels(labels), torch.ones(size, dtype=torch.bool), labels, labels, []).to(device)

    began = time.perf_counter()
    first_loss = engine.train_step(batch, 1e-4).sums[0].item() / size
    first_step_s = time.perf_counter() - began
    for _ in range(warmup - 1):
        engine.train_step(batch, 1e-4)
    times_ms = _step_times_ms(lambda: engine.train_step(batch, 1e-4), steps, gpu)
    median = statistics.median(times_ms)
    images_per_s = 1000 * size / median
    tflop_per_s = images_per_s * train_flops(config.model, NUM_CLASSES) / 1e12
    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    peak = next((value for part, value in PEAK_TFLOP_PER_S.items() if part in name), None)
    deciles = statistics.quantiles(times_ms, n=10)
    return {
        "model": model,
        "image_size": side,
        "parameters": parameters,
        "batch_per_rank": size,
        "precision": f"{config.engine.precision} weights and activations, fp32 master weights and moments",
        "zero_stage": config.engine.zero_stage,
        "compile": compiled,
        "checkpoint_activations": config.engine.checkpoint_activations,
        "data": "random, on the device",
        "images_per_s": round(images_per_s, 3),
        "ms_per_step": {"median": round(median, 3), "p10": round(deciles[0], 3), "p90": round(deciles[-1], 3)},
        "tflop_per_s": round(tflop_per_s, 4),
        "mfu": round(tflop_per_s / peak, 4) if peak else None,
        "peak_tflop_per_s": peak,
        "memory_gb": round(peak_memory_bytes(device) / 1e9, 3),
        "first_step_s": round(first_step_s, 2),
        "first_loss": round(first_loss, 5),
        "steps": steps,
        "device": name,
        "versions": versions(),
    }


def _step_times_ms(step: Any, steps: int, gpu: bool) -> list[float]:
    """Times each step; on a GPU by events that are read at the end, so that nothing waits inside the loop."""
    import torch

    if not gpu:
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1000 * (end - start) for start, end in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:])]


if __name__ == "__main__":
    cli.run(main)
