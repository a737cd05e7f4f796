"""`tools/benchmark.py train --peer`: our step beside timm's and plain PyTorch's, cell by cell, as table and plot.

A cell that the file of results has already, from the same device and commit, is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pretrain import cli
from pretrain.benchmark.cells import LOOPS, NUM_CLASSES, cell_config
from pretrain.benchmark.peers import LoopFailed, compared
from pretrain.errors import UserError
from pretrain.escape import in_markdown
from pretrain.json_files import parse_json
from pretrain.plan.memory import Layout, memory
from pretrain.provenance import commit, processor
from pretrain.storage import write_text

# On a GPU by what is most worth knowing: a short stay should yield these first.
GPU_MODELS, CPU_MODELS = ["L/16", "H/14", "B/16", "g/14", "S/16"], ["Ti/16", "S/16"]
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "benchmarks" / "train.jsonl"
_GPU_ROUNDS, _GPU_STEPS = 3, 15  # that ten minutes on a GPU yield the whole table
_MAX_BATCH, _FILLED = 512, 0.85  # of a device's memory; the rest is for what the plan does not count
_HEADER = ["model", "loop", "compile", "ranks", "images/s", "TFLOP/s", "MFU", "of measured peak", "memory [GB]"]
_HEADER += ["forward [ms]", "backward", "optimizer", "collectives", "data", "ours / it", "interval"]


def peer_table(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Measures all cells, the most important first, and shows them; lines, table and plot lie at --out.

    Raises UserError for what cannot be compared, and at the end when a cell failed.
    """
    if options["precision"] == "fp16":
        raise UserError("--peer compares fp32 and bf16; --precision is fp16")
    if options["data"]:
        raise UserError("--peer compares steps on random images; --data measures ours alone")
    if arguments.ranks < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        raise UserError("--ranks and --rounds: expected at least 1")
    device, gpu_bytes = _device()
    out = arguments.out or DEFAULT_OUT
    rows, failures = _earlier(out), []
    rounds = arguments.rounds or (_GPU_ROUNDS if gpu_bytes else 5)
    settings = {"num_ranks": arguments.ranks, "threads": arguments.threads, "rounds": rounds}
    for model, compiled, loops in cells_of(arguments.model, arguments.compile, arguments.loops, on_gpu=gpu_bytes > 0):
        own, together = dict(options), True
        if gpu_bytes:
            own["steps"] = options["steps"] or _GPU_STEPS
            own["batch"], needed = fitting_batch(model, arguments.ranks, options, gpu_bytes)
            together = needed * len(loops) <= _FILLED * gpu_bytes
        cell = {"model": model, "compiled": compiled == "on", "options": own}
        key = json.dumps({**cell, **settings, "loops": loops, "device": device, "commit": commit()})
        if any(row["cell"] == key for row in rows):
            cli.tell(f"{model}, compile {compiled}, {', '.join(loops)}: measured before, in {out}")
            continue
        try:
            found = compared(loops, cell, **settings, together=together)
        except LoopFailed as failure:
            cli.tell(f"{model}, compile {compiled}: {failure}")
            failures.append(model)
            continue
        rows += [row | {"cell": key} for row in found]
        write(rows, out)  # after each cell: what was measured outlives an interrupt
    _show(rows)
    if failures:
        raise UserError(f"{len(failures)} cells failed; see above")


def cells_of(
    models: list[str] | None, compiled: list[str] | None, loops: list[str] | None, *, on_gpu: bool
) -> list[tuple[str, str, list[str]]]:
    """Returns what is measured, in order: model, compile on or off, loops. None: the default.

    On a GPU first our own loop alone, compiled, of all models: a stay that is cut short has at least these.
    """
    found: list[tuple[str, str, list[str]]] = []
    models = models or (GPU_MODELS if on_gpu else CPU_MODELS)
    modes = compiled or (["on", "off"] if on_gpu else ["off"])
    if on_gpu and len(models) > 1:
        found += [(model, modes[0], ["ours"]) for model in models]
    for model in models:
        for mode in modes:
            # The other form of GELU costs nothing on a GPU, and compiled.
            default = [loop for loop in LOOPS[1:] if loop != "timm-tanh" or (not on_gpu and mode == "off")]
            chosen = ["ours", *(loops or default)]
            if model.startswith("timm:") or "+" in model:  # only plain ViTs have their twin there
                chosen = [loop for loop in chosen if not loop.startswith("timm")]
            found.append((model, mode, chosen))
    return found


