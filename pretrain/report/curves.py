"""Curves of runs over steps: one PNG by matplotlib, and panels of plain geometry that the HTML page draws as SVG.

Unlike a PNG, the panels follow the page's colour scheme, light or dark, and its font.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.escape import shown
from pretrain.log import warn
from pretrain.report.figures import best
from pretrain.report.runs import Run
from pretrain.storage import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart too, darkened where they were pale on white. The
# page has lighter ones for its dark scheme, in the same order; from the ninth run on they repeat, dashed.
COLORS = ("#0072b2", "#d55e00", "#00845f", "#b5578f", "#b07900", "#3a9bd3", "#6b4fa0", "#5f6368")


class PanelOf(NamedTuple):
    """What one panel shows."""

    title: str
    unit: str  # of the vertical axis
    metrics: tuple[str, ...]
    factor: float
    scale: str  # linear, from zero, log


PANELS = (
    PanelOf("Loss", "cross-entropy [nats]", ("train/loss", "val/loss"), 1, "linear"),
    PanelOf("Top-1 accuracy", "images [%]", ("train/top1", "val/top1"), 100, "from zero"),
    PanelOf("Learning rate", "rate", ("train/lr",), 1, "from zero"),
    PanelOf("Gradient norm before clipping", "global L2 norm, logarithmic", ("train/grad_norm",), 1, "log"),
    PanelOf("Speed", "images per second, all ranks", ("train/images_per_s",), 1, "from zero"),
    PanelOf("Waiting for data", "time of rank 0 [%]", ("train/data_wait",), 100, "from zero"),
)
_MAX_NAME = 120  # letters of a legend's line
_LEGEND_LETTERS = 170  # that fit the width of the PNG
MAX_PANELS = 60  # beside PANELS; a PNG has at most 65,535 pixels a side
_UNEQUAL = 4  # if the lengths of runs differ by a larger factor, the step axis is logarithmic, to show the shortest too
_MANY = 100  # points, from which on a moving mean is drawn over the pale raw curve


def panels_of(runs: Sequence[Run]) -> list[PanelOf]:
    """Returns PANELS, and one for each few-shot and k-nn accuracy and average precision logged during training."""
    found = {metric for run in runs for metric in run.curves if re.search("shot|/knn_|/mean_average_prec", metric)}
    natural = sorted(
        (metric for metric in found if not metric.endswith("-std")),
        key=lambda m: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", m)],  # 5-shot before 10-shot
    )
    if len(natural) > MAX_PANELS:
        warn(f"only {MAX_PANELS} of {len(natural)} accuracies over steps are drawn; without {natural[MAX_PANELS]} ...")
    shown_ones = natural[:MAX_PANELS]
    return [*PANELS, *(PanelOf(m.removeprefix("val/"), "images [%]", (m,), 100, "from zero") for m in shown_ones)]


class _Drawn(NamedTuple):
    """One curve of a panel, in the units of its axis; NaN where nothing can be drawn."""

    run: int
    metric: str
    steps: np.ndarray
    values: np.ndarray


def _drawn(of: PanelOf, runs: Sequence[Run]) -> list[_Drawn]:
    found = []
    for number, run in enumerate(runs):
        for metric in of.metrics:
            if metric in run.curves:
                steps, values = run.curves[metric]
                seen = np.isfinite(values) & ((values > 0) | (of.scale != "log"))
                found.append(_Drawn(number, metric, steps, np.where(seen, values * of.factor, np.nan)))
    return found


def _strokes(curve: _Drawn, runs: Sequence[Run]) -> list[tuple[str, np.ndarray, float]]:
    """Returns the lines that draw a curve: kind (raw: pale; mean; val: dashed, with dots), values and width of each."""
    if not curve.metric.startswith("train/"):
        return [("val", curve.values, 1.2)]
    if curve.metric == "train/lr":
        return [("mean", curve.values, _lr_width(curve.run, runs))]
    if len(curve.values) < _MANY:
        return [("mean", curve.values, 1.8)]
    return [("raw", curve.values, 0.8), ("mean", moving_mean(curve.values, len(curve.values) // 40), 1.8)]


def _lr_width(run: int, runs: Sequence[Run]) -> float:
    """Returns the line width of a learning rate: wider where later runs have the same one, to show behind them."""
    own = runs[run].curves["train/lr"]
    later = [other.curves["train/lr"] for other in runs[run + 1 :] if "train/lr" in other.curves]
    num_equal = sum(all(map(np.array_equal, own, other)) for other in later)
    return 1.8 + 0.8 * min(2, num_equal)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns, for each point, the mean of the finite values in a window around it; windows are shorter at the ends."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


# --- SVG -------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 360, 215  # of a panel, in SVG units: about a pixel, on a phone too
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 8, 24  # margins; a label at the left has up to 6 characters, as 0.0025
_BUCKETS = 250  # longer curves are split into so many stretches; the smallest and largest value of each are kept


@dataclass(frozen=True)
class Line:
    """One polyline."""

    run: int  # its colour
    kind: str  # of `_strokes`
    path: str  # an SVG path
    width: float


@dataclass(frozen=True)
class Dot:
    """One marked value."""

    run: int
    x: float
    y: float
    text: str  # tooltip


@dataclass(frozen=True)
class Panel:
    """One small diagram."""

    title: str
    unit: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    dots: list[Dot]


def draw_panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels in which at least one run has logged something."""
    log_steps = differ_in_length(runs)
    found = [_panel(of, runs, log_steps) for of in panels_of(runs)]
    return [panel for panel in found if panel]


