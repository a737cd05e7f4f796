"""Plans a run before it is queued: memory, communication, time, cost, data rate, disk, saves; without a GPU or torch.

python tools/plan.py --config configs/NAME.yaml [key=value ...] --gpus 1,8,64 --gpu h100

Everything is a formula (docs/performance.md). The memory of tensors is tested against the real engine on CPU ranks; the
MFU is fitted to one H100, or with --from benchmarks/train.jsonl as tools/benchmark.py train --peer measured it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import Config, load_config
from pretrain.errors import ConfigError, UserError
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
    of_the_run = [_option(name) for name, number in _NUMBERS.items() if number.of_the_run]
    if arguments.table:
        cli.refuse(arguments, ("--gpus", *of_the_run), "with --table")
    for name, number in _NUMBERS.items():
        if name not in used:
            setattr(arguments, name, number.default)
    if arguments.gpus_per_node is None:
        arguments.gpus_per_node = _GPUS_PER_NODE
    if arguments.gpus is not None:
        gpus = _numbers(arguments.gpus, config)
    else:  # at most as many as a step has images
        gpus = [count for count in _DEFAULT_GPUS if count <= config.data.global_batch]
    _check(arguments)
    device = DEVICES[arguments.gpu]
    cluster = Cluster(device, arguments.gpus_per_node, arguments.network_gb_s * 1e9)
    lines = read_rows(arguments.measured) if arguments.measured else []
    given, rows = _assumptions(arguments, config, lines)
    if arguments.table:
        choices = show_models(config, cluster, given, lambda other: _rate(arguments, other, lines)[0])
        values: object = choices
        rows = [row for row in rows if row[2] not in of_the_run]
    else:
        values = show(config, gpus, cluster, given)
        choices = values["choices"]
    given_options = {_option(name) for name in used - {"gpu"}}
    told = [[*row[:3], "given" if row[2] in given_options else row[3]] for row in rows]
    cli.print_table("Assumed", ["", "", "change by", "source"], told, text_columns=(0, 2, 3))
    of_compiled = any(row[3] == _OF_COMPILED for row in told)
    if uncompiled := _uncompiled(config, choices, of_compiled, arguments.zero3_share):
        cli.tell(f"warning: {uncompiled}", sys.stderr)
    if arguments.out_json is not None:
        content = {"config": config.name, "gpu": device.name, "assumed": [row[:2] for row in told], "plan": values}
        write_text(arguments.out_json, json.dumps(content, indent=1) + "\n")


def _uncompiled(config: Config, choices: list[dict[str, Any]], of_compiled: bool, zero3_share: float) -> str:
    """Returns a warning if the MFU is that of a compiled step but a chosen layout will not be compiled, else ""."""
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
    """Returns the config with total_steps computed from total_epochs, which needs the manifest of data.train."""
    from pretrain.train.epochs import in_steps

    try:
        return in_steps(config)
    except ConfigError:
        raise
    except UserError as error:
        raise UserError(f"{error} (total_epochs takes the number of images; without data give total_steps=N)") from None


class _Number(NamedTuple):
    """A number that the plan assumes; an option, named by its key in _NUMBERS."""

    told: str
    default: float | None = None  # None: it depends on the config, as `told` says
    most: float = 1e12
    of_the_run: bool = False  # has no effect on --table


_NUMBERS = {
    "mfu": _Number("of one GPU without recomputation, 0 to 1 (default: by width)", most=1.0),
    "zero3_share": _Number("of ZeRO 1's rate that 3 has", ZERO3_SHARE, most=1.0),
    "launch_us": _Number("host time of a launch", 1e6 * LAUNCH_S),
    "usable": _Number("share of memory", USABLE_SHARE, most=1.0),
    "network_gb_s": _Number("of a node, GB/s one way, as of 8 x 50", 400.0),
    "price": _Number("of a GPU's hour", 2.5, of_the_run=True),
    "loader_rate": _Number("images per second and core (default 496, 275 RandAugment)", of_the_run=True),
    "image_kb": _Number("of a file", 110.0, of_the_run=True),
    # Of one GPU, into pinned memory: PCIe 4 moves up to 32; a node's memory can take that of eight GPUs.
    "copy_gb_s": _Number("of a GPU's copies into host memory", 20.0, of_the_run=True),
    "write_gb_s": _Number("of a node to the checkpoints' disk", 1.0, of_the_run=True),
    "save_s": _Number("that a save keeps training waiting (default: by --copy-gb-s)", most=1e6, of_the_run=True),
    "mtbf_h": _Number("hours of a GPU between failures", 50_000.0, of_the_run=True),
    # A rank that died is named within seconds, one that was stopped after 45 (docs/reliability.md); one that hangs in
    # the device, or a node without power, takes engine.watchdog_s or engine.timeout_s, but is one failure among many.
    "detect_s": _Number("from a failure to the end", 60.0, most=1e6, of_the_run=True),
    # 6 on a CPU with nothing else to do (docs/results.md); the rest is for the scheduler, CUDA, NCCL and reading.
    "restart_s": _Number("from the end to the next step", 300.0, most=1e6, of_the_run=True),
}
_DEFAULT_GPUS, _GPUS_PER_NODE = (1, 8, 64), 8
_OF_COMPILED = "of a compiled step"  # the source of an assumed MFU


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(arguments: argparse.Namespace) -> None:
    for name, number in _NUMBERS.items():
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= number.most:  # nor NaN
            raise UserError(f"{_option(name)} is {value:g}, expected above 0 and up to {number.most:g}")
    for name in ("gpus_per_node", "classes"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MAX_GPUS:
            raise UserError(f"{_option(name)} is {value}, expected 1 to {MAX_GPUS}")
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
    parser.add_argument(
        "--from", type=Path, dest="measured", metavar="FILE", help="MFU as tools/benchmark.py train --peer measured it"
    )
    parser.add_argument("--gpus-per-node", type=int, help=f"(default {_GPUS_PER_NODE})")
    for name, number in _NUMBERS.items():
        default = "" if number.default is None else f" (default {number.default:g})"
        parser.add_argument(_option(name), type=float, help=number.told + default)
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
    """Returns the rate that a GPU reaches with a config's model, and the source of its MFU."""
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
    mfus = {"MFU on one GPU": (rate, source)}
    if arguments.table and not arguments.mfu:  # of each size
        mfus = {f"MFU, {name}": _rate(arguments, of_model(config, name), lines) for name in TABLE_MODELS}
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
        *([told, f"{each.mfu:.1%}", "--mfu", source] for told, (each, source) in mfus.items()),
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
        [
            "a save waits",
            "see above" if arguments.save_s is None else f"{arguments.save_s:g} s",
            "--save-s",
            f"by {'--copy-gb-s' if behind else '--write-gb-s'}",
        ],
        ["failures, per GPU", f"{arguments.mtbf_h:,.0f} h", "--mtbf-h", "Llama 3: 50,600 h"],
        ["until a failure ends", f"{arguments.detect_s:,.0f} s", "--detect-s", "reliability.md"],
        ["until it trains again", f"{arguments.restart_s:,.0f} s", "--restart-s", "performance.md"],
    ]


if __name__ == "__main__":
    cli.run(main)
