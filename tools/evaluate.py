"""Scores weights: accuracy on the evaluation tasks and on own shards, few-shot, nearest neighbours, linear probe.

python tools/evaluate.py WEIGHTS [--tasks imagenet,real,knn:pets --data ROOT] [--val MANIFEST] [--fewshot TRAIN TEST]
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.cluster import agreement, ranks
from pretrain.config import DataConfig, choices_of
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, eval_batches
from pretrain.data.manifest import Manifest, check_shards, load_manifest
from pretrain.errors import UserError
from pretrain.evaluation import fewshot, knn, probe
from pretrain.evaluation.classification import (
    OFFICIAL,
    Predict,
    Predictions,
    Score,
    among,
    predict_all,
    relabelled,
    scores_of,
)
from pretrain.evaluation.features import Extract, Features, extract_features, pre_logits, raw_pixels
from pretrain.evaluation.predictions import lines, wrong_items
from pretrain.log import warn
from pretrain.models.build import build_model
from pretrain.models.weights import Weights, model_of, read_weights, results_folder, weights_sha256
from pretrain.provenance import versions
from pretrain.shards.examples import sample_names
from pretrain.storage import replacing, write_text
from pretrain.tasks.imagenet_labels import real_labels, scored_classes
from pretrain.tasks.table import TASKS, Task, missing, task, task_folder

TRAINED, RANDOM, PIXELS = "trained", "random weights", "raw pixels"
MAX_PIXEL_BYTES = 16 << 30  # of raw pixels as float32: 28,000 images at 224 px
MAX_LOGIT_BYTES = 4 << 30  # of float32 on every rank, for mean average precision: 50,000 images of 21k classes
TIMEOUT_S = 6 * 3600  # ranks may decode at very different speeds, and wait while rank 0 fits regressions


class Row(NamedTuple):
    """One line of results.json."""

    model: str  # TRAINED, RANDOM or PIXELS
    metric: str  # "top1", "10-shot", "10-shot-std", "imagenet_v2/top1", "knn:pets/20-nn" ...
    value: float
    n: int  # images it was measured on


class Job(NamedTuple):
    """A kind of evaluation on a data set."""

    kind: str  # of EVALUATORS
    name: str  # in front of its metrics: "imagenet_v2", "knn:pets"; "" for --val and --fewshot
    data: dict[str, Path]  # manifests: "test", and "train" where there is something to learn
    task: Task | None = None  # the table's row

    @property
    def roles(self) -> dict[str, str]:
        """What results.json calls the data sets."""
        if self.name:
            return {role: f"{self.name}/{role}" for role in self.data}
        return {"test": "val"} if self.kind == "classify" else {role: f"fewshot_{role}" for role in self.data}


@dataclass
class Bench:
    """The model under test, with all that an evaluator needs, and what the evaluators leave beside their rows."""

    arguments: argparse.Namespace
    weights: Weights
    model: nn.Module
    device: torch.device
    loss: str
    predictions: list[tuple[Job, Manifest, Predictions]] = field(default_factory=list)
    chosen_c: dict[str, float] = field(default_factory=dict)  # of each linear probe
    shared: set[Path] = field(default_factory=set)  # test sets that the head is scored on more than once
    _logits: dict[Path, list[Batch]] = field(default_factory=dict)  # this rank's, of shared sets
    _kept: dict[tuple, Features | None] = field(default_factory=dict)  # of the last data set, for the next evaluator

    def options(self, transform: str | None = None) -> dict[str, Any]:
        """Returns how images are read: in the weights' own transform, or in the one named (few-shot's)."""
        crop = fewshot.CROP if transform == fewshot.TRANSFORM else self.weights.eval_crop
        config = DataConfig(
            eval_transform=cast(Any, transform or self.weights.eval_transform),  # literals, as the config wrote them
            eval_crop=crop,
            interpolation=cast(Any, self.weights.interpolation),
            mean=cast(Any, self.weights.mean),
            std=cast(Any, self.weights.std),
            workers=self.arguments.workers,
        )
        size = self.weights.model.image_size
        return {"batch_size": self.arguments.batch_size, "image_size": size, "config": config}

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of uint8 images [B, 3, H, W]."""
        return self.model(to_float(images, torch.float32, self.weights.normalisation))

    def head_batches(self, manifest: Manifest) -> Iterable[Batch]:
        """Returns this rank's batches with logits [B, classes] in place of images; of a shared set, from one pass."""
        if manifest.path in self._logits:
            return self._logits[manifest.path]
        batches = eval_batches(manifest, np.arange(manifest.num_samples), **self.options())
        return self._predicted(batches, manifest.path)

    def _predicted(self, batches: Iterator[Batch], path: Path) -> Iterator[Batch]:
        done = []
        for batch in batches:
            if batch.error is None:
                batch = batch._replace(images=self.predict(batch.images.to(self.device)))
            if path in self.shared:
                done.append(batch._replace(images=batch.images.cpu()))
            yield batch
        if path in self.shared:  # and all of it is there
            self._logits[path] = done

    def features(
        self,
        name: str,
        extract: Extract,
        sets: dict[str, Manifest],
        transform: str | None = None,
        max_train: int | None = None,
    ) -> list[Features | None]:
        """Returns the features of a training and a test set, on rank 0. Those of the last two sets are kept."""
        keys = {role: (name, manifest.path, transform, max_train) for role, manifest in sets.items()}
        self._kept = {key: found for key, found in self._kept.items() if key in keys.values()}
        for role, manifest in sets.items():
            indices = np.arange(manifest.num_samples)
            if role == "train" and max_train is not None:
                indices = fewshot.spread_indices(manifest.num_samples, max_train)
            if keys[role] not in self._kept:
                with cli.progress(f"features, {name}", len(indices), "images") as advance:
                    self._kept[keys[role]] = extract_features(
                        extract,
                        manifest,
                        **self.options(transform),
                        device=self.device,
                        indices=indices,
                        max_bytes=MAX_PIXEL_BYTES if extract is raw_pixels else None,
                        progress=advance,
                    )
        return [self._kept[key] for key in keys.values()]