def differ_in_length(runs: Sequence[Run]) -> bool:
    """Returns whether the shortest run would be too narrow to see beside the longest."""
    lengths = [max(int(steps[-1]) for steps, _ in run.curves.values()) for run in runs if run.curves]
    return bool(lengths) and max(lengths) > _UNEQUAL * max(1, min(lengths))


@dataclass(frozen=True)
class _Axes:
    """The ranges of steps and values. With `log`, `low` and `high` are decimal logarithms."""

    first: int
    last: int
    low: float
    high: float
    log: bool
    log_steps: bool

    def x(self, step: float) -> float:
        at, first, last = ((math.log10(max(1, s)) if self.log_steps else s) for s in (step, self.first, self.last))
        return LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        height = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    def path(self, steps: np.ndarray, values: np.ndarray) -> str:
        """Returns an SVG path, interrupted where a value is not finite."""
        parts, pen = [], "M"
        for step, value in _reduced(steps, values):
            if math.isfinite(value):
                parts.append(f"{pen}{self.x(step):.1f} {self.y(value):.1f}")
            pen = "L" if math.isfinite(value) else "M"
        return "".join(parts)


def _panel(of: PanelOf, runs: Sequence[Run], log_steps: bool) -> Panel | None:
    from matplotlib.ticker import EngFormatter

    curves = _drawn(of, runs)
    axes = _axes(of, curves, log_steps)
    if axes is None:
        return None
    lines = [
        Line(curve.run, kind, axes.path(curve.steps, values), width)
        for curve in curves
        for kind, values, width in _strokes(curve, runs)
    ]
    dots = [dot for curve in curves if not curve.metric.startswith("train/") for dot in _dots(curve, axes, runs)]
    steps = _step_ticks(axes)
    levels = [10**level for level in _log_levels(axes.low, axes.high)] if axes.log else _ticks(axes.low, axes.high)
    return Panel(
        of.title,
        of.unit,
        [(round(axes.x(step), 1), EngFormatter(sep="").format_eng(step)) for step in steps],  # 10k
        [(round(axes.y(level), 1), label) for level, label in zip(levels, axis_labels(levels))],
        sorted(lines, key=lambda line: line.kind != "raw"),  # pale ones below
        dots,
    )


def _axes(of: PanelOf, curves: Sequence[_Drawn], log_steps: bool) -> _Axes | None:
    """Returns the axes that show all curves, or None when there is nothing to show."""
    values = np.concatenate([np.empty(0), *(curve.values[np.isfinite(curve.values)] for curve in curves)])
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if of.scale == "log":
        low, high = math.log10(low), math.log10(high)
    elif of.scale == "from zero":
        low = min(0.0, low)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0  # a constant curve needs some height too
    if not (of.scale == "from zero" and low == 0):
        low -= margin
    last = max(int(curve.steps[-1]) for curve in curves)
    first = max(1, min(int(curve.steps[0]) for curve in curves)) if log_steps else 0
    return _Axes(first, max(first + 1, last), low, high + margin, of.scale == "log", log_steps)


def _dots(curve: _Drawn, axes: _Axes, runs: Sequence[Run]) -> list[Dot]:
    return [
        Dot(
            curve.run,
            round(axes.x(step), 1),
            round(axes.y(value), 1),
            f"{runs[curve.run].name}, {curve.metric.removeprefix('val/')} at step {step:,}: {value:.4g}",
        )
        for step, value in _reduced(curve.steps, curve.values)
        if math.isfinite(value)
    ]


