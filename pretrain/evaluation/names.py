"""Evaluations by name, as --tasks gives them: `imagenet`, `knn:pets`. Without torch: a wrong name is told at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.config.checks import did_you_mean
from pretrain.errors import UserError
from pretrain.tasks.table import TASKS, VTAB, Task, check_not_all, missing, task, task_folder

HEAD = "classify"  # asked for by a task's bare name and by --val; the others as KIND:NAME
# The kinds of evaluation, rows of evaluators.EVALUATORS, and the data sets of each: "test", and "train" where there is
# something to learn.
NEEDS: dict[str, tuple[str, ...]] = {
    HEAD: ("test",),
    "fewshot": ("train", "test"),
    "knn": ("train", "test"),
    "probe": ("train", "test"),
}


class Named(NamedTuple):
    """An evaluation that was asked for by name."""

    kind: str  # of NEEDS
    text: str  # as it was written
    data: dict[str, Path]  # folders of shards: "test", and "train" where there is something to learn
    task: Task | None  # the table's row; None: a folder of the user's own


def named(tasks: str, root: Path) -> list[Named]:
    """Returns what --tasks NAME,... asks for, each once, on the data in `root`. Raises UserError for a wrong name.

    vtab and KIND:vtab stand for all of its tasks.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    every = [one for name in names for one in _each(name)]
    return [_named(name, root) for name in dict.fromkeys(every)]


def _each(text: str) -> list[str]:
    kind, colon, name = text.rpartition(":")
    return [f"{kind}{colon}{one}" for one in VTAB] if name == "vtab" else [text]


def _named(text: str, root: Path) -> Named:
    kind, colon, name = text.partition(":")
    if not colon:
        row = task(text)
        return Named(HEAD, text, {"test": task_folder(row, root) / row.test_split}, row)
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
    return Named(kind, text, {role: folder / splits[role] for role in NEEDS[kind]}, row)


def absent(one: Named, root: Path) -> str | None:
    """Returns one line that says what an evaluation lacks and how to get it; None where its data is there."""
    if one.task is not None:
        return missing(one.task, root, [path.name for path in one.data.values()])
    gone = next((path for path in one.data.values() if not (path / "manifest.json").exists()), None)
    if gone is None:
        return None
    hint = "" if gone.parent.exists() else did_you_mean(one.text.partition(":")[2], TASKS)
    return f"{one.text}: {gone} has no manifest.json; tools/make_shards.py makes shards.{hint}"


def check_any_there(asked: Sequence[Named], root: Path) -> None:
    """Raises UserError when the data of none of them is there."""
    check_not_all([line for one in asked if (line := absent(one, root))], len(asked), root)
