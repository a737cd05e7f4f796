"""The figures of runs, as JSON values and as tables of text for both the HTML page and the Markdown page."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.config import Config, model_name, non_defaults
from pretrain.config.hints import settings
from pretrain.escape import portable, portable_path
from pretrain.models.formats import told_of_run
from pretrain.report.runs import Curve, Run
from pretrain.report.story import goodput, lost_steps, sentence, training_seconds
from pretrain.tasks.published import PAPER_ROWS, PaperRow
from pretrain.tasks.table import VTAB, vtab_means

NOTHING = "–"  # in a cell for which nothing was measured
DIGEST_LETTERS = 12  # of a digest as shown: as many as in file names

# The columns of the paper's Table 2, and the tasks whose scores they show.
PAPER_COLUMNS = {
    "ImageNet": "imagenet",
    "ReaL": "real",
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "Pets": "pets",
    "Flowers": "flowers",
    "VTAB": "vtab",
}
REFERENCES = [row for row in PAPER_ROWS if set(row.scores) & set(PAPER_COLUMNS.values())]
VTAB_REFERENCES = [row for row in PAPER_ROWS if set(VTAB) <= set(row.scores)]  # the paper's Table 9


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]
    num_runs: int = 0  # the first so many rows are run 0, 1 ..., in the colour of their curves
    text_columns: tuple[int, ...] = (0,)  # aligned left; the others hold figures


def summary(run: Run) -> dict[str, Any]:
    """Returns a run's figures as JSON values: last and best metrics, bad samples, skipped steps, environment."""
    last_start = run.starts[-1] if run.starts else {}
    config = run.config
    rates = _finite_values(run, "train/images_per_s")
    values = {
        "run": run.name,
        "folder": str(run.folder),
        "done": run.done,
        "steps": max((int(steps[-1]) for steps, _ in run.curves.values()), default=None),
        "total_steps": config.total_steps if config else None,
        "global_batch": config.data.global_batch if config else None,
        "model": model_name(config.model) if config else None,
        "target": {"recipe": run.target.recipe, "score": run.target.score} if run.target else None,
        "scores": protocol_scores(run),
        "scores_at": {task: found for task, found in _by_size(run).items() if len(found) > 1},
        "last": {metric: finite(values[-1]) for metric, (_, values) in sorted(run.curves.items())},
        "best": {
            metric: best(run.curves[metric], position) for metric, position in _BEST.items() if metric in run.curves
        },
        "median_images_per_s": float(np.median(rates)) if rates.size else None,
        "skipped_steps": _count(run, "train/skipped_steps"),
        "skipped_at": run.skipped_at,
        "bad_samples": _count(run, "train/bad_samples"),
        "bad_samples_by_cause": run.bad_samples,
        "restarts": len(run.starts) - 1 if run.starts else None,
        "lost_steps": lost_steps(run),
        "goodput": goodput(run),
        "ranks": [start.get("world_size") for start in run.starts],
        "starts": [{key: start.get(key) for key in ("step", "time", "world_size", "commit")} for start in run.starts],
        "commit": last_start.get("commit"),
        "command": last_start.get("command"),
        "versions": last_start.get("versions"),
        "evaluation": run.evaluation,
        "finetuning": run.finetuning,
        "wrong_predictions": {
            "count": run.wrong.number,
            **{key: getattr(run.wrong, key) for key in ("data", "data_sha256", "weights_sha256")},
            "confused": [
                {"label": label, "predicted": predicted, "count": number, "of": total}
                for label, predicted, number, total in (run.wrong.confusion.confused if run.wrong.confusion else ())
            ],
            "shown": [
                {"name": w.name, "label": w.label, "predicted": w.predicted, "probability": w.probability}
                for w in run.wrong.shown
            ],
        },
        "pictures": [picture.name for picture in run.pictures],
        "config_differences": dict(config_differences(config)) if config else None,
    }
    return {**values, "sentence": sentence(run, values), "training_seconds": training_seconds(run)}


