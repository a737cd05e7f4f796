"""Scores weights: accuracy on the evaluation tasks and on own shards, few-shot, nearest neighbours, linear probe.

python tools/evaluate.py WEIGHTS [--tasks imagenet,real,knn:pets --data ROOT] [--val MANIFEST] [--fewshot TRAIN TEST]
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.cluster import signals
from pretrain.config import DataConfig, choices_of
from pretrain.errors import UserError
from pretrain.evaluation.names import HEAD, Job, missing_data, named
from pretrain.models.formats import add_of_run, check_weights, told_of_run
from pretrain.tasks.table import check_any_there

TIMEOUT_S = 6 * 3600  # ranks may decode at very different speeds, and wait while rank 0 fits regressions


def main() -> None:
    arguments = _arguments()
    jobs = _checked_jobs(arguments)
    signals.end_with_launcher()
    with cli.loading():
        from pretrain.cluster import agreement, ranks
        from pretrain.evaluation import fewshot
        from pretrain.evaluation.jobs import Done, do_jobs, open_jobs, shared_sets
        from pretrain.evaluation.results import Measured, table_of, write_results
        from pretrain.evaluation.subject import subject_of
        from pretrain.models.weights import read_weights, results_folder, weights_sha256
        from pretrain.shards.pool import num_cores

    workers = min(4, num_cores()) if arguments.workers is None else arguments.workers

    device = ranks.start(TIMEOUT_S)
    weights = agreement.together(lambda: read_weights(arguments.weights, arguments.image_size, arguments.of_run))
    digest = agreement.from_main(lambda: weights_sha256(weights.source, weights.of_run))
    opened, failed = open_jobs(jobs, weights, arguments.data)
    subject = subject_of(
        weights,
        device,
        loss=arguments.loss,
        batch_size=arguments.batch_size,
        workers=workers,
        shots=sorted(set(arguments.shots or fewshot.SHOTS)),
        fewshot_transform=arguments.fewshot_transform or fewshot.TRANSFORM,
        baselines=arguments.baselines,
        shared=shared_sets(opened),
    )
    measured = Measured(subject, weights, digest)
    # Results at another image size have their own folder: a report must not show them as the run's.
    name = f"evaluation-{arguments.image_size}px" if arguments.image_size else "evaluation"
    out = arguments.out or results_folder(arguments.weights, name)
    done: list[Done] = []
    write = partial(write_results, out, arguments.predictions, measured, done, failed)
    for one in do_jobs(subject, opened, failed):
        done.append(one)
        if len(done) < len(opened):  # an error is raised on all ranks: the others would wait for rank 0 in the next job
            agreement.from_main(write)
    if ranks.is_main():
        title = f"{arguments.weights}{told_of_run(weights.of_run)}"
        cli.print_table(title, *table_of([row for one in done for row in one.found.rows]))
        write()
        cli.tell(f"{out / 'results.json'}, {out / 'results.md'}")
        if arguments.predictions:
            cli.tell(arguments.predictions)
        shown = out if arguments.out or arguments.image_size else out.parent
        if done:
            cli.tell_next(f"python tools/report.py {shlex.quote(str(shown))}")
    ranks.stop()
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} not scored: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Scores a run (its newest valid checkpoint), a checkpoint, or a converted folder. --tasks names rows of the\n"
        "table of tasks for the model's own head (imagenet, real, imagenet_v2, cifar10 ...) and fewshot:NAME,\n"
        "knn:NAME, probe:NAME for its features, on the data in ROOT/NAME/{train,test} that make_shards --task made.\n"
        "--val and --fewshot take any shards. Every image is scored once, on any number of ranks. Writes\n"
        "results.json, results.md and wrong.json. Exit code 2 when a task could not be scored.",
        "python tools/evaluate.py runs/NAME --tasks imagenet,real,knn:pets --data data --predictions predictions.jsonl",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, folder, .npz, or timm:NAME ...")
    add_of_run(parser)
    parser.add_argument("--tasks", metavar="TASK,...", help="what to score of the sets in --data")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="ROOT", help="folder of the tasks' data (default data)"
    )
    parser.add_argument("--val", type=Path, metavar="MANIFEST", help="shards of the classes the model was trained on")
    parser.add_argument(
        "--fewshot", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="shards of any classes: to learn from, to test"
    )
    parser.add_argument("--shots", type=int, nargs="+", metavar="K", help="images per class (default 1 5 10 25)")
    parser.add_argument(
        "--fewshot-transform",
        choices=choices_of(DataConfig, "eval_transform"),
        help="how few-shot sees images (default fewshot: big_vision's, squashed and cropped)",
    )
    parser.add_argument(
        "--baselines", action="store_true", help="few-shot also with random weights and with raw pixels as features"
    )
    parser.add_argument(
        "--loss", choices=["softmax", "sigmoid"], help="default: the one it was trained with; softmax where not known"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels of the model's input (default: trained)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per rank and forward pass (default 256)")
    parser.add_argument("--workers", type=int, help="loader processes per rank (default: up to 4, as cores allow)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write a line of JSON for each image")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results (default: WEIGHTS/evaluation[-Npx])")
    arguments = parser.parse_args()
    if not (arguments.val or arguments.fewshot or arguments.tasks):
        raise UserError("nothing to evaluate: give --val MANIFEST, --fewshot TRAIN TEST, or --tasks NAME,...")
    cli.check_least(arguments, image_size=1, batch_size=1, workers=0)
    if arguments.shots and min(arguments.shots) < 1:
        raise UserError(f"--shots is {arguments.shots}, expected numbers of at least 1")
    check_weights(arguments.weights)
    for path in (arguments.val, *(arguments.fewshot or ())):
        if path is not None:
            cli.check_found(path, "shards and their manifest; tools/make_shards.py makes them")
    return arguments


def _checked_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Returns the jobs asked for. Raises UserError for a wrong name, absent data, and options that no job needs."""
    own = [Job(HEAD, data={"test": arguments.val})] if arguments.val else []
    if arguments.fewshot:
        own.append(Job("fewshot", data=dict(zip(("train", "test"), arguments.fewshot))))
    tasks = named(arguments.tasks or "", arguments.data)
    kinds = {job.kind for job in (*own, *tasks)}
    if arguments.baselines and "fewshot" not in kinds:
        raise UserError(
            "--baselines compares few-shot accuracies: it needs --fewshot TRAIN TEST or --tasks fewshot:NAME"
        )
    if arguments.predictions and HEAD not in kinds:
        raise UserError("--predictions are of the model's head: it needs --val MANIFEST or a task without a colon")
    if not own:
        check_any_there((missing_data(job, arguments.data) for job in tasks), arguments.data)
    return [*own, *tasks]


if __name__ == "__main__":
    cli.run(main)
