"""Sends the run's numbers to Weights & Biases too, when log.wandb_project asks for it.

A thread sends them and reports its first error, if any: training neither waits for wandb nor ends with it.
"""

import hashlib
import os
import queue
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.cluster import ranks, watchdog
from pretrain.config import Config, config_to_dict
from pretrain.errors import ConfigError, first_line
from pretrain.log import say, warn

MAX_WAITING = 10_000  # log lines in the queue; when it is full, as when wandb hangs, new ones are dropped
END_S = 60.0  # how long the end of a run waits for what is still to be sent


def check_installed(config: Config) -> None:
    """Raises ConfigError where wandb is asked for but not installed."""
    if config.log.wandb_project is None:
        return
    found = find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/ that another program left is no package
        raise ConfigError(
            f"log.wandb_project is {config.log.wandb_project}, but wandb is not installed: pip install wandb, "
            "or set it to null"
        )


def wandb_log(config: Config, folder: Path) -> "WandbLog | None":
    """Returns the writer on rank 0; None on other ranks and if not asked for."""
    return WandbLog(config, folder) if config.log.wandb_project is not None and ranks.is_main() else None


class WandbLog:
    """Queues the numbers of log lines; only `close` waits: END_S at most for the queue, and again for the thread."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._left_out = 0  # log lines
        self._thread = threading.Thread(target=self._hand_over, args=(config, folder), name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes named numbers of `step`."""
        try:
            self._waiting.put_nowait((step, dict(values)))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Ends wandb's run, and warns of what was not sent."""
        try:
            self._waiting.put(None, timeout=END_S if self._thread.is_alive() else 0)
        except queue.Full:
            pass  # reported below
        end = time.monotonic() + END_S
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(5.0, left))
            watchdog.beat()  # it is not the training that hangs
        if self._thread.is_alive():
            warn(f"Weights & Biases: not done after {END_S:.0f} s; what is missing there is in metrics.jsonl")
        elif self._left_out:
            warn(f"Weights & Biases: {self._left_out:,} log lines were left out; metrics.jsonl has them")

    def _hand_over(self, config: Config, folder: Path) -> None:
        try:
            run = _start(config, folder)
            while (line := self._waiting.get()) is not None:
                step, values = line
                run.log({"step": step, **values})
            run.finish()
        except Exception as error:  # a foreign program and the network may raise anything
            warn(f"Weights & Biases: {first_line(error)}; off for the rest of this run, metrics.jsonl has the numbers")


def _start(config: Config, folder: Path) -> Any:
    """Returns wandb's run: the same one for each start in this folder.

    wandb's own step must increase, but a resumed run logs some steps again: so `step` is a logged value and the x axis.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # makes a missing login an error: otherwise wandb asks, and waits
    import wandb  # pyright: ignore[reportMissingImports] - an extra; 0.5 s to import: only where it is used

    # console: wandb would capture our streams. finish_timeout: it would wait for an upload without end.
    settings = wandb.Settings(console="off", silent=True, finish_timeout=END_S)
    run = wandb.init(
        project=config.log.wandb_project,
        entity=config.log.wandb_entity,
        dir=str(folder),
        id=run_id(folder),
        resume="allow",
        name=config.name,
        config=config_to_dict(config),
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    say(f"Weights & Biases: {f'offline, in {folder}/wandb' if run.offline else run.url}")
    return run


def run_id(folder: Path) -> str:
    """Returns 16 hex digits, the same for each start of a run, but different for a new run of the same name."""
    try:
        with (folder / "starts.jsonl").open("rb") as file:
            first_start = file.readline()  # contains the time
    except OSError:  # not written, on a full disk
        first_start = b""
    return hashlib.sha256(folder.name.encode() + b"\n" + first_start).hexdigest()[:16]
