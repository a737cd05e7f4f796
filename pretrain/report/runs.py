"""What a run's folder holds, read into one plain value; hands on `Run`. Changes nothing in the folder.

metrics.jsonl, starts.jsonl, bad_samples.jsonl, skipped_steps.jsonl, config.yaml, DONE, batch.png (train/folder.py);
evaluation/results.json (tools/evaluate.py), evaluation/wrong.json, finetune/TASK/results.json and the same below
finetune-from-scratch (tools/finetune.py), pictures/*.png (tools/visualize.py).
A folder without a run has what it has: that of converted weights, or the --out of tools/finetune.py.
Folders travel between people: nothing in them is trusted, pictures least.
"""

import base64
import binascii
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.config import Config, load_config
from pretrain.errors import ConfigError, UserError
from pretrain.log import warn

ROOT = Path(__file__).resolve().parents[2]
Curve = tuple[np.ndarray, np.ndarray]  # steps and values
MAX_WRONG = 48  # thumbnails of one run on the page: a screenful or two


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG that can be shown."""

    name: str  # of its file, without the ending
    data_uri: str
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class WrongPrediction:
    """A test image, the class it belongs to, and the one the model gave it."""

    name: str
    label: str
    predicted: str
    probability: float | None  # of the predicted class
    picture: Picture | None


@dataclass(frozen=True)
class Target:
    """What the recipe's header promises."""

    recipe: str  # the config file, as the command named it
    score: str


@dataclass(frozen=True)
class Run:
    """All that is known of a run from its folder."""

    folder: Path
    name: str  # as shown: the folder's name, or its path where two runs share a name
    curves: dict[str, Curve]  # by metric: "train/loss", "val/top1" ...
    starts: list[dict[str, Any]]  # time, versions, commit, ranks and step of each start
    config: Config | None
    config_text: str | None  # config.yaml as it stands there
    evaluation: dict[str, Any] | None  # what tools/evaluate.py wrote
    finetuning: list[dict[str, Any]]  # what tools/finetune.py wrote, by task
    bad_samples: dict[str, int]  # by cause
    skipped_at: list[int]  # steps whose update was skipped
    pictures: list[Picture]
    wrong: list[WrongPrediction]  # the first MAX_WRONG
    num_wrong: int  # in wrong.json
    target: Target | None
    done: bool


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads folders of runs, of weights with results, of results. Raises UserError when one holds nothing to report."""
    names = [folder.resolve().name for folder in folders]
    return [_read_run(f, name if names.count(name) == 1 else str(f)) for f, name in zip(folders, names)]


def _read_run(folder: Path, name: str) -> Run:
    curves = _read_curves(folder / "metrics.jsonl")
    evaluation = _read_evaluation(folder / "evaluation" / "results.json")
    finetuning = [_read_finetuning(path) for path in _finetuning_files(folder)]
    if not (curves or evaluation or finetuning):
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; give the folder of a run, such as runs/NAME")
        raise UserError(
            f"{folder}: nothing to report: no metrics.jsonl of a run that has logged something, and no results of "
            "tools/evaluate.py or tools/finetune.py"
        )
    starts = list(_read_lines(folder / "starts.jsonl"))
    bad = Counter(str(row.get("reason")) for row in _read_lines(folder / "bad_samples.jsonl"))
    wrong, num_wrong = _read_wrong(folder)
    config = folder / "config.yaml"
    return Run(
        folder=folder,
        name=name,
        curves=curves,
        starts=starts,
        config=_read_config(config) if config.is_file() else None,
        config_text=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        evaluation=evaluation,
        finetuning=finetuning,
        bad_samples=dict(bad.most_common()),
        skipped_at=[row["step"] for row in _read_lines(folder / "skipped_steps.jsonl")],
        pictures=_read_pictures(folder),
        wrong=wrong,
        num_wrong=num_wrong,
        target=_read_target(starts[-1], folder.resolve().name) if starts else None,
        done=(folder / "DONE").is_file(),
    )


def _read_curves(path: Path) -> dict[str, Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in _read_lines(path):
        for metric, value in row.items():
            if metric != "step" and isinstance(value, (int, float)):
                points.setdefault(metric, []).append((row["step"], value))
    return {metric: (np.array(s), np.array(v, dtype=float)) for metric, p in points.items() for s, v in [zip(*p)]}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines that are whole: the last one of a running or killed run may be torn. No file has no lines."""
    torn = 0
    if not path.is_file():
        return
    with path.open("rb") as file:  # line by line: bad_samples.jsonl of a large run has millions
        for line in file:
            try:
                row = json.loads(line)
                row = {**row, "step": int(row["step"])}
            except (ValueError, KeyError, TypeError):
                torn += 1
                continue
            yield row
    if torn:
        warn(f"{path}: {torn} damaged lines left out")


