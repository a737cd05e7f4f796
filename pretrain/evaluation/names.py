"""Jobs, named as in `--tasks imagenet,knn:pets`. Imports no torch, so that a wrong name is reported at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pretrain.config.checks import did_you_mean
from pretrain.errors import UserError
from pretrain.tasks.table import TASKS, VTAB, Task, missing, task, task_folder

HEAD = "classify"  # asked for by a task's bare name and by --val; the others as KIND:NAME
# The kinds of evaluation, rows of evaluators.EVALUATORS, and the data sets of each: "test", and "train" where there is
# something to learn.
NEEDS: dict[str, tuple[str, ...]] = {
    HEAD: ("test",),
    "fewshot": ("train", "test"),
    "knn": ("train", "test"),
    "probe": ("train", "test"),
}


class Job(NamedTuple):
    """A kind of evaluation on a data set."""

    kind: str  # of NEEDS
    name: str = ""  # as in --tasks; prefixes its metrics; "" for --val, --fewshot and in training
    data: Mapping[str, Path] = {}  # folders of shards: "test", and "train" where there is something to learn
    task: Task | None = None  # the table's row; None: data of the user's own

    @property
    def roles(self) -> dict[str, str]:
        """What results.json calls the data sets."""
        if self.name:
            return {role: f"{self.name}/{role}" for role in self.data}
        return {"test": "val"} if self.kind == HEAD else {role: f"fewshot_{role}" for role in self.data}


def named(tasks: str, root: Path) -> list[Job]:
    """Returns the jobs of --tasks NAME,..., each once, on the data in `root`. Raises UserError for a wrong name.

    vtab and KIND:vtab stand for all of VTAB's tasks.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    every = [one for name in names for one in _each(name)]
    return [_named(name, root) for name in dict.fromkeys(every)]


def _each(text: str) -> list[str]:
    kind, colon, name = text.rpartition(":")
    return [f"{kind}{colon}{one}" for one in VTAB] if name == "vtab" else [text]


def _named(text: str, root: Path) -> Job:
    kind, colon, name = text.partition(":")
    if not colon:
        row = task(text)
        return Job(HEAD, text, {"test": task_folder(row, root) / row.test_split}, row)
    if kind not in NEEDS or kind == HEAD:
        *others, last = (f"{known}:NAME" for known in NEEDS if known != HEAD)
        raise UserError(f"--tasks: {text!r} is neither a task nor {', '.join(others)} or {last}")
    if (row := TASKS.get(name)) is None:
        folder = root / name
        test = "val" if (folder / "val").exists() and not (folder / "test").exists() else "test"
        splits = {"train": "train", "test": test}
    else:
        folder = task_folder(row, root)
        train = "trainval" if "trainval" in row.splits else "train"  # VTAB's 1,000 images
        if "train" in NEEDS[kind] and train not in row.splits:
            raise UserError(f"--tasks: {text!r}: {name} has no training images to learn from")
        splits = {"train": train, "test": row.test_split}
    return Job(kind, text, {role: folder / splits[role] for role in NEEDS[kind]}, row)


def missing_data(job: Job, root: Path) -> str | None:
    """Returns one line that says what an evaluation lacks and how to get it; None where its data is there."""
    if job.task is not None:
        return missing(job.task, root, [path.name for path in job.data.values()])
    gone = next((path for path in job.data.values() if not (path / "manifest.json").exists()), None)
    if gone is None:
        return None
    hint = "" if gone.parent.exists() else did_you_mean(job.name.partition(":")[2], TASKS)
    return f"{job.name}: {gone} has no manifest.json; tools/make_shards.py makes shards.{hint}"
