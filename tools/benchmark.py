"""Speed and size of models, measured with the code that trains: engine, ZeRO 1, clipping and optimizer step included.

python tools/benchmark.py train --model B/16 L/16     the training step: images/s, FLOP/s, MFU, memory
python tools/benchmark.py model --out models.jsonl    a table: parameters, FLOPs, activations, latencies
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import HYBRIDS, VIT_SHAPES, Config, config_from_dict, named_model
from pretrain.errors import UserError
from pretrain.storage import write_text

if TYPE_CHECKING:  # a wrong argument is told at once, not after the seconds that torch takes
    import torch

    from pretrain.data.loader import Batch
    from pretrain.engine.step import Engine

# Dense bf16, from data sheets; the figures with 2:4 sparsity are twice as high and mean nothing here.
PEAK_TFLOP_PER_S = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
NUM_CLASSES = 1000
# Patch 14 is the published one of H and g; it does not divide 384, so both have a second row of patch 16.
TABLE = ["Ti/16", "S/16", "B/16", "L/16", "H/14", "H/16", "g/14", "g/16"]
MAX_PARAMETERS_ON_CPU = 100_000_000  # trained by default: B takes about a minute, g would take an hour and 20 GB


def main() -> None:
    parser = cli.parser(
        "Measures speed and size with the code that trains. `train --help` and `model --help` tell the rest.",
        "python tools/benchmark.py train --model B/16 L/16 --compile on off",
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="train|model", help="what to measure")
    _add_train(commands)
    _add_model(commands)
    arguments = parser.parse_args()
    if arguments.cell:
        for row in arguments.measure(**json.loads(arguments.cell)):
            print(json.dumps(row), flush=True)
    else:
        arguments.run(arguments)


def _add_command(commands: Any, name: str, description: str, example: str) -> argparse.ArgumentParser:
    """Adds a command with the options that both have."""
    parser = commands.add_parser(
        name,
        help=description.partition(".")[0].lower(),
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, help="images per step (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--warmup", type=int, help="steps before timing (default: 10 on a GPU, 2 on a CPU)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 40 on a GPU, 5 on a CPU)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # internal: measure one cell, given as JSON, in this process
    return parser


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    for name in ("batch", "warmup", "steps"):
        value, lowest = getattr(arguments, name), 2 if name == "steps" else 1  # deciles need two steps
        if value is not None and value < lowest:
            raise UserError(f"--{name} is {value}, expected at least {lowest}")
    return {name: getattr(arguments, name) for name in ("batch", "precision", "warmup", "steps")}


def _cell_rows(what: str, cell: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the rows that a cell printed and, when it failed, why."""
    # A fresh process per cell: what one leaves behind (compiler caches, allocator) must not reach the next.
    command = [sys.executable, __file__, what, "--cell", json.dumps(cell)]
    result = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"model"')]
    if result.returncode == 0 and rows:
        return rows, None
    ended = f"ended by signal {-result.returncode}" if result.returncode < 0 else "no message"
    lines = [line for line in result.stderr.splitlines() if line.strip()] or [ended]
    errors = [line for line in lines if re.match(r"(error|[\w.]+(Error|Exception)):", line)]  # messages may go on below
    return rows, (errors or lines)[-1].removeprefix("error: ")


def _check_name(model: str) -> None:
    named = named_model(model)
    if not model.startswith("timm:") and (named is None or named.image_size is not None):
        sizes = ", ".join([*VIT_SHAPES, *HYBRIDS])
        raise UserError(f"--model {model}: expected SIZE/PATCH with SIZE one of {sizes}, or timm:NAME")


def _config(
    model: str, image_size: int, batch: int, precision: str, *, pooling: str | None = None, **engine: bool
) -> Config:
    """Returns the config of a run on random images; `engine` are further keys of its section."""
    _check_name(model)
    values = {
        "name": "benchmark",
        "total_steps": 1_000_000,
        "model": {"name": model, "image_size": image_size, **({"pooling": pooling} if pooling else {})},
        "data": {"train": "random", "global_batch": batch},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "engine": {"precision": precision, "max_micro_batch_size": batch, **engine},
    }
    return config_from_dict(values, "benchmark")


# --- what both measure with ------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How much is measured, and where."""

    device: "torch.device"
    name: str  # of the device
    batch: int  # images per step
    warmup: int
    steps: int


