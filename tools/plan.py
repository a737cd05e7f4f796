"""Plans a run before it is queued: memory, communication, time, cost, data rate, disk, saves; without a GPU or torch.

python tools/plan.py --config configs/NAME.yaml [key=value ...] --gpus 1,8,64 --gpu h100

Everything is a formula (docs/performance.md). The memory of tensors is tested against the real engine on CPU ranks; the
MFU is fitted to one H100. With --from benchmarks/train.jsonl it is that of tools/benchmark.py train --peer.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.gpus import DEVICES, GIB
from pretrain.json_files import Fields
from pretrain.plan.choose import USABLE_SHARE
from pretrain.plan.failures import Failures, Saves
from pretrain.plan.launches import COMPILED, EAGER
from pretrain.plan.measured import measured, read_rows, wanted
from pretrain.plan.report import TABLE_MODELS, Assumptions, checkpoint_bytes, of_model, show, show_models
from pretrain.plan.speed import LAUNCH_S, ZERO3_SHARE, Cluster, Rate, assumed_mfu
from pretrain.sizes import is_plain
from pretrain.storage import write_text

MAX_GPUS = 1 << 20
# Images per second and core, crop and flip at 224 pixels from full-size photos of ImageNet; with RandAugment 2/10.
# docs/performance.md tells how they were measured.
LOADER_RATE, LOADER_RATE_RANDAUGMENT = 496.0, 275.0


def main() -> None:
    arguments = _parser().parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides, lambda line: cli.tell(line, sys.stderr))
    if not is_plain(config.model):
        raise UserError(
            f"model.name: {config.model.name} is no plain ViT with absolute positions, which alone has formulas; "
            "tools/benchmark.py model counts it"
        )
    if not config.total_steps:
        config = _in_steps(config)
    used = {name for name, value in vars(arguments).items() if value is not None}
    if arguments.table:
        for name in ("gpus", *_OF_THE_RUN):
            if name in used:
                raise UserError(f"--{name.replace('_', '-')} has no effect with --table; leave it out")
    for name, value in _DEFAULTS.items():
        if name not in used:
            setattr(arguments, name, value)
    if "gpus" not in used:  # at most as many as a step has images
        arguments.gpus = ",".join(n for n in arguments.gpus.split(",") if int(n) <= config.data.global_batch)
    gpus = _numbers(arguments.gpus, config)
    _check(arguments)
    device = DEVICES[arguments.gpu]
    cluster = Cluster(device, arguments.gpus_per_node, arguments.network_gb_s * 1e9)
    lines = read_rows(arguments.measured) if arguments.measured else []
    given, rows = _assumptions(arguments, config, lines)
    if arguments.table:
        choices = show_models(config, cluster, given, lambda other: _rate(arguments, other, lines)[0])
        values: object = choices
        rows = [row for row in rows if _name(row[2]) not in _OF_THE_RUN]
    else:
        values = show(config, gpus, cluster, given)
        choices = values["choices"]
    told = [[*row[:3], "given" if _name(row[2]) in used - {"gpu"} else row[3]] for row in rows]
    cli.print_table("Assumed", ["", "", "change by", "source"], told, text_columns=(0, 2, 3))
    of_compiled = any(row[3] == _OF_COMPILED for row in told)
    if uncompiled := _uncompiled(config, choices, of_compiled, arguments.zero3_share):
        cli.tell(f"warning: {uncompiled}", sys.stderr)
    if arguments.out_json is not None:
        content = {"config": config.name, "gpu": device.name, "assumed": [row[:2] for row in told], "plan": values}
        write_text(arguments.out_json, json.dumps(content, indent=1) + "\n")


def _uncompiled(config: Config, choices: list[dict[str, Any]], of_compiled: bool, zero3_share: float) -> str:
    """Says that the MFU is of a compiled step where a layout that is chosen will not be compiled."""
    if not config.engine.compile and of_compiled:
        return (
            "engine.compile=false: the assumed MFU, and so time and price, are of a compiled step; an eager one is "
            "slower: give --mfu"
        )
    if config.engine.compile and any(choice["fits"] and not choice["compiled"] for choice in choices):
        return (
            "ZeRO 3 is not compiled (engine.compile=auto): its time is that of a compiled step's MFU x "
            f"{zero3_share:g} (--zero3-share), which is not measured"
        )
    return ""


def _in_steps(config: Config) -> Config:
    """Returns the config with the steps of its total_epochs, which take the manifest of data.train."""
    from pretrain.train.epochs import in_steps

    try:
        found = in_steps(config)
    except UserError as error:
        raise UserError(f"{error} (total_epochs takes the number of images; without data give total_steps=N)") from None
    if not found.total_steps:
        raise UserError(
            f"data.held_out ({config.data.held_out}) leaves nothing of {config.data.train} to train on; lower it"
        )
    return found


_DEFAULTS = {
    "gpus": "1,8,64",
    "price": 2.5,
    "usable": USABLE_SHARE,
    "gpus_per_node": 8,
    "network_gb_s": 400.0,
    "image_kb": 110.0,
    "copy_gb_s": 20.0,  # of one GPU, pinned: PCIe 4 moves up to 32; a node's memory takes it from eight
    "write_gb_s": 1.0,
    "zero3_share": ZERO3_SHARE,
    "launch_us": 1e6 * LAUNCH_S,
    "mtbf_h": 50_000.0,
    # A rank that died is named within seconds, one that was stopped after 45 (docs/reliability.md); one that hangs in
    # the device, or a node without power, takes engine.watchdog_s or engine.timeout_s, and is one end among many.
    "detect_s": 60.0,
    "restart_s": 300.0,  # 6 on a CPU, alone (docs/results.md); the rest: the scheduler, CUDA, NCCL, reading
}
# What a table of sizes does not use: it has no run.
_OF_THE_RUN = (
    *("price", "loader_rate", "image_kb", "copy_gb_s", "write_gb_s", "save_s", "mtbf_h", "detect_s", "restart_s"),
)
_OF_COMPILED = "of a compiled step"  # the source of an assumed MFU
_MOST = {"mfu": 1.0, "usable": 1.0, "zero3_share": 1.0}


def _name(option: str) -> str:
    return option[2:].replace("-", "_")


def _check(arguments: argparse.Namespace) -> None:
    rates = "loader_rate", "image_kb", "copy_gb_s", "write_gb_s", "mtbf_h", "usable", "network_gb_s"
    for name in ("mfu", "zero3_share", "launch_us", "price", *rates):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and 0 < value <= _MOST.get(name, 1e12)):
            raise UserError(
                f"--{name.replace('_', '-')} is {value:g}, expected above 0 and up to {_MOST.get(name, 1e12):g}"
            )
    for name in ("gpus_per_node", "classes"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MAX_GPUS:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 to {MAX_GPUS}")
    for name in ("save_s", "detect_s", "restart_s"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1e6:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, expected above 0 and up to 1e6")
    if arguments.mfu and arguments.measured:
        raise UserError("--mfu and --from both tell the MFU; give one of them")
    if arguments.out_json is not None:
        cli.check_writable("--json", arguments.out_json)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "Plans a run before it is queued: which stage, micro-batch and recomputation, how long, at what price.\n"
        "Formulas only: needs no GPU and no data; with total_epochs the manifest of data.train is read for the\n"
        "number of images: without data give total_steps=N. Images are those of the recipe: data.global_batch stays.",
        "python tools/plan.py --config configs/augreg_imagenet1k.yaml model.name=L/16 --gpus 1,8,64 --gpu h200",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, for example optim.lr=1e-3"
    )
    parser.add_argument("--gpus", metavar="N,N", help="numbers of GPUs (default 1,8,64, up to data.global_batch)")
    parser.add_argument("--gpu", choices=list(DEVICES), default="h100", help="(default h100)")
    parser.add_argument(
        "--table", action="store_true", help="choices for B, L, H, g, G, e, 22B on 1 to 512 GPUs instead"
    )
    parser.add_argument("--json", type=Path, dest="out_json", metavar="FILE", help="write the numbers too")
    parser.add_argument("--classes", type=int, help="outputs of the head (default: model.num_classes, else 1000)")
    parser.add_argument("--mfu", type=float, help="of one GPU without recomputation, 0 to 1 (default: by width)")
    parser.add_argument(
        "--from", type=Path, dest="measured", metavar="FILE", help="MFU as tools/benchmark.py train --peer measured it"
    )
    parser.add_argument("--zero3-share", type=float, help=f"of ZeRO 1's rate that 3 has (default {ZERO3_SHARE})")
    parser.add_argument("--launch-us", type=float, help=f"host time of a launch (default {1e6 * LAUNCH_S:g})")
    parser.add_argument("--price", type=float, help="of a GPU's hour (default 2.5)")
    parser.add_argument("--usable", type=float, help=f"share of memory (default {USABLE_SHARE})")
    parser.add_argument("--gpus-per-node", type=int, help="(default 8)")
    parser.add_argument("--network-gb-s", type=float, help="of a node, GB/s one way (default 400: 8 x 50)")
    parser.add_argument("--loader-rate", type=float, help="images per second and core (default 496, 275 RandAugment)")
    parser.add_argument("--image-kb", type=float, help="of a file (default 110)")
    parser.add_argument("--copy-gb-s", type=float, help="of a GPU's copies into host memory (default 20)")
    parser.add_argument("--write-gb-s", type=float, help="of a node to the checkpoints' disk (default 1)")
    parser.add_argument("--save-s", type=float, help="that a save keeps training waiting (default: by --copy-gb-s)")
    parser.add_argument("--mtbf-h", type=float, help="hours of a GPU between failures (default 50000)")
    parser.add_argument("--detect-s", type=float, help="from a failure to the end (default 60)")
    parser.add_argument("--restart-s", type=float, help="from the end to the next step (default 300)")
    return parser


def _numbers(text: str, config: Config) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise UserError(f"--gpus is {text!r}, expected numbers with commas between, for example 1,8,64")
    gpus = sorted({int(part) for part in parts})
    most = min(config.data.global_batch, MAX_GPUS)
    if gpus[0] < 1 or gpus[-1] > most:
        wrong = gpus[0] if gpus[0] < 1 else gpus[-1]
        raise UserError(
            f"--gpus: {wrong} of them, expected 1 to {most}: each takes an image of data.global_batch at least"
        )
    return gpus


def _rate(arguments: argparse.Namespace, config: Config, lines: list[Fields]) -> tuple[Rate, str]:
    """What a GPU reaches with a config's model, and where its MFU comes from."""
    device, width, precision = DEVICES[arguments.gpu], config.model.shape.width, config.engine.precision
    found = measured(lines, config, device)
    if found is not None:
        mfu, source = found.mfu, f"measured, {found.batch} images"
    else:
        mfu, source = arguments.mfu or assumed_mfu(device, width, precision), _OF_COMPILED
    return Rate(mfu, arguments.zero3_share, 1e-6 * arguments.launch_us), source