# --- evaluators: a kind of evaluation -> its rows --------------------------------------------------------------------


def classify(bench: Bench, job: Job, sets: dict[str, Manifest]) -> list[Row]:
    """Loss, top-1, top-5 and a task's own metric, by the model's head."""
    manifest = sets["test"]
    batches: Iterable[Batch] = bench.head_batches(manifest)
    predict: Predict = nn.Identity()
    num_scored = manifest.num_samples
    if job.task and (classes := scored_classes(job.task)):
        predict = among(predict, classes)
    if job.task and job.task.metric == "real":
        labels = agreement.from_main(lambda: _real_labels(manifest))
        batches, num_scored = relabelled(batches, labels), sum(map(bool, labels))
    logit_bytes = 4 * manifest.num_samples * bench.weights.num_classes
    ranks_classes = manifest.multi_label and logit_bytes <= MAX_LOGIT_BYTES
    if manifest.multi_label and not ranks_classes:
        warn(f"{manifest.path}: no mean average precision: its logits would take {logit_bytes >> 30} GB")
    with cli.progress(job.name or "validation", manifest.num_samples, "images") as advance:
        told = _told(batches, lambda: advance(bench.arguments.batch_size * ranks.world_size()))
        found = predict_all(predict, told, loss=bench.loss, device=bench.device, keep_logits=ranks_classes)
    n = len(found.index)
    if n < num_scored and ranks.is_main():
        warn(f"{manifest.path}: {num_scored - n} of {num_scored} images cannot be read: not scored")
    bench.predictions.append((job, manifest, found))
    scores = scores_of(found)
    if job.task and job.task.official_metric in OFFICIAL:
        official = OFFICIAL[job.task.official_metric]
        scores.append(Score(job.task.official_metric, official(found.labels[:, 0], found.classes[:, 0]), n))
    return _rows(TRAINED, job, scores)


def _real_labels(manifest: Manifest) -> list[list[int]]:
    """The ReaL labels of each sample, joined by its name; none where the name cannot be read."""
    names = sample_names(manifest, range(manifest.num_samples))
    found = iter(real_labels([name for name in names if name]))
    return [next(found) if name else [] for name in names]


