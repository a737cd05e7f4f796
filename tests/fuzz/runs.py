"""What stands in a run's folder: read by the report, and where a run goes on by what rewinds its logs."""

import base64
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tiny import tiny_config

from fuzz.harness import Target
from fuzz.mutate import changed_json, changed_lines, json_seeds, line_seeds
from fuzz.sets import picture
from fuzz.spare import spare_configs
from pretrain.config import config_to_yaml
from pretrain.log import rewind
from pretrain.report.figures import summary
from pretrain.report.page import html, markdown, write_report
from pretrain.report.runs import read_runs

DRAWN = 128  # one input of so many is drawn, in each of two ways: half a second, as long as 100 others

_START = {
    "step": 0,
    "time": "2026-01-01",
    "world_size": 4,
    "commit": "a1",
    "command": ["x.py", "--config", "a.yaml"],
    "recipe": "a.yaml",
    "versions": {"torch": "2"},
}
_RESULTS = {
    "format": "pretrain-evaluation",
    "version": 1,
    "weights": "step-0000000020",
    "rows": [
        {"model": "trained", "metric": "top1", "value": 0.5, "n": 101},
        {"model": "trained", "metric": "10-shot", "value": 0.5, "n": 9},
    ],
}
_WRONG: dict[str, Any] = {"items": [{"name": "a", "label": "b", "predicted": "c", "probability": 0.5, "path": "a.png"}]}
_WRONG["items"].append(_WRONG["items"][0] | {"png_base64": base64.b64encode(picture()).decode()})
_WRONG |= {"classes": ["b", "c"], "confusion": [[0, 0, 3], [0, 1, 2], [1, 1, 4]]}
_WRONG |= {"data": "d", "data_sha256": "0" * 64, "weights_sha256": "1" * 64}
_FINETUNING = {
    "format": "pretrain-finetuning", "version": 1, "task": "cifar10", "metric": "top1", "mean": 0.5, "std": 0.1,
    "values": [0.5, 0.5], "lr": 0.01,
    "n": 100, "from_scratch": False, "differs": ["steps"], "complete": True,
}  # fmt: skip
_BATCH = {
    "format": "pretrain-batch",
    "version": 1,
    "side": 4,
    "images": [{"x": 1, "y": 1, "caption": "a"}, {"x": 2, "y": 0, "caption": "b"}],
}
_LINES = [
    {
        "step": 5,
        "train/loss": 1.5,
        "train/top1": 0.1,
        "train/lr": 1e-3,
        "train/images_per_s": 100.0,
        "train/bad_samples": 2,
    },
    {"step": 10, "val/top1": 0.5, "val/loss": 1.0, "val/images": 101, "train/loss": 1.25},
]


def _run(folder: Path) -> Path:
    """A folder of a run in which every file is in order."""
    run = folder / "run"
    for name in ("evaluation", "finetune/cifar10", "pictures"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _LINES))
    (run / "starts.jsonl").write_text(json.dumps(_START) + "\n")
    (run / "evaluation" / "results.json").write_text(json.dumps(_RESULTS))
    (run / "evaluation" / "wrong.json").write_text(json.dumps(_WRONG))
    (run / "finetune" / "cifar10" / "results.json").write_text(json.dumps(_FINETUNING))
    (run / "pictures" / "a.png").write_bytes(picture())
    (run / "batch.png").write_bytes(picture())
    (run / "batch.json").write_text(json.dumps(_BATCH))
    text = config_to_yaml(tiny_config(Path("shards"), folder, name="run"))
    (run / "recipe.yaml").write_text("# score: 50 %\n" + text)
    (run / "config.yaml").write_text(text)
    return run


def link_tree(run: Path, own: Path) -> None:
    """Makes the folders of a run in `own`, and links to its files."""
    for path in run.rglob("*"):
        target = own / path.relative_to(run)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.link(path, target)


