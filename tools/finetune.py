"""Fine-tunes weights on own photos, or on tasks of the paper's table, by its protocol, and scores the test images.

python tools/finetune.py WEIGHTS --train photos [--test photos-test] [--out DIR] [--steps N] [key=value ...]
python tools/finetune.py WEIGHTS --task cifar10 [--data ROOT] [--out DIR] [--seeds 3] [key=value ...]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.cluster.jobs import STOPPED, array_ranges
from pretrain.errors import UserError
from pretrain.models.formats import check_weights
from pretrain.tasks.table import VTAB, check_any_there, missing, task

if TYPE_CHECKING:
    from pretrain.finetune.running import SweepRun
    from pretrain.finetune.sweep import Options

MAX_RATE = 1e3
MAX_ROWS = 40  # of the table of classes; the page shows the lowest of more


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Fine-tunes weights by the paper's protocol: SGD, a learning rate chosen on images held out of train, then\n"
        "all of train for each seed. Only final runs are scored on the test images. Each is a restartable pretraining\n"
        "run; the same command again goes on, and what is done is not repeated. Writes results.json and results.md.\n"
        "With --train, on own photos (photos/CLASS/NAME.jpg, or photos/train/CLASS/..., photos/test/CLASS/...) or\n"
        "shards: a fifth of each class is held out where there is no test; writes report.html too.",
        "python tools/finetune.py runs/NAME --train photos\n"
        "  python tools/finetune.py runs/NAME --task cifar10 --data data engine.max_micro_batch_size=32",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, folder, .npz, or timm:NAME ...")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", type=Path, metavar="DIR", help="own photos, a folder for each class, or shards")
    what.add_argument("--task", metavar="NAME", help="cifar10, vtab/eurosat ..., or vtab: all 19")
    parser.add_argument("--test", type=Path, metavar="DIR", help="of --train (default: a part of it is held out)")
    parser.add_argument("--data", type=Path, help="of --task: folder of all tasks' shards (default data)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for runs and results (default: WEIGHTS/finetune...)")
    parser.add_argument("--from-scratch", action="store_true", help="random weights of the same architecture instead")
    parser.add_argument("--seeds", type=int, metavar="N", help="final runs (default 3; 1 with --train)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="per run, warm-up in proportion (default: the paper's; --train: by size)"
    )
    parser.add_argument(
        "--lr",
        type=_rates,
        metavar="LR[,LR...]",
        help="rates to choose from (default: the paper's; --train: 0.003,0.01,0.03)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="default: the paper's 384 (--train: at most twice the weights' own; on a CPU as trained)",
    )
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="ranks (default: all GPUs, or one CPU rank; 1 with --train)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print the runs with their numbers and stop")
    only.add_argument("--run", type=int, metavar="INDEX", help="do one run of the list: for job arrays")
    only.add_argument("--collect", action="store_true", help="train nothing: make the table from what is there")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config of every run"
    )
    arguments = parser.parse_intermixed_args()
    _check_options(arguments)
    check_weights(arguments.weights)
    return arguments


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that belong to --task alone, or to --train, and for values that no run can have."""
    cli.check_least(arguments, steps=1, seeds=1, num_gpus=1, image_size=1)
    for rate in arguments.lr or ():
        if not 0 < rate < MAX_RATE:  # false for NaN too
            raise UserError(f"--lr {rate:g}: expected rates above 0 and below {MAX_RATE:g}, as 0.003,0.01")
    if arguments.train is None and arguments.test is not None:
        raise UserError("--test is of --train; a --task has its own test images")
    if arguments.train is None:
        return
    cli.refuse(arguments, ("--data", "--list", "--collect", "--run"), "on --train, only on --task")
    for option, path in (("--train", arguments.train), ("--test", arguments.test)):
        if path is not None and not path.exists():
            raise UserError(f"{option} {path}: not found; expected a folder of class folders, or a manifest.json")


def main() -> int:
    arguments = _arguments()
    return _on_own_data(arguments) if arguments.train is not None else _on_tasks(arguments)


# --- own data --------------------------------------------------------------------------------------------------------


