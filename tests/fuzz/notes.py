"""What commands write beside their results and read again, or other commands read: lists, records, counts, scores."""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import make_shards as tiny_shards
from tiny import tiny_config

from fuzz.audits import STEPS, run_of_two_ranks
from fuzz.harness import Target
from fuzz.mutate import changed_json, changed_lines, changed_picture, json_seeds, line_seeds
from fuzz.pictures import encoded, large_pictures, odd_pictures
from fuzz.spare import spare_configs, spare_initial_values
from fuzz.weights import NAMES, tiny_weights
from pretrain.checkpoint.read import read_state
from pretrain.config import config_to_yaml, load_config
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.evaluation import results as evaluation
from pretrain.finetune import own_results, scores
from pretrain.models.card import model_card
from pretrain.models.google import class_names_file, write_google
from pretrain.models.timm_folder import write_own_folder
from pretrain.models.weights import read_weights, weights_sha256
from pretrain.report.files import picture
from pretrain.report.own_page import write_page
from pretrain.shards import elsewhere, unfinished
from pretrain.shards.build import read_dropped, read_dropped_items
from pretrain.shards.counts import FILE as COUNTS
from pretrain.shards.counts import read_counts, table_of
from pretrain.shards.examples import FILE as EXAMPLES
from pretrain.shards.examples import Example, load_examples, sample_names
from pretrain.tasks import preparation
from pretrain.tasks.table import TASKS
from pretrain.train.datasets import open_data
from pretrain.train.resuming import fingerprint, refuse_changes, resumed_order
from pretrain.train.state import resumed

Call = Callable[[bytes, Path], object]


def _json(values: Any, call: Call) -> Target:
    return Target([json.dumps(values).encode()], json_seeds(values), [], changed_json, call)


def _lines(rows: list[Any], call: Call) -> Target:
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return Target([good], line_seeds(good), [], changed_lines, call)


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- of data sets ----------------------------------------------------------------------------------------------------


def examples(folder: Path) -> Target:
    """examples.jsonl beside a manifest."""
    made = tiny_shards(folder / "set", num_samples=6)
    rows = [Example(index, f"a/{index % 2}.png", index % 7, "0" * 64)._asdict() for index in range(6)]

    def call(data: bytes, own: Path) -> None:
        for path in made.iterdir():
            os.link(path, own / path.name)
        _written(own / EXAMPLES, data)
        manifest = load_manifest(own)
        load_examples(manifest)
        sample_names(manifest, [0, 5])

    return _lines(rows, call)


def counts(folder: Path) -> Target:
    """counts.json of a data set, as make_shards shows it."""

    def call(data: bytes, own: Path) -> None:
        _written(own / COUNTS, data)
        table_of(*read_counts(own))

    return _json({"images": [3, 0], "classes": ["ash", "birch"], "notes": {"a": 1}}, call)


def provenance(folder: Path) -> Target:
    """provenance.json of a data set: what was left out."""

    def call(data: bytes, own: Path) -> None:
        _written(own / "provenance.json", data)
        read_dropped(own)
        read_dropped_items(own)

    return _json({"dropped": ["a.png: damaged"], "dropped_items": [5, 7]}, call)


def unfinished_plan(folder: Path) -> Target:
    """plan.json of a data set that is not finished."""
    plan = {"classes": "0" * 64, "seed": 0, "quality": None}

    def call(data: bytes, own: Path) -> None:
        _written(own / unfinished.FOLDER / "plan.json", data)
        unfinished.begin(own, plan)

    return _json({"format": unfinished.FORMAT, "version": unfinished.VERSION, **plan}, call)


def unfinished_shard(folder: Path) -> Target:
    """The record of a shard that is complete, in a set that is not."""

    def call(data: bytes, own: Path) -> None:
        (own / "a.tar").write_bytes(bytes(512))
        (own / "a.idx").write_bytes(b"")
        _written(own / "000000.json", data)
        unfinished.read(own, 0, own / "a.tar")

    done = {"num_samples": 1, "num_bytes": 512, "sha256": "0" * 64}
    return _json(done | {"dropped": {"5": "damaged"}, "counts": {"0": 1}, "notes": {"converted": 1}}, call)