_BEST: dict[str, Callable[[np.ndarray], Any]] = {
    "val/top1": np.nanargmax,
    "val/top5": np.nanargmax,
    "val/loss": np.nanargmin,
    "train/loss": np.nanargmin,
}


def best(curve: Curve, position: Callable[[np.ndarray], Any]) -> dict[str, Any] | None:
    """Returns step and value at `position`, np.nanargmax or np.nanargmin; None when no value is finite."""
    steps, values = curve[0], np.where(np.isfinite(curve[1]), curve[1], np.nan)
    if np.isnan(values).all():
        return None
    found = int(position(values))  # the first of equals
    return {"step": int(steps[found]), "value": float(values[found])}


def _count(run: Run, metric: str) -> int | None:
    values = _finite_values(run, metric)
    return int(values[-1]) if values.size else None


def _finite_values(run: Run, metric: str) -> np.ndarray:
    values = run.curves[metric][1] if metric in run.curves else np.empty(0)
    return values[np.isfinite(values)]


def finite(value: Any) -> float | None:
    """Returns the number, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def protocol_scores(run: Run) -> dict[str, float]:
    """Returns the run's mean score of each task, a fraction; "vtab" is the flat mean of its tasks, if all have one.

    Results by another protocol, or from random weights, do not count; only the table of fine-tunings shows them. Of
    several scores, such as ImageNet's at 384 and at 512 pixels, the one at the largest size, the last of equals.
    """
    means = {task: found[-1]["mean"] for task, found in _by_size(run).items()}
    if set(VTAB) <= set(means):
        means.setdefault("vtab", vtab_means({task: means[task] for task in VTAB})["vtab"])
    return means


def _by_size(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Returns each task's mean scores by the protocol, with image sizes, from the smallest size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for of in sorted(run.finetuning, key=lambda of: of["image_size"] or 0):  # stable
        if not of["differs"] and not of["from_scratch"] and math.isfinite(of["mean"]):
            found.setdefault(of["task"], []).append({"image_size": of["image_size"], "mean": of["mean"]})
    return found


def config_differences(config: Config) -> Iterator[tuple[str, str]]:
    """Yields key and value, as YAML, of settings that differ from the defaults or have none."""
    return ((key, _as_yaml(value)) for key, value in non_defaults(config))


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(list(value) if isinstance(value, tuple) else value)


# --- tables ----------------------------------------------------------------------------------------------------------


def overview_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """One line per run: steps, accuracy and loss, speed, skipped steps, bad samples, restarts."""
    header = ["run", "steps", "best val top-1", "last val top-1", "last train loss", "images/s"]
    header += ["skipped steps", "bad samples", "restarts"]
    return Table(header, [_overview(values) for values in summaries], num_runs=len(summaries))


def _overview(values: dict[str, Any]) -> list[str]:
    best_top1, last = values["best"].get("val/top1"), values["last"]
    total = f" of {values['total_steps']:,}" if values["total_steps"] else ""
    steps = NOTHING if values["steps"] is None else f"{values['steps']:,}{total}"
    loss, rate = last.get("train/loss"), values["median_images_per_s"]
    return [
        values["run"],
        steps if values["done"] or values["steps"] is None else f"{steps}, not done",
        f"{best_top1['value']:.2%} at step {best_top1['step']:,}" if best_top1 else "",
        f"{last['val/top1']:.2%}" if last.get("val/top1") is not None else "",
        f"{loss:.4f}" if loss is not None else "",
        f"{rate:,.0f}" if rate is not None else "",
        *("" if values[name] is None else f"{values[name]:,}" for name in ("skipped_steps", "bad_samples", "restarts")),
    ]


def paper_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """The runs' scores above the paper's."""
    rows = [
        [values["run"], *(_score(values, task) for task in PAPER_COLUMNS.values()), "this report"]
        for values in summaries
    ]
    for row in REFERENCES:
        cells = (f"{row.scores[task]:.2f}%" if task in row.scores else NOTHING for task in PAPER_COLUMNS.values())
        rows.append([_paper_model(row), *cells, row.source])
    columns = len(PAPER_COLUMNS)
    return Table(["model", *PAPER_COLUMNS, "source"], rows, num_runs=len(summaries), text_columns=(0, columns + 1))


def _score(values: dict[str, Any], task: str) -> str:
    """Returns a cell of the paper's table; where there are several scores, all of them with their image sizes."""
    if several := values["scores_at"].get(task):
        return ", ".join(f"{_percent(of['mean'])} at {of['image_size'] or NOTHING} px" for of in several)
    return _percent(values["scores"].get(task))


