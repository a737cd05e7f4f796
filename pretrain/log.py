"""What a run writes while it trains: the console, metrics.jsonl, TensorBoard. Rank 0 speaks.

A disk that fills up must not end training: a writer that fails warns once for each cause, and closing the log reports
how many lines were lost.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import torch
from PIL import Image

from pretrain.cluster import ranks
from pretrain.config import MAX_STEP
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import Fields
from pretrain.storage import replacing, write_text

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
_BLOCK_BYTES = 1 << 20  # read at a time from the end of a log


def say(*lines: str) -> None:
    """Prints lines on rank 0."""
    if ranks.is_main():
        for line in lines:
            _print(line, sys.stdout)


def warn(message: str) -> None:
    """Prints a warning from any rank, which it names unless it is rank 0."""
    prefix = "" if ranks.is_main() else f"rank {ranks.rank()}: "
    _print(f"{prefix}warning: {message}", sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    # The stream is often a file on the same full disk, or a pipe whose reader has gone: no reason to end training.
    try:
        print(shown(message), file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Empties a stream's buffer that could not be written: multiprocessing flushes it before starting a process."""
    number = stream.fileno()
    real, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
        stream.flush()
    finally:
        os.dup2(real, number)
        os.close(real)
        os.close(nowhere)


_lost_lines: Counter[Path] = Counter()  # of this process, by file; reported when the run's log is closed


class JsonLines:
    """A file of JSON objects, one a line, each with its "step". A line is in the file when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told: set[int | None] = set()  # causes

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Writes a line for each row: all of them, in one piece, or none."""
        if not rows:
            return
        try:
            _append(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:
            _lost_lines[self.path] += len(rows)
            if error.errno not in self._told:
                warn(f"{self.path}: {error.strerror}; the training goes on without what it would have logged here")
            self._told.add(error.errno)


def _append(path: Path, line: bytes) -> None:
    """Appends lines to a file, which is as before if that fails: the next line must not be appended to half a line."""
    descriptor = not_a_link(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def tell_lost_lines() -> None:
    """Warns of the lines that this process could not write, once."""
    for path, count in _lost_lines.items():
        warn(f"{path}: {count:,} lines could not be written")
    _lost_lines.clear()


def not_a_link(path: str | Path, flags: int) -> int:
    """Opens a file of a run's folder, but no symbolic link: somebody else may have made the folder, and one in it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(folder: Path) -> None:
    """Syncs a folder's *.jsonl to disk, so that they survive a crash of the machine."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".jsonl"]  # glob hides errors since Python 3.13
    except OSError as error:
        return warn(f"{folder}: {error.strerror}; its logs may not be on the disk yet")
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            warn(f"{path}: {error.strerror}")


def rewind(path: Path, step: int) -> int:
    """Drops the lines of steps after `step` and a torn last line, so that a resumed run does not log a step twice.

    Returns the last step that had a line, at least `step`. Damaged lines among those dropped are reported. Earlier
    lines are not read: they were on disk before the checkpoint was published, and a long run has gigabytes of them. A
    file that cannot be cut stays as it is, with a warning.
    """
    last, damaged, kept_bytes = step, 0, 0
    if not path.exists():
        return last
    try:
        with open(path, "r+b", opener=not_a_link) as file:
            for begin, line in _from_the_end(file):
                try:
                    of_line = step_of(line)
                except UserError:
                    damaged += 1
                    continue
                if of_line <= step:
                    kept_bytes = begin + len(line) + 1
                    break
                last = max(last, of_line)
            if kept_bytes < file.seek(0, os.SEEK_END):
                file.truncate(kept_bytes)
                os.fsync(file.fileno())
    except OSError as error:
        warn(f"{path}: {error.strerror}; lines of steps after {step} stay in it, and come again")
        return last
    if damaged:
        warn(f"{path}: {damaged} damaged lines left out")
    return last


def _from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields the complete lines of a file, the last one first: its offset, and its bytes without the newline."""
    behind, torn = b"", True  # what was read already of the line that a block ends in; whether it has no newline
    for start in range(file.seek(0, os.SEEK_END) // _BLOCK_BYTES * _BLOCK_BYTES, -1, -_BLOCK_BYTES):
        file.seek(start)
        block = file.read(_BLOCK_BYTES)
        end = len(block)
        while (line_end := block.rfind(b"\n", 0, end)) >= 0:
            if not torn:
                yield start + line_end + 1, block[line_end + 1 : end] + behind
            end, behind, torn = line_end, b"", False
        behind = block[:end] + behind
    if not torn:
        yield 0, behind


def step_of(line: bytes) -> int:
    """Returns the step of a log's line. Raises UserError when it is damaged."""
    return Fields.parse(line, "line").integer("step", 0, MAX_STEP)


class OtherLog(Protocol):
    """Another destination for the numbers of a run. It must not raise."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes named numbers of `step`, without waiting."""

    def close(self) -> None:
        """Ends what it has begun."""


class RunLog:
    """The writers of one run, opened at `step`. On ranks other than 0 every method does nothing.

    elsewhere: receives the numbers too, besides the run's own files.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, elsewhere: OtherLog | None = None) -> None:
        self._folder, self._total_steps, self._elsewhere = folder, total_steps, elsewhere
        self._start_step, self._start_time = step, time.monotonic()
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._board: Any = None
        if ranks.is_main():
            self._board = _board(folder / "tensorboard", step + 1)

    def scalars(self, step: int, values: Mapping[str, float], *, on_console: bool = True) -> None:
        """Logs named numbers of `step` to all writers; the console's line ends with the time left."""
        if not ranks.is_main():
            return
        self._metrics.append({"step": step, "time": time.strftime(TIME_FORMAT), **values})
        self._to_board(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])
        if self._elsewhere is not None:
            self._elsewhere.scalars(step, values)
        if not on_console:
            return
        left = (time.monotonic() - self._start_time) / max(1, step - self._start_step) * (self._total_steps - step)
        words = [in_words(name, value) for name, value in values.items() if _worth_a_look(name, value)]
        shown = "  ".join(words)
        say(f"step {step}/{self._total_steps} ({step / self._total_steps:.1%})  {shown}  left {duration(left)}")

    def image(self, name: str, image: torch.Tensor, meaning: Mapping[str, Any]) -> None:
        """Writes a uint8 [3, height, width] picture to NAME.png and to TensorBoard, and what it shows to NAME.json."""
        if ranks.is_main():
            self._to_board(lambda board: board.add_image(name, image))
            try:
                (self._folder / f"{name}.json").unlink(missing_ok=True)  # it must never describe another picture
                with replacing(self._folder / f"{name}.png") as temporary:
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "png")
                write_text(self._folder / f"{name}.json", json.dumps(meaning) + "\n")
            except OSError as error:
                warn(f"{self._folder / name}.png: {error.strerror}")

    def sync(self) -> None:
        """Syncs the logs, before a checkpoint is published: those of its steps must be on disk. From any thread."""
        if ranks.is_main():
            sync(self._folder)
        self._to_board(lambda board: board.flush())

    def close(self) -> None:
        """Ends the TensorBoard file, and reports what was lost."""
        self._to_board(lambda board: board.close())
        if self._elsewhere is not None:
            self._elsewhere.close()
        tell_lost_lines()

    def _to_board(self, write: Callable[[Any], Any]) -> None:
        if (board := self._board) is None:  # read once: another thread may switch it off
            return
        try:
            write(board)
        except OSError as error:  # its writer raises on a full disk, out of any call
            warn(f"TensorBoard: {error.strerror or error}; off for the rest of this run")
            self._board = None


