"""Few-shot accuracy as a chart over shots: the weights beside random weights and raw pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

_METRIC = re.compile(r"(\d{1,6})-shot")
MAX_SHOTS, MAX_SERIES = 8, 6  # more cannot be told apart; the table has them all
_INSET = 22  # of the first and last column, so that their marks are not cut off


@dataclass(frozen=True)
class Mark:
    """A measured accuracy: its place, and the ends of mean ± one standard deviation."""

    x: float
    y: float
    low: float
    high: float
    text: str  # tooltip


@dataclass(frozen=True)
class Series:
    """The accuracies of one kind of features."""

    name: str
    path: str  # SVG
    marks: list[Mark]
    ends: str  # the accuracy with the fewest images and with the most


@dataclass(frozen=True)
class FewShot:
    """The chart of one evaluation."""

    num_images: int  # tested on
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Series]


def fewshot_chart(rows: Sequence[dict[str, Any]]) -> FewShot | None:
    """Returns the chart of an evaluation's rows; None without two kinds of features, or with invalid values."""
    values = {(row["model"], row["metric"]): row["value"] for row in rows}
    found = {(row["model"], int(match[1])): row for row in rows if (match := _METRIC.fullmatch(row["metric"]))}
    shots = sorted({number for _, number in found})[:MAX_SHOTS]
    names = list(dict.fromkeys(name for name, number in found if number in shots))[:MAX_SERIES]
    if len(names) < 2 or not all(0 <= row["value"] <= 1 for row in found.values()):
        return None
    places = {number: _across(column, len(shots)) for column, number in enumerate(shots)}
    series = []
    for name in names:
        marks, own = [], [number for number in shots if (name, number) in found]
        for number in own:
            mean, std = found[name, number]["value"], values.get((name, f"{number}-shot-std"), 0.0)
            low, high = (_down(min(1.0, max(0.0, mean + sign * std))) for sign in (-1, 1))
            text = f"{name}, {number}-shot: {mean:.2%}" + (f" ± {100 * std:.2f}" if std else "")
            marks.append(Mark(places[number], _down(mean), low, high, text))
        path = "M" + "L".join(f"{mark.x:.1f} {mark.y:.1f}" for mark in marks)
        words = [f"{found[name, number]['value']:.1%} with {number}" for number in dict.fromkeys((own[0], own[-1]))]
        series.append(Series(name, path, marks, f"{', '.join(words)} per class"))
    levels = [(_down(level / 100), str(level)) for level in (0, 25, 50, 75, 100)]
    images = max(row["n"] for row in found.values())
    return FewShot(images, [(places[number], f"{number:,}") for number in shots], levels, series)


def _across(column: int, columns: int) -> float:
    room = WIDTH - LEFT - RIGHT - 2 * _INSET
    return round(LEFT + _INSET + (room * column / (columns - 1) if columns > 1 else room / 2), 1)


def _down(accuracy: float) -> float:
    return round(HEIGHT - BOTTOM - accuracy * (HEIGHT - BOTTOM - TOP), 1)