def _on_own_data(arguments: argparse.Namespace) -> int:
    with cli.loading():
        from pretrain.cluster.local import gpu_is_here
        from pretrain.finetune.own_data import prepare
        from pretrain.finetune.own_folders import find_parts, name_of
        from pretrain.finetune.own_results import accuracy, write_accuracy
        from pretrain.finetune.own_runs import (
            check_asked,
            default_size,
            in_words,
            plan_own,
            score_images,
            stored_side,
            timed,
        )
        from pretrain.finetune.running import run_sweeps
        from pretrain.report.own_page import write_page

    parts, told = find_parts(arguments.train, arguments.test)
    name = name_of(arguments.train)
    options = _options(arguments, name)
    on_gpu = gpu_is_here()
    size = arguments.image_size or default_size(options.start, on_gpu=on_gpu)
    model = options.start.model
    if model.timm_name is None and size % model.patch_size:  # before shards are made
        raise UserError(f"--image-size {size}: expected a multiple of the weights' patches of {model.patch_size} px")
    check_asked(name, options, image_size=size, on_gpu=on_gpu)
    data = prepare(parts, options.out, shorter_side=stored_side(size))
    sweep = plan_own(name, data, options, image_size=size, on_gpu=on_gpu)
    for line in (*told, *data.told, *in_words(sweep, data)):
        cli.tell(line)
    with timed(sweep) as seconds:
        if code := run_sweeps([sweep], options) or score_images(sweep):
            return code
    found = accuracy(sweep, data, weights=_called(arguments.weights), seconds=seconds())
    write_accuracy(sweep, found)
    _show_own(found, options.out, write_page(options.out))
    return 0


def _show_own(found: dict[str, Any], out: Path, page: Path) -> None:
    rows = [[of["name"], f"{of['top1']:.1%}", f"{of['correct']:,} of {of['n']:,}"] for of in found["per_class"]]
    if len(rows) <= MAX_ROWS:
        cli.print_table(f"{found['data']}: accuracy of each class", ("class", "accuracy", "images"), rows)
    low, high = found["interval"]
    cli.tell(
        f"{found['data']}: {found['top1']:.1%} of {found['n']:,} test images are named rightly "
        f"(95% interval {low:.1%} to {high:.1%})"
    )
    cli.tell(f"page:    {page}")
    cli.tell(f"weights: {out / found['run']}")
    cli.tell(f"next:    python tools/predict.py {shlex.quote(str(out / found['run']))} PHOTO.jpg")


def _called(weights: Path) -> str:
    """Returns the name of weights for a page, without the folders of this machine."""
    return weights.resolve().name if weights.exists() else str(weights)


# --- tasks of the paper ----------------------------------------------------------------------------------------------


def _on_tasks(arguments: argparse.Namespace) -> int:
    vtab = arguments.task == "vtab"
    chosen = [task(name) for name in (VTAB if vtab else [arguments.task])]
    if not arguments.list:
        data = _data_of(arguments)
        check_any_there((missing(one, data) for one in chosen), data)
    with cli.loading():
        from pretrain.finetune.running import collect, jobs, plan, run_one, run_sweeps

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


def _options(arguments: argparse.Namespace, own: str | None = None) -> Options:
    """Returns the options asked for. own: the name of own data; None for tasks."""
    from pretrain.finetune.sweep import Options, read_start
    from pretrain.models.weights import results_folder

    name = "finetune-from-scratch" if arguments.from_scratch else "finetune"
    return Options(
        start=read_start(arguments.weights, from_scratch=arguments.from_scratch),
        data=_data_of(arguments),
        out=arguments.out or results_folder(arguments.weights, name) / (own or ""),
        num_seeds=(1 if own else 3) if arguments.seeds is None else arguments.seeds,
        steps=arguments.steps,
        lr_grid=arguments.lr,
        image_size=arguments.image_size,
        overrides=tuple(arguments.overrides),
        num_gpus=1 if own and arguments.num_gpus is None else arguments.num_gpus,
    )


def _data_of(arguments: argparse.Namespace) -> Path:
    return Path("data") if arguments.data is None else arguments.data


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected rates, as 0.003,0.01") from None


def _list(listed: list[SweepRun]) -> int:
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
    cli.tell_next(f"python tools/report.py {shlex.quote(str(out))}")


if __name__ == "__main__":
    cli.run(main)
