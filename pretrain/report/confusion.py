"""The confusion matrix: which classes are mistaken for which, as a picture and a list of the most frequent pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pretrain.config import MAX_CLASSES
from pretrain.errors import UserError
from pretrain.json_files import Fields

_MAX_CELLS = 30  # classes per side of the picture; of more, those with the most mistakes
_MAX_CONFUSED = 8  # pairs of classes that are listed
CELL, LABEL = 30, 150  # units of SVG, about pixels: a cell's side, the room for names
_MAX_LABEL = 20  # letters that fit
_MAX_IMAGES = 10**15


@dataclass(frozen=True)
class Cell:
    """Images of one class that got one prediction."""

    x: int
    y: int
    number: int
    opacity: float  # rises with the share of the class's images
    is_right: bool
    text: str  # tooltip


@dataclass(frozen=True)
class Confusion:
    """The confusion picture: rows are true classes, columns predictions."""

    CELL: ClassVar[int] = CELL
    LABEL: ClassVar[int] = LABEL
    names: list[str]  # of the classes drawn, cut where they are long
    cells: list[Cell]
    size: int  # units of SVG a side
    is_part: bool  # whether classes are left out
    confused: list[tuple[str, str, int, int]]  # pairs mistaken most often: true, predicted, images, all of the class
    num_confused: int  # pairs that were mistaken


def read_pairs(values: Fields, num_classes: int) -> dict[tuple[int, int], int]:
    """Returns the number of images by (class, prediction), from the key "confusion".

    Raises UserError for anything but a list of [class, prediction, images].
    """
    rows = values.values.get("confusion")
    if not isinstance(rows, list):
        values.wrong("confusion", "a list of [class, prediction, images]")
    found: dict[tuple[int, int], int] = {}
    for place, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 3:
            raise UserError(f"{values.source}: confusion[{place}] is not [class, prediction, images]")
        of = Fields(dict(zip(("class", "prediction", "images"), row)), f"{values.source}: confusion[{place}]")
        most = min(num_classes, MAX_CLASSES) - 1
        found[of.integer("class", 0, most), of.integer("prediction", 0, most)] = of.integer("images", 1, _MAX_IMAGES)
    return found


def drawn(pairs: Mapping[tuple[int, int], int], classes: Sequence[str]) -> Confusion:
    """Returns the picture and the table of confusions. pairs: number of images by (true class, predicted class)."""
    totals, mistakes = [0] * len(classes), [0] * len(classes)
    for (label, predicted), number in pairs.items():
        totals[label] += number
        if label != predicted:
            mistakes[label] += number
            mistakes[predicted] += number
    met = [label for label in range(len(classes)) if totals[label] or mistakes[label]]
    shown = sorted(sorted(met, key=lambda label: (-mistakes[label], label))[:_MAX_CELLS])
    places = {label: place for place, label in enumerate(shown)}
    cells = [
        Cell(
            x=LABEL + CELL * places[predicted],
            y=LABEL + CELL * places[label],
            number=number,
            opacity=round(0.15 + 0.85 * number / totals[label], 3),
            is_right=label == predicted,
            text=f"{number:,} of {totals[label]:,} {classes[label]}: taken for {classes[predicted]}",
        )
        for (label, predicted), number in pairs.items()
        if label in places and predicted in places
    ]
    names = [_cut(classes[label]) for label in shown]
    confused = _confused(pairs, totals, classes)
    size = LABEL + CELL * len(shown)
    return Confusion(names, cells, size, len(shown) < len(met), confused[:_MAX_CONFUSED], len(confused))


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"


def _confused(
    pairs: Mapping[tuple[int, int], int], totals: Sequence[int], classes: Sequence[str]
) -> list[tuple[str, str, int, int]]:
    wrong = [(label, predicted, number) for (label, predicted), number in pairs.items() if label != predicted]
    wrong.sort(key=lambda row: (-row[2], row[0], row[1]))
    return [(classes[label], classes[to], number, totals[label]) for label, to, number in wrong]
