"""Numbers of images per class, stored beside the manifest as counts.json, and shown as a table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.manifest import MAX_SAMPLES
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.storage import write_text

FILE = "counts.json"
_SHOWN = 40  # classes: more than a screen is no table


def write_counts(
    folder: Path, counts: Sequence[int], classes: Sequence[str], told: Mapping[str, Mapping[str, int]]
) -> None:
    """Writes the number of images of each class, in the order of labels; classes: their names, or nothing.

    told: counts of what was skipped and noted, by kind.
    """
    values: dict[str, Any] = {"format": "pretrain-counts", "version": 1, "images": list(counts)}
    values |= {"classes": list(classes), **told}
    write_text(folder / FILE, json.dumps(values, indent=1) + "\n")


def read_counts(folder: Path) -> tuple[list[int], list[str]]:
    """Returns the number of images of each class, and the classes' names, or nothing. Raises UserError."""
    values = Fields.read(folder / FILE)
    each, classes = values.items("images"), list(values.texts("classes"))
    images = [each.integer(place, 0, MAX_SAMPLES) for place in each.values]
    if not images:
        values.wrong("images", "the number of images of at least one class")
    if classes and len(classes) != len(images):
        raise UserError(f"{values.source}: has {len(classes)} class names for {len(images)} numbers of images")
    return images, classes


def table_of(counts: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Returns a table of the images of each class; of many classes only the extremes, and those without images."""
    names = list(classes) or [str(label) for label in range(len(counts))]
    width = max(len(f"{count:,}") for count in counts)
    lines = [f"  {count:{width},} {name}" for count, name in zip(counts, names)]
    if len(counts) > _SHOWN:
        order = sorted(range(len(counts)), key=lambda label: (counts[label], label))
        middle = f"  {len(counts):,} classes: {min(counts):,} to {max(counts):,} images, median "
        middle += f"{statistics.median(counts):,g}; the fewest and the most:"
        lines = [middle, *(lines[label] for label in (*order[:5], *order[-5:]))]
    empty = [names[label] for label, count in enumerate(counts) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
        lines.append(f"  {len(empty):,} classes have no image: {shown}")
    return lines