def remote_record(folder: Path) -> Target:
    """The record of a shard on a server that was read by an earlier start; another one is read again."""
    made = tiny_shards(folder / "set", num_samples=6)
    (shard,) = load_manifest(made).shards
    url = "http://h/a.tar"
    elsewhere.num_bytes_of = lambda *_: shard.num_bytes
    elsewhere.download_to = lambda path, *_: os.link(shard.path, path)

    def call(data: bytes, own: Path) -> None:
        os.link(shard.path.with_suffix(".idx"), own / "a.idx")
        work = _written(own / "work" / "a.tar.json", data).parent
        elsewhere._walked(own, work, 7, threading.Event(), url, "a.tar")

    values = {"origin": {"url": url, "num_bytes": shard.num_bytes}, "num_bytes": shard.num_bytes, "num_samples": 6}
    values |= {"sha256": shard.sha256, "multi_label": False}
    return _json(values | {"counts": {"0": 5, "6": 1}, "passed_over": {"txt": 1}}, call)


def task_list(folder: Path) -> Target:
    """task.json of a prepared evaluation task."""
    task = TASKS["cifar10"]
    split = {"source": "a", "source_sha256": "0" * 64, "num_samples": 1, "num_expected": 1, "left_out": 0}
    values = {"format": preparation.FORMAT, "version": preparation.VERSION, "task": task.name, "differs": ["a"]}

    def call(data: bytes, own: Path) -> None:
        _written(own / preparation.FILE, data)
        preparation.set_differences(own)
        preparation._finished(task, own)

    return _json(values | {"splits": {"test": split | {"examples_sha256": "0" * 64}}}, call)


# --- of runs ---------------------------------------------------------------------------------------------------------


def resume(folder: Path, *, mixture: bool = False) -> Target:
    """state.json of a checkpoint from which a run goes on, or another one branches off."""
    run = run_of_two_ranks(folder, mixture=mixture)
    spare_configs()
    config = load_config(run / "config.yaml")
    data = open_data(config)
    values = read_state(run / "checkpoints" / f"step-{STEPS:010d}")
    values |= {"data": fingerprint(data.train, data.order)}
    values |= {"engine": {"optimizer_step": 5.0, "loss_scaler": {"cur_scale": 2.0**16, "cur_iter": 7}}}

    def call(state: bytes, own: Path) -> None:
        _written(own / "state.json", state)
        refuse_changes(own, config, data.train)
        resumed_order(own, data.order, config.total_steps)
        resumed(own)

    return _json(values, call)


def card(folder: Path) -> Target:
    """state.json of a checkpoint, of which a model card tells."""
    run = run_of_two_ranks(folder)
    spare_configs()
    weights, step = tiny_weights(), run / "checkpoints" / f"step-{STEPS:010d}"

    def call(data: bytes, own: Path) -> None:
        place = _written(own / "run" / "checkpoints" / step.name / "state.json", data).parent
        _told(model_card(replace(weights, source=place), "timm", **_WORDS))

    return _json(read_state(step) | {"metrics": {"val/top1": 0.5}}, call)


def card_scores(folder: Path) -> Target:
    """evaluation/results.json beside weights, of which a model card tells."""
    write_own_folder(tiny_weights(), folder / "own")
    weights = read_weights(folder / "own")

    def call(data: bytes, own: Path) -> None:
        for path in (folder / "own").iterdir():
            os.link(path, own / path.name)
        _written(own / "evaluation" / "results.json", data)
        _told(model_card(replace(weights, source=own), "timm", **_WORDS))

    own = {"weights_sha256": weights_sha256(folder / "own"), "image_size": weights.model.image_size}
    return _json(_RESULTS | own, call)


_WORDS: dict[str, Any] = {"title": "a", "command": "b", "loading": "c", "proof": "d", "versions": {"torch": "2"}}


def _told(text: str) -> None:
    """Raises where a text cannot be written, or lets a terminal do something."""
    text.encode()
    if wrong := next((letter for letter in text if not letter.isprintable() and letter != "\n"), None):
        raise ValueError(f"{wrong!r} is told")