def _read_config(path: Path) -> Config | None:
    try:
        return load_config(path)
    except ConfigError as error:  # of another version: its text is shown all the same
        warn(f"{error}; reported without it")
        return None


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != "pretrain-evaluation":
            raise ValueError(f"its format is {values['format']!r}")
        kinds = {"model": str, "metric": str, "value": float, "n": int}
        rows = [{name: kind(row[name]) for name, kind in kinds.items()} for row in values["rows"]]
        return {**values, "weights": str(values["weights"]), "rows": rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: was not written by tools/evaluate.py ({error}); move it away") from None


def _finetuning_files(folder: Path) -> list[Path]:
    """The results of each task: below a run or weights, or in the folder that tools/finetune.py's --out named."""
    own = [path for path in folder.glob("*/results.json") if _format_of(path) == "pretrain-finetuning"]
    found = {*folder.glob("finetune*/**/results.json"), *own}
    return sorted(path for path in found if path.parent.name != "evaluation")  # of a final run, by tools/evaluate.py


def _format_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"]
    except (ValueError, KeyError, TypeError):
        return None  # somebody else's file


def _read_finetuning(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            "task": str(values["task"]),
            "metric": str(values["metric"]),
            "mean": float(values["mean"]),
            "std": None if values.get("std") is None else float(values["std"]),
            "values": [float(value) for value in values.get("values") or []],
            "lr": None if values.get("lr") is None else float(values["lr"]),
            "n": None if values.get("n") is None else int(values["n"]),
            "from_scratch": bool(values.get("from_scratch", False)),
            "differs": [str(difference) for difference in values.get("differs") or []]
            + ([] if values.get("complete", True) else ["not all seeds are done"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: was not written by tools/finetune.py ({error!r}); move it away") from None


# --- pictures --------------------------------------------------------------------------------------------------------


def _read_pictures(folder: Path) -> list[Picture]:
    paths = [folder / "batch.png", *sorted(folder.glob("pictures/*.png"))]
    found = [_picture(path.stem, path.read_bytes(), str(path)) for path in paths if path.is_file()]
    return [picture for picture in found if picture]


def _picture(name: str, content: bytes, source: str) -> Picture | None:
    """Returns bytes as something to show; warns and returns None when they are not a PNG or JPEG."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        warn(f"{source}: not a picture that can be shown ({' '.join(str(error).split())}); left out")
        return None
    kind = "png" if image.format == "PNG" else "jpeg"
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size)


def _read_wrong(folder: Path) -> tuple[list[WrongPrediction], int]:
    """Returns the first MAX_WRONG wrong predictions, and how many the file has."""
    path = folder / "evaluation" / "wrong.json"
    if not path.is_file():
        return [], 0
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return [
            WrongPrediction(
                name=str(item["name"]),
                label=str(item["label"]),
                predicted=str(item["predicted"]),
                probability=None if item.get("probability") is None else float(item["probability"]),
                picture=_wrong_picture(folder, item, str(path)),
            )
            for item in items[:MAX_WRONG]
        ], len(items)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be used as wrong predictions ({error!r}); move it away") from None


def _wrong_picture(folder: Path, item: dict[str, Any], source: str) -> Picture | None:
    name = str(item["name"])
    if "png_base64" in item:
        try:
            return _picture(name, base64.b64decode(item["png_base64"], validate=True), f"{source}: {name}")
        except binascii.Error:
            warn(f"{source}: {name}: png_base64 is not base64; left out")
            return None
    if "path" not in item:
        return None
    path = (folder / "evaluation" / item["path"]).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():  # a page must not carry other files away
        warn(f"{source}: {name}: no file {item['path']} in the run's folder; left out")
        return None
    return _picture(name, path.read_bytes(), str(path))


# --- the recipe's promise --------------------------------------------------------------------------------------------


def _read_target(start: dict[str, Any], name: str) -> Target | None:
    """Returns what the recipe named in the last command promises; None where that file is not at hand."""
    words = [str(word) for word in start.get("command") or []]
    recipe = next((after for word, after in zip(words, words[1:]) if word == "--config"), None)
    recipe = recipe or next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
    if recipe is None or Path(recipe).suffix not in (".yaml", ".yml"):
        return None
    for path in (Path(recipe), ROOT / recipe):
        if path.is_file():
            score = recipe_score(path.read_text(encoding="utf-8", errors="replace"), name)
            return Target(recipe, score) if score else None
    return None


def recipe_score(text: str, name: str) -> str | None:
    """Returns the `score:` paragraph of a config's header, preceded by the line of run `name` in its table, if any."""
    header = [line.removeprefix("#").rstrip() for line in text.splitlines() if line.startswith("#")]
    begin = next((i for i, line in enumerate(header) if line.startswith(" score:")), None)
    if begin is None:
        return None
    words = [header[begin].partition(":")[2].strip()]
    for line in header[begin + 1 :]:
        if not line.startswith("   ") or "|" in line:  # the next paragraph, or the table
            break
        words.append(line.strip())
    own = re.search(r"^name: *(\S+)", text, flags=re.MULTILINE)
    for line in header:
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and (
            f"name={name}" in cells[3].split() or (cells[3] == "(this file)" and own and own[1] == name)
        ):
            return f"{cells[0]}: {cells[2]}. {' '.join(words)}"
    return " ".join(words)
