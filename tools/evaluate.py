"""Scores weights on shards: loss, top-1 and top-5, and few-shot accuracy of the features.

python tools/evaluate.py WEIGHTS [--val MANIFEST] [--fewshot TRAIN TEST] [--shots 1 5 10 25] [--baselines] [--out DIR]
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli, distributed
from pretrain.config import DataConfig
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, eval_batches
from pretrain.data.manifest import Manifest, check_shards, load_manifest
from pretrain.errors import UserError
from pretrain.evaluation.classification import classification_scores
from pretrain.evaluation.features import extract_features, pre_logits, raw_pixels
from pretrain.evaluation.fewshot import L2, SEEDS, SHOTS, fewshot
from pretrain.log import warn
from pretrain.models.build import build_model
from pretrain.models.weights import Weights, load_tensors, read_weights
from pretrain.run import versions

TRAINED, RANDOM, PIXELS = "trained", "random weights", "raw pixels"
MAX_PIXEL_BYTES = 16 << 30  # of raw pixels as float32: 28,000 images at 224 px


class Row(NamedTuple):
    """One line of results.json."""

    model: str  # TRAINED, RANDOM or PIXELS
    metric: str  # "top1", "10-shot", "10-shot-std" ...
    value: float
    n: int  # images it was measured on


def main() -> None:
    parser = cli.parser(
        "Scores a run (its newest valid checkpoint), a checkpoint, or a converted folder on shards: loss, top-1 and\n"
        "top-5 with --val, big_vision's few-shot linear evaluation with --fewshot. Every image is scored once, on any\n"
        "number of ranks. Writes results.json and results.md.",
        "python tools/evaluate.py runs/NAME --val data/val --fewshot data/digits-train data/digits-test --baselines",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint step-N or converted folder")
    parser.add_argument("--val", type=Path, metavar="MANIFEST", help="shards of the classes the model was trained on")
    parser.add_argument(
        "--fewshot", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="shards of any classes: to learn from, to test"
    )
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS, metavar="K", help="images per class")
    parser.add_argument(
        "--baselines", action="store_true", help="few-shot also with random weights and with raw pixels as features"
    )
    parser.add_argument("--loss", choices=["softmax", "sigmoid"], help="default: the one it was trained with")
    parser.add_argument("--batch-size", type=int, default=256, help="images per rank and forward pass (default 256)")
    parser.add_argument("--workers", type=int, help="loader processes per rank (default: up to 4, as cores allow)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results (default: WEIGHTS/evaluation)")
    arguments = parser.parse_args()
    _check(arguments)
    if arguments.workers is None:
        arguments.workers = min(4, len(os.sched_getaffinity(0)))

    device = distributed.start(timeout_s=1800)  # ranks may decode at very different speeds
    rows, record = _evaluate(arguments, device)
    if distributed.is_main():
        out = arguments.out or arguments.weights / "evaluation"
        _print_table(rows, str(arguments.weights))
        _write(out, rows, record)
        print(f"{out / 'results.json'}, {out / 'results.md'}")
    distributed.stop()


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.val and not arguments.fewshot:
        raise UserError("nothing to evaluate: give --val MANIFEST, --fewshot TRAIN TEST, or both")
    if arguments.baselines and not arguments.fewshot:
        raise UserError("--baselines compares few-shot accuracies: it needs --fewshot TRAIN TEST")
    for name, lowest in (("batch_size", 1), ("workers", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {lowest}")
    if min(arguments.shots) < 1:
        raise UserError(f"--shots is {arguments.shots}, expected numbers of at least 1")
    arguments.shots = sorted(set(arguments.shots))


def _evaluate(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows, and what is needed to repeat them."""
    weights = read_weights(arguments.weights)
    val = load_manifest(arguments.val) if arguments.val else None
    few = [load_manifest(path) for path in arguments.fewshot or ()]
    manifests = ([val] if val else []) + few
    for manifest in manifests:
        check_shards(manifest)
    _check_classes(weights, val, few)
    model = build_model(weights.model, weights.num_classes)
    load_tensors(model, weights)
    model.to(device).eval()
    config = DataConfig(
        eval_transform=cast(Any, weights.eval_transform),  # one of its literals, as the config wrote it
        eval_crop=weights.eval_crop,
        interpolation=cast(Any, weights.interpolation),
        workers=arguments.workers,
    )
    options = {"batch_size": arguments.batch_size, "image_size": weights.model.image_size, "config": config}
    loss = arguments.loss or weights.loss
    rows = _classify(model, val, loss, device, options) if val else []
    if few:
        rows += _few_shot(arguments, weights, model, few, device, options)
    record = {
        "format": "pretrain-evaluation",
        "version": 1,
        "weights": str(weights.source),
        "model": weights.model.name,
        "image_size": weights.model.image_size,
        "num_classes": weights.num_classes,
        "loss": loss,
        "data": {
            role: {"path": str(m.path), "sha256": m.sha256, "num_samples": m.num_samples, "num_classes": m.num_classes}
            for role, m in zip(["val"] * bool(val) + ["fewshot_train", "fewshot_test"], manifests)
        },
        "fewshot": {"shots": arguments.shots, "seeds": SEEDS, "l2": L2} if few else None,
        "versions": versions(),
    }
    return rows, record


