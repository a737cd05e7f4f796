"""Reads a run's folder into one plain value, a `Run`. Changes nothing in the folder.

metrics.jsonl, starts.jsonl, bad_samples.jsonl, skipped_steps.jsonl, config.yaml, recipe.yaml, DONE, batch.png and
batch.json (train/folder.py); evaluation/results.json (tools/evaluate.py), evaluation/wrong.json,
finetune/TASK/results.json and the same below finetune-from-scratch (tools/finetune.py), pictures/*.png
(tools/visualize.py).
A folder without a run, such as converted weights or the --out of tools/finetune.py, may hold only some of these.
Folders travel between people: nothing in them is trusted, pictures least. Links that lead out of the folder are not
followed; a line or picture that cannot be used is left out with a warning.
"""

import base64
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import MAX_IMAGE_SIZE, Config, load_config
from pretrain.errors import ConfigError, UserError
from pretrain.escape import portable_path
from pretrain.json_files import Fields
from pretrain.log import MAX_STEP, warn
from pretrain.report.batch import Example, read_batch
from pretrain.report.confusion import Confusion, drawn, read_pairs
from pretrain.report.files import MAX_PICTURE_BYTES, Picture, inside, lines, picture, picture_file, read_text
from pretrain.report.own_weights import digests_here, evaluation_compared, finetuning_compared
from pretrain.report.places import nothing_in
from pretrain.report.target import Target, read_target

Curve = tuple[np.ndarray, np.ndarray]  # steps and values
MAX_WRONG = 48  # thumbnails of a run on the page: a screenful or two
MAX_PICTURES = 50
MAX_OTHERS = 20  # other weights with results in the same folder, such as other checkpoints of a run
MAX_METRICS, MAX_REASONS = 200, 20  # distinct ones of a run; ours log some 30, and have 6 reasons
MAX_VALUE = 1e100  # a larger figure is damage, and its square may overflow
MAX_COUNT = 10**15


@dataclass(frozen=True)
class WrongPrediction:
    """A test image, the class it belongs to, and the one the model gave it."""

    name: str
    label: str
    predicted: str
    probability: float | None  # of the predicted class
    picture: Picture | None


@dataclass(frozen=True)
class Wrong:
    """The content of wrong.json. An earlier version did not name data and weights: these texts are then empty."""

    shown: list[WrongPrediction]  # the first MAX_WRONG
    number: int  # of items in the file
    confusion: Confusion | None  # where each image has one class
    data: str
    data_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Run:
    """All that is known of a run from its folder."""

    folder: Path
    name: str  # as shown: the folder's name, or its path where two runs share a name
    curves: dict[str, Curve]  # by metric: "train/loss", "val/top1" ...
    logged_at: str | None  # time of the last log line
    starts: list[dict[str, Any]]  # time, versions, commit, ranks and step of each start
    config: Config | None
    config_text: str | None  # the text of config.yaml
    evaluation: dict[str, Any] | None  # what tools/evaluate.py wrote
    finetuning: list[dict[str, Any]]  # what tools/finetune.py wrote, by task
    bad_samples: dict[str, int]  # by cause
    skipped_at: list[int]  # steps whose update was skipped
    batch: list[Example]  # of the first batch
    pictures: list[Picture]
    wrong: Wrong
    target: Target | None
    done: bool


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads folders of runs, weights or results. Raises UserError when one holds nothing to report."""
    names = [folder.resolve().name for folder in folders]
    places = list(map(portable_path, folders))
    called = [
        name if names.count(name) == 1 else place if places.count(place) == 1 else str(folder)
        for folder, name, place in zip(folders, names, places)
    ]
    return list(map(_read_run, folders, called))


def _read_run(folder: Path, name: str) -> Run:
    curves, logged_at = _read_curves(folder)
    evaluation = _read_evaluation(folder)
    finetuning = [_read_finetuning(path) for path in _finetuning_files(folder)]
    if not (curves or evaluation or finetuning):
        raise nothing_in(folder)
    here = digests_here(folder) if evaluation or finetuning else set()
    starts = list(lines(folder, "starts.jsonl", _start))
    batch = read_batch(folder)
    config_text = read_text(folder, "config.yaml")
    config = None if config_text is None else _read_config(folder / "config.yaml")
    return Run(
        folder=folder,
        name=name,
        curves=curves,
        logged_at=logged_at,
        starts=starts,
        config=config,
        config_text=config_text,
        evaluation=evaluation and evaluation_compared(evaluation, folder, here),
        finetuning=[finetuning_compared(found, here) for found in finetuning],
        bad_samples=_read_bad_samples(folder),
        skipped_at=list(lines(folder, "skipped_steps.jsonl", _step)),
        batch=batch,
        pictures=_read_pictures(folder, [] if batch else ["batch.png"]),
        wrong=read_wrong(folder),
        target=read_target(folder, starts[-1]["recipe"], config) if starts else None,
        done=(folder / "DONE").is_file(),
    )


def _read_config(path: Path) -> Config | None:
    try:
        return load_config(path)
    except (ConfigError, OSError) as error:  # of another version: its text is still shown
        return warn(f"{error}; reported without it")


# --- logs ------------------------------------------------------------------------------------------------------------


def _step(row: Fields) -> int:
    return row.integer("step", 0, MAX_STEP)


def _read_curves(folder: Path) -> tuple[dict[str, Curve], str | None]:
    """Returns the curves, and the time of the last line that has one."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    first_too_many = last_time = None
    for step, row, time in lines(folder, "metrics.jsonl", _metrics):
        last_time = time or last_time
        for metric, value in row.items():
            if metric not in points and len(points) >= MAX_METRICS:
                first_too_many = first_too_many or metric
                continue
            steps, values = points.setdefault(metric, ([], []))
            steps.append(step)
            values.append(value)
    if first_too_many is not None:
        warn(f"{folder}/metrics.jsonl: has more than {MAX_METRICS} metrics; {first_too_many} and others left out")
    return {metric: (np.array(steps), np.array(values)) for metric, (steps, values) in points.items()}, last_time