def _reduced(steps: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    """Returns all points or, of a long curve, the lowest and highest of each stretch, so that no spike is lost."""
    if len(values) <= 2 * _BUCKETS:
        kept = np.arange(len(values))
    else:
        kept = []
        for stretch in np.array_split(np.arange(len(values)), _BUCKETS):
            finite = stretch[np.isfinite(values[stretch])]
            here = finite if len(finite) else stretch[:1]
            kept += sorted({here[np.argmin(values[here])], here[np.argmax(values[here])]})
    return [(int(steps[i]), float(values[i])) for i in kept]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns up to six round numbers from `low` to `high`."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _step_ticks(axes: _Axes) -> list[float]:
    if not axes.log_steps:
        return _ticks(axes.first, axes.last, whole=True)
    powers = [10**level for level in range(10) if axes.first <= 10**level <= axes.last]
    return powers if len(powers) > 1 else [axes.first, axes.last]


def _log_levels(low: float, high: float) -> list[float]:
    """Returns decimal logarithms of round numbers: 1, 2, 5 in each decade, or fewer when there are many decades."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    leading = (1, 2, 5) if high - low < 2.5 else (1,)
    levels = [decade + math.log10(digit) for decade in decades for digit in leading]
    inside = [level for level in levels if low <= level <= high]
    if len(inside) >= 2:
        return inside[:: max(1, len(inside) // 6)]
    return [math.log10(tick) for tick in _ticks(10**low, 10**high) if tick > 0]


def axis_labels(values: Sequence[float]) -> list[str]:
    """Returns short labels in one format: all as 2.5e-4 where any value is that small."""
    if any(0 < abs(value) < 0.001 for value in values):
        parts = [f"{value:.2e}".split("e") for value in values]
        return [f"{float(digits):g}e{int(power)}" if float(digits) else "0" for digits, power in parts]
    return [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in values]


# --- PNG -------------------------------------------------------------------------------------------------------------

# Added to the widths of `_strokes`; "val" has its own width, since its dots need a thinner line here.
_STYLES = {"raw": {"alpha": 0.3}, "mean": {}, "val": {"ls": "--", "lw": 1, "marker": "o", "ms": 4}}


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draws the panels of `panels_of` for all runs into one PNG."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches
    panels, log_steps = panels_of(runs), differ_in_length(runs)
    num_rows = -(-len(panels) // 3)
    figure = Figure(figsize=(15, 4.25 * num_rows), layout=layout)  # no pyplot: no global state, no window
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    grid = figure.subplots(num_rows, 3).flat
    for axes, of in zip(grid, panels):
        for curve in _drawn(of, runs):
            for kind, values, width in _strokes(curve, runs):
                axes.plot(curve.steps, values, color=colors[curve.run], **{"lw": width, **_STYLES[kind]})
        axes.set_title(_plain(of.title), fontsize=12, fontweight="bold")
        axes.set_ylabel(of.unit)
        _finish_panel(axes, of.scale, log_steps)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=c, lw=2.5, label=_legend(run)) for run, c in zip(runs, colors)]
    if any(metric.startswith("val/") for run in runs for metric in run.curves):
        handles += [
            Line2D([], [], color="black", lw=2, label="training"),
            Line2D([], [], color="black", ls="--", marker="o", ms=4, lw=1, label="validation"),
        ]
    longest = 6 + max(len(str(handle.get_label())) for handle in handles)  # the line before a name, a gap after it
    columns = max(1, min(4, len(handles), _LEGEND_LETTERS // longest))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _finish_panel(axes: Any, scale: str, log_steps: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel("step, logarithmic" if log_steps else "step")
    if log_steps and axes.lines:
        axes.set_xscale("log")
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
    """Returns the run's name and its best validation."""
    top1 = best(run.curves["val/top1"], np.nanargmax) if "val/top1" in run.curves else None
    return _plain(run.name) + (f" (best validation top-1 {top1['value']:.2%} at step {top1['step']:,})" if top1 else "")


def _plain(text: str) -> str:
    """Returns text that matplotlib shows literally: a pair of "$" would be a formula. Long text is cut."""
    line = shown(text)
    return (line if len(line) <= _MAX_NAME else f"{line[:_MAX_NAME]}...").replace("$", r"\$")