def _plan(options: dict[str, Any]) -> _Plan:
    import torch

    from pretrain.cluster import ranks

    device = ranks.start(600)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    defaults = {"batch": 128, "warmup": 10, "steps": 40} if gpu else {"batch": 8, "warmup": 2, "steps": 5}
    return _Plan(device, name, **{key: options[key] or default for key, default in defaults.items()})


def _engine(config: Config, device: "torch.device") -> "Engine":
    from pretrain.data.order import plan_batch
    from pretrain.engine.step import Engine
    from pretrain.models.build import build_model

    size = config.data.global_batch
    return Engine(build_model(config.model, NUM_CLASSES), config, plan_batch(size, 1, size), device)


def _batch(config: Config, device: "torch.device") -> "Batch":
    """Returns random images that stay on the device."""
    import torch

    from pretrain.data.loader import Batch, single_labels

    size, side = config.data.global_batch, config.model.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    ones = torch.ones(size, dtype=torch.bool)
    return Batch(images, *single_labels(labels), ones, labels, labels, []).to(device)


def _step_times_ms(step: Callable[[], Any], steps: int, gpu: bool) -> list[float]:
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


def _summary_ms(times_ms: list[float]) -> dict[str, float]:
    """Returns the median and the first and last decile."""
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")  # the other one extrapolates: below zero
    values = {"median": statistics.median(times_ms), "p10": deciles[0], "p90": deciles[-1]}
    return {name: round(value, 3) for name, value in values.items()}


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "Times the real training step on random images. One JSON line per cell (model x compile), each in a fresh\n"
        "process: the median over --steps steps after --warmup steps. MFU counts 6 FLOPs per multiply-add of a\n"
        "forward pass, no recomputation, against the dense bf16 peak. --compile on needs a C compiler.",
        "python tools/benchmark.py train --model B/16 L/16 --compile on off",
    )
    parser.add_argument("--model", nargs="+", default=["B/16", "L/16"], metavar="NAME", help="SIZE/PATCH, or timm:NAME")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], default=["off", "on"], help="cells to run")
    parser.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.set_defaults(run=_run_train, measure=_measure_train)