_ROWS = [
    {"model": "trained", "metric": metric, "value": 0.5, "n": n}
    for metric, n in (("top1", 101), ("5-shot", 9), ("cifar10/5-shot", 9))
]
_DATA = {"path": "a", "sha256": "0" * 64, "num_samples": 101, "num_classes": 3}
_TRANSFORM = {"name": "vit", "crop": 1, "interpolation": "bilinear"}
_RECORD: dict[str, Any] = {
    "format": "pretrain-evaluation", "version": 1, "weights": "a", "weights_sha256": "1" * 64, "model": "Ti",
    "image_size": 16, "num_classes": 3, "loss": "softmax", "transform": _TRANSFORM,
    "data": {"val": _DATA}, "fewshot": None, "knn": None, "probe": None, "failed": {}, "versions": {"torch": "2"},
}  # fmt: skip
_SHOTS = {"shots": [5], "seeds": [0], "l2": 1.0, "transform": _TRANSFORM, "max_train": 9}
_SETS = dict.fromkeys(("val", "fewshot_train", "fewshot_test", "cifar10/train", "cifar10/test"), _DATA)
_RESULTS = _RECORD | {"data": _SETS, "fewshot": _SHOTS, "rows": _ROWS}


def earlier_results(folder: Path) -> Target:
    """results.json of an earlier evaluation, to which another one adds."""
    new = evaluation.Row("trained", "top5", 0.9, 101)

    def call(data: bytes, own: Path) -> None:
        path = _written(own / "results.json", data)
        evaluation.set_aside(own, "1" * 64)
        rows, record = evaluation.with_earlier([new], _RECORD, path)
        evaluation.pages(rows, record, [])
        if len(rows) == 1:  # with a warning
            raise UserError("replaced")

    return _json(_RESULTS | {"others": [_RESULTS | {"weights_sha256": "2" * 64}]}, call)


def predictions(folder: Path) -> Target:
    """predictions.jsonl of an evaluation on own data."""

    def call(data: bytes, own: Path) -> None:
        list(own_results._pairs(_written(own / "a.jsonl", data)))

    return _lines([{"label": 1, "prediction": 0, "name": "a"}, {"label": 0, "prediction": 0, "name": "b"}], call)


def own_accuracy(folder: Path) -> Target:
    """accuracy.json of a fine-tuning on own data, as its page shows it."""
    values = {
        "format": "pretrain-accuracy", "version": 1, "data": "a", "weights": "b", "from_scratch": False,
        "model": "B/16", "device": "1 CPU core", "run": "c", "image_size": 16, "steps": 5, "batch": 2, "lr": 0.01,
        "seeds": [0.5], "run_sha256": "0" * 64, "test_sha256": "1" * 64,
        "selection": [{"lr": 0.01, "top1": 0.5}, {"lr": 0.03, "top1": None}], "seconds": 5.5, "num_train": 5,
        "num_test": 2, "classes": ["ash", "birch"], "correct": 1, "n": 2, "top1": 0.5, "interval": [0.1, 0.9],
        "per_class": [{"label": 0, "name": "ash", "correct": 1, "n": 2, "top1": 0.5, "interval": [0.1, 0.9]}],
        "confusion": [[0, 0, 1], [0, 1, 1]], "told": ["a"], "differs": ["b"],
    }  # fmt: skip

    def call(data: bytes, own: Path) -> None:
        _written(own / "accuracy.json", data)
        write_page(own)

    return _json(values, call)


def run_score(folder: Path) -> Target:
    """DONE of a run of a sweep, by whose score a rate is chosen."""
    spare_configs()
    config = tiny_config(folder / "set", folder, name="run")
    text = config_to_yaml(config).encode()

    def call(data: bytes, own: Path) -> None:
        _written(own / "run" / "config.yaml", text)
        _written(own / "run" / "DONE", data)
        scores.score(replace(config, output=own))

    return _json({"step": 20, "val/top1": 0.5, "val/images": 10}, call)


def run_pictures(folder: Path) -> Target:
    """A picture in a run's folder, as the report shows it."""
    good = [
        encoded("RGB", "png"),
        encoded("RGB", "jpeg"),
        encoded("P", "png"),
        encoded("RGB", "jpeg", progressive=True),
    ]

    def call(data: bytes, own: Path) -> None:
        picture("a.png", data, "a.png")

    return Target(good, odd_pictures(good[1], good[0]), large_pictures(), changed_picture, call)


# --- of weights ------------------------------------------------------------------------------------------------------


def class_names(folder: Path) -> Target:
    """NAME.classes.json beside an .npz."""
    spare_initial_values()
    write_google(tiny_weights(), folder / "a.npz", "released")

    def call(data: bytes, own: Path) -> None:
        os.link(folder / "a.npz", own / "a.npz")
        _written(class_names_file(own / "a.npz"), data)
        read_weights(own / "a.npz")

    return _json(list(NAMES), call)
