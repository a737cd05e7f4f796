"""Examines the machine, or all nodes of a job, before a run: what would stop it or slow it down, and the remedy.

python tools/doctor.py [--config configs/NAME.yaml [key=value ...]]

`deepspeed`, `torchrun` and `srun python` start it on all ranks, in the way that they start launch/pretrain.py.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.cluster import signals
from pretrain.config import load_config
from pretrain.errors import UserError

WAIT_S = 60.0  # imports of torch take half a minute from a busy shared disk
MAX_WAIT_S = 3600.0


def main() -> int:
    parser = cli.parser(
        "Examines the machine, or all nodes that a launcher starts it on: versions, GPUs, the sum over all ranks and\n"
        "its bandwidth, clocks, limits, /dev/shm, memory, compiler. With --config also the run's disks: locks and\n"
        "renames (a folder .doctor-* that it removes), room for checkpoints, the rate at which shards are read.\n"
        "Exit code: 0 when nothing is red, 2 when something is, 75 when it is storage alone.",
        "srun --ntasks-per-node=8 python tools/doctor.py --config configs/plain_s16_imagenet1k.yaml",
    )
    parser.add_argument("--config", type=Path, help="YAML file of the run; without it, the machine alone")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, as output=/scratch/me"
    )
    parser.add_argument(
        "--wait-s", type=float, default=WAIT_S, help=f"for a rank or check that is silent (default {WAIT_S:g})"
    )
    arguments = parser.parse_intermixed_args()
    if not (math.isfinite(arguments.wait_s) and 1 <= arguments.wait_s <= MAX_WAIT_S):
        raise UserError(f"--wait-s is {arguments.wait_s:g}, expected 1 to {MAX_WAIT_S:g}")
    if arguments.overrides and arguments.config is None:
        raise UserError(f"{arguments.overrides[0]} has no effect without --config; give the run's file")
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    signals.end_with_launcher()
    with cli.loading():
        from pretrain.doctor.examine import examine
    return examine(config, arguments.wait_s)


if __name__ == "__main__":
    cli.run(main)
