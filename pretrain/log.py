"""What a run writes while it trains: the console, metrics.jsonl, TensorBoard. Rank 0 speaks.

A disk that fills up must not end the training: a failing writer warns once and is then off.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

from pretrain.cluster import ranks
from pretrain.storage import replacing


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if ranks.is_main():
        _print(message, sys.stdout)


def warn(message: str) -> None:
    """Prints a warning from any rank, which it names unless it is rank 0."""
    prefix = "" if ranks.is_main() else f"rank {ranks.rank()}: "
    _print(f"{prefix}warning: {message}", sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    # Often a file on the same full disk, or a pipe whose reader has gone: no reason to end a training.
    with contextlib.suppress(OSError):
        print(message, file=stream, flush=True)


class JsonLines:
    """A file of JSON objects, one a line, each with its "step". A line is in the file when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if not self._failed:
                warn(f"{self.path}: {error.strerror}; the training goes on without what it would have logged here")
            self._failed = True


def sync(folder: Path) -> None:
    """Brings a folder's *.jsonl to the disk, so that they outlive a crash of the machine."""
    try:
        paths = [folder / name for name in os.listdir(folder) if name.endswith(".jsonl")]
    except OSError as error:
        return warn(f"{folder}: {error.strerror}; its logs may not outlive a crash of the machine now")
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            warn(f"{path}: {error.strerror}")


def rewind(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` and a torn last line, so that a resumed run does not log a step twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))


class RunLog:
    """The writers of one run, opened at `step`. On ranks other than 0 every method does nothing."""

    def __init__(self, folder: Path, step: int, total_steps: int) -> None:
        self._folder, self._total_steps = folder, total_steps
        self._start_step, self._start_time = step, time.monotonic()
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._board: Any = None
        if ranks.is_main():
            from torch.utils.tensorboard.writer import SummaryWriter  # 1 s to import: only where it writes

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs named numbers of `step` to all writers; the console's line ends with the time left."""
        if not ranks.is_main():
            return
        self._metrics.append({"step": step, **values})
        self._to_board(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])
        left = (time.monotonic() - self._start_time) / max(1, step - self._start_step) * (self._total_steps - step)
        shown = "  ".join(
            f"{name.removeprefix('train/')} {_short(v)}" for name, v in values.items() if _worth_a_look(name, v)
        )
        say(f"step {step}/{self._total_steps} ({step / self._total_steps:.1%})  {shown}  left {duration(left)}")

    def image(self, name: str, image: torch.Tensor) -> None:
        """Writes a uint8 [3, height, width] picture to NAME.png and to TensorBoard."""
        if ranks.is_main():
            self._to_board(lambda board: board.add_image(name, image))
            try:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(self._folder / f"{name}.png")
            except OSError as error:
                warn(f"{name}.png: {error.strerror}")

    def sync(self) -> None:
        """Called before a checkpoint is published: what it covers must be on disk."""
        if ranks.is_main():
            sync(self._folder)
        self._to_board(lambda board: board.flush())

    def close(self) -> None:
        """Ends the TensorBoard file."""
        self._to_board(lambda board: board.close())

    def _to_board(self, write: Callable[[Any], Any]) -> None:
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:  # its writer raises on a full disk, out of any call
            warn(f"TensorBoard: {error.strerror or error}; off for the rest of this run")
            self._board = None


def duration(seconds: float) -> str:
    """Returns 75 as "1m15s", 7260 as "2h01m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _worth_a_look(name: str, value: float) -> bool:
    """The console shows what one watches; the rest, and counts of nothing, are in the files."""
    counts, quiet = (
        ("train/bad_samples", "train/skipped_steps"),
        ("train/tflop_per_s", "train/memory_gb", "train/epoch"),
    )
    return name not in quiet and not (name in counts and value == 0)


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