def few_shot(bench: Bench, job: Job, sets: dict[str, Manifest]) -> list[Row]:
    """big_vision's closed-form regression on 1, 5, 10 and 25 images per class."""
    arguments, rows = bench.arguments, []
    for name, extract in _extractors(bench, sets).items():
        train, test = bench.features(name, extract, sets, arguments.fewshot_transform, fewshot.MAX_TRAIN)
        with cli.progress(f"few-shot, {name}", len(arguments.shots) * len(fewshot.SEEDS), "regressions") as advance:
            solve = partial(fewshot.fewshot, shots=arguments.shots, progress=advance)
            rows += _rows(name, job, agreement.from_main(partial(_on_features, solve, train, test)))
    return rows


def _on_features(solve: Callable[..., Any], train: Features | None, test: Features | None) -> Any:
    """What an evaluator says of features, which rank 0 alone has."""
    assert train is not None and test is not None
    return solve(*train, *test)


def _extractors(bench: Bench, sets: dict[str, Manifest]) -> dict[str, Extract]:
    extractors = {TRAINED: pre_logits(bench.model, bench.weights.normalisation)}
    if bench.arguments.baselines:
        untrained = build_model(bench.weights.model, bench.weights.num_classes)
        extractors[RANDOM] = pre_logits(untrained.to(bench.device).eval(), bench.weights.normalisation)
        pixel_bytes = sum(m.num_samples for m in sets.values()) * 3 * bench.weights.model.image_size**2 * 4
        if pixel_bytes <= MAX_PIXEL_BYTES:
            extractors[PIXELS] = raw_pixels
        elif ranks.is_main():
            warn(f"no row for raw pixels: they would take {pixel_bytes >> 30} GB, at most {MAX_PIXEL_BYTES >> 30}")
    return extractors


def nearest_neighbours(bench: Bench, job: Job, sets: dict[str, Manifest]) -> list[Row]:
    """The vote of the nearest training images."""
    train, test = bench.features(TRAINED, pre_logits(bench.model, bench.weights.normalisation), sets)
    with cli.progress(job.name, sets["test"].num_samples, "images") as advance:
        solve = partial(knn.knn, device=bench.device, progress=advance)
        return _rows(TRAINED, job, agreement.from_main(partial(_on_features, solve, train, test)))


def linear_probe(bench: Bench, job: Job, sets: dict[str, Manifest]) -> list[Row]:
    """Logistic regression on all training images."""
    train, test = bench.features(TRAINED, pre_logits(bench.model, bench.weights.normalisation), sets)
    with cli.progress(job.name, len(probe.GRID) + 1, "regressions") as advance:
        solve = partial(probe.probe, progress=advance)
        scores, c = agreement.from_main(partial(_on_features, solve, train, test))
    bench.chosen_c[job.name] = c
    return _rows(TRAINED, job, scores)


EVALUATORS: dict[str, Callable[[Bench, Job, dict[str, Manifest]], list[Row]]] = {
    "classify": classify,
    "fewshot": few_shot,
    "knn": nearest_neighbours,
    "probe": linear_probe,
}


def _rows(model: str, job: Job, scores: list[Score]) -> list[Row]:
    prefix = f"{job.name}/" if job.name else ""
    return [Row(model, prefix + score.metric, score.value, score.n) for score in scores]


