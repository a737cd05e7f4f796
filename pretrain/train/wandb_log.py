"""The run's numbers on Weights & Biases too, when log.wandb_project asks for it.

A thread hands them over, and whatever fails there is told once: the training neither waits for wandb nor ends with it.
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

MAX_WAITING = 10_000  # log lines that were not handed over; of more, as when wandb hangs, new ones are left out
END_S = 60.0  # how long the end of a run waits for what is still to be sent


def check_installed(config: Config) -> None:
    """Raises ConfigError where wandb is asked for but not installed."""
    if config.log.wandb_project is None:
        return
    found = find_spec("wandb")
    if found is None or found.origin is None:  # the folder wandb/ that runs of other programs leave is no package
        raise ConfigError(
            f"log.wandb_project is {config.log.wandb_project}, but wandb is not installed: pip install wandb, "
            "or set it to null"
        )


def wandb_log(config: Config, folder: Path) -> "WandbLog | None":
    """Returns the writer, on rank 0; None where nobody asks for it."""
    return WandbLog(config, folder) if config.log.wandb_project is not None and ranks.is_main() else None


class WandbLog:
    """Takes the numbers of log lines; nothing here waits but `close`, for END_S at most."""

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
        """Ends wandb's run, and tells what did not get there."""
        try:
            self._waiting.put(None, timeout=END_S if self._thread.is_alive() else 0)
        except queue.Full:
            pass  # told below
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
        except Exception as error:  # of somebody else's program and network: any
            warn(f"Weights & Biases: {first_line(error)}; off for the rest of this run, metrics.jsonl has the numbers")


def _start(config: Config, folder: Path) -> Any:
    """Returns wandb's run: the same one for each start in this folder.

    Its own steps must rise, and a resumed run logs some steps again: so ours are a number of each line, and the axis.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # then a missing login is an error: else it asks, and waits
    import wandb  # pyright: ignore[reportMissingImports] - an extra; 0.5 s to import: only where it is used

    # Its console would take our streams; it waits without end for an upload unless it is told not to.
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
    """Returns 16 letters that are the same for each start of a run, and others for a new run of the same name."""
    try:
        with (folder / "starts.jsonl").open("rb") as file:
            first_start = file.readline()  # it has the time
    except OSError:  # a full disk has kept it from being written
        first_start = b""
    return hashlib.sha256(folder.name.encode() + b"\n" + first_start).hexdigest()[:16]
