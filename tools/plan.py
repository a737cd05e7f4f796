"""Plans a run before it is queued: memory, communication, time, cost, data rate, disk, saves; without a GPU or torch.

python tools/plan.py --config configs/NAME.yaml [key=value ...] --gpus 1,8,64 --gpu h100

Everything is a formula (docs/performance.md). The memory of tensors is tested against the real engine on CPU ranks; no
time was measured on a GPU yet.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.plan.choose import USABLE_SHARE
from pretrain.plan.devices import DEVICES, GIB, assumed_mfu
from pretrain.plan.failures import Failures
from pretrain.plan.report import Assumptions, checkpoint_bytes, show, show_models
from pretrain.plan.speed import Cluster
from pretrain.sizes import is_plain
from pretrain.storage import write_text

MAX_GPUS = 1 << 20
# Images per second and core, crop and flip at 224 pixels from full-size photos of ImageNet; with RandAugment 2/10.
# docs/performance.md tells how they were measured.
LOADER_RATE, LOADER_RATE_RANDAUGMENT = 496.0, 275.0


def main() -> None:
    parser = _parser()
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if not is_plain(config.model):
        raise UserError(
            f"model.name: {config.model.name} is no plain ViT with absolute positions, which alone has formulas; "
            "tools/benchmark.py model counts it"
        )
    gpus = _numbers(arguments.gpus, config)
    for name in ("mfu", "price", "loader_rate", "image_kb", "write_gb_s", "mtbf_h", "usable", "network_gb_s"):
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
    if arguments.out_json is not None and not arguments.out_json.parent.is_dir():
        raise UserError(f"--json {arguments.out_json}: there is no folder {arguments.out_json.parent}")
    device = DEVICES[arguments.gpu]
    cluster = Cluster(device, arguments.gpus_per_node, arguments.network_gb_s * 1e9)
    given, told = _assumptions(arguments, config)
    if arguments.table:
        values: object = show_models(
            config, cluster, given, lambda other: arguments.mfu or assumed_mfu(device, other.model.shape.width)
        )
    else:
        values = show(config, gpus, cluster, given)
    cli.print_table("Assumed", ["", "", "change by", "source"], told, text_columns=(0, 2, 3))
    if arguments.out_json is not None:
        content = {"config": config.name, "gpu": device.name, "assumed": [row[:2] for row in told], "plan": values}
        write_text(arguments.out_json, json.dumps(content, indent=1) + "\n")


_MOST = {"mfu": 1.0, "usable": 1.0}


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "Plans a run before it is queued: which stage, micro-batch and recomputation, how long, at what price.\n"
        "Formulas only: needs no GPU and no data. Images are those of the recipe: data.global_batch stays.",
        "python tools/plan.py --config configs/augreg_imagenet1k.yaml model.name=L/16 --gpus 1,8,64 --gpu h200",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, for example optim.lr=1e-3"
    )
    parser.add_argument("--gpus", default="1,8,64", metavar="N,N", help="numbers of GPUs (default 1,8,64)")
    parser.add_argument("--gpu", choices=list(DEVICES), default="h100", help="(default h100)")
    parser.add_argument(
        "--table", action="store_true", help="choices for B, L, H, g, G, e, 22B on 1 to 512 GPUs instead"
    )
    parser.add_argument("--json", type=Path, dest="out_json", metavar="FILE", help="write the numbers too")
    parser.add_argument("--classes", type=int, help="outputs of the head (default: model.num_classes, else 1000)")
    parser.add_argument("--mfu", type=float, help="of one GPU without recomputation, 0 to 1 (default: by width)")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU's hour (default 2.5)")
    parser.add_argument("--usable", type=float, default=USABLE_SHARE, help=f"share of memory (default {USABLE_SHARE})")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default 8)")
    parser.add_argument("--network-gb-s", type=float, default=400, help="of a node, GB/s one way (default 400: 8 x 50)")
    parser.add_argument("--loader-rate", type=float, help="images per second and core (default 496, 275 RandAugment)")
    parser.add_argument("--image-kb", type=float, default=110, help="of a file (default 110)")
    parser.add_argument("--write-gb-s", type=float, default=1.0, help="of the checkpoints' disk (default 1)")
    parser.add_argument(
        "--save-s", type=float, help="that a save keeps training waiting (default: size / --write-gb-s)"
    )
    parser.add_argument("--mtbf-h", type=float, default=50_000, help="hours of a GPU between failures (default 50000)")
    parser.add_argument("--detect-s", type=float, help="from a failure to the end (default: engine.timeout_s)")
    parser.add_argument("--restart-s", type=float, default=300, help="from the end to the next step (default 300)")
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


def _assumptions(arguments: argparse.Namespace, config: Config) -> tuple[Assumptions, list[list[str]]]:
    device = DEVICES[arguments.gpu]
    classes = arguments.classes or config.model.num_classes or 1000
    mfu = arguments.mfu or assumed_mfu(device, config.model.shape.width)
    augmented = config.data.randaugment_layers > 0
    loader = arguments.loader_rate or (LOADER_RATE_RANDAUGMENT if augmented else LOADER_RATE)
    size = checkpoint_bytes(config, classes)
    save_s = arguments.save_s or size / 1e9 / arguments.write_gb_s
    detect_s = arguments.detect_s or config.engine.timeout_s
    usable = arguments.usable * device.memory_bytes
    failures = Failures(arguments.mtbf_h, detect_s, arguments.restart_s)
    given = Assumptions(classes, mfu, usable, arguments.price, loader, arguments.image_kb * 1e3, save_s, failures)
    told = [
        ["classes", f"{classes:,}", "--classes", "config, or 1000"],
        ["MFU on one GPU", f"{mfu:.1%}", "--mfu", "by width, assumed"],
        ["peak, dense bf16", f"{device.peak_flops / 1e12:,.0f} TF/s", "--gpu", "data sheet"],
        ["memory for tensors", f"{usable / GIB:.1f} GiB", "--usable", "not measured"],
        ["NVLink one way", f"{device.link_rate / 1e9:,.0f} GB/s", "--gpu", "data sheet"],
        ["a node's network", f"{arguments.network_gb_s:,.0f} GB/s", "--network-gb-s", "8 x 400 Gb/s"],
        ["GPUs per node", str(arguments.gpus_per_node), "--gpus-per-node", ""],
        ["price of a GPU hour", f"{arguments.price:g}", "--price", "an example"],
        ["loader per core", f"{loader:,.0f} img/s", "--loader-rate", "performance.md"],
        ["size of an image", f"{arguments.image_kb:g} kB", "--image-kb", "ImageNet"],
        ["a save waits", f"{save_s:.1f} s", "--save-s", "size, --write-gb-s"],
        ["failures, per GPU", f"{arguments.mtbf_h:,.0f} h", "--mtbf-h", "Llama 3: 50,600 h"],
        ["until a failure ends", f"{detect_s:,.0f} s", "--detect-s", "engine.timeout_s"],
        ["until it trains again", f"{arguments.restart_s:,.0f} s", "--restart-s", "not measured"],
    ]
    return given, told


if __name__ == "__main__":
    cli.run(main)
