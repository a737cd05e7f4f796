"""A run's folder: who may write in it, what it records of each start, and when it is done.

runs/NAME/
  config.yaml  deepspeed.json    the complete config of the last start, and what DeepSpeed was given
  starts.jsonl                   each start: step, versions, commit, ranks, command
  metrics.jsonl  tensorboard/    the curves
  batch.png                      one augmented batch
  bad_samples.jsonl  skipped_steps.jsonl  samples-RANK.jsonl    what was left out; the order, when asked for
  checkpoints/                   see pretrain/checkpoint/layout.py
  DONE                           proof of the end: the last step and its validation
"""

import fcntl
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

from pretrain.checkpoint.read import read_state
from pretrain.cluster import agreement, ranks
from pretrain.config import (
    BRANCH_MAY_CHANGE,
    Config,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    resume_differences,
)
from pretrain.data.manifest import Manifest
from pretrain.errors import ConfigError, UserError
from pretrain.log import JsonLines, rewind, say
from pretrain.provenance import commit, versions
from pretrain.storage import write_text

_STARTS, _LOCK = "starts.jsonl", "lock"
_CLAIM_TRIES = 20  # half a second each: a killed run's last processes may need seconds to go


def claim(folder: Path) -> TextIO | None:
    """Makes the run's folder and takes its lock, which is held as long as the returned file is open (rank 0).

    Raises UserError, on all ranks, when another process trains in it, when it cannot be written, or when a rank's node
    does not see it.
    """
    held: list[TextIO] = []
    token = agreement.from_main(lambda: _take_lock(folder, held))

    def see() -> None:
        if ranks.is_main():
            return  # reading would close the file, and with any closing a process loses its lock
        if not (folder / _LOCK).is_file() or (folder / _LOCK).read_text() != token:
            raise UserError(f"{folder}: rank {ranks.rank()} does not see it; give output= on a disk that all share")

    agreement.together(see)
    return held[0] if held else None


def _take_lock(folder: Path, held: list[TextIO]) -> str:
    """Locks the folder, appends the open file to `held`, and returns what it wrote into it."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output=") from None
    held.append(file)
    for _attempt in range(_CLAIM_TRIES):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader processes, gone with a kill
        except OSError:
            time.sleep(0.5)
            continue
        token = uuid.uuid4().hex
        file.truncate(0)
        file.write(token)
        file.flush()
        return token
    raise UserError(f"{folder}: another process trains in this folder; wait for it, or choose another name=")


def is_done(folder: Path, config: Config) -> bool:
    """Returns whether the run has reached config.total_steps, on every rank alike."""

    def reached() -> bool:
        try:
            return json.loads((folder / "DONE").read_text(encoding="utf-8"))["step"] >= config.total_steps
        except (OSError, ValueError, KeyError):
            return False

    return agreement.from_main(reached)


def mark_done(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Writes DONE, on rank 0: an exit status alone proves nothing, launchers have lost it."""
    if ranks.is_main():
        write_text(folder / "DONE", json.dumps({"step": step, **metrics}) + "\n")


def fingerprint(train_set: Manifest) -> dict[str, Any]:
    """Returns what decides the order of samples and their pixels, as a checkpoint's state.json holds it."""
    return {
        "format": "pretrain-data-state",
        "version": 1,
        "order": {"name": "permuted", "version": "v1", "manifest_sha256": train_set.sha256},
        "pixels": {name: versions()[name] for name in ("torchvision", "pillow")},
    }


def refuse_changes(checkpoint: Path, config: Config, train_set: Manifest, *, branching: bool = False) -> None:
    """Raises ConfigError, naming each difference, when `checkpoint` belongs to a run with other settings or data.

    branching: `config` starts another run there, which may have another name, length and schedule.
    """
    saved, data = read_state(checkpoint), fingerprint(train_set)
    before = config_to_dict(config_from_dict(saved["config"], f"{checkpoint}/state.json"))  # with keys added since
    differences = resume_differences(before, config, BRANCH_MAY_CHANGE if branching else ())
    for key, value in data["order"].items():
        if saved["data"]["order"].get(key) != value:
            differences.append(f"data {key}: was {saved['data']['order'].get(key)}, is {value}")
    if differences:
        way_out = "start with init_from instead of branch_from" if branching else "start another run with name=..."
        raise ConfigError(
            f"{checkpoint}: was written with other settings ({'; '.join(differences)}); "
            f"give them the old values, or {way_out}"
        )
    if saved["data"]["pixels"] != data["pixels"]:
        say(
            "warning: decoders changed since the checkpoint, pixels may differ: "
            f"{saved['data']['pixels']} -> {data['pixels']}"
        )


def record_start(folder: Path, config: Config, deepspeed_config: dict[str, Any], step: int) -> None:
    """Writes what this start runs with, and drops log lines after `step`, which will be written again. Rank 0."""
    if not ranks.is_main():
        return
    for path in folder.glob("*.jsonl"):
        if path.name != _STARTS:  # its history is kept
            rewind(path, step)
    (folder / "DONE").unlink(missing_ok=True)  # of a shorter total_steps
    write_text(folder / "config.yaml", config_to_yaml(config))
    write_text(folder / "deepspeed.json", json.dumps(deepspeed_config, indent=2) + "\n")
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": ranks.world_size(),
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
    }
    JsonLines(folder / _STARTS).append(start)