def _assumptions(
    arguments: argparse.Namespace, config: Config, lines: list[Fields]
) -> tuple[Assumptions, list[list[str]]]:
    device, precision = DEVICES[arguments.gpu], config.engine.precision
    classes = arguments.classes or config.model.num_classes or 1000
    rate, source = _rate(arguments, config, lines)
    if arguments.measured and not arguments.table and not source.startswith("measured"):
        raise UserError(f"--from {arguments.measured}: {wanted(lines, config, device)}")
    data = config.data  # 3-Augment with its jitter takes as long as RandAugment or longer, 1 to 2 ms at 224 pixels
    augmented = data.randaugment_layers > 0 or data.three_augment or data.color_jitter > 0
    loader = arguments.loader_rate or (LOADER_RATE_RANDAUGMENT if augmented else LOADER_RATE)
    behind, rates = config.checkpoint.behind, (1e9 * arguments.copy_gb_s, 1e9 * arguments.write_gb_s)
    saves = Saves(checkpoint_bytes(config, classes), behind, *rates, arguments.gpus_per_node, arguments.save_s)
    usable = arguments.usable * device.memory_bytes
    failures = Failures(arguments.mtbf_h, arguments.detect_s, arguments.restart_s)
    bytes_of_image = arguments.image_kb * 1e3
    given = Assumptions(classes, rate, usable, arguments.price, loader, bytes_of_image, saves, failures)
    return given, [
        ["classes", f"{classes:,}", "--classes", "config, or 1000"],
        *_mfu_rows(arguments, config, lines),
        [
            "peak, fp32" if precision == "fp32" else "peak, dense bf16",
            f"{device.peak(precision) / 1e12:,.4g} TF/s",
            "--gpu",
            "data sheet",
        ],
        ["ZeRO 3 against 1 and 2", f"{arguments.zero3_share:.0%}", "--zero3-share", "L/16 of others"],
        ["launches per block", f"{COMPILED.plain}, eager {EAGER.plain}", "", "counted on CPUs"],
        ["a launch, host time", f"{arguments.launch_us:g} us", "--launch-us", "assumed"],
        ["memory for tensors", f"{usable / GIB:.1f} GiB", "--usable", "not measured"],
        ["NVLink one way", f"{device.link_rate / 1e9:,.0f} GB/s", "--gpu", "data sheet"],
        ["a node's network", f"{arguments.network_gb_s:,.0f} GB/s", "--network-gb-s", "8 x 400 Gb/s"],
        ["GPUs per node", str(arguments.gpus_per_node), "--gpus-per-node", ""],
        ["price of a GPU hour", f"{arguments.price:g}", "--price", "an example"],
        ["loader per core", f"{loader:,.0f} img/s", "--loader-rate", "performance.md"],
        ["size of an image", f"{arguments.image_kb:g} kB", "--image-kb", "ImageNet"],
        *([["copy, of each GPU", f"{arguments.copy_gb_s:g} GB/s", "--copy-gb-s", "PCIe, not measured"]] * behind),
        ["disk, of each node", f"{arguments.write_gb_s:g} GB/s", "--write-gb-s", "not measured"],
        ["a save waits", _waits(arguments), "--save-s", f"by {'--copy-gb-s' if behind else '--write-gb-s'}"],
        ["failures, per GPU", f"{arguments.mtbf_h:,.0f} h", "--mtbf-h", "Llama 3: 50,600 h"],
        ["until a failure ends", f"{arguments.detect_s:,.0f} s", "--detect-s", "reliability.md"],
        ["until it trains again", f"{arguments.restart_s:,.0f} s", "--restart-s", "performance.md"],
    ]


def _waits(arguments: argparse.Namespace) -> str:
    return "see above" if arguments.save_s is None else f"{arguments.save_s:g} s"


def _mfu_rows(arguments: argparse.Namespace, config: Config, lines: list[Fields]) -> list[list[str]]:
    """The MFU of the config's model; of a table that of each size."""
    if not arguments.table or arguments.mfu:
        rate, source = _rate(arguments, config, lines)
        return [["MFU on one GPU", f"{rate.mfu:.1%}", "--mfu", source]]
    rows = []
    for name in TABLE_MODELS:
        rate, source = _rate(arguments, of_model(config, name), lines)
        rows.append([f"MFU, {name}", f"{rate.mfu:.1%}", "--mfu", source])
    return rows


if __name__ == "__main__":
    cli.run(main)