def _board(folder: Path, first_step: int) -> Any:
    """Returns TensorBoard's writer, which hides what was logged before from `first_step` on; None on a bad disk.

    On a full disk its thread would end with a traceback on stderr. That is suppressed, because the next call raises the
    same error, which is reported.
    """
    from torch.utils.tensorboard.writer import SummaryWriter  # 1 s to import: only where it writes

    before = threading.excepthook

    def quiet(arguments: threading.ExceptHookArgs) -> None:
        of_board = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = quiet
    try:
        return SummaryWriter(str(folder), purge_step=first_step)
    except OSError as error:
        warn(f"{folder}: {error.strerror or error}; the training goes on without TensorBoard's files")
        return None


def duration(seconds: float) -> str:
    """Returns 75 as "1m15s", 7260 as "2h01m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


_SHARES = ("top1", "top5", "data_wait", "mean_average_precision", "mean_per_class")


def _worth_a_look(name: str, value: float) -> bool:
    """Whether the console shows a number; the rest, and counts that are 0, are only in the files."""
    counts, quiet = (
        ("train/bad_samples", "train/damaged_samples", "train/skipped_steps", "train/loss_spikes"),
        ("train/tflop_per_s", "train/epoch", "train/own_s", "train/own_s_max", "train/slow_rank"),
    )
    return name not in quiet and not (name in counts and value == 0)


def in_words(name: str, value: float) -> str:
    """Returns a number of the log for the console, as the tables show it: shares in per cent, memory in GB."""
    short = name.removeprefix("train/")
    if name == "train/memory_gb":
        return f"memory {value:.1f} GB"
    if name == "train/mfu":
        return f"mfu {value:.1%}"  # of the peak in bf16; a tenth of a per cent is noise already
    last = short.rpartition("/")[2]
    if isinstance(value, float) and (last in _SHARES or last.startswith(("fewshot_", "knn_"))):
        return f"{short} {value:.2%}"
    return f"{short} {value:.4g}" if isinstance(value, float) else f"{short} {value}"