def _metrics(row: Fields) -> tuple[int, dict[str, float], str | None]:
    """Returns a line's step, numbers and time; leaves out texts, lists, and "layers/", which are for TensorBoard."""
    shown = {key: value for key, value in row.values.items() if key != "step" and not key.startswith("layers/")}
    numbers = [key for key, value in shown.items() if type(value) in (int, float)]
    time = row.values.get("time")
    return _step(row), {key: _figure(row, key) for key in numbers}, time if isinstance(time, str) else None


def _figure(row: Fields, key: str) -> float:
    """Returns a number; NaN and infinity are allowed, since a diverged run logs them."""
    value = row.values.get(key)
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return row.number(key, -MAX_VALUE, MAX_VALUE)


def _start(row: Fields) -> dict[str, Any]:
    """Returns a line of starts.jsonl; values that an earlier version did not write are None."""
    versions = row.part("versions") if row.has("versions") else None
    texts = "time", "recipe", "commit", "train_set", "device", "device_type"
    counts = "world_size", "parameters", "train_images", "num_classes"
    return {
        "step": _step(row),
        "lost_steps": row.integer("lost_steps", 0, MAX_STEP) if row.has("lost_steps") else None,
        "command": list(row.texts("command", ())) or None,
        "versions": versions and {name: versions.text(name) for name in versions.values},
        **{key: row.text(key, "") or None for key in texts},
        **{key: row.integer(key, 0, MAX_COUNT, 0) or None for key in counts},
    }


