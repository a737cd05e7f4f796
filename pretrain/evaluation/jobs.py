"""Jobs, the evaluations that were asked for: their data sets are opened and checked, then the jobs are run."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.cluster import agreement, ranks
from pretrain.data.classes import match_classes
from pretrain.data.manifest import Manifest, check_shards, load_manifest, read_as
from pretrain.errors import UserError
from pretrain.evaluation.evaluators import EVALUATORS, Found
from pretrain.evaluation.names import HEAD, Job, missing_data
from pretrain.evaluation.subject import Images, Subject, all_images, fitting
from pretrain.log import warn
from pretrain.models.weights import Weights


class Opened(NamedTuple):
    """A job whose data sets exist and suit the weights."""

    job: Job
    sets: dict[str, Images]


class Done(NamedTuple):
    """A job that was done."""

    job: Job
    sets: dict[str, Images]
    found: Found


def open_jobs(jobs: list[Job], weights: Weights, root: Path) -> tuple[list[Opened], dict[str, str]]:
    """Returns the jobs with their opened data sets, the same on all ranks; and, by name, why other jobs cannot be run.

    Checks all data sets before any image is read. Raises UserError when no job is left, or a job without a name fails.
    """
    failed: dict[str, str] = {}
    opened = []
    for job in jobs:
        sets = _tried(job, failed, partial(agreement.together, partial(_open, job, weights, root)))
        if sets is not None:
            opened.append(Opened(job, sets))
    if not opened:
        raise UserError(f"none of {', '.join(failed)} can be scored")
    return opened, failed


def shared_sets(opened: list[Opened]) -> set[Path]:
    """Returns the data sets that the head is scored on more than once."""
    scored = [sets["test"].manifest.path for job, sets in opened if job.kind == HEAD]
    return {path for path in scored if scored.count(path) > 1}


def do_jobs(subject: Subject, opened: list[Opened], failed: dict[str, str]) -> Iterator[Done]:
    """Yields each job when it is done; adds to `failed` why others could not be scored. Called by all ranks.

    Raises DeviceMemoryError, on this rank alone, when the GPU's memory does not hold a batch.
    """
    for job, sets in opened:
        with fitting(subject.batch_size):
            found = _tried(job, failed, partial(EVALUATORS[job.kind].score, subject, job, sets))
        if found is not None:
            yield Done(job, sets, found)


def _tried(job: Job, failed: dict[str, str], make: Callable[[], Any]) -> Any:
    """Returns what `make`, called on all ranks, returns; None, with a warning and a note in `failed`, on UserError.

    A job without a name raises the error instead.
    """
    try:
        return make()
    except UserError as error:
        if not job.name:
            raise
        failed[job.name] = str(error)
        if ranks.is_main():
            warn(f"{job.name} is not scored: {error}")
        return None


def _open(job: Job, weights: Weights, root: Path) -> dict[str, Images]:
    if job.task and (told := missing_data(job, root)):
        raise UserError(told)
    sets = {role: load_manifest(path) for role, path in job.data.items()}
    for manifest in sets.values():
        check_shards(manifest)
    if job.kind == HEAD:
        if job.task and job.task.num_classes != weights.num_classes:
            raise UserError(
                f"{job.name} has {job.task.num_classes} classes, the head of {weights.source} has "
                f"{weights.num_classes}: fine-tune it on the task, or score its features, as in knn:{job.name}"
            )
        sets["test"] = as_head_reads(weights, sets["test"])
        if job.task and sets["test"].label_map is not None:  # a task's own labels, as ReaL's, are in the set's order
            raise UserError(f"{job.name}: {weights.source} has its classes in another order; score it with --val")
    elif "train" in sets:
        sets["test"], told = read_as(sets["test"], sets["train"])
        _tell(told)
    return {role: all_images(manifest) for role, manifest in sets.items()}


def as_head_reads(weights: Weights, val: Manifest) -> Manifest:
    """Returns a data set with its labels mapped to a head's classes by name, and warns of what was mapped.

    Raises UserError when a class of the set has no counterpart in the head.
    """
    sides = val.class_names, val.num_classes, weights.class_names, weights.num_classes
    match = match_classes(*sides, their_place=str(val.path), our_place=str(weights.source))
    _tell(match.told)
    return val.with_meaning(match, weights.class_names)


def _tell(message: str | None) -> None:
    if message and ranks.is_main():
        warn(message)
