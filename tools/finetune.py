"""Fine-tunes weights on tasks of the paper's table, by its protocol, and scores the test images.

python tools/finetune.py WEIGHTS --task cifar10 [--data ROOT] [--out DIR] [--seeds 3] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.cluster.jobs import STOPPED, array_ranges
from pretrain.errors import UserError
from pretrain.models.formats import check_weights

if TYPE_CHECKING:
    from pretrain.finetune.running import Job, Options


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Fine-tunes weights by the paper's protocol: SGD, a learning rate chosen on images held out of train, then\n"
        "all of train for each seed, and every test image scored once. Each run is a restartable pretraining run; the\n"
        "same command again goes on, and what is done is not repeated. Writes results.json and results.md.",
        "python tools/finetune.py runs/NAME --task cifar10 --data data engine.max_micro_batch_size=32",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, folder, .npz, or timm:NAME ...")
    parser.add_argument("--task", required=True, metavar="NAME", help="cifar10, vtab/eurosat ..., or vtab: all 19")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all tasks' shards (default data)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for runs and results (default: WEIGHTS/finetune)")
    parser.add_argument("--from-scratch", action="store_true", help="random weights of the same architecture instead")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="final runs per task (default 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="per run, warm-up in proportion (default: the paper's)")
    parser.add_argument("--lr", type=_rates, metavar="LR[,LR...]", help="rates to choose from (default: the paper's)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the paper's 384")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="ranks (default: all GPUs, or one CPU rank)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print the runs with their numbers and stop")
    only.add_argument("--run", type=int, metavar="INDEX", help="do one run of the list: for job arrays")
    only.add_argument("--collect", action="store_true", help="train nothing: make the table from what is there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config of every run")
    arguments = parser.parse_intermixed_args()
    check_weights(arguments.weights)
    return arguments


def main() -> int:
    arguments = _arguments()
    with cli.loading():
        from pretrain.finetune.running import collect, jobs, plan, run_one, run_sweeps
        from pretrain.tasks.table import VTAB, task

    vtab = arguments.task == "vtab"
    chosen = [task(name) for name in (VTAB if vtab else [arguments.task])]
    options = _options(arguments)
    if arguments.list:
        return _list(jobs(chosen, options))
    if arguments.run is not None:
        return run_one(chosen, arguments.run, options)
    sweeps = plan(chosen, options)
    code = 0 if arguments.collect else run_sweeps(sweeps, options)
    if code == STOPPED:
        return code
    found = collect(sweeps, options.out, vtab=vtab)
    if not found and not code:
        raise UserError(f"{options.out}: no final run is done; the same command without --collect does them")
    if found:
        _show(found, options.out, vtab=vtab)
    return code or (0 if len(sweeps) == len(chosen) else UserError.exit_code)


def _options(arguments: argparse.Namespace) -> Options:
    from pretrain.finetune.running import Options
    from pretrain.finetune.sweep import default_folder, read_start

    return Options(
        start=read_start(arguments.weights, from_scratch=arguments.from_scratch),
        data=arguments.data,
        out=arguments.out or default_folder(arguments.weights, from_scratch=arguments.from_scratch),
        num_seeds=arguments.seeds,
        steps=arguments.steps,
        lr_grid=arguments.lr,
        image_size=arguments.image_size,
        overrides=tuple(arguments.overrides),
        num_gpus=arguments.num_gpus,
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected rates, as 0.003,0.01") from None


def _list(listed: list[Job]) -> int:
    for number, job in enumerate(listed):
        what = f"final, seed {job.seed}" if job.lr is None else f"select, learning rate {job.lr:g}"
        print(f"{number}\t{job.task.name}\t{what}")
    num_selecting = sum(job.lr is not None for job in listed)
    ranges = array_ranges([num_selecting, len(listed) - num_selecting])
    print(f"job arrays, one after the other: {', then '.join(ranges)}", file=sys.stderr)
    return 0


def _show(found: list[dict[str, Any]], out: Path, *, vtab: bool) -> None:
    from pretrain.finetune.results import percent
    from pretrain.report.figures import paper_table, summary
    from pretrain.report.runs import read_runs

    rows = []
    for line in found:
        lr = "" if line["lr"] is None else f"{line['lr']:g}"
        seeds = str(len(line["values"])) + ("" if line["complete"] else ", incomplete")
        rows.append([line["task"], line["metric"], percent(line), seeds, lr, f"{line['n']:,}"])
    header = ("task", "metric", "mean", "seeds", "lr", "images")
    cli.print_table(str(out), header, rows, text_columns=(0, 1))
    for line in found[-1:] if vtab else found:
        if line["differs"]:
            cli.tell(f"{line['task']}: not the paper's protocol: {'; '.join(line['differs'])}")
    beside = paper_table([summary(run) for run in read_runs([out])])
    cli.print_table("top-1 beside the paper's", beside.header, beside.rows, text_columns=beside.text_columns)


if __name__ == "__main__":
    cli.run(main)