def _read_bad_samples(folder: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for reason in lines(folder, "bad_samples.jsonl", _reason):
        counts[reason if reason in counts or len(counts) < MAX_REASONS else "others"] += 1
    return dict(counts.most_common())


def _reason(row: Fields) -> str:
    _step(row)
    return row.text("reason", "None")


# --- results ---------------------------------------------------------------------------------------------------------


@contextmanager
def _written_by(tool: str, path: Path) -> Iterator[None]:
    """Turns errors from reading a results file into one that says that the tool did not write it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: was not written by tools/{tool}.py ({reason}); move it away") from None


def _evaluation_place(folder: Path) -> str:
    """Returns the folder of tools/evaluate.py's files: below a run or weights, or the folder itself if it was --out."""
    return "" if _is_of("pretrain-evaluation", folder, folder / "results.json") else "evaluation/"


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    if (path := inside(folder, f"{_evaluation_place(folder)}results.json")) is None:
        return None
    with _written_by("evaluate", path):
        values = Fields.read(path)
        if (found := values.text("format")) != "pretrain-evaluation":
            raise UserError(f"its format is {found!r}")
        others = [_evaluated(other) for other in values.parts("others", ())[:MAX_OTHERS]]
        return {**values.values, **_evaluated(values), "others": others}


def _evaluated(record: Fields) -> dict[str, Any]:
    rows = [
        {
            "model": row.text("model"),
            "metric": row.text("metric"),
            "value": _figure(row, "value"),
            "n": row.integer("n", 0, MAX_COUNT),
        }
        for row in record.parts("rows")
    ]
    told = {"weights_sha256": record.text("weights_sha256", ""), "of_run": record.text("of_run", "")}
    return {"weights": record.text("weights"), **told, "rows": rows}


def _finetuning_files(folder: Path) -> list[Path]:
    """Returns each task's results file: below a run or weights, or in a folder that was tools/finetune.py's --out.

    Those of a final run below are left out: it has a config.yaml, and may itself have been evaluated and fine-tuned.
    """
    found = {path for path in folder.glob("*/results.json") if _is_of("pretrain-finetuning", folder, path)}
    for between in ("", "*/", "*/*/"):
        for path in folder.glob(f"finetune*/{between}results.json"):
            *above, _ = path.relative_to(folder).parents
            of_a_run = any((folder / part / "config.yaml").exists() for part in above)
            if not of_a_run and inside(folder, str(path.relative_to(folder))):
                found.add(path)
    return sorted(path for path in found if not _is_of("pretrain-evaluation", folder, path))


def _is_of(form: str, folder: Path, path: Path) -> bool:
    if inside(folder, str(path.relative_to(folder))) is None:
        return False
    try:
        return Fields.read(path).text("format") == form
    except (OSError, UserError):
        return False  # not a file of ours


def _read_finetuning(path: Path) -> dict[str, Any]:
    with _written_by("finetune", path):
        values = Fields.read(path)
        done = values.flag("complete", True)
        each = values.items("values", ())
        return {
            "task": values.text("task"),
            "metric": values.text("metric"),
            "mean": _figure(values, "mean"),
            "std": _figure(values, "std") if values.has("std") else None,
            "values": [_figure(each, place) for place in each.values],
            "lr": _figure(values, "lr") if values.has("lr") else None,
            "n": values.integer("n", 0, MAX_COUNT) if values.has("n") else None,
            "image_size": values.integer("image_size", 1, MAX_IMAGE_SIZE) if values.has("image_size") else None,
            "from_scratch": values.flag("from_scratch", False),
            "weights_sha256": values.text("weights", ""),  # empty for random weights too
            "differs": [*values.texts("differs", ()), *([] if done else ["not all seeds are done"])],
        }


# --- pictures --------------------------------------------------------------------------------------------------------


def _read_pictures(folder: Path, names: list[str]) -> list[Picture]:
    names = [*names, *sorted(f"pictures/{path.name}" for path in folder.glob("pictures/*.png"))]
    if len(names) > MAX_PICTURES:
        warn(f"{folder}: has more than {MAX_PICTURES} pictures; {names[MAX_PICTURES]} and what follows are left out")
    paths = [path for name in names[:MAX_PICTURES] if (path := inside(folder, name))]
    found = [picture_file(path.stem, path) for path in paths]
    return [picture for picture in found if picture]


def read_wrong(folder: Path) -> Wrong:
    """Returns the wrong predictions of the last call of tools/evaluate.py that scored the head."""
    if (path := inside(folder, f"{_evaluation_place(folder)}wrong.json")) is None:
        return Wrong([], 0, None, "", "", "")
    try:
        values = Fields.read(path)
        items = values.parts("items")
        return Wrong(
            shown=[_wrong_item(folder, item, str(path)) for item in items[:MAX_WRONG]],
            number=len(items),
            confusion=_confusion(values) if items else None,
            **{key: values.text(key, "") for key in ("data", "data_sha256", "weights_sha256")},
        )
    except (OSError, UserError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be used as wrong predictions ({reason}); move it away") from None


def _wrong_item(folder: Path, item: Fields, source: str) -> WrongPrediction:
    return WrongPrediction(
        name=item.text("name"),
        label=item.text("label", max_letters=1 << 16),  # of several classes
        predicted=item.text("predicted"),
        probability=item.number("probability", 0, 1) if item.has("probability") else None,
        picture=_wrong_picture(folder, item, source),
    )


def _confusion(values: Fields) -> Confusion | None:
    """Returns the confusion matrix; None where it is not known or no class was mistaken for another."""
    if "confusion" not in values.values:  # several labels per image, or an earlier version
        return None
    classes = values.texts("classes")
    found = drawn(read_pairs(values, len(classes)), classes)
    return found if found.confused else None


def _wrong_picture(folder: Path, item: Fields, source: str) -> Picture | None:
    name = item.text("name")
    if content := item.text("png_base64", "", max_letters=2 * MAX_PICTURE_BYTES):
        try:
            return picture(name, base64.b64decode(content, validate=True), f"{source}: {name}")
        except ValueError:  # also letters that are not ASCII
            return warn(f"{source}: {name}: png_base64 is not base64; left out")
    if not (place := item.text("path", "")):
        return None
    if (path := inside(folder, f"{Path(source).relative_to(folder).parent}/{place}")) is None:
        return warn(f"{source}: {name}: no file {place} in the run's folder; left out")
    return picture_file(name, path)
