"""What was asked for: jobs, whose data sets are opened and checked, and which are then done."""

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
    """A job whose data sets are there and fit."""

    job: Job
    sets: dict[str, Images]


class Done(NamedTuple):
    """A job that was done."""

    job: Job
    sets: dict[str, Images]
    found: Found


def open_jobs(jobs: list[Job], weights: Weights, root: Path) -> tuple[list[Opened], dict[str, str]]:
    """Returns the jobs with their data sets, checked before anything is read, on all ranks alike; and why others fail.

    Raises UserError when none is left, or for a job without a name.
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
    """Yields each job when it is done; why others could not be is added to `failed`. Called by all ranks.

    Raises DeviceMemoryError, on this rank alone, when the GPU's memory does not hold a batch.
    """
    for job, sets in opened:
        with fitting(subject.batch_size):
            found = _tried(job, failed, partial(EVALUATORS[job.kind].score, subject, job, sets))
        if found is not None:
            yield Done(job, sets, found)


def _tried(job: Job, failed: dict[str, str], make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on all ranks; a named task that cannot be scored is warned of and noted: None."""
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
        if job.task and sets["test"].label_map is not None:  # its own labels, as ReaL's, count in the set's order
            raise UserError(f"{job.name}: {weights.source} has its classes in another order; score it with --val")
    elif "train" in sets:
        sets["test"], told = read_as(sets["test"], sets["train"])
        _tell(told)
    return {role: all_images(manifest) for role, manifest in sets.items()}


def as_head_reads(weights: Weights, val: Manifest) -> Manifest:
    """Returns a data set with its labels read as classes of a head, by their names, and tells what was mapped.

    Raises UserError when a class of the set has no counterpart in the head.
    """
    sides = val.class_names, val.num_classes, weights.class_names, weights.num_classes
    match = match_classes(*sides, their_place=str(val.path), our_place=str(weights.source))
    _tell(match.told)
    return val.with_meaning(match, weights.class_names)


def _tell(message: str | None) -> None:
    if message and ranks.is_main():
        warn(message)