def _check_classes(weights: Weights, val: Manifest | None, few: list[Manifest]) -> None:
    if val and val.num_classes > weights.num_classes:
        raise UserError(f"{val.path}: has {val.num_classes} classes, {weights.source} has {weights.num_classes}")
    if val and val.class_names and weights.class_names:
        pairs = list(zip(val.class_names, weights.class_names))
        if different := [i for i, (a, b) in enumerate(pairs) if a != b]:
            first = different[0]
            warn(
                f"{val.path}: {len(different)} class names differ from the weights', the first: class {first} is "
                f"{pairs[first][0]!r} there, {pairs[first][1]!r} in the weights; do labels mean the same?"
            )
    if few and (few[0].num_classes, few[0].class_names) != (few[1].num_classes, few[1].class_names):
        raise UserError(
            f"--fewshot: {few[0].path} ({few[0].num_classes} classes) and {few[1].path} ({few[1].num_classes} classes) "
            "must have the same classes under the same names"
        )


def _classify(model: nn.Module, val: Manifest, loss: str, device: torch.device, options: dict[str, Any]) -> list[Row]:
    batches = eval_batches(val, np.arange(val.num_samples), **options)
    with cli.progress("validation", val.num_samples, "images") as advance, torch.no_grad():
        scores = classification_scores(
            lambda images: model(to_float(images, torch.float32)),
            _told(batches, lambda: advance(options["batch_size"] * distributed.world_size())),
            loss=loss,
            device=device,
        )
    if scores[0].n < val.num_samples:
        warn(f"{val.path}: {val.num_samples - scores[0].n} of {val.num_samples} images cannot be read: not scored")
    return [Row(TRAINED, *score) for score in scores]


def _told(batches: Iterable[Batch], tell: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        tell()


def _few_shot(
    arguments: argparse.Namespace,
    weights: Weights,
    model: nn.Module,
    few: list[Manifest],
    device: torch.device,
    options: dict[str, Any],
) -> list[Row]:
    extractors = {TRAINED: pre_logits(model)}
    if arguments.baselines:
        extractors[RANDOM] = pre_logits(build_model(weights.model, weights.num_classes).to(device).eval())
        pixel_bytes = sum(m.num_samples for m in few) * 3 * weights.model.image_size**2 * 4
        if pixel_bytes <= MAX_PIXEL_BYTES:
            extractors[PIXELS] = raw_pixels
        else:
            warn(f"no row for raw pixels: they would take {pixel_bytes >> 30} GB, at most {MAX_PIXEL_BYTES >> 30}")
    rows = []
    for name, extract in extractors.items():
        features = []
        for manifest in few:
            with cli.progress(f"features, {name}", manifest.num_samples, "images") as advance:
                features += extract_features(extract, manifest, device=device, progress=advance, **options)
        with cli.progress(f"few-shot, {name}", len(arguments.shots) * len(SEEDS), "regressions") as advance:
            solve = partial(fewshot, *features, shots=arguments.shots, seeds=SEEDS, progress=advance)
            scores = distributed.from_main(solve)
        rows += [Row(name, *score) for score in scores]
    return rows


# --- what is shown and written ---------------------------------------------------------------------------------------


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the table's header and lines: one line per metric, one column per model."""
    models = list(dict.fromkeys(row.model for row in rows))
    values = {(row.model, row.metric): row for row in rows}
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows if not row.metric.endswith("-std")):
        found = [values.get((model, metric)) for model in models]
        spread = [values.get((model, f"{metric}-std")) for model in models]
        cells = [_cell(row, std) for row, std in zip(found, spread)]
        lines.append([metric, *cells, f"{next(row.n for row in found if row):,}"])
    return ["metric", *models, "images"], lines


def _cell(row: Row | None, std: Row | None) -> str:
    if row is None:
        return ""
    if row.metric == "loss":
        return f"{row.value:.4f}"
    return f"{row.value:.2%}" + (f" ± {100 * std.value:.2f}" if std else "")


def _print_table(rows: list[Row], title: str) -> None:
    header, lines = _cells(rows)
    table = Table(title=title)
    for name in header:
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _write(out: Path, rows: list[Row], record: dict[str, Any]) -> None:
    header, lines = _cells(rows)
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    text = [f"# {record['weights']}", "", f"Model {record['model']} at {record['image_size']} px.", ""]
    text += ["| " + " | ".join(line) + " |" for line in table] + [""]
    text += [f"- {role}: {of['path']}, {of['num_samples']:,} images" for role, of in record["data"].items()]
    if record["fewshot"]:
        text.append(
            f"- few-shot: ridge regression on the head's input (l2 {record['fewshot']['l2']:g}), mean ± standard "
            f"deviation over {len(record['fewshot']['seeds'])} draws of the training images"
        )
    results = json.dumps({**record, "rows": [row._asdict() for row in rows]}, indent=2)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.md", "\n".join(text)), ("results.json", results)):
            (out / f".tmp-{name}").write_text(content + "\n", encoding="utf-8")
            os.replace(out / f".tmp-{name}", out / name)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


if __name__ == "__main__":
    cli.run(main)