def fitting_batch(model: str, num_ranks: int, options: dict[str, Any], gpu_bytes: int) -> tuple[int, int]:
    """Returns images per rank, as asked for or the largest power of two that fits, and the bytes that they take.

    By the plan's formula, and for models that it does not know the benchmark's default of 128, all of the memory.
    """
    if model.startswith("timm:") or "+" in model:
        return options["batch"] or 128, gpu_bytes
    batch = options["batch"] or _MAX_BATCH
    while True:
        config = cell_config(model, options["image_size"], batch * num_ranks, options["precision"])
        layout = Layout(num_ranks, options["zero_stage"], batch, 1, options["checkpoint_activations"])
        needed = memory(config, NUM_CLASSES, layout).peak
        if options["batch"] or batch == 1 or needed <= _FILLED * gpu_bytes:
            return batch, needed
        batch //= 2


def _device() -> tuple[str, int]:
    """Its name, and the bytes of its memory; 0 for a CPU."""
    import torch  # seconds, and only here; the cells have processes of their own

    if not torch.cuda.is_available():
        return processor(), 0
    return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory


def _earlier(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    lines = out.read_text(encoding="utf-8").splitlines()
    rows = [parse_json(line, f"{out}:{number}") for number, line in enumerate(lines, 1)]
    wrong = [number for number, row in enumerate(rows, 1) if not (isinstance(row, dict) and "cell" in row)]
    if wrong:
        raise UserError(f"{out}:{wrong[0]}: is no line of --peer; give another --out")
    return rows


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the rows as JSON lines, the table beside them as Markdown, and the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    table = [_HEADER, ["---"] * 2 + ["--:"] * (len(_HEADER) - 2), *(map(in_markdown, cells(row)) for row in rows)]
    conditions = [f"- {text}" for text in dict.fromkeys(map(_conditions, rows))]
    lines = ["| " + " | ".join(line) + " |" for line in table] + ["", *conditions]
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    plot(rows, out.with_suffix(".png"))


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table as text."""
    peak, mfu, parts, ratio = row["measured_peak_tflop_per_s"], row["mfu"], row["parts_ms"], row["ratio"]
    times = [f"{parts[name]:,.1f}" for name in ("forward", "backward", "optimizer", "collectives", "data")]
    ours = row["loop"] == "ours"
    return [
        row["model"],
        row["loop"],
        "on" if row["compile"] else "off",
        str(row["ranks"]),
        f"{row['images_per_s']:,.1f}",
        f"{row['tflop_per_s']:,.3g}",
        "" if mfu is None else f"{100 * mfu:.1f} %",
        f"{100 * row['tflop_per_s'] / peak:.0f} %",
        f"{row['memory_gb']:,.1f}",
        *times,
        "" if ours else f"{ratio['median']:.3f}",
        "" if ours else f"{ratio['low']:.3f} to {ratio['high']:.3f}" + ("" if row["interleaved"] else ", not in turns"),
    ]


def _conditions(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['loop']}: {row['image_size']} pixels, {row['batch_per_rank']} images per rank, "
        f"{row['precision']}, images: {row['data']}; {len(row['rounds_ms'])} rounds of {row['steps']} steps; "
        f"{row['device']}, torch {row['versions']['torch']}, timm {row['versions']['timm']}, commit {row['commit']}"
    )


def _show(rows: list[dict[str, Any]]) -> None:
    caption = "medians; MFU of the data sheet's dense bf16 peak; interval: least and greatest of the rounds"
    cli.print_table("training step", _HEADER, map(cells, rows), text_columns=(0, 1), caption=caption)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws our rate over each peer's, a bar with its interval for each; at 1 both are equally fast."""
    from matplotlib.figure import Figure  # a second to import

    peers = [row for row in rows if row["loop"] != "ours"]
    figure = Figure(figsize=(7, 1 + 0.35 * len(peers)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['model']} {row['loop']}{', compiled' if row['compile'] else ''} x{row['ranks']}" for row in peers]
    middle = [row["ratio"]["median"] for row in peers]
    below = [row["ratio"]["median"] - row["ratio"]["low"] for row in peers]
    above = [row["ratio"]["high"] - row["ratio"]["median"] for row in peers]
    axes.barh(range(len(peers)), middle, xerr=[below, above], color="#4477aa")
    axes.set_yticks(range(len(peers)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("our images/s divided by theirs")
    figure.savefig(file, dpi=120)