def _read(run: Path, name: str, also: Sequence[str], data: bytes, own: Path) -> None:
    """Reads and shows a run with its file `name` replaced, and its logs `also`; then rewinds them."""
    choice = zlib.crc32(data) % DRAWN
    link_tree(run, own)
    for file in (name, *also):
        (own / file).unlink(missing_ok=True)
        (own / file).write_bytes(data)
    try:
        runs = read_runs([own])
        summaries = [summary(run) for run in runs]
        markdown(summaries)
        if choice == 0:
            html(runs, summaries)
        elif choice == 1:
            write_report(runs, own / "out")
    finally:
        for path in [own / file for file in (name, *also) if file.endswith(".jsonl")]:  # the others are links
            rewind(path, 7)


def _draw_once(run: Path) -> None:
    """Loads fonts and templates, which takes longer than an input may."""
    runs = read_runs([run])
    html(runs, [summary(run) for run in runs])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        write_report(runs, Path(folder))


def _target(
    folder: Path, name: str, seeds: list[bytes], mutate: Callable[[bytes, Random], bytes], also: Sequence[str] = ()
) -> Target:
    spare_configs()
    run = _run(folder)
    _draw_once(run)
    return Target([(run / name).read_bytes()], seeds, [], mutate, partial(_read, run, name, also))


def metrics(folder: Path) -> Target:
    """metrics.jsonl, and the other logs with the same lines."""
    good = "".join(json.dumps(row) + "\n" for row in _LINES).encode()
    extra = [
        json.dumps({"step": odd, "train/loss": 1.0})
        for odd in (float("inf"), 1e30, 10**40, float("nan"), -1, "5", [], True, None, 0.5)
    ]
    extra += [
        json.dumps({"step": 20, "train/loss": odd})
        for odd in (10**400, float("nan"), float("inf"), 1e308, -1e308, "a", [], True)
    ]
    extra += [
        "[]",
        "{}",
        "1",
        "null",
        '{"loss": 1}',
        '{"step": 1, "step": []}',
        json.dumps({"step": 20, "a" * 5000: 1}),
    ]
    seeds = (
        [good + line.encode() + b"\n" for line in extra] + [line.encode() + b"\n" for line in extra] + line_seeds(good)
    )
    return _target(folder, "metrics.jsonl", seeds, changed_lines, ("bad_samples.jsonl", "skipped_steps.jsonl"))


def starts(folder: Path) -> Target:
    """starts.jsonl."""
    good = json.dumps(_START).encode() + b"\n"
    extra = [
        _START | {key: odd}
        for key in _START
        for odd in ([], {}, 1, None, "a", [[]], {"a": []}, float("nan"), True, [None])
    ]
    extra += [
        _START | {"command": ["--config", path]}
        for path in ("/etc/passwd.yaml", "\0.yaml", "a" * 5000 + ".yaml", "..", "/dev/zero.yaml")
    ]
    seeds = [json.dumps(one).encode() + b"\n" for one in extra] + line_seeds(good)
    return _target(folder, "starts.jsonl", seeds, changed_lines)


def batch(folder: Path) -> Target:
    """batch.json, by which batch.png is cut."""
    return _target(folder, "batch.json", json_seeds(_BATCH), changed_json)


def recipe(folder: Path) -> Target:
    """recipe.yaml, which the last start names; its inputs are made by whoever knows configs."""
    (folder / "recipe").mkdir()
    return _target(folder / "recipe", "recipe.yaml", [], changed_lines)


def results(folder: Path) -> Target:
    """evaluation/results.json."""
    return _target(folder, "evaluation/results.json", json_seeds(_RESULTS), changed_json)


def wrong(folder: Path) -> Target:
    """evaluation/wrong.json."""
    return _target(folder, "evaluation/wrong.json", json_seeds(_WRONG), changed_json)


def finetuning(folder: Path) -> Target:
    """finetune/TASK/results.json."""
    seeds = [json.dumps(_FINETUNING).replace(' 0.5, "std"', ' 1e400, "std"').encode()]
    return _target(folder, "finetune/cifar10/results.json", seeds + json_seeds(_FINETUNING), changed_json)