def vtab_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """VTAB task by task and the means, beside the paper's Table 9; no rows if no run has a task by the protocol."""
    measured = [{task: values["scores"][task] for task in VTAB if task in values["scores"]} for values in summaries]
    published = [{task: row.scores[task] / 100 for task in VTAB} for row in VTAB_REFERENCES]
    columns = [_with_means(scores) for scores in (*measured, *published)]
    rows = [[name.removeprefix("vtab/"), *(_percent(of.get(name)) for of in columns)] for name in columns[-1]]
    header = ["task", *(values["run"] for values in summaries), *map(_paper_model, VTAB_REFERENCES)]
    return Table(header, rows if any(measured) else [])


def _with_means(scores: dict[str, float]) -> dict[str, float]:
    if len(scores) < len(VTAB):
        return scores
    return scores | {f"mean of {name.replace('vtab', 'all')}": mean for name, mean in vtab_means(scores).items()}


def _paper_model(row: PaperRow) -> str:
    return f"ViT-{row.model}, {row.upstream}"


def targets(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each score that a recipe's header promises once: names of its runs, recipe, score."""
    found: dict[tuple[str, str], list[str]] = {}
    for values in summaries:
        if target := values["target"]:
            found.setdefault((target["recipe"], target["score"]), []).append(values["run"])
    return [{"runs": runs, "recipe": recipe, "score": score} for (recipe, score), runs in found.items()]


def losses_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """What was not trained on: samples by cause, and steps."""
    causes = list(dict.fromkeys(cause for values in summaries for cause in values["bad_samples_by_cause"]))
    rows = []
    for values in summaries:
        seen = values["steps"] * values["global_batch"] if values["steps"] and values["global_batch"] else None
        bad, skipped = values["bad_samples"], values["skipped_steps"]
        by_cause = values["bad_samples_by_cause"]
        rows.append(
            [
                values["run"],
                NOTHING if seen is None else f"{seen:,}",
                NOTHING if bad is None else f"{bad:,}" + (f" ({bad / seen:.3%})" if bad and seen else ""),
                *(f"{by_cause.get(cause, 0):,}" for cause in causes),
                NOTHING if skipped is None else f"{skipped:,}" + _at_steps(values["skipped_at"]),
            ]
        )
    return Table(["run", "samples seen", "bad samples", *causes, "skipped steps"], rows, num_runs=len(rows))


def nothing_lost(summaries: Sequence[dict[str, Any]]) -> str | None:
    """Returns a sentence in place of the table if all counts are known and zero, else None."""
    counts = [values[name] for values in summaries for name in ("bad_samples", "skipped_steps")]
    listed = any(values["bad_samples_by_cause"] or values["skipped_at"] for values in summaries)
    if None in counts or any(counts) or listed:
        return None
    return "Nothing was left out: no bad sample, no skipped step."


def _at_steps(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    return f" (at {', '.join(f'{step:,}' for step in steps[:5])}{', ...' if len(steps) > 5 else ''})"


def starts_table(values: dict[str, Any]) -> Table:
    """Each start of a run: the first, and every resumption."""
    rows = [
        [
            str(number),
            _date(start["time"]),
            f"{start['step']:,}",
            NOTHING if start["world_size"] is None else str(start["world_size"]),
            short_commit(start["commit"]),
        ]
        for number, start in enumerate(values["starts"], 1)
    ]
    return Table(["start", "time", "at step", "ranks", "commit"], rows, text_columns=(0, 1, 4))


def _date(time: Any) -> str:
    """Returns a time such as 2026-11-22T09:35:13+0000 with spaces, cut to minutes."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d([+-]\d{4})", str(time))
    return f"{match[1]} {match[2]} {match[3]}" if match else str(time or NOTHING)


def short_commit(commit: Any) -> str:
    """Returns the first 10 digits of a commit, with its mark if files differed from it."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", str(commit)) if commit else NOTHING


def evaluations(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the records of all weights that were evaluated into a run's folder, those of the last call first."""
    record = values["evaluation"]
    return [record, *record["others"]] if record else []


def of_wrong(wrong: dict[str, Any]) -> str:
    """Returns the data and weights of wrong predictions, as the end of a heading; "" where unknown."""
    told = f" on {wrong['data']}" if wrong["data"] else ""
    return told + (f", weights {wrong['weights_sha256'][:DIGEST_LETTERS]}" if wrong["weights_sha256"] else "")


def of_record(record: dict[str, Any]) -> str:
    """Returns the weights of an evaluation's record, in words."""
    digest = f", weights {record['weights_sha256'][:DIGEST_LETTERS]}" if record["weights_sha256"] else ""
    told = portable_path(record["weights"]) + digest + told_of_run(record["of_run"])
    return told + "; those here now are others" * record["is_of_others"]


def evaluation_table(found: Sequence[dict[str, Any]]) -> Table:
    """The rows that tools/evaluate.py measured; a standard deviation is shown beside its mean."""
    spread = {(row["model"], row["metric"]): row["value"] for row in found}
    rows = []
    for row in found:
        if not row["metric"].endswith("-std"):
            std = spread.get((row["model"], f"{row['metric']}-std"))
            cell = shown(row["metric"], row["value"]) + ("" if std is None else f" ± {100 * std:.2f}")
            rows.append([row["model"], row["metric"], cell, f"{row['n']:,}"])
    return Table(["features", "metric", "value", "images"], rows, text_columns=(0, 1))


def finetuning_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """A line per task and run."""
    rows = []
    for values in summaries:
        for of in values["finetuning"]:
            mean, std = of["mean"], of["std"]
            cell = NOTHING if not math.isfinite(mean) else shown(of["metric"], mean)
            spread = f" ± {100 * std:.2f}" if std is not None and math.isfinite(std) else ""
            rows.append(
                [
                    of["task"],
                    values["run"],
                    of["metric"],
                    cell + spread,
                    str(of["image_size"] or NOTHING),
                    str(len(of["values"]) or NOTHING),
                    NOTHING if of["lr"] is None else f"{of['lr']:g}",
                    NOTHING if of["n"] is None else f"{of['n']:,}",
                    "; ".join(["random weights"] * of["from_scratch"] + of["differs"]) or "the paper's",
                    of["weights_sha256"][:DIGEST_LETTERS] or NOTHING,
                ]
            )
    rows.sort(key=lambda row: row[0])  # stable: runs keep their order
    header = ["task", "run", "metric", "mean", "px", "seeds", "lr", "images", "protocol", "weights"]
    return Table(header, rows, text_columns=(0, 1, 2, 8, 9))


def config_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Settings that differ from the defaults, a column per run; keys in the order of pretrain/config/sections.py."""
    known = [values for values in summaries if values["config_differences"]]
    keys = dict.fromkeys(key for values in known for key in values["config_differences"])
    order = sorted(keys, key=[key for key, *_ in settings()].index)
    rows = [[key, *(portable(values["config_differences"].get(key, NOTHING)) for values in known)] for key in order]
    columns = range(len(known) + 1)
    return Table(["key", *(values["run"] for values in known)], rows, text_columns=tuple(columns))


def shown(metric: str, value: float) -> str:
    """Returns a loss as a number, everything else as per cent."""
    return f"{value:.4f}" if metric.endswith(("loss", "quadratic_kappa")) else f"{value:.2%}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2%}"
