"""The evaluators, each a row of one table, which tools/evaluate.py and the evaluations of a run share."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from pretrain.checkpoint import behind
from pretrain.cluster import agreement, ranks
from pretrain.data.loader import Batch
from pretrain.data.manifest import Manifest
from pretrain.evaluation import fewshot, knn, probe
from pretrain.evaluation.classification import (
    OFFICIAL,
    EvaluationStopped,
    Predictions,
    Score,
    among,
    has_average_precision,
    logit_bytes,
    predict_all,
    relabelled,
    scores_of,
)
from pretrain.evaluation.features import MAX_PIXEL_BYTES, Extract, Features, raw_pixels
from pretrain.evaluation.names import HEAD, Job
from pretrain.evaluation.subject import TRAINED, Images, Subject, transform_of
from pretrain.shards.examples import sample_names
from pretrain.tasks.imagenet_labels import real_labels, scored_classes

_LOOK_EVERY_S = 0.02


class Row(NamedTuple):
    """One line of results.json."""

    model: str  # "trained", "random weights" or "raw pixels"
    metric: str  # "top1", "10-shot", "10-shot-std", "imagenet_v2/top1", "knn:pets/20-nn" ...
    value: float
    n: int  # images it was measured on


class Found(NamedTuple):
    """What an evaluator returns."""

    rows: list[Row]
    predictions: Predictions | None = None  # of each image, where the head was scored; on rank 0
    chosen: Mapping[str, Any] = {}  # by the evaluator, recorded with its `protocol`: {"c": 0.1}


class Evaluator(NamedTuple):
    """A row of the table."""

    score: Callable[[Subject, Job, dict[str, Images]], Found]
    protocol: Callable[[Subject], dict[str, Any]] | None = None  # for results.json; None: other entries say it all
    grows: tuple[str, ...] = ()  # protocol keys that each row adds to; others are the same for all rows
    told: Callable[[dict[str, Any]], list[str]] = lambda _: []  # the protocol as lines of results.md


def rows_of(job: Job, scores: Iterable[Score], model: str = TRAINED) -> list[Row]:
    """Returns scores as rows, their metrics prefixed with the job's name."""
    prefix = f"{job.name}/" if job.name else ""
    return [Row(model, prefix + score.metric, score.value, score.n) for score in scores]


# --- the functions ---------------------------------------------------------------------------------------------------


def classify(subject: Subject, job: Job, sets: dict[str, Images]) -> Found:
    """The head's loss, top1, top5, for images with several labels mean_average_precision, and the task's own metric."""
    manifest, indices = sets["test"]
    predict, batches = subject.head(sets["test"])
    num_scored = len(indices)
    if job.task and (classes := scored_classes(job.task)):
        predict = among(predict, classes)
    if job.task and job.task.metric == "real":
        labels = agreement.from_main(lambda: _real_labels(manifest))
        batches, num_scored = relabelled(batches, labels), sum(bool(labels[index]) for index in indices)
    keep_logits = has_average_precision(manifest, len(indices), subject.num_classes, subject.max_logit_bytes)
    if manifest.multi_label and not keep_logits:
        needed = logit_bytes(len(indices), subject.num_classes)
        subject.tell(f"{manifest.path}: no mean average precision: its logits would take {needed >> 30} GB")
    with subject.progress(job.name or "validation", len(indices), "images") as advance:
        found = predict_all(
            predict,
            _with_progress(batches, lambda: advance(subject.batch_size * ranks.world_size())),
            loss=subject.loss,
            device=subject.device,
            stop_agreed=subject.stop_agreed,
            keep_logits=keep_logits,
        )
    scores = on_main(partial(_scores, found, job), subject.stop_agreed)
    n = scores[0].n
    if n < num_scored and ranks.is_main():
        subject.tell(f"{manifest.path}: {num_scored - n} of {num_scored} images cannot be read: not scored")
    return Found(rows_of(job, scores), predictions=found)


def _scores(found: Predictions | None, job: Job) -> list[Score]:
    assert found is not None
    scores = scores_of(found)
    if job.task and job.task.official_metric in OFFICIAL:
        official = OFFICIAL[job.task.official_metric]
        value = official(found.labels[:, 0], found.classes[:, 0])
        scores.append(Score(job.task.official_metric, value, len(found.index)))
    return scores


