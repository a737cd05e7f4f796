"""Traces of some steps on rank 0, for Perfetto and TensorBoard: where their time goes, operation by operation."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch

from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.engine.step import Engine
from pretrain.log import say, warn
from pretrain.storage import replacing

ASKED = "PROFILE"  # a file of this name in the run's folder asks for a trace


class Profile:
    """Traces the steps that config.profile names, and those after a log line at which it finds the file PROFILE.

    Without a trace it costs nothing, and none of its errors ends training. As a context manager, it writes a trace in
    progress on exit, except at a second Ctrl-C.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self._folder, self._engine = config.output / config.name, engine
        self._settings, self._look_every = config.profile, config.log.every_steps
        self._first, self._trace = 0, cast(Any, None)  # first step and profiler of the trace in progress

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C ends at once
            self.end()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps the training step of this number, counted from 1."""
        if self._trace is None and ranks.is_main() and (number == self._settings.at_step or self._is_asked(number)):
            self._begin(number)
        if self._trace is None:
            yield
            return
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._first + self._settings.num_steps - 1:
            self.end()

    def _is_asked(self, number: int) -> bool:
        """Whether there is a file PROFILE, looked for after each log line; removes it."""
        with suppress(OSError):
            if number % self._look_every == 1 % self._look_every:
                (self._folder / ASKED).unlink()
                return True
        return False

    def _begin(self, number: int) -> None:
        trace = torch.profiler.profile(record_shapes=True)
        try:
            trace.start()
        except RuntimeError as error:  # another profiler is at work, say
            warn(f"profile: {error}; the training goes on without a trace")
            return
        self._first, self._trace, self._engine.mark = number, trace, torch.profiler.record_function

    def end(self) -> None:
        """Writes the trace in progress, if there is one, completely or not at all."""
        if self._trace is None:
            return
        trace, self._trace, self._engine.mark = self._trace, None, nullcontext
        path = self._folder / "profile" / f"step-{self._first:010d}.pt.trace.json"
        try:
            trace.stop()
            path.parent.mkdir(exist_ok=True)
            if path.parent.is_symlink():
                raise OSError(errno.ELOOP, "its folder is a link, which may lead anywhere")
            with replacing(path) as temporary:
                trace.export_chrome_trace(str(temporary))
                if not _is_whole(temporary):  # torch reports no error for a full disk
                    raise OSError(0, "could not be written whole; is the disk full?")
        except (OSError, RuntimeError) as error:
            warn(f"{path}: {getattr(error, 'strerror', None) or error}; the training goes on without this trace")
        else:
            say(f"trace from step {self._first} on: {path}; https://ui.perfetto.dev shows it")


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100))
        return file.read().rstrip().endswith(b"}")
