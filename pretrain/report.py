"""What runs achieved: curves.png, report.md and report.json, from what the runs wrote while they trained.

Reads metrics.jsonl, starts.jsonl, config.yaml, DONE and evaluation/results.json of each run; changes nothing in them.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.log import warn

Curve = tuple[np.ndarray, np.ndarray]  # steps and values


@dataclass(frozen=True)
class Run:
    """All that is known of a run from its folder."""

    folder: Path
    name: str  # as shown: the folder's name, or its path where two runs share a name
    curves: dict[str, Curve]  # by metric: "train/loss", "val/top1" ...
    starts: list[dict[str, Any]]  # versions, commit, ranks and step of each start
    config: Config | None
    evaluation: dict[str, Any] | None  # what tools/evaluate.py wrote
    done: bool


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders. Raises UserError when one is not a run, or has logged nothing yet."""
    names = [folder.resolve().name for folder in folders]
    return [_read_run(f, name if names.count(name) == 1 else str(f)) for f, name in zip(folders, names)]


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; give the folder of a run, such as runs/NAME, that has logged something")
    points: dict[str, list[tuple[int, float]]] = {}
    for row in _read_lines(path):
        for metric, value in row.items():
            if metric != "step":
                points.setdefault(metric, []).append((row["step"], value))
    if not points:
        raise UserError(f"{path}: is empty: the run has logged nothing yet")
    curves = {metric: (np.array(s), np.array(v, dtype=float)) for metric, p in points.items() for s, v in [zip(*p)]}
    starts, config, results = folder / "starts.jsonl", folder / "config.yaml", folder / "evaluation" / "results.json"
    return Run(
        folder=folder,
        name=name,
        curves=curves,
        starts=_read_lines(starts) if starts.is_file() else [],
        config=load_config(config) if config.is_file() else None,
        evaluation=_read_json(results) if results.is_file() else None,
        done=(folder / "DONE").is_file(),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last one of a running or killed run may be torn."""
    rows, torn = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            torn += 1
    if torn:
        warn(f"{path}: {torn} damaged lines left out")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != "pretrain-evaluation":
            raise ValueError(f"its format is {values['format']!r}")
        return values
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: was not written by tools/evaluate.py ({error}); move it away") from None


# --- numbers ---------------------------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """Returns a run's figures as JSON values: last and best metrics, what was left out, and what it ran with."""
    last_start = run.starts[-1] if run.starts else {}
    config = run.config
    rate = run.curves.get("train/images_per_s")
    return {
        "run": run.name,
        "folder": str(run.folder),
        "done": run.done,
        "steps": max(int(steps[-1]) for steps, _ in run.curves.values()),
        "total_steps": config.total_steps if config else None,
        "global_batch": config.data.global_batch if config else None,
        "model": config.model.name if config else None,
        "last": {metric: _finite(values[-1]) for metric, (_, values) in sorted(run.curves.items())},
        "best": {metric: _best(run.curves[metric], *how) for metric, how in _BEST.items() if metric in run.curves},
        "median_images_per_s": _finite(np.median(rate[1])) if rate else None,
        "skipped_steps": _count(run, "train/skipped_steps"),
        "bad_samples": _count(run, "train/bad_samples"),
        "restarts": len(run.starts) - 1 if run.starts else None,
        "ranks": [start.get("world_size") for start in run.starts],
        "commit": last_start.get("commit"),
        "command": last_start.get("command"),
        "versions": last_start.get("versions"),
        "evaluation": run.evaluation,
    }


_BEST: dict[str, tuple[Callable[[np.ndarray], Any]]] = {
    "val/top1": (np.nanargmax,),
    "val/top5": (np.nanargmax,),
    "val/loss": (np.nanargmin,),
    "train/loss": (np.nanargmin,),
}


def _best(curve: Curve, position: Callable[[np.ndarray], Any]) -> dict[str, Any] | None:
    steps, values = curve
    if np.isnan(values).all():
        return None
    best = int(position(values))  # the first of equals
    return {"step": int(steps[best]), "value": _finite(values[best])}


def _count(run: Run, metric: str) -> int | None:
    return int(run.curves[metric][1][-1]) if metric in run.curves else None


def _finite(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


# --- writing ---------------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Writes curves.png, report.md and report.json into `out` and returns their paths. Raises UserError when it cannot.

    The Markdown page shows the picture by its relative name.
    """
    summaries = [summary(run) for run in runs]
    record = {"format": "pretrain-report", "version": 1, "runs": summaries}
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_curves(runs, out / "curves.png")
        _write_text(out / "report.md", markdown(summaries))
        _write_text(out / "report.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); give another --out") from None
    return [out / name for name in ("curves.png", "report.md", "report.json")]


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns the page: one table of all runs, then what each ran with and its evaluation."""
    lines = ["# Report", "", "![Curves](curves.png)", "", *_table(_OVERVIEW, [_overview(s) for s in summaries])]
    for values in summaries:
        versions = ", ".join(f"{name} {version}" for name, version in (values["versions"] or {}).items())
        facts = {
            "folder": values["folder"],
            "model": values["model"],
            "command": " ".join(values["command"] or []),
            "ranks of each start": ", ".join(map(str, values["ranks"])),
            "commit": values["commit"],
            "versions": versions,
        }
        lines += ["", f"## {values['run']}", "", *(f"- {name}: {fact}" for name, fact in facts.items() if fact)]
        if values["evaluation"]:
            rows = [[r["model"], r["metric"], _shown(r["metric"], r["value"]), f"{r['n']:,}"] for r in _rows(values)]
            lines += ["", f"Evaluation of {values['evaluation']['weights']}:", ""]
            lines += _table(["features", "metric", "value", "images"], rows)
    return "\n".join(lines) + "\n"


_OVERVIEW = [
    "run",
    "steps",
    "best val top-1",
    "last val top-1",
    "last train loss",
    "images/s",
    "skipped",
    "bad",
    "restarts",
]


def _overview(values: dict[str, Any]) -> list[str]:
    best, last = values["best"].get("val/top1"), values["last"]
    total = f" of {values['total_steps']:,}" if values["total_steps"] else ""
    loss, rate = last.get("train/loss"), values["median_images_per_s"]
    return [
        values["run"],
        f"{values['steps']:,}{total}" + ("" if values["done"] else ", not done"),
        f"{best['value']:.2%} at step {best['step']:,}" if best else "",
        f"{last['val/top1']:.2%}" if last.get("val/top1") is not None else "",
        f"{loss:.4f}" if loss is not None else "",
        f"{rate:,.0f}" if rate is not None else "",
        *("" if values[name] is None else f"{values[name]:,}" for name in ("skipped_steps", "bad_samples", "restarts")),
    ]


def _rows(values: dict[str, Any]) -> list[dict[str, Any]]:
    return values["evaluation"]["rows"]


def _shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{value:.2%}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    table = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in table]


# --- curves ----------------------------------------------------------------------------------------------------------

# title, unit of the vertical axis, metrics, factor, scale
_PANELS = (
    ("Loss", "cross-entropy [nats]", ("train/loss", "val/loss"), 1, "linear"),
    ("Top-1 accuracy", "images [%]", ("train/top1", "val/top1"), 100, "from zero"),
    ("Learning rate", "rate", ("train/lr",), 1, "from zero"),
    ("Gradient norm before clipping", "global L2 norm, logarithmic", ("train/grad_norm",), 1, "log"),
    ("Speed", "images per second, all ranks", ("train/images_per_s",), 1, "from zero"),
    ("Waiting for data", "time of rank 0 [%]", ("train/data_wait",), 100, "from zero"),
)
_MANY = 100  # points; from here on the mean over a window is drawn over the pale raw curve


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draws loss, accuracy, learning rate, gradient norm, speed and waiting of all runs into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches
    figure = Figure(figsize=(15, 8.5), layout=layout)  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    colors = [f"C{i % 10}" for i in range(len(runs))]
    for axes, (title, unit, metrics, factor, scale) in zip(figure.subplots(2, 3).flat, _PANELS):
        for i, (run, color) in enumerate(zip(runs, colors)):
            for metric in metrics:
                if metric == "train/lr" and metric in run.curves:  # often the same for all: earlier runs drawn wider
                    axes.plot(*run.curves[metric], color=color, lw=1.8 + 2 * min(4, len(runs) - 1 - i))
                elif metric in run.curves:
                    _draw_curve(axes, run.curves[metric], factor, color, dots=metric.startswith("val/"))
        axes.set_title(title, fontsize=12, fontweight="bold")
        axes.set_ylabel(unit)
        _finish_panel(axes, scale)
    handles = [Line2D([], [], color=c, lw=2.5, label=_legend(run)) for run, c in zip(runs, colors)]
    if any(metric.startswith("val/") for run in runs for metric in run.curves):
        handles += [
            Line2D([], [], color="black", lw=2, label="training"),
            Line2D([], [], color="black", ls="--", marker="o", ms=4, lw=1, label="validation"),
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False, fontsize=11)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _finish_panel(axes: Any, scale: str) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes, color="gray")
    elif scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale == "from zero":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _legend(run: Run) -> str:
    best = _best(run.curves["val/top1"], np.nanargmax) if "val/top1" in run.curves else None
    return run.name + (f" (best validation top-1 {best['value']:.2%} at step {best['step']:,})" if best else "")


def _draw_curve(axes: Any, curve: Curve, factor: float, color: str, dots: bool) -> None:
    steps, values = curve[0], curve[1] * factor
    if dots:
        axes.plot(steps, values, color=color, ls="--", lw=1, marker="o", ms=4)
    elif len(values) < _MANY:
        axes.plot(steps, values, color=color, lw=1.8)
    else:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
        axes.plot(steps, _moving_mean(values, len(values) // 40), color=color, lw=1.8)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean over `window` points around each, of the finite ones; shorter windows at the ends."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