def _told(batches: Iterable[Batch], tell: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        tell()


# --- what was asked for ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = cli.parser(
        "Scores a run (its newest valid checkpoint), a checkpoint, or a converted folder. --tasks names rows of the\n"
        "table of tasks for the model's own head (imagenet, real, imagenet_v2, cifar10 ...) and fewshot:NAME,\n"
        "knn:NAME, probe:NAME for its features, on the data in ROOT/NAME/{train,test} that make_shards --task made.\n"
        "--val and --fewshot take any shards. Every image is scored once, on any number of ranks. Writes\n"
        "results.json, results.md and wrong.json. Exit code 2 when a task could not be scored.",
        "python tools/evaluate.py runs/NAME --tasks imagenet,real,knn:pets --data data --predictions predictions.jsonl",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint step-N or converted folder")
    parser.add_argument("--tasks", metavar="TASK,...", help="what to score of the sets in --data")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder of the tasks' data")
    parser.add_argument("--val", type=Path, metavar="MANIFEST", help="shards of the classes the model was trained on")
    parser.add_argument(
        "--fewshot", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="shards of any classes: to learn from, to test"
    )
    parser.add_argument("--shots", type=int, nargs="+", default=fewshot.SHOTS, metavar="K", help="images per class")
    parser.add_argument(
        "--fewshot-transform",
        choices=choices_of(DataConfig, "eval_transform"),
        default=fewshot.TRANSFORM,
        help="how few-shot sees images (default fewshot: big_vision's, squashed and cropped)",
    )
    parser.add_argument(
        "--baselines", action="store_true", help="few-shot also with random weights and with raw pixels as features"
    )
    parser.add_argument(
        "--loss", choices=["softmax", "sigmoid"], help="default: the one it was trained with; softmax where not known"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images per rank and forward pass (default 256)")
    parser.add_argument("--workers", type=int, help="loader processes per rank (default: up to 4, as cores allow)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write a line of JSON for each image")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results (default: WEIGHTS/evaluation)")
    arguments = parser.parse_args()
    jobs = _jobs(arguments)
    _check(arguments, jobs)
    if arguments.workers is None:
        arguments.workers = min(4, len(os.sched_getaffinity(0)))

    device = ranks.start(TIMEOUT_S)
    rows, bench, record = _evaluate(arguments, jobs, device)
    if ranks.is_main():
        out = arguments.out or results_folder(arguments.weights, "evaluation")
        _print_table(rows, str(arguments.weights))
        rows, record = _with_earlier(rows, record, out / "results.json")
        _write(out, _pages(rows, record, bench))
        print(f"{out / 'results.json'}, {out / 'results.md'}")
        if arguments.predictions:
            _write_predictions(arguments.predictions, bench)
    ranks.stop()
    if failed := record["failed"]:
        raise UserError(f"{len(failed)} of {len(jobs)} not scored: {', '.join(failed)}")


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Returns what the command line asks for."""
    jobs = []
    if arguments.val:
        jobs.append(Job("classify", "", {"test": arguments.val}))
    if arguments.fewshot:
        jobs.append(Job("fewshot", "", dict(zip(("train", "test"), arguments.fewshot))))
    names = [name.strip() for name in (arguments.tasks or "").split(",") if name.strip()]
    if names and not arguments.data:
        raise UserError("--tasks needs --data ROOT, the folder in which ROOT/TASK/test and so on lie")
    return jobs + [_job(name, arguments.data) for name in dict.fromkeys(names)]


def _job(text: str, root: Path) -> Job:
    kind, colon, name = text.partition(":")
    if not colon:
        row = task(text)
        return Job("classify", text, {"test": task_folder(row, root) / row.test_split}, row)
    if kind not in EVALUATORS or kind == "classify":
        raise UserError(f"--tasks: {text!r} is neither a task nor fewshot:NAME, knn:NAME or probe:NAME")
    if (row := TASKS.get(name)) is None:
        folder = root / name
        test = "val" if (folder / "val").exists() and not (folder / "test").exists() else "test"
        return Job(kind, text, {"train": folder / "train", "test": folder / test})
    train = "trainval" if "trainval" in row.splits else "train"  # VTAB's 1,000 images
    if train not in row.splits:
        raise UserError(f"--tasks: {text!r}: {name} has no training images to learn from")
    folder = task_folder(row, root)
    return Job(kind, text, {"train": folder / train, "test": folder / row.test_split}, row)


def _check(arguments: argparse.Namespace, jobs: list[Job]) -> None:
    if not jobs:
        raise UserError("nothing to evaluate: give --val MANIFEST, --fewshot TRAIN TEST, or --tasks and --data")
    kinds = {job.kind for job in jobs}
    if arguments.baselines and "fewshot" not in kinds:
        raise UserError(
            "--baselines compares few-shot accuracies: it needs --fewshot TRAIN TEST or --tasks fewshot:NAME"
        )
    if arguments.predictions and "classify" not in kinds:
        raise UserError("--predictions are of the model's head: it needs --val MANIFEST or a task without a colon")
    for name, lowest in (("batch_size", 1), ("workers", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {lowest}")
    if min(arguments.shots) < 1:
        raise UserError(f"--shots is {arguments.shots}, expected numbers of at least 1")
    arguments.shots = sorted(set(arguments.shots))


def _evaluate(
    arguments: argparse.Namespace, jobs: list[Job], device: torch.device
) -> tuple[list[Row], Bench, dict[str, Any]]:
    """Returns the rows, the bench with what else was found, and what is needed to repeat them."""
    weights = agreement.together(lambda: read_weights(arguments.weights))
    digest = agreement.from_main(lambda: weights_sha256(weights.source))
    failed: dict[str, str] = {}
    opened = [
        (job, sets) for job in jobs if (sets := _tried(job, failed, partial(_open, job, weights, arguments.data)))
    ]
    if not opened:
        raise UserError(f"none of {', '.join(failed)} can be scored")
    loss = arguments.loss or weights.loss or "softmax"
    bench = Bench(arguments, weights, model_of(weights).to(device), device, loss)
    scored = [sets["test"].path for job, sets in opened if job.kind == "classify"]
    bench.shared = {path for path in scored if scored.count(path) > 1}
    rows: list[Row] = []
    for job, sets in opened:
        rows += _tried(job, failed, partial(EVALUATORS[job.kind], bench, job, sets)) or []
    return rows, bench, _record(bench, digest, opened, failed)


def _tried(job: Job, failed: dict[str, str], make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on all ranks; a named task that cannot be scored is told and noted, None returned."""
    try:
        return make()
    except UserError as error:
        if not job.name:
            raise
        failed[job.name] = str(error)
        if ranks.is_main():
            warn(f"{job.name} is not scored: {error}")
        return None


def _open(job: Job, weights: Weights, root: Path) -> dict[str, Manifest]:
    """Returns a job's data sets, checked before anything is read, on all ranks alike."""
    return agreement.together(lambda: _opened(job, weights, root))


def _opened(job: Job, weights: Weights, root: Path) -> dict[str, Manifest]:
    if job.task and (told := missing(job.task, root, [path.name for path in job.data.values()])):
        raise UserError(told)
    sets = {role: load_manifest(path) for role, path in job.data.items()}
    for manifest in sets.values():
        check_shards(manifest)
    if job.kind == "classify":
        _check_classes(weights, sets["test"])
        if job.task and job.task.num_classes != weights.num_classes:
            raise UserError(
                f"{job.name} has {job.task.num_classes} classes, the head of {weights.source} has "
                f"{weights.num_classes}: fine-tune it on the task, or score its features, as in knn:{job.name}"
            )
    elif len({(manifest.num_classes, manifest.class_names) for manifest in sets.values()}) > 1:
        train, test = sets.values()
        raise UserError(
            f"{job.name or '--fewshot'}: {train.path} ({train.num_classes} classes) and {test.path} "
            f"({test.num_classes} classes) must have the same classes under the same names"
        )
    return sets


def _check_classes(weights: Weights, val: Manifest) -> None:
    if val.num_classes > weights.num_classes:
        raise UserError(f"{val.path}: has {val.num_classes} classes, {weights.source} has {weights.num_classes}")
    unlike = _are_wordnet_ids(val.class_names) != _are_wordnet_ids(weights.class_names)
    if not (unlike or _are_numbers(val.class_names) or _are_numbers(weights.class_names)):
        pairs = list(zip(val.class_names, weights.class_names))
        if different := [i for i, (a, b) in enumerate(pairs) if a != b]:
            first = different[0]
            warn(
                f"{val.path}: {len(different)} class names differ from the weights', the first: class {first} is "
                f"{pairs[first][0]!r} there, {pairs[first][1]!r} in the weights; do labels mean the same?"
            )


def _are_numbers(class_names: tuple[str, ...]) -> bool:
    """No names, or those that a set gets whose labels came without: they do not say what a class is."""
    return list(class_names) == [str(number) for number in range(len(class_names))]


def _are_wordnet_ids(class_names: tuple[str, ...]) -> bool:
    """ImageNet's names of classes, n01440764: they cannot be compared with words."""
    return all(re.fullmatch(r"n\d{8}", name) for name in class_names)


# --- what is shown and written ---------------------------------------------------------------------------------------


def _record(
    bench: Bench, digest: str, opened: list[tuple[Job, dict[str, Manifest]]], failed: dict[str, str]
) -> dict[str, Any]:
    """Returns what is needed to repeat the rows."""
    arguments, weights = bench.arguments, bench.weights
    kinds = {job.kind for job, _ in opened if job.name not in failed}
    own, few = bench.options()["config"], bench.options(arguments.fewshot_transform)["config"]
    return {
        "format": "pretrain-evaluation",
        "version": 1,
        "weights": str(weights.source),
        "weights_sha256": digest,
        "model": weights.model.name,
        "image_size": weights.model.image_size,
        "num_classes": weights.num_classes,
        "loss": bench.loss,
        "transform": {"name": own.eval_transform, "crop": own.eval_crop, "interpolation": own.interpolation},
        "data": {
            job.roles[role]: {
                "path": str(m.path),
                "sha256": m.sha256,
                "num_samples": m.num_samples,
                "num_classes": m.num_classes,
            }
            for job, sets in opened
            for role, m in sets.items()
        },
        "fewshot": {
            "shots": arguments.shots,
            "seeds": fewshot.SEEDS,
            "l2": fewshot.L2,
            "transform": {"name": few.eval_transform, "crop": few.eval_crop, "interpolation": few.interpolation},
            "max_train": fewshot.MAX_TRAIN,
        }
        if "fewshot" in kinds
        else None,
        "knn": {"neighbours": knn.NEIGHBOURS, "temperature": knn.TEMPERATURE} if "knn" in kinds else None,
        "probe": {"grid": probe.GRID, "held_out": probe.HELD_OUT, "c": bench.chosen_c} if "probe" in kinds else None,
        "failed": failed,
        "versions": versions(),
    }


SHARED = {"weights_sha256": "weights", "loss": "loss", "transform": "transform"}  # alike for all rows of results.json
GROWS = ("shots", "c")  # of a protocol, with each row measured; the rest of it is alike for all rows of a kind


def _with_earlier(rows: list[Row], record: dict[str, Any], path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows after those of an earlier call that still hold, and what is needed to repeat both.

    An earlier row holds when it is of the same weights, was not measured again, and is not of a data set or by a
    protocol that now is another one. What is dropped is told.
    """
    if not path.is_file():
        return rows, record
    record = json.loads(json.dumps(record))  # tuples become lists, as in the file
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        found = [Row(**row) for row in earlier["rows"]]
        differ = [name for key, name in SHARED.items() if earlier.get(key) != record[key]]
        again = {(row.model, row.metric) for row in rows}
        others = [row for row in found if (row.model, row.metric) not in again]
        kept = [row for row in others if not differ and _holds(row, earlier, record)]
        merged = _merged_record(kept, earlier, record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"{path}: cannot be read as an earlier call's ({error!r}); replaced")
        return rows, record
    if dropped := [row.metric for row in others if row not in kept]:
        why = f"other {', '.join(differ) or 'data or protocol'}"
        warn(f"{path}: {len(dropped)} rows of an earlier call are dropped ({why}): {', '.join(dropped)}")
    return [*kept, *rows], merged


def _holds(row: Row, earlier: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the new record says nothing of a row's data sets and protocol, or the same as the earlier one."""
    kind, roles = _origin(row)
    data, protocol = [], []
    for values in (earlier, record):
        data.append({role: of["sha256"] for role, of in values["data"].items() if role.startswith(roles)})
        protocol.append({key: value for key, value in (values.get(kind) or {}).items() if key not in GROWS})
    return all(not now or now == before for before, now in (data, protocol))


def _origin(row: Row) -> tuple[str, str]:
    """Returns a row's kind of evaluation, and what its data sets' names in results.json begin with."""
    name, _, metric = row.metric.rpartition("/")
    kind, colon, _ = name.partition(":")
    if not colon:
        kind = "fewshot" if "-shot" in metric else "classify"
    return kind, f"{name}/" if name else "fewshot_" if kind == "fewshot" else "val"


def _merged_record(kept: list[Row], earlier: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with the data sets and protocols of the rows that were kept."""
    kinds, roles = zip(*map(_origin, kept)) if kept else ((), ())
    data = {role: of for role, of in earlier["data"].items() if role.startswith(tuple(roles))}
    merged = {**record, "data": data | record["data"]}
    for kind in {"fewshot", "knn", "probe"} & set(kinds):
        before, now = earlier[kind], record[kind] or {}
        merged[kind] = before | now
        if kind == "fewshot":
            merged[kind]["shots"] = sorted({*before["shots"], *now.get("shots", [])})
        if kind == "probe":
            merged[kind]["c"] = before["c"] | now.get("c", {})
    return merged


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the table's header and lines: one line per metric, one column per model."""
    models = list(dict.fromkeys(row.model for row in rows))
    values = {(row.model, row.metric): row for row in rows}
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows if not row.metric.endswith("-std")):
        found = [values.get((model, metric)) for model in models]
        spread = [values.get((model, f"{metric}-std")) for model in models]
        cells = [_cell(row, std) for row, std in zip(found, spread)]
        lines.append([metric, *cells, f"{next(row.n for row in found if row):,}"])
    return ["metric", *models, "images"], lines


def _cell(row: Row | None, std: Row | None) -> str:
    if row is None:
        return ""
    if row.metric.endswith(("loss", "quadratic_kappa")):
        return f"{row.value:.4f}"
    return f"{row.value:.2%}" + (f" ± {100 * std.value:.2f}" if std else "")


def _print_table(rows: list[Row], title: str) -> None:
    header, lines = _cells(rows)
    table = Table(title=title)
    for name in header:
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _pages(rows: list[Row], record: dict[str, Any], bench: Bench) -> dict[str, str | None]:
    """Returns the files of results by name, None for one that is to go.

    wrong.json is of the first set that the last call to score the head scored it on.
    """
    pages: dict[str, str | None] = {}
    if bench.predictions:
        _, manifest, found = bench.predictions[0]
        pages["wrong.json"] = json.dumps({"items": wrong_items(found, manifest)}, indent=1)
    elif not any(_origin(row)[0] == "classify" for row in rows):  # none of an earlier call stands here either
        pages["wrong.json"] = None
    pages["results.md"] = _markdown(rows, record)
    pages["results.json"] = json.dumps({**record, "rows": [row._asdict() for row in rows]}, indent=2)
    return pages


def _markdown(rows: list[Row], record: dict[str, Any]) -> str:
    header, lines = _cells(rows)
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    text = [f"# {record['weights']}", "", f"Model {record['model']} at {record['image_size']} px.", ""]
    text += ["| " + " | ".join(line) + " |" for line in table] + [""]
    text += [f"- {role}: {of['path']}, {of['num_samples']:,} images" for role, of in record["data"].items()]
    text.append(f"- images as evaluation={_transform(record['transform'])} shows them")
    if few := record["fewshot"]:
        text.append(
            f"- few-shot: ridge regression on the head's input (l2 {few['l2']:g}), mean ± standard deviation over "
            f"{len(few['seeds'])} draws of the training images; evaluation={_transform(few['transform'])}"
        )
    if near := record["knn"]:
        text.append(f"- k-nn: cosine similarity, votes weighted by exp(similarity / {near['temperature']:g})")
    text += [f"- {name}: C = {c:g}" for name, c in (record["probe"] or {"c": {}})["c"].items()]
    text += [f"- **not scored**: {reason}" for reason in record["failed"].values()]
    return "\n".join(text)


def _transform(values: dict[str, Any]) -> str:
    crop = "" if values["name"] == "vit" else f", crop {values['crop']:g}"
    resizing = values["interpolation"] if values["name"].startswith(("timm", "transformers")) else "as big_vision"
    return f"{values['name']} ({resizing}{crop})"


def _write(out: Path, pages: dict[str, str | None]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in pages.items():
            if content is None:
                if (out / name).exists():
                    warn(f"{out / name}: removed, since it is of nothing in results.json any more")
                    (out / name).unlink()
                continue
            write_text(out / name, content + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def _write_predictions(path: Path, bench: Bench) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for job, manifest, found in bench.predictions:
                file.writelines(lines(found, manifest, job.name or "val"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --predictions") from None
    print(path)


if __name__ == "__main__":
    cli.run(main)