def _run_train(arguments: argparse.Namespace) -> None:
    options = {
        **_options(arguments),
        "image_size": arguments.image_size,
        "checkpoint_activations": arguments.checkpoint_activations,
    }
    for model in arguments.model:
        _config(model, arguments.image_size, 8, arguments.precision)  # a wrong name is told before the first cell runs
    for model in arguments.model:
        for compiled in arguments.compile:
            rows, failure = _cell_rows("train", {"model": model, "compiled": compiled == "on", "options": options})
            if failure:
                raise UserError(f"{model}, compile {compiled}: {failure}")
            line = json.dumps(rows[-1])
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def _measure_train(model: str, compiled: bool, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from pretrain.models.profile import num_parameters, train_flops
    from pretrain.provenance import versions
    from pretrain.train.meter import peak_memory_bytes

    plan = _plan(options)
    config = _config(
        model,
        options["image_size"],
        plan.batch,
        options["precision"],
        compile=compiled,
        checkpoint_activations=options["checkpoint_activations"],
    )
    engine, batch = _engine(config, plan.device), _batch(config, plan.device)

    began = time.perf_counter()
    first_loss = engine.train_step(batch, 1e-4).sums[0].item() / plan.batch
    first_step_s = time.perf_counter() - began
    for _ in range(plan.warmup - 1):
        engine.train_step(batch, 1e-4)
    times_ms = _step_times_ms(lambda: engine.train_step(batch, 1e-4), plan.steps, plan.device.type == "cuda")
    images_per_s = 1000 * plan.batch / statistics.median(times_ms)
    tflop_per_s = images_per_s * train_flops(config.model, NUM_CLASSES) / 1e12
    peak = next((value for part, value in PEAK_TFLOP_PER_S.items() if part in plan.name), None)
    yield {
        "model": model,
        "image_size": config.model.image_size,
        "parameters": num_parameters(_on_meta(config)),
        "batch_per_rank": plan.batch,
        "precision": f"{config.engine.precision} weights and activations, fp32 master weights and moments",
        "zero_stage": config.engine.zero_stage,
        "compile": compiled,
        "checkpoint_activations": config.engine.checkpoint_activations,
        "data": "random, on the device",
        "images_per_s": round(images_per_s, 3),
        "ms_per_step": _summary_ms(times_ms),
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


def _on_meta(config: Config) -> "torch.nn.Module":
    """The model in the precision of its weights, without memory."""
    import torch

    from pretrain.engine.settings import DTYPES
    from pretrain.models.build import build_model

    with torch.device("meta"):
        return build_model(config.model, NUM_CLASSES).to(DTYPES[config.engine.precision])


# --- model -----------------------------------------------------------------------------------------------------------


def _add_model(commands: Any) -> None:
    parser = _add_command(
        commands,
        "model",
        "Compares models in a table. One row per model and image size: parameters (1000 classes); FLOPs of one\n"
        "image, 2 per multiply-add, forward and training (3 x forward); activations, the bytes that a training step\n"
        "of --batch images saves for its backward pass, without parameters, nothing recomputed; median latency of a\n"
        "forward pass and of a training step (forward, backward, clipping, update), eager, each model in a fresh\n"
        "process. What is not timed keeps its row, with the reason.",
        "python tools/benchmark.py model --model B/16 R50+B/16 timm:resnet50 --image-size 224 --out models.jsonl",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=TABLE,
        metavar="NAME",
        help=f"SIZE/PATCH, hybrids as R50+B/16, or timm:NAME (default {' '.join(TABLE)})",
    )
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 384], help="pixels (default 224 384)")
    parser.add_argument("--pooling", choices=["token", "gap", "map"], default="token", help="of models that are ours")
    parser.add_argument(
        "--max-params",
        type=int,
        metavar="N",
        help=f"train models of at most N parameters (default: all on a GPU, {MAX_PARAMETERS_ON_CPU:,} on a CPU)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="JSON lines; the table beside it, as FILE.md")
    parser.set_defaults(run=_run_model, measure=_measure_model)


def _run_model(arguments: argparse.Namespace) -> None:
    if arguments.out and arguments.out.suffix == ".md":
        raise UserError(f"--out {arguments.out}: is where the table would go; give the JSON lines another ending")
    options = {**_options(arguments), "max_params": arguments.max_params}
    for model in arguments.model:
        _check_name(model)  # a wrong name is told before the first cell runs
    cells = [(model, size) for size in arguments.image_size for model in arguments.model]
    rows, failures = [], 0
    with cli.progress("models", len(cells), "rows") as advance:
        for model, size in cells:
            pooling = None if model.startswith("timm:") else arguments.pooling
            cell = {"model": model, "image_size": size, "pooling": pooling, "options": options}
            row, failed = _model_row(cell)
            rows.append(row)
            failures += failed
            if arguments.out:  # after each row: what was measured outlives an interrupt
                _write_models(rows, arguments.out)
            advance(1)
    _print_models(rows)
    if failures:
        raise UserError(f"{failures} of {len(cells)} rows are not complete; their last column says why")


def _model_row(cell: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns a cell's row, and whether something went wrong with it: then its `not_timed` says what."""
    try:
        _config(cell["model"], cell["image_size"], 8, cell["options"]["precision"])
    except UserError as error:  # patches do not divide the image: the other sizes of this model may be fine
        return {
            "model": cell["model"],
            "image_size": cell["image_size"],
            "not_timed": str(error).removeprefix("benchmark: "),
        }, False
    found, failure = _cell_rows("model", cell)
    row = found[-1] if found else {"model": cell["model"], "image_size": cell["image_size"]}
    return (row | {"not_timed": failure}, True) if failure else (row, False)


def _measure_model(
    model: str, image_size: int, pooling: str | None, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the row with what is counted, then with the forward pass, then with training: each outlives a failure."""
    from pretrain.provenance import versions

    plan = _plan(options)
    gpu = plan.device.type == "cuda"
    config = _config(model, image_size, plan.batch, options["precision"], pooling=pooling)
    limit = options["max_params"] or (None if gpu else MAX_PARAMETERS_ON_CPU)
    row = {
        "model": model,
        "image_size": image_size,
        "pooling": pooling,
        **_counted(config, plan.device.type),
        "not_timed": None,
        "device": plan.name,
        "steps": plan.steps,
        "versions": versions(),
    }

    def timed(name: str, step: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(plan.warmup):
            step()
        times_ms = _summary_ms(_step_times_ms(step, plan.steps, gpu))
        return {f"{name}_ms": times_ms, f"{name}_images_per_s": round(1000 * plan.batch / times_ms["median"], 3)}

    yield row
    batch = _batch(config, plan.device)
    row |= timed("forward", _forward(config, batch))
    if limit is not None and row["parameters"] > limit:
        yield {**row, "not_timed": f"training: more than {limit:,} parameters (--max-params)"}
        return
    yield row
    engine = _engine(config, plan.device)
    yield {**row, **timed("train", lambda: engine.train_step(batch, 1e-4))}


def _forward(config: Config, batch: "Batch") -> "Callable[[], torch.Tensor]":
    """Returns inference, with the weights in the precision of the activations and nothing else in memory."""
    import torch

    from pretrain.data.images import to_float
    from pretrain.engine.settings import DTYPES
    from pretrain.models.build import build_model

    dtype = DTYPES[config.engine.precision]
    network = build_model(config.model, NUM_CLASSES).to(batch.images.device, dtype).eval()
    return torch.inference_mode()(lambda: network(to_float(batch.images, dtype)))


def _counted(config: Config, device: str) -> dict[str, Any]:
    """Returns the columns that need no clock."""
    from pretrain.models.profile import forward_macs, num_parameters, train_flops

    return {
        "parameters": num_parameters(_on_meta(config)),
        "forward_flops": 2 * forward_macs(config.model, NUM_CLASSES),
        "train_flops": train_flops(config.model, NUM_CLASSES),
        "batch": config.data.global_batch,
        "precision": config.engine.precision,
        "activation_bytes": _activation_bytes(config, device),
    }


def _activation_bytes(config: Config, device: str) -> int:
    """Returns the bytes that a training step of `global_batch` images saves for its backward pass.

    Distinct storages are counted once, parameters and buffers not. Fake tensors of the device's kind choose its kernels
    (a fused attention saves no attention matrix, which "meta" tensors would) but take neither memory nor time.
    """
    import torch
    from torch._subclasses import FakeTensorMode

    from pretrain.data.loader import single_labels
    from pretrain.losses import per_image_loss

    network, size, side = _on_meta(config), config.data.global_batch, config.model.image_size
    saved: dict[int, torch.UntypedStorage] = {}  # holding each keeps its key unique

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # the meta parameters that become fake ones
        network = network.to_empty(device=device)
        own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
        images = torch.empty(size, 3, side, side, device=device, dtype=next(network.parameters()).dtype)
        labels = single_labels(torch.empty(size, device=device, dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = per_image_loss(network(images), *labels, config.loss).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for key, storage in saved.items() if key not in own)


_COLUMNS = [
    "model",
    "px",
    "parameters",
    "GFLOPs forward",
    "GFLOPs train",
    "activations [MB]",
    "forward [ms]",
    "images/s",
    "training step [ms]",
    "images/s",
    "not timed",
]


def _model_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], str(row["image_size"])]
    if "parameters" not in row:
        return [*cells, *[""] * (len(_COLUMNS) - 3), row["not_timed"]]
    cells += [f"{row['parameters']:,}", *(f"{row[f'{name}_flops'] / 1e9:,.2f}" for name in ("forward", "train"))]
    cells.append(f"{row['activation_bytes'] / 1e6:,.1f}")
    for name in ("forward", "train"):
        timed = f"{name}_ms" in row
        cells += [_short(row[f"{name}_ms"]["median"]), _short(row[f"{name}_images_per_s"])] if timed else ["", ""]
    return [*cells, row["not_timed"] or ""]


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _conditions(rows: list[dict[str, Any]]) -> str:
    """One line: what all rows were measured with."""
    row = next((row for row in rows if "parameters" in row), None)
    if row is None:
        return "nothing measured"
    pooling = f"pooling {row['pooling']}, " if row["pooling"] else ""
    return (
        f"{NUM_CLASSES} classes, {pooling}batch {row['batch']}, {row['precision']} weights and activations, eager, "
        f"{row['device']}, torch {row['versions']['torch']}; FLOPs of one image, activations and times of a batch"
    )


def _print_models(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="models", caption=_conditions(rows))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "not timed") else "right")
    for row in rows:
        table.add_row(*_model_cells(row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _write_models(rows: list[dict[str, Any]], out: Path) -> None:
    ruler = ["---" if name in ("model", "not timed") else "---:" for name in _COLUMNS]
    table = [_COLUMNS, ruler, *map(_model_cells, rows)]
    lines = ["| " + " | ".join(line) + " |" for line in table] + ["", _conditions(rows) + "."]
    for path, text in ((out, [json.dumps(row) for row in rows]), (out.with_suffix(".md"), lines)):
        write_text(path, "\n".join(text) + "\n")


if __name__ == "__main__":
    cli.run(main)
