"""A run's logs, line by line and by step; the folder may come from anyone, so nothing in it is trusted."""

import errno
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from pretrain.checkpoint.layout import MAX_STEP
from pretrain.errors import UserError
from pretrain.json_files import Fields

MAX_LINE_BYTES = 64 << 20  # a rank's samples of one step: 2 million of them
_HEAD = re.compile(rb'\{"step": (\d{1,10})[,}]')  # as json.dumps writes it


class Lie(UserError):
    """Something in a run's folder contradicts the rest; the message has the file, what it says and what is expected."""


def lie(place: object, found: object, expected: object) -> NoReturn:
    """Raises Lie as one line."""
    raise Lie(f"{place}: {found}; expected {expected}")


def rows(path: Path) -> Iterator[Fields]:
    """Yields the lines of a log; none where there is no file. Skips an incomplete last line, as a kill leaves.

    Raises Lie for a damaged line, or one whose step is below that of the line before.
    """
    if not os.path.lexists(path):
        return
    with open_log(path) as file:
        last = 0
        for fields in rows_of(file, path):
            step = fields.integer("step", 0, MAX_STEP)
            if step < last:
                lie(fields.source, f"step {step} after step {last}", "steps in order")
            last = step
            yield fields


def rows_of(file: BinaryIO, path: Path) -> Iterator[Fields]:
    """Yields the lines of an open log, with steps in any order."""
    number = 0
    while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
        number += 1
        source = f"{path}: line {number}"
        try:
            fields = Fields.parse(line, source)
            fields.integer("step", 0, MAX_STEP)
        except UserError as error:
            raise Lie(str(error)) from None
        yield fields
    if len(line) == MAX_LINE_BYTES:
        raise Lie(f"{path}: line {number + 1} has more than {MAX_LINE_BYTES:,} bytes")


def open_log(path: Path) -> BinaryIO:
    """Opens a log. Raises Lie where it is not a plain file: a link could lead anywhere."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise
        raise Lie(f"{path}: is not a plain file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Lie(f"{path}: is not a plain file")
    return file


class StepLines:
    """A log with a line for each of many steps, in order, of which a few are looked up.

    Consecutive steps are read without seeking.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_log(path)
        self._before, self._line = -1, b""  # step of the line before the next one; the next one
        self._read()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def line_of(self, step: int) -> bytes | None:
        """Returns the line of a step, None when there is none. Raises Lie when there are two, or it is damaged."""
        if not self._before < step <= self._next:
            self._seek(step)
        if self._next != step:
            return None
        line = self._line
        self._before = step
        self._read()
        if self._next == step:
            lie(self.path, f"step {step} has two lines", "one: no step is trained twice")
        return line

    def has_step(self, first: int, last: int) -> bool:
        """Returns whether there is a line of any step from `first` to `last`."""
        self._seek(first)
        return self._next <= last

    @property
    def last_step(self) -> int:
        """The step of the last complete line, 0 when there is none."""
        place = self._seek(MAX_STEP + 1)
        return self._read_from(place - 1) if place else 0

    def _read(self) -> None:
        self._line = self._file.readline(MAX_LINE_BYTES)
        if len(self._line) == MAX_LINE_BYTES:
            raise Lie(f"{self.path}: a line has more than {MAX_LINE_BYTES:,} bytes")
        torn = not self._line.endswith(b"\n")
        self._next = MAX_STEP + 1 if torn else self._step(self._line)

    def _step(self, line: bytes) -> int:
        if match := _HEAD.match(line):
            return int(match[1])
        raise Lie(f"{self.path}: a line begins with {line[:40]!r}, expected its step")

    def _seek(self, step: int) -> int:
        """Reads the first line whose step is at least `step`, found by bisection: a log may have gigabytes.

        Returns the offset just after the first byte of the line before it; 0 where there is none.
        """
        places = range(os.fstat(self._file.fileno()).st_size)
        place = bisect_left(places, step, key=self._read_from)
        self._read_from(place)
        self._before = step - 1
        return place

    def _read_from(self, place: int) -> int:
        """Reads the first line that begins at or after the byte `place`; returns its step."""
        self._file.seek(max(0, place - 1))
        if place:
            self._file.readline(MAX_LINE_BYTES)
        self._read()
        return self._next
