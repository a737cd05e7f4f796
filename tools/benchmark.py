"""Speed and size of models, measured with the code that trains: engine, ZeRO 1, clipping and optimizer step included.

python tools/benchmark.py train --model B/16 L/16     the training step: images/s, FLOP/s, MFU, memory
python tools/benchmark.py model --out models.jsonl    a table: parameters, FLOPs, activations, latencies
python tools/benchmark.py save --model B/16           how long training waits for a checkpoint, in the background or not
python tools/benchmark.py start --ranks 1 4           from the command to the first step, of a new run and a resumed one
python tools/benchmark.py order --samples 300000000   reading and mixing by the order of samples, without images
python tools/benchmark.py data --rows decode workers  reading photos, beside timm and webdataset, and over a network
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.benchmark.cells import LOOPS, cell_config, check_name, last_row
from pretrain.benchmark.data_table import PHOTOS, ROWS, data_lines, print_lines
from pretrain.benchmark.orders import order_rows
from pretrain.benchmark.peer_table import peer_table
from pretrain.benchmark.starting import start_lines
from pretrain.benchmark.table import MAX_PARAMETERS_ON_CPU, TABLE, model_row, print_kernels, print_table, write_table
from pretrain.errors import UserError


def main() -> None:
    parser = cli.parser(
        "Measures speed and size with the code that trains. COMMAND --help tells the rest.",
        "python tools/benchmark.py train --model B/16 L/16 --compile on off",
    )
    commands = parser.add_subparsers(
        dest="what", required=True, metavar="train|model|save|start|order|data", help="what to measure"
    )
    _add_train(commands)
    _add_model(commands)
    _add_save(commands)
    _add_start(commands)
    _add_order(commands)
    _add_data(commands)
    arguments = parser.parse_args()
    given = vars(arguments)
    if given.get("out") is not None and (given["out"].is_dir() or not given.get("peer")):  # --peer makes the folder
        cli.check_writable("--out", given["out"])
    if (folder := given.get("folder")) and not folder.is_dir():
        raise UserError(f"--folder {folder}: is not a folder; give one on the disk that is to be measured")
    arguments.run(arguments)


def _add_parser(commands: Any, name: str, description: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=description.partition(".")[0].lower(),
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_command(commands: Any, name: str, description: str, example: str) -> argparse.ArgumentParser:
    """Adds a command with the options that all commands share that time a model."""
    parser = _add_parser(commands, name, description, example)
    parser.add_argument("--batch", type=int, help="images per step (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--warmup", type=int, help="steps before timing (default: 10 on a GPU, 2 on a CPU)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 40 on a GPU, 5 on a CPU)")
    return parser


def _options(arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Returns the options for the cells' processes: those of `_add_command`, and `more` by name."""
    cli.check_least(arguments, batch=1, warmup=1, steps=2)  # deciles need two steps
    return {name: getattr(arguments, name) for name in ("batch", "precision", "warmup", "steps", *more)}


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "Times the real training step on random images. One JSON line per cell (model x compile), each in a fresh\n"
        "process: the median over --steps steps after --warmup steps. MFU counts 6 FLOPs per multiply-add of a\n"
        "forward pass, no recomputation, against the dense bf16 peak. --compile on needs a C compiler.",
        "python tools/benchmark.py train --model B/16 L/16 --compile on off",
    )
    parser.add_argument("--model", nargs="+", metavar="NAME", help="SIZE/PATCH, or timm:NAME (default B/16 L/16)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], help="cells to run (default both)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--fp8", action="store_true", help="our loop with engine.fp8; needs torchao")
    parser.add_argument(
        "--kernels", action="store_true", help="where the step's time goes, kernel by kernel; with --peer in the JSON"
    )
    parser.add_argument("--zero-stage", type=int, choices=[1, 2, 3], default=1, help="default 1")
    parser.add_argument("--peer", action="store_true", help="beside timm's loop and plain PyTorch, in turns; a table")
    parser.add_argument(
        "--ranks", type=int, help="with --peer: of this machine; with --bottleneck: that share its cores (default 1)"
    )
    parser.add_argument(
        "--threads", type=int, help="with --peer: of each rank on a CPU (default: its share of the cores)"
    )
    parser.add_argument("--rounds", type=int, help="with --peer: of --steps steps (default 5 of 5, on a GPU 3 of 15)")
    parser.add_argument(
        "--processes", type=int, help="with --peer: of a loop, one after the other (default 3, on a GPU 1)"
    )
    parser.add_argument(
        "--in-one", action="store_true", help="with --peer: all loops in one process, whose luck they share; for CPUs"
    )
    parser.add_argument(
        "--data", help="a set, to train on its images through the loader; with --peer ours alone, beside random images"
    )
    parser.add_argument("--workers", type=int, default=4, help="with --data: loader processes of a rank (default 4)")
    parser.add_argument("--bottleneck", action="store_true", help="with --data: what bounds such a run, and a way out")
    parser.add_argument("--loops", nargs="+", choices=LOOPS[1:], help="with --peer: those beside ours (default: all)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.set_defaults(run=_run_train)


_OF_PEER = ("--loops", "--rounds", "--processes", "--threads", "--in-one")


def _check_effect(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that has no effect on what is asked for."""
    if arguments.bottleneck:
        cli.refuse(arguments, ("--peer", *_OF_PEER, "--warmup", "--steps"), "with --bottleneck")
    elif not arguments.peer:
        cli.refuse(arguments, ("--ranks", *_OF_PEER), "without --peer")


def _run_train(arguments: argparse.Namespace) -> None:
    more = "image_size", "checkpoint_activations", "fp8", "zero_stage", "kernels", "data", "workers"
    options = {**_options(arguments, *more), "paced": False}
    for model in arguments.model or []:  # a wrong name is told before the first cell runs
        cell_config(model, arguments.image_size, 8, arguments.precision, fp8=arguments.fp8)
    cli.check_least(arguments, ranks=1, rounds=1, processes=1, workers=0)
    _check_effect(arguments)
    arguments.ranks = arguments.ranks or 1
    if arguments.kernels and arguments.bottleneck:
        raise UserError("--kernels tells of a step alone: leave out --bottleneck")
    if arguments.bottleneck:
        _run_bottleneck(arguments, options)
        return
    if arguments.peer:
        peer_table(arguments, options)
        return
    for model in arguments.model or ["B/16", "L/16"]:
        for compiled in arguments.compile or ["off", "on"]:
            cell = {"model": model, "compiled": compiled == "on", "options": options}
            row = last_row("train", cell, f"{model}, compile {compiled}")
            _print_row(row, arguments.out)
            if arguments.kernels:
                print_kernels(row)


def _run_bottleneck(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    if arguments.data is None:
        raise UserError("--bottleneck: give a data set with --data")
    for model in arguments.model or ["B/16"]:
        for compiled in arguments.compile or ["auto"]:  # as in a run
            own = options | {"compile": {"on": True, "off": False}.get(compiled, compiled), "ranks": arguments.ranks}
            row = last_row("bottleneck", {"model": model, "options": own}, f"{model}, compile {compiled}")
            _print_row(row, arguments.out)
            rate = f"{row['images_per_s']:,.1f} images/s of a rank with {row['cores']} cores"
            cli.tell(f"{model}: {rate}, bound by: {row['bound_by']}. {row['way_out']}")


def _print_row(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    _append(row, out)


def _append(row: dict[str, Any], out: Path | None) -> None:
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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
    parser.set_defaults(run=_run_model)


def _run_model(arguments: argparse.Namespace) -> None:
    if arguments.out and arguments.out.suffix == ".md":
        raise UserError(f"--out {arguments.out}: is where the table would go; give the JSON lines another ending")
    options = _options(arguments, "max_params")
    for model in arguments.model:
        check_name(model)  # a wrong name is told before the first cell runs
    cells = [(model, size) for size in arguments.image_size for model in arguments.model]
    rows, failures = [], 0
    with cli.progress("models", len(cells), "rows") as advance:
        for model, size in cells:
            pooling = None if model.startswith("timm:") else arguments.pooling
            cell = {"model": model, "image_size": size, "pooling": pooling, "options": options}
            row, failed = model_row(cell)
            rows.append(row)
            failures += failed
            if arguments.out:  # after each row: what was measured outlives an interrupt
                write_table(rows, arguments.out)
            advance(1)
    print_table(rows)
    if failures:
        raise UserError(f"{failures} of {len(cells)} rows are not complete; their last column says why")


def _add_save(commands: Any) -> None:
    parser = _add_command(
        commands,
        "save",
        "Times how long training waits for a checkpoint. --steps saves written while it waits (checkpoint.behind off)\n"
        "alternate with as many behind its steps, from a copy in host memory; one JSON line per model: medians and\n"
        "deciles of both, the first save, which takes the memory, and the steps beside a save and without one.",
        "python tools/benchmark.py save --model B/16 --image-size 32 --folder /data",
    )
    parser.add_argument("--model", nargs="+", default=["B/16"], metavar="NAME", help="SIZE/PATCH, or timm:NAME")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: where TMPDIR is)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.set_defaults(run=_run_save)


def _run_save(arguments: argparse.Namespace) -> None:
    folder = arguments.folder and str(arguments.folder.resolve())
    options = {**_options(arguments, "image_size"), "folder": folder}
    for model in arguments.model:  # a wrong name is told before the first cell runs
        cell_config(model, arguments.image_size, 8, arguments.precision)
    for model in arguments.model:
        _print_row(last_row("save", {"model": model, "options": options}, model), arguments.out)


def _add_start(commands: Any) -> None:
    parser = _add_parser(
        commands,
        "start",
        "Times commands by the clock, to the first step and to the exit: a new run of four steps, and one resumed at\n"
        "its second; for each number of ranks and each way to start them, beside another checkout if one is given.\n"
        "Alone on the machine. One JSON line for each: medians over the rounds.",
        "python tools/benchmark.py start --ranks 1 4 --beside ../older",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="of this machine (default 1 4)")
    parser.add_argument("--rounds", type=int, default=5, help="in which each way has its turn (default 5)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="a checkout of another commit of this repository")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.set_defaults(run=_run_start)


def _run_start(arguments: argparse.Namespace) -> None:
    if min(*arguments.ranks, arguments.rounds) < 1:
        raise UserError("--ranks and --rounds: expected at least 1")
    other = arguments.beside and arguments.beside.resolve()
    if other and not (other / "launch" / "pretrain.py").is_file():
        raise UserError(f"--beside {arguments.beside}: has no launch/pretrain.py; give a checkout of this repository")
    for row in start_lines(arguments.ranks, arguments.rounds, other):
        _print_row(row, arguments.out)


def _add_order(commands: Any) -> None:
    parser = _add_parser(
        commands,
        "order",
        "Computes what the order of samples makes of reading and mixing. JSON lines: the numbers of the order lanes;\n"
        "for each number of ranks, how many bytes are read for each that is used where each rank, or each node, reads\n"
        "for itself, and requests per 1,000 images; for both orders, the classes of a step beside those of an ideal\n"
        "shuffle, with shards that are shuffled and shards sorted by class. No images are needed.",
        "python tools/benchmark.py order --samples 300000000 --ranks 504 512",
    )
    parser.add_argument("--samples", type=int, default=1_281_167, help="of the data set (default 1,281,167)")
    parser.add_argument(
        "--kb", type=int, default=100, help="of a sample on average, in thousands of bytes (default 100)"
    )
    parser.add_argument("--classes", type=int, default=1000, help="all equally large (default 1000)")
    parser.add_argument("--batch", type=int, default=4096, help="images per step over all ranks (default 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 504, 512], help="default 1 8 64 504 512")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="default 8")
    parser.set_defaults(run=_run_order)


def _run_order(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    for name in ("samples", "kb", "classes", "batch", "ranks_per_node"):
        least = 2 if name == "classes" else 1  # one class has no mix
        if not least <= given[name] <= 1 << 40:
            raise UserError(f"--{name.replace('_', '-')} is {given[name]}, expected {least} to 2^40")
    if min(arguments.ranks) < 1:
        raise UserError(f"--ranks is {arguments.ranks}, expected numbers from 1 on")
    for row in order_rows(
        num_samples=arguments.samples,
        sample_bytes=1000 * arguments.kb,
        num_classes=arguments.classes,
        global_batch=arguments.batch,
        world_sizes=arguments.ranks,
        per_node=arguments.ranks_per_node,
    ):
        print(json.dumps(row), flush=True)


def _add_data(commands: Any) -> None:
    parser = _add_parser(
        commands,
        "data",
        "Times the reading of photos, row by row, each in a fresh process beside its peer: "
        + "; ".join(f"{name}: {what}" for name, what in ROWS.items())
        + ".\nAlone on the machine, with two cores. Ends with 2 when a target is missed.",
        "python tools/benchmark.py data --photos photos.tar --rows decode workers",
    )
    photos = os.environ.get("PRETRAIN_TEST_DATA", "")
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path(photos, PHOTOS) if photos else None,
        help=f"a webdataset tar of JPEG photos (default: {PHOTOS} in the folder PRETRAIN_TEST_DATA)",
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], help="default: all")
    parser.add_argument("--folder", type=Path, help="where sets are made, of up to 5 GB (default: where TMPDIR is)")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file too")
    parser.set_defaults(run=_run_data)


def _run_data(arguments: argparse.Namespace) -> None:
    lines = []
    for row in arguments.rows:
        for found in data_lines(row, arguments.photos, arguments.folder):
            lines.append(found)
            _append(found, arguments.out)
    print_lines(lines)
    if missed := [found["what"] for found in lines if found.get("holds") is False]:
        raise UserError(f"{len(missed)} of {len(lines)} targets are missed: {'; '.join(missed)}")


if __name__ == "__main__":
    cli.run(main)
