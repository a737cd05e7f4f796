"""The page on fine-tuning on own data: OUT/report.html, made from the results of tools/finetune.py --train.

A sentence and a chart first; then the confusions, the misclassified photos, and how the result was made. One file, no
script, nothing from outside; names of classes and photos are untrusted.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.escape import portable
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.report.confusion import drawn, read_pairs
from pretrain.report.files import inside
from pretrain.report.page import template
from pretrain.report.runs import MAX_COUNT, WrongPrediction, read_wrong
from pretrain.report.story import duration
from pretrain.storage import write_text

PAGE = "report.html"
_ACCURACY = "accuracy.json"
_MAX_BARS = 24  # classes of the chart; of more, those with the lowest accuracy
_MAX_SECONDS = 1e9


@dataclass(frozen=True)
class Bar:
    """A class's accuracy, its numbers in percent."""

    name: str
    correct: int
    n: int
    share: float
    low: float  # of the 95 % interval
    high: float


def is_own(folder: Path) -> bool:
    """Returns whether a folder is the output of a finished tools/finetune.py --train."""
    return inside(folder, _ACCURACY) is not None


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page into `out`, or into the folder itself, and returns its path.

    Raises UserError when it cannot be written, or the folder holds something else.
    """
    path, page = folder / _ACCURACY, (out or folder) / PAGE
    if not is_own(folder):
        raise UserError(f"{path}: not found; give the folder that tools/finetune.py --train has written")
    try:
        values = Fields.read(path)
        run = _run_name(values)
        wrong = _wrong(values, folder, run)
        text = template("own_page.html.jinja").render(
            **_shown(values), wrong=wrong, trained=shlex.quote(str(_from_here(folder) / run))
        )
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, text, errors="replace")
    except OSError as error:
        raise UserError(f"{error.filename or page}: {error.strerror}; give another --out") from None
    return page


def _wrong(values: Fields, folder: Path, run: str) -> list[WrongPrediction]:
    """Returns the misclassified photos; none if wrong.json is from a later evaluation, such as one on other data.

    A wrong.json of an earlier version has no digests, and is accepted.
    """
    if (path := inside(folder, f"{run}/evaluation/wrong.json")) is None:
        return []
    found = read_wrong(folder / run)
    pairs = ((found.weights_sha256, "run_sha256"), (found.data_sha256, "test_sha256"))
    if any(digest and values.text(key, digest) != digest for digest, key in pairs):
        warn(f"{path}: left out: of other data or weights than {_ACCURACY}; tools/evaluate.py RUN --val TEST makes it")
        return []
    return found.shown


def _from_here(folder: Path) -> Path:
    """Returns a folder relative to the working folder, or outside of that its name alone: a page shows no paths."""
    if not folder.is_absolute():
        return folder
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else Path(folder.name)


def _shown(values: Fields) -> dict[str, Any]:
    """Returns the values for the template, after checking the type and range of each."""
    if (found := values.text("format")) != "pretrain-accuracy":
        values.wrong("format", f"pretrain-accuracy, not {found!r}")
    classes = values.texts("classes")
    bars = sorted((_bar(part, classes) for part in values.parts("per_class")), key=lambda bar: (bar.share, bar.name))
    low, high = _interval(values)
    seconds = values.number("seconds", 0, _MAX_SECONDS) if values.has("seconds") else None
    facts = {
        key: values.integer(key, 0, MAX_COUNT) for key in ("num_train", "num_test", "steps", "batch", "image_size")
    }
    return {
        **facts,
        **{key: values.text(key) for key in ("data", "weights", "model", "device", "run")},
        "from_scratch": values.flag("from_scratch"),
        "num_classes": len(classes),
        "overall": Bar("all classes", *_counts(values), 100 * values.number("top1", 0, 1), low, high),
        "chance": 100 / max(1, len(classes)),
        "time": None if seconds is None else duration(seconds),
        "bars": bars[:_MAX_BARS],
        "num_bars": len(bars),
        "confusion": drawn(read_pairs(values, len(classes)), classes),
        "lr": values.number("lr", 0, 1e3),
        "selection": [_rate(part) for part in values.parts("selection")],
        "num_choosing": max((part.integer("n", 0, MAX_COUNT, 0) for part in values.parts("selection")), default=0),
        "seeds": [f"{seed:.2%}" for seed in values.numbers("seeds", -1, 1e9)],
        "told": list(map(portable, values.texts("told"))),
        "differs": list(map(portable, values.texts("differs"))),
    }


def _run_name(values: Fields) -> str:
    """Returns the run's name, checked to be that of a subfolder."""
    name = values.text("run")
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        values.wrong("run", "the name of a folder")
    return name


def _counts(values: Fields) -> tuple[int, int]:
    return values.integer("correct", 0, MAX_COUNT), values.integer("n", 1, MAX_COUNT)


def _interval(values: Fields) -> tuple[float, float]:
    """Returns both ends of the 95 % interval, in percent."""
    ends = values.numbers("interval", -1, 1e9)
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        values.wrong("interval", "two shares, rising")
    return 100 * ends[0], 100 * ends[1]


def _bar(part: Fields, classes: tuple[str, ...]) -> Bar:
    name = classes[part.integer("label", 0, len(classes) - 1)]
    return Bar(name, *_counts(part), 100 * part.number("top1", 0, 1), *_interval(part))


def _rate(part: Fields) -> tuple[str, str]:
    """Returns a learning rate that was tried, and its accuracy on the held-out images."""
    reached = f"{part.number('top1', 0, 1):.1%}" if part.has("top1") else "not finite"
    return f"{part.number('lr', 0, 1e3):g}", reached
