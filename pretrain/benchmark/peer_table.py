"""`tools/benchmark.py train --peer`: compares our step with timm's and plain PyTorch's, as a table and a plot.

A cell that is already in the results file, from the same device and commit, is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import cli
from pretrain.benchmark.cells import LOOPS, NUM_CLASSES, RANDOM_IMAGES, cell_config, last_row
from pretrain.benchmark.peers import LoopFailed, Schedule, compared
from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.escape import in_markdown, markdown_table
from pretrain.json_files import parse_json
from pretrain.plan.memory import Layout, memory
from pretrain.provenance import commit
from pretrain.sizes import is_plain
from pretrain.storage import write_text

# On a GPU, the most important first, in case the measurement is cut short. Our loop alone, one cell per model, should
# take 5 minutes; the cells with peers, each of which compiles timm's whole model, 20 to 40 more.
GPU_MODELS, CPU_MODELS = ["L/16", "H/14", "B/16", "g/14", "S/16"], ["Ti/16", "S/16"]
_GPU_PEERS = ["L/16", "B/16", "S/16", "H/14", "g/14"]  # the largest last: they take longest to compile
_GPU_DATA = ["L/16", "S/16"]  # on real images: one bound by the GPU, and one that the loader may bound
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "benchmarks" / "train.jsonl"
_GPU_ROUNDS, _GPU_STEPS = 3, 15
_CPU_ROUNDS, _CPU_PROCESSES = 5, 3
_BATCHES = tuple(1 << power for power in range(9, -1, -1))  # to try: 512, 256 ... 1
_FILLED = 0.85  # of a device's memory; the rest is for what the plan does not include
_HEADER = ["model", "loop", "compile", "ranks", "images/s", "TFLOP/s", "MFU", "of measured peak", "memory [GB]"]
_HEADER += ["forward [ms]", "backward", "optimizer", "collectives", "data", "ours / it", "interval"]
_TEXT_COLUMNS = 0, 1


class PeerCell(NamedTuple):
    """One measurement: a model's step in each of the loops."""

    model: str
    compiled: str  # "on" or "off"
    loops: list[str]
    data: str | None = None  # the set whose images are read; None: random ones


