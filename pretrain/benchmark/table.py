"""The table of models: a row per model and image size, also for those that could not be measured.

Imports no torch; the cells' processes do.
"""

import json
from pathlib import Path
from typing import Any

from pretrain import cli
from pretrain.benchmark.cells import NUM_CLASSES, cell_config, cell_rows
from pretrain.errors import UserError
from pretrain.escape import markdown_table
from pretrain.storage import write_text

# H and g are published with patch 14, which does not divide 384, so both have a second row with patch 16.
TABLE = ["Ti/16", "S/16", "B/16", "L/16", "H/14", "H/16", "g/14", "g/16"]
MAX_PARAMETERS_ON_CPU = 100_000_000  # trained by default: B takes about a minute, g would take an hour and 20 GB
_COLUMNS = ["model", "px", "parameters", "GFLOPs forward", "GFLOPs train", "activations [MB]"]
_COLUMNS += ["forward [ms]", "images/s", "training step [ms]", "images/s", "not timed"]
_TEXT_COLUMNS = 0, len(_COLUMNS) - 1


def model_row(cell: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Measures a cell in a process of its own; returns its row, and whether it failed: then `not_timed` says why."""
    named = {key: cell[key] for key in ("model", "image_size")}
    try:
        cell_config(cell["model"], cell["image_size"], 8, cell["options"]["precision"])
    except UserError as error:  # patches do not divide the image; other sizes of this model may be fine
        return {**named, "not_timed": str(error).removeprefix("benchmark: ")}, False
    found, failure = cell_rows("model", cell)
    row = found[-1] if found else named
    return (row | {"not_timed": failure}, True) if failure else (row, False)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    cells = map(_model_cells, rows)
    cli.print_table("models", _COLUMNS, cells, text_columns=_TEXT_COLUMNS, caption=_conditions(rows))


def print_kernels(row: dict[str, Any]) -> None:
    """Prints a training step's time by groups of kernels, and the kernels that take longest."""
    whole = sum(row["kernel_groups_ms"].values())
    groups = [[name, "", f"{ms:.2f}", f"{ms / whole:.1%}"] for name, ms in row["kernel_groups_ms"].items()]
    kernels = [
        [kernel["kernel"][:100], f"{kernel['calls']:g}", f"{kernel['ms']:.2f}", f"{kernel['ms'] / whole:.1%}"]
        for kernel in row["kernels"]
    ]
    columns = ["kernel", "calls", "ms per step", "share"]
    cli.print_table(f"{row['model']}: a step", columns, groups + kernels, text_columns=(0,))


def write_table(rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the rows as JSON lines, and the table beside them as Markdown."""
    table = markdown_table(_COLUMNS, map(_model_cells, rows), _TEXT_COLUMNS)
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out.with_suffix(".md"), "\n".join([*table, "", _conditions(rows) + ".\n"]))


def _model_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], str(row["image_size"])]
    if "parameters" not in row:
        return [*cells, *[""] * (len(_COLUMNS) - 3), row["not_timed"]]
    cells += [f"{row['parameters']:,}", *(f"{row[f'{name}_flops'] / 1e9:,.2f}" for name in ("forward", "train"))]
    cells.append(f"{row['activation_bytes'] / 1e6:,.1f}")
    for name in ("forward", "train"):
        timed = f"{name}_ms" in row
        cells += [_short(row[f"{name}_ms"]["median"]), _short(row[f"{name}_images_per_s"])] if timed else ["", ""]
    return [*cells, row["not_timed"] or ""]


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _conditions(rows: list[dict[str, Any]]) -> str:
    """Returns one line with the conditions that all rows share."""
    row = next((row for row in rows if "parameters" in row), None)
    if row is None:
        return "nothing measured"
    pooling = f"pooling {row['pooling']}, " if row["pooling"] else ""
    return (
        f"{NUM_CLASSES} classes, {pooling}batch {row['batch']}, {row['precision']} weights and activations, eager, "
        f"{row['device']}, torch {row['versions']['torch']}; FLOPs of one image, activations and times of a batch"
    )
