"""OUT/.unfinished-set: the plan of a data set without a manifest yet, and which of its shards are complete.

A killed build resumes from here. Each complete shard has a file, written after the shard; a set of other images or
options is not mixed with what is there.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from pretrain.data.shard_list import MAX_SHARD_BYTES, MAX_SHARD_SAMPLES, Shard
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief
from pretrain.storage import remove, remove_left_over, write_text

FOLDER = ".unfinished-set"
FORMAT, VERSION = "pretrain-unfinished-set", 2
_PLAN = "plan.json"
_RECORD = re.compile(r"\d{6,}\.json", re.ASCII)  # of a shard, by its number
TORN_AFTER_S = 600  # a writer appends to its file all the time; but clocks of nodes differ

Plan = Mapping[str, int | str | None]  # all that the bytes of a set depend on, by a name for the user


class Done(NamedTuple):
    """A complete shard."""

    shard: Shard
    dropped: dict[int, str]  # what was left out, by its place among the shard's images, with the reason
    counts: Counter[int]  # images of each class
    notes: Counter[str]  # pictures that were converted, or look otherwise than shown


def plan_of(out: Path) -> Plan | None:
    """Returns the plan of the unfinished set in a folder, None where there is none."""
    path = out / FOLDER / _PLAN
    if not path.exists():
        return None
    values = Fields.read(path).values
    head = {"format": FORMAT, "version": VERSION}
    if {name: values.pop(name, None) for name in head} != head:
        raise UserError(f"{path}: is no {FORMAT} {VERSION}; remove {out} to begin anew")
    return values


def begin(out: Path, plan: Plan) -> Path:
    """Returns the folder of an unfinished set, made or found. Raises UserError when it has another plan."""
    folder = out / FOLDER
    if plan_of(out) is None:
        folder.mkdir(exist_ok=True)
        text = json.dumps({"format": FORMAT, "version": VERSION, **plan}, indent=1) + "\n"
        write_text(folder / _PLAN, text, shared=True)
    found = plan_of(out) or {}
    for name in {**plan, **found}:
        if found.get(name) != plan.get(name):
            was = f"{brief(found.get(name))} and is now {brief(plan.get(name))}"
            raise UserError(
                f"{out}: holds the unfinished data set of another command: its {name} was {was}; give that command "
                f"again to finish it, or remove {out} to begin anew"
            )
    return folder


def keep(folder: Path, number: int, done: Done) -> None:
    """Records that shard `number` is complete, with its index. Raises UserError when the set is done already."""
    values = {
        "num_samples": done.shard.num_samples,
        "num_bytes": done.shard.num_bytes,
        "sha256": done.shard.sha256,
        "dropped": {str(place): line for place, line in done.dropped.items()},
        "counts": {str(label): count for label, count in sorted(done.counts.items())},
        "notes": dict(done.notes),  # in the order they came, as counts.json has them
    }
    try:
        write_text(_file(folder, number), json.dumps(values) + "\n", shared=True)
    except FileNotFoundError:
        raise gone(folder) from None


def num_complete(folder: Path) -> int:
    """Returns how many shards are recorded as complete; the records are not read, as 30,000 would take long."""
    try:
        return sum(bool(_RECORD.fullmatch(name)) for name in os.listdir(folder))
    except FileNotFoundError:
        raise gone(folder) from None


def gone(folder: Path) -> UserError:
    """Returns the error for a build's temporary folder that is gone."""
    return UserError(f"{folder}: is gone; another command has finished this data set meanwhile, or removed it")


def read(folder: Path, number: int, path: Path) -> Done | None:
    """Returns shard `number`, which lies at `path`, None unless it is complete. Raises UserError for a damaged file."""
    file = _file(folder, number)
    if not file.exists() or not path.exists() or not path.with_suffix(".idx").exists():
        return None
    values = Fields.read(file)
    num_bytes = values.integer("num_bytes", 0, MAX_SHARD_BYTES)
    if path.stat().st_size != num_bytes:
        return None
    shard = Shard(str(path), values.integer("num_samples", 0, MAX_SHARD_SAMPLES), num_bytes, values.text("sha256"))
    counts, notes, dropped = values.part("counts"), values.part("notes"), values.part("dropped")
    return Done(
        shard,
        {_number(place): dropped.text(place) for place in dropped.values},
        Counter({_number(label): counts.integer(label, 0, MAX_SHARD_BYTES) for label in counts.values}),
        Counter({note: notes.integer(note, 0, MAX_SHARD_BYTES) for note in notes.values}),
    )


def _number(text: str) -> int:
    """A label, or a place in a shard."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SHARD_SAMPLES)) else 0


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def clear(out: Path, name: str) -> None:
    """Removes the records of an unfinished set of this name, when its manifest is written.

    The plan goes last, so that a killed call can be repeated.
    """
    remove_torn(out, name)
    folder = out / FOLDER
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if path.name != _PLAN:
                path.unlink(missing_ok=True)
    remove(folder)


def remove_torn(out: Path, name: str, numbers: Container[int] | None = None) -> None:
    """Removes temporary files of these shards (None: of all) that killed processes have left.

    What is younger than TORN_AFTER_S stays, unless a process of this machine left it: another node may be writing it.
    """
    remove_left_over(out)
    torn = re.compile(rf"\.tmp-.*{re.escape(name)}-(\d+)\.(?:tar|idx)")
    for path in out.iterdir():
        found = torn.fullmatch(path.name)
        if found and (numbers is None or int(found[1]) in numbers) and _age_s(path) > TORN_AFTER_S:
            path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # another node has just finished it
        return 0.0
