"""Pretrains a Vision Transformer.

deepspeed launch/pretrain.py --config configs/NAME.yaml [key=value ...]

The same command again resumes. `python launch/pretrain.py ...` runs one rank; torchrun works too, and under SLURM plain
`srun python launch/pretrain.py ...` with a task for each GPU (launch/pretrain.sbatch). With `--restarts N` plain python
starts the ranks of this machine itself, and starts them again when one is lost.
"""

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

# This file's folder comes first on sys.path, where `pretrain` would be this file instead of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.cluster import signals, watchdog

# Before imports that take seconds, in which SIGUSR1, SLURM's warning, would end the process.
STOP = signals.StopRequest() if __name__ == "__main__" else None

from pretrain import cli
from pretrain.checkpoint.layout import step_folders
from pretrain.cluster import forks, local, restarts
from pretrain.cluster.slurm import rank_so_far
from pretrain.config import Config, config_to_yaml, load_config, option_hint, settings_help
from pretrain.errors import ConfigError, UserError
from pretrain.models.formats import check_weights


def _tell(line: str) -> None:
    if not rank_so_far(os.environ):
        cli.tell(line, sys.stderr)


def main() -> int | None:
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
    parser.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="start this machine's ranks, and again when one is lost: N times in a row without a checkpoint, 0 never",
    )
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="ranks of --restarts (default: all GPUs, or one CPU rank)"
    )
    parser.epilog = f"{parser.epilog}\n\n{settings_help()}"
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option; {option_hint(unknown[0])}")
    config = load_config(arguments.config, arguments.overrides, _tell)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return None
    if arguments.print_folder:
        print(config.output / config.name)
        return None
    if arguments.restarts is None and arguments.num_gpus is not None:
        raise UserError("--num-gpus is of --restarts; `deepspeed` has --num_gpus")
    cli.check_least(arguments, restarts=0, num_gpus=1)
    _check_paths(config)
    if arguments.restarts is not None and not restarts.is_supervised(os.environ):
        return _with_restarts(arguments.restarts, arguments.num_gpus, config, arguments.config)
    _train(config, arguments.config)
    return None


def _check_paths(config: Config) -> None:
    """Refuses data and weights that are not there, before imports that take seconds.

    Not where the run has started before: then their disk may be away, and the same command goes on when it is back.
    """
    if os.path.isfile(config.output / config.name / "starts.jsonl"):
        return
    from pretrain.data.manifest import check_manifest_found  # not sooner: it imports numpy

    given = config.data.val, config.evaluation.fewshot_train, config.evaluation.fewshot_test
    for path in [*(source.path for source in config.data.sources), *filter(None, given)]:
        check_manifest_found(path)
    if config.init_from is not None:
        check_weights(config.init_from)


def _train(config: Config, recipe: Path) -> None:
    signals.end_with_launcher(STOP)
    if not rank_so_far(os.environ):
        _tell_of_imports(config)
    with watchdog.watching(config.output / config.name, config.engine.watchdog_s, config.engine.timeout_s):
        with cli.loading():
            from pretrain.train.run import train
        train(config, recipe=recipe, stop=STOP)


def _tell_of_imports(config: Config) -> None:
    if "torch" not in sys.modules:
        print(f"{config.name}: loading torch and DeepSpeed", flush=True)


def _with_restarts(most: int, num_ranks: int | None, config: Config, recipe: Path) -> int:
    folder = config.output / config.name
    assert STOP is not None

    def newest() -> str:
        with suppress(OSError):  # the disk is away
            return next((path.name for path in step_folders(folder / "checkpoints")), "")
        return ""

    _tell_of_imports(config)
    forks.count_gpus_without_the_driver()
    with cli.loading():
        import pretrain.train.run  # noqa: F401 - once for all ranks and all starts
        from pretrain.train import ending
    earlier = ending.stamp(folder)  # only the holder of the run's lock deletes STOP.json: another start may be ending
    ranks = num_ranks or local.default_num_ranks()
    if forks.can_fork():
        start: restarts.Start = forks.by_fork(partial(cli.run, partial(_train, config, recipe)))
    else:
        start = restarts.by_command([sys.executable, *sys.orig_argv[1:]])  # unchanged: `is_supervised` tells ranks
    refused = partial(ending.refused, folder, earlier)
    return restarts.run_with_restarts(start, ranks, most, STOP, newest=newest, refused=refused)


if __name__ == "__main__":
    cli.run(main)
