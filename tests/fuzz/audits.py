"""A run's folder as tools/audit.py reads it: each of its files changed, the others in order."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tiny import tiny_config

from fuzz.harness import Target
from fuzz.mutate import changed_json, changed_lines, json_seeds, line_seeds, member
from fuzz.runs import link_tree
from fuzz.sets import END, picture
from fuzz.spare import spare_configs, spare_samples
from pretrain.audit.checks import audit
from pretrain.audit.folder import Options
from pretrain.checkpoint.layout import manifest_text
from pretrain.config import config_to_dict, config_to_yaml
from pretrain.data.mixture import shard_name
from pretrain.data.order import share
from pretrain.errors import UserError
from pretrain.shards.existing import index_existing
from pretrain.storage import crc32c
from pretrain.train.datasets import open_data
from pretrain.train.resuming import fingerprint, receipt
from pretrain.train.state import TrainState

STEPS, SAVED, SKIPPED, RANKS = 6, (3, 6), 5, 2
NAMES = ["ash", "birch"]
Lines = list[dict[str, Any]]


def run_of_two_ranks(folder: Path, *, mixture: bool = False) -> Path:
    """The folder of a run that adds up: two ranks, two checkpoints, a bad sample in each epoch, a skipped step."""
    sets = [_set(folder / name) for name in (("set", "other") if mixture else ("set",))]
    changes = {"data__global_batch": 4, "log__every_steps": 2, "checkpoint__every_steps": 3, "total_steps": STEPS}
    if mixture:
        changes["data__train"] = [{"path": str(path), "weight": 2.0 + n} for n, path in enumerate(sets)]
    config = tiny_config(sets[0], folder, name="run", **changes)
    data = open_data(config)
    order, identity = data.order, fingerprint(data.train, data.order)["order"]
    seen = {step: list(zip(*(a.tolist() for a in order.samples(step - 1)))) for step in range(1, STEPS + 1)}
    bad: Lines = [
        {"step": step, "epoch": epoch, "index": index, "shard": shard_name(data.train, index), "reason": "decode"}
        | {"detail": ""}
        for step, pairs in seen.items()
        for epoch, index in sorted(pairs)
        if index % 6 == 2
    ]
    skipped: Lines = [{"step": SKIPPED, "indices": [index for _, index in seen[SKIPPED]]}]

    def counts(until: int) -> dict[str, int]:
        own = (sum(row["step"] <= until for row in rows) for rows in (bad, [], skipped))
        return dict(zip(("bad_samples", "damaged_samples", "skipped_steps"), own))

    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_to_yaml(config))
    start = {"world_size": RANKS, "seed": config.seed, "global_batch": 4, "held_out": 0, "samples_logged": True}
    of_start = json.dumps({"step": 0, **start, "starts_before": hashlib.sha256(b"").hexdigest()}).encode() + b"\n"
    (run / "starts.jsonl").write_bytes(of_start)
    curves = [{f"train/{key}": value for key, value in counts(step).items()} for step in (2, 4, 6)]
    epochs = [{"step": step, "train/loss": 1.0, "train/epoch": order.epochs(step)} for step in (2, 4, 6)]
    _write_lines(run / "metrics.jsonl", [epoch | own for epoch, own in zip(epochs, curves)])
    _write_lines(run / "bad_samples.jsonl", bad)
    _write_lines(run / "skipped_steps.jsonl", skipped)
    for rank in range(RANKS):
        own = share(4, rank, RANKS)
        lines = [{"step": step, "samples": [list(pairs[slot]) for slot in own]} for step, pairs in seen.items()]
        _write_lines(run / f"samples-{rank:05d}.jsonl", lines)
    for step in SAVED:
        said = counts(step)
        state = TrainState(step=step, bad_samples={"decode": said.pop("bad_samples")}, **said)
        values = {"step": step, "metrics": {}, "world_size": RANKS, "class_names": NAMES, "train": asdict(state)}
        values |= {"config": config_to_dict(config), "data": {"order": identity}}
        values |= {"receipt": receipt(state, order, identity), "starts_sha256": hashlib.sha256(of_start).hexdigest()}
        checkpoint = run / "checkpoints" / f"step-{step:010d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps(values))
        _seal(checkpoint)
    (run / "DONE").write_text(json.dumps({"step": STEPS}) + "\n")
    return run


def _set(folder: Path) -> Path:
    """A data set of six images, one of them broken."""
    folder.mkdir(parents=True)
    images = [b"broken" if number == 2 else picture() for number in range(6)]
    samples = (member(b"%d.png" % n, image) + member(b"%d.cls" % n, b"%d" % (n % 2)) for n, image in enumerate(images))
    tar = folder.with_suffix(".tar")
    tar.write_bytes(b"".join(samples) + END)
    index_existing([tar], NAMES, folder)
    return folder


def _write_lines(path: Path, rows: Lines) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _seal(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    entry = {"path": file.name, "bytes": file.stat().st_size, "crc32c": crc32c(file)}
    (checkpoint / "MANIFEST.json").write_text(
        manifest_text({"format": "pretrain-checkpoint", "version": 1, "files": [entry]})
    )


def _audited(run: Path, name: str, data: bytes, own: Path) -> None:
    """Audits a run with its file `name` replaced. What it finds is raised, a finding of two lines first."""
    link_tree(run, own)
    (own / name).unlink()
    (own / name).write_bytes(data)
    if name.endswith("state.json"):
        (own / name).with_name("MANIFEST.json").unlink()
        _seal((own / name).parent)
    wrong = [finding.wrong for finding in audit(own, Options(True, None, False, 0)) if finding.wrong]
    if wrong:
        raise UserError(next((told for told in wrong if "\n" in told), wrong[0]))


def _target(name: str, mutate: Callable[[bytes, Random], bytes], folder: Path, *, mixture: bool = False) -> Target:
    run = run_of_two_ranks(folder, mixture=mixture)
    spare_configs()
    spare_samples()
    good = (run / name).read_bytes()
    seeds = json_seeds(json.loads(good)) if mutate is changed_json else line_seeds(good)
    return Target([good], seeds, [], mutate, partial(_audited, run, name))


AUDITS: dict[str, Callable[[Path], Target]] = {
    "audit_starts": partial(_target, "starts.jsonl", changed_lines),
    "audit_curves": partial(_target, "metrics.jsonl", changed_lines),
    "audit_listed": partial(_target, "bad_samples.jsonl", changed_lines),
    "audit_skipped": partial(_target, "skipped_steps.jsonl", changed_lines),
    "audit_samples": partial(_target, "samples-00001.jsonl", changed_lines),
    "audit_receipt": partial(_target, f"checkpoints/step-{STEPS:010d}/state.json", changed_json),
    "audit_mixture": partial(_target, f"checkpoints/step-{STEPS:010d}/state.json", changed_json, mixture=True),
    "audit_done": partial(_target, "DONE", changed_json),
}