def _with_progress(batches: Iterable[Batch], advance: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance()


def _real_labels(manifest: Manifest) -> list[list[int]]:
    """Returns the ReaL labels of each sample, looked up by its name; none where the name cannot be read."""
    names = sample_names(manifest, range(manifest.num_samples))
    found = iter(real_labels([name for name in names if name]))
    return [next(found) if name else [] for name in names]


def few_shot(subject: Subject, job: Job, sets: dict[str, Images]) -> Found:
    """1-shot, 1-shot-std ...: big_vision's closed-form regression on 1, 5, 10 and 25 images per class."""
    rows = []
    for name, extract in _compared(subject, sets).items():
        features = subject.features(name, extract, sets, "fewshot")
        num_regressions = len(subject.shots) * len(fewshot.SEEDS)
        with subject.progress(f"few-shot, {name}", num_regressions, "regressions") as advance:
            solve = partial(fewshot.fewshot, shots=subject.shots, progress=advance)
            rows += rows_of(job, on_features(solve, features, subject.stop_agreed), name)
    return Found(rows)


def _compared(subject: Subject, sets: dict[str, Images]) -> dict[str, Extract]:
    found = {TRAINED: subject.extract}
    for name, make in subject.baselines.items():
        extract = make()
        pixel_bytes = sum(len(images.indices) for images in sets.values()) * 3 * subject.image_size**2 * 4
        if extract is not raw_pixels or pixel_bytes <= MAX_PIXEL_BYTES:
            found[name] = extract
        elif ranks.is_main():
            most = MAX_PIXEL_BYTES >> 30
            subject.tell(f"no row for raw pixels: they would take {pixel_bytes >> 30} GB, at most {most}")
    return found


def nearest_neighbours(subject: Subject, job: Job, sets: dict[str, Images]) -> Found:
    """1-nn and 20-nn: the vote of the nearest training images."""
    features = subject.features(TRAINED, subject.extract, sets, "knn")
    with subject.progress(job.name, len(sets["test"].indices), "images") as advance:
        solve = partial(knn.knn, device=subject.device, progress=advance)
        return Found(rows_of(job, on_features(solve, features, subject.stop_agreed)))


def linear_probe(subject: Subject, job: Job, sets: dict[str, Images]) -> Found:
    """top1 and mean_per_class of a logistic regression on all training images."""
    features = subject.features(TRAINED, subject.extract, sets, "probe")
    with subject.progress(job.name, len(probe.GRID) + 1, "regressions") as advance:
        scores, c = on_features(partial(probe.probe, progress=advance), features, subject.stop_agreed)
    return Found(rows_of(job, scores), chosen={"c": c})


def on_features(solve: Callable[..., Any], features: list[Features | None], stop_agreed: Callable[[], bool]) -> Any:
    """Returns on every rank the result of `solve` for training and test features, which only rank 0 has."""

    def solved() -> Any:
        train, test = features
        assert train is not None and test is not None
        return solve(*train, *test)

    return on_main(solved, stop_agreed)


def on_main(solve: Callable[[], Any], stop_agreed: Callable[[], bool]) -> Any:
    """Runs `solve` on rank 0 and returns its result, or raises its error, on every rank.

    It may take longer than a collective's timeout: until it ends, all ranks poll with short all-reduces. Raises
    EvaluationStopped on all ranks when `stop_agreed` returns True meanwhile.
    """
    main = ranks.is_main()
    work = behind.in_background(lambda: main and solve(), behind=main)
    while agreement.any_rank(not work.done()):
        if stop_agreed():
            raise EvaluationStopped
        time.sleep(_LOOK_EVERY_S)
    return agreement.from_main(work.result)


# --- the table -------------------------------------------------------------------------------------------------------


def _fewshot_protocol(subject: Subject) -> dict[str, Any]:
    config, max_train = subject.reading("fewshot")
    values = {"shots": subject.shots, "seeds": fewshot.SEEDS, "l2": fewshot.L2}
    return {**values, "transform": transform_of(config), "max_train": max_train}


def _fewshot_told(protocol: dict[str, Any]) -> list[str]:
    return [
        f"few-shot: ridge regression on the head's input (l2 {protocol['l2']:g}), mean ± standard deviation over "
        f"{len(protocol['seeds'])} draws of the training images; evaluation={in_words(protocol['transform'])}"
    ]


def in_words(transform: dict[str, Any]) -> str:
    """Returns a transform, as `transform_of` describes it, in words for results.md."""
    crop = "" if transform["name"] == "vit" else f", crop {transform['crop']:g}"
    interpolation = (
        transform["interpolation"] if transform["name"].startswith(("timm", "transformers")) else "as big_vision"
    )
    return f"{transform['name']} ({interpolation}{crop})"


# The keys are those of names.NEEDS, which lists the data sets that each needs.
EVALUATORS: dict[str, Evaluator] = {
    HEAD: Evaluator(classify),
    "fewshot": Evaluator(few_shot, _fewshot_protocol, ("shots",), _fewshot_told),
    "knn": Evaluator(
        nearest_neighbours,
        lambda _: {"neighbours": knn.NEIGHBOURS, "temperature": knn.TEMPERATURE},
        told=lambda p: [f"k-nn: cosine similarity, votes weighted by exp(similarity / {p['temperature']:g})"],
    ),
    "probe": Evaluator(
        linear_probe,
        lambda _: {"grid": probe.GRID, "held_out": probe.HELD_OUT},
        ("c",),
        lambda p: [f"{name}: C = {c:g}" for name, c in p["c"].items()],
    ),
}
