"""Pretrains a Vision Transformer.

deepspeed launch/pretrain.py --config configs/NAME.yaml [key=value ...]

The same command again resumes. `python launch/pretrain.py ...` runs one rank; torchrun works too, and under SLURM plain
`srun python launch/pretrain.py ...` with a task for each GPU (launch/pretrain.sbatch).
"""

import os
import sys
from pathlib import Path

# This file's folder comes first on sys.path, where `pretrain` would be this file instead of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.cluster import signals, watchdog

# Before imports that take seconds, in which SIGUSR1, SLURM's warning, would end the process.
STOP = signals.StopRequest() if __name__ == "__main__" else None

from pretrain import cli
from pretrain.cluster.slurm import rank_so_far
from pretrain.config import config_to_yaml, load_config, option_hint, settings_help
from pretrain.errors import ConfigError


def _tell(line: str) -> None:
    if not rank_so_far(os.environ):
        cli.tell(line, sys.stderr)


def main() -> None:
    parser = cli.parser(
        "Pretrains a Vision Transformer. The same command again resumes where the newest checkpoint is.",
        "deepspeed launch/pretrain.py --config configs/tiny_imagenet_ti8.yaml optim.lr=5e-4",
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file that names what differs from the defaults"
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete config and exit")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, for example optim.lr=1e-3"
    )
    parser.add_argument("--print-folder", action="store_true", help="print the run's folder and exit")
    parser.epilog = f"{parser.epilog}\n\n{settings_help()}"
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option; {option_hint(unknown[0])}")
    config = load_config(arguments.config, arguments.overrides, _tell)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return
    if arguments.print_folder:
        print(config.output / config.name)
        return
    signals.end_with_launcher()
    if not rank_so_far(os.environ):
        print(f"{config.name}: loading torch and DeepSpeed", flush=True)
    with watchdog.watching(config.output / config.name, config.engine.watchdog_s, config.engine.timeout_s):
        with cli.loading():
            from pretrain.train.run import train
        train(config, recipe=arguments.config, stop=STOP)


if __name__ == "__main__":
    cli.run(main)