def peer_table(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Measures all cells, the most important first, and prints them; writes lines, table and plot to --out.

    Raises UserError for what cannot be compared, and at the end when a loop failed.
    """
    if options["precision"] == "fp16":
        raise UserError("--peer compares fp32 and bf16; --precision is fp16")
    device, gpu_bytes = _device()
    schedule = schedule_of(arguments, on_gpu=gpu_bytes > 0)
    out = arguments.out or DEFAULT_OUT
    rows, keys, failures = _earlier(out), set(), 0
    asked = arguments.model, arguments.compile, arguments.loops
    for cell in cells_of(*asked, on_gpu=gpu_bytes > 0, data=options["data"]):
        own, together = _options_of(cell, schedule, options, gpu_bytes)
        measured = {"model": cell.model, "compiled": cell.compiled == "on", "options": own}
        about = {**measured, **schedule._asdict(), "loops": cell.loops, "device": device, "commit": commit()}
        key = json.dumps(about)
        keys.add(key)
        if _is_measured(rows, key):
            cli.tell(f"{_name(cell)}: measured before, in {out}")
            continue
        try:
            found = compared(cell.loops, measured, schedule, together=together)
        except LoopFailed as failure:
            cli.tell(f"{_name(cell)}: {failure}")
            failures += 1
            continue
        for row in found:
            if "failed" in row:
                cli.tell(f"{_name(cell)}: {row['loop']}: {row['failed']}")
        rows = [row for row in rows if row["cell"] != key] + [row | {"cell": key} for row in found]
        write(rows, out)  # after each cell, so that an interrupt loses only one
    caption = "medians; MFU of the data sheet's dense bf16 peak; interval: of the rounds, 94 % from five on"
    cli.print_table("training step", _HEADER, map(cells, rows), text_columns=_TEXT_COLUMNS, caption=caption)
    failures += sum("failed" in row for row in rows if row["cell"] in keys)
    if failures:
        raise UserError(f"{failures} loops failed; see above")


def schedule_of(arguments: argparse.Namespace, *, on_gpu: bool) -> Schedule:
    """Returns how often loops are started and measured. Raises UserError for more processes than rounds."""
    rounds, processes = arguments.rounds, arguments.processes
    if rounds is None:
        rounds = _GPU_ROUNDS if on_gpu else _CPU_ROUNDS
    if processes is None:  # on a GPU a start takes longer than the rounds, and timings are not known to vary by process
        processes = 1 if on_gpu else min(_CPU_PROCESSES, rounds)
    if arguments.in_one and on_gpu:
        why = "on a GPU our engine would choose the peers' attention and hold their memory"
        raise UserError(f"--in-one is for CPUs: {why}")
    if processes > rounds:
        most = f"at most a process for each of {rounds} rounds (--rounds)"
        raise UserError(f"--processes is {processes}, expected {most}")
    return Schedule(arguments.ranks, arguments.threads, rounds, processes, arguments.in_one)


def _options_of(
    cell: PeerCell, schedule: Schedule, options: dict[str, Any], gpu_bytes: int
) -> tuple[dict[str, Any], bool]:
    """Returns a cell's options, and whether its loops fit into the device's memory together."""
    own = options | ({} if cell.data else {"data": None, "workers": None})
    if not gpu_bytes:
        return own, True
    own["steps"] = options["steps"] or _GPU_STEPS
    own["batch"], needed = fitting_batch(cell.model, schedule.num_ranks, options, gpu_bytes)
    return own, needed * len(cell.loops) <= _FILLED * gpu_bytes


def _name(cell: PeerCell) -> str:
    return f"{cell.model}, compile {cell.compiled}, {', '.join(cell.loops)}" + (", real images" if cell.data else "")


def _is_measured(rows: list[dict[str, Any]], key: str) -> bool:
    """Returns whether a cell need not be repeated: it was measured, or failed only for lack of memory."""
    found = [row for row in rows if row["cell"] == key]
    return bool(found) and all("out of memory" in row.get("failed", "out of memory") for row in found)


def cells_of(
    models: list[str] | None,
    compiled: list[str] | None,
    loops: list[str] | None,
    *,
    on_gpu: bool,
    data: str | None = None,
) -> list[PeerCell]:
    """Returns the cells in order. None: the default. data: a set, on which our loop alone is measured too.

    On a GPU, first our own loop alone, compiled, for all models, in case the measurement is cut short. Then real
    images, then all peers compiled, then all peers eager.
    """
    modes = compiled or (["on", "off"] if on_gpu else ["off"])
    chosen, of_data, of_peers = (GPU_MODELS, _GPU_DATA, _GPU_PEERS) if on_gpu else (CPU_MODELS,) * 3
    found = []
    if on_gpu and len(models or chosen) > 1:
        found += [PeerCell(model, modes[0], ["ours"]) for model in models or chosen]
    if data:
        found += [PeerCell(model, modes[0], ["ours"], data) for model in models or of_data]
    for mode in modes:
        for model in models or of_peers:
            # Which form of GELU makes no difference in speed on a GPU, or compiled.
            default = [loop for loop in LOOPS[1:] if loop != "timm-tanh" or (not on_gpu and mode == "off")]
            beside = ["ours", *(loops or default)]
            if not is_plain(ModelConfig(name=model)):  # only plain ViTs have a counterpart in timm
                beside = [loop for loop in beside if not loop.startswith("timm")]
            found.append(PeerCell(model, mode, beside))
    return found


def fitting_batch(model: str, num_ranks: int, options: dict[str, Any], gpu_bytes: int) -> tuple[int, int]:
    """Returns images per rank, as requested or the largest power of two that fits, and the bytes that a step takes.

    By the plan's formula. Models without a formula get the benchmark's default of 128, and count as all of the memory.
    """
    if not is_plain(ModelConfig(name=model)):
        return options["batch"] or 128, gpu_bytes

    def needed(batch: int) -> int:
        config = cell_config(model, options["image_size"], batch * num_ranks, options["precision"])
        layout = Layout(num_ranks, options["zero_stage"], batch, 1, options["checkpoint_activations"])
        return memory(config, NUM_CLASSES, layout).peak

    batch = options["batch"] or next((size for size in _BATCHES if needed(size) <= _FILLED * gpu_bytes), 1)
    return batch, needed(batch)


def _device() -> tuple[str, int]:
    """Returns the device's name, and the bytes of its memory; 0 for a CPU.

    Uses a short-lived process: this one would keep some of the GPU's memory, or the whole GPU in EXCLUSIVE_PROCESS.
    """
    row = last_row("device", {}, "the device does not answer")
    return row["name"], row["bytes"]


def _earlier(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    lines = out.read_text(encoding="utf-8").splitlines()
    rows = [parse_json(line, f"{out}:{number}") for number, line in enumerate(lines, 1)]
    wrong = [number for number, row in enumerate(rows, 1) if not (isinstance(row, dict) and "cell" in row)]
    if wrong:
        raise UserError(f"{out}:{wrong[0]}: is not a line of --peer; give another --out")
    return rows


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the rows as JSON lines, the table beside them as Markdown, and the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    conditions = [f"- {text}" for text in dict.fromkeys(map(_conditions, rows))]
    lines = [*markdown_table(_HEADER, map(cells, rows), _TEXT_COLUMNS), "", *conditions]
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    plot(rows, out.with_suffix(".png"))


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table as text."""
    begin = [row["model"], row["loop"], "on" if row["compile"] else "off", str(row["ranks"])]
    if "failed" in row:
        return [*begin, *[""] * (len(_HEADER) - len(begin) - 1), "failed"]
    if row["data"] != RANDOM_IMAGES:
        begin[1] += ", real images"
    peak, mfu, parts, ratio = row["measured_peak_tflop_per_s"], row["mfu"], row["parts_ms"], row["ratio"]
    times = [f"{parts[name]:,.1f}" for name in ("forward", "backward", "optimizer", "collectives", "data")]
    ours = row["loop"] == "ours"
    return [
        *begin,
        f"{row['images_per_s']:,.1f}",
        f"{row['tflop_per_s']:,.3g}",
        "" if mfu is None else f"{100 * mfu:.1f} %",
        f"{100 * row['tflop_per_s'] / peak:.0f} %",
        "" if row.get("in_one") else f"{row['memory_gb']:,.1f}",  # it is of all loops together
        *times,
        "" if ours else f"{ratio['median']:.3f}",
        "" if ours else f"{ratio['low']:.3f} to {ratio['high']:.3f}" + ("" if row["interleaved"] else ", not in turns"),
    ]


def _conditions(row: dict[str, Any]) -> str:
    if "failed" in row:
        compiled = "on" if row["compile"] else "off"
        return f"{row['model']}, {row['loop']}, compile {compiled}: {in_markdown(row['failed'])}"
    shared = ", shared by all loops" if row.get("in_one") else ""
    return (
        f"{row['model']}, {row['loop']}: {row['image_size']} pixels, {row['batch_per_rank']} images per rank, "
        f"{row['precision']}, images: {row['data']}; {len(row['rounds_ms'])} rounds of {row['steps']} steps "
        f"in {row.get('processes', 1)} processes, one after the other{shared}; "
        f"{row['device']}, torch {row['versions']['torch']}, timm {row['versions']['timm']}, commit {row['commit']}"
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws our rate divided by each peer's, as bars with intervals; at 1 both are equally fast."""
    from matplotlib.figure import Figure  # a second to import

    peers = [row for row in rows if row["loop"] != "ours" and "failed" not in row]
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
