"""JSON from a bad disk or from a stranger: size, nesting and types are compared with limits before a value is used.

Every JSON file of the project is read here: `Fields.read` for an object in a file, `Fields.parse` for one in a text or
a line of a log, whose values are asked for with their types; `read_json` and `parse_json` for anything else. What does
not fit is one UserError with the place, the key, what was found and what is expected.
"""

import json
import math
import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn

from pretrain.errors import UserError

MAX_BYTES = 64 << 20  # a manifest of 300 million images in shards of 10,000 has 5 MB
MAX_MARKS = 3 << 20  # of , : [ and {: 64 MB of small objects become 1.7 GB; 300,000 shards need 2.7 million
MAX_DEPTH = 32  # objects and lists inside each other; ours have 5


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_marks: int = MAX_MARKS) -> Any:
    """Returns what a file of JSON holds. Raises UserError when it is too large or not JSON, OSError as it comes."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), str(path), max_marks)


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns a file's bytes. Raises UserError when it is too large or no plain file, OSError as it comes."""
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a plain file")
        text = file.read(min(max_bytes, status.st_size) + 1)  # read(n) allocates n bytes at once
    if len(text) > max_bytes:
        raise UserError(f"{path}: has more than {max_bytes:,} bytes, which is the limit of such a file")
    return text


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer, for ever


def parse_json(text: bytes | str, source: str, max_marks: int = MAX_MARKS) -> Any:
    """Returns what a text of JSON (UTF-8) says.

    Raises UserError naming `source` when it is not JSON, too deep, or would become far larger in memory than it is.
    """
    marks = (b",", b":", b"[", b"{") if isinstance(text, bytes) else (",", ":", "[", "{")
    if sum(text.count(mark) for mark in marks) > max_marks:  # pyright: ignore[reportArgumentType]
        raise UserError(f"{source}: holds more than {max_marks:,} values")
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise UserError(f"{source}: is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # also bytes that are not UTF-8, and numbers of more than 4300 digits
        raise UserError(f"{source}: is not JSON ({error})") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [inner for inner in level if isinstance(inner, (dict, list))]
        level = [item for inner in containers for item in (inner.values() if isinstance(inner, dict) else inner)]
        if not level:
            return value
    raise UserError(f"{source}: is nested more than {MAX_DEPTH} deep")


@dataclass(frozen=True)
class Fields:
    """A JSON object, its values by type. A key that is not there, or null, is `default` where one is given.

    Each method raises UserError unless the value is of its type and within its bounds.
    """

    values: dict[str, Any]
    source: str  # the file, and where in it

    @classmethod
    def of(cls, value: object, source: str) -> "Fields":
        """Returns a value as an object. Raises UserError when it is something else."""
        if not isinstance(value, dict):
            raise UserError(f"{source}: is {brief(value)}, expected an object")
        return cls(value, source)

    @classmethod
    def read(cls, path: Path, *, max_bytes: int = MAX_BYTES, max_marks: int = MAX_MARKS) -> "Fields":
        """Returns the object that a file holds. Raises UserError as `read_json` and `of`, OSError as it comes."""
        return cls.of(read_json(path, max_bytes=max_bytes, max_marks=max_marks), str(path))

    @classmethod
    def parse(cls, text: bytes | str, source: str, max_marks: int = MAX_MARKS) -> "Fields":
        """Returns the object that a text of JSON says. Raises UserError as `parse_json` and `of`."""
        return cls.of(parse_json(text, source, max_marks), source)

    def integer(self, key: str, least: int, most: int, default: int | EllipsisType = ...) -> int:
        """An integer within [least, most]; neither true nor 1.0 is one."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.wrong(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float, default: float | EllipsisType = ...) -> float:
        """A finite number within [least, most]."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            self.wrong(key, f"a number from {least:g} to {most:g}")
        if not math.isfinite(value):
            self.wrong(key, "a finite number")
        return float(value)

    def numbers(self, key: str, least: float, most: float) -> list[float]:
        """A list of finite numbers within [least, most]."""
        each = self.items(key)
        return [each.number(place, least, most) for place in each.values]

    def flag(self, key: str, default: bool | EllipsisType = ...) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | EllipsisType = ..., *, max_letters: int = 4096) -> str:
        """A text without lone surrogates, which no file can hold."""
        value = self._get(key, default)
        if not is_text(value) or len(value) > max_letters:
            self.wrong(key, f"a text of at most {max_letters} letters")
        return value

    def texts(self, key: str, default: tuple[str, ...] | EllipsisType = ...) -> tuple[str, ...]:
        """A list of texts."""
        value = self._get(key, default)
        if not isinstance(value, (list, tuple)) or not all(map(is_text, value)):
            self.wrong(key, "a list of texts")
        return tuple(value)

    def part(self, key: str) -> "Fields":
        """An object inside this one."""
        return Fields.of(self._get(key, ...), f"{self.source}: {key}")

    def parts(self, key: str, default: tuple[()] | EllipsisType = ...) -> list["Fields"]:
        """A list of objects."""
        return [Fields.of(item, f"{self.source}: {place}") for place, item in self.items(key, default).values.items()]

    def items(self, key: str, default: tuple[()] | EllipsisType = ...) -> "Fields":
        """A list of any values, each of which has the key "key[place]"."""
        value = self._get(key, default)
        if not isinstance(value, (list, tuple)):
            self.wrong(key, "a list")
        return Fields({f"{key}[{place}]": item for place, item in enumerate(value)}, self.source)

    def has(self, key: str) -> bool:
        """Whether the key is there, and not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, expected: str) -> NoReturn:
        """Raises the UserError of a value that is not what is expected."""
        raise UserError(f"{self.source}: {key} is {brief(self.values.get(key))}, expected {expected}")

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is ...:
            raise UserError(f"{self.source}: {key} is {'null' if key in self.values else 'missing'}")
        return default


def is_text(value: object) -> bool:
    """Returns whether a value is a text that UTF-8 can hold; JSON can name half of a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def brief(value: object) -> str:
    """Returns a value as an error shows it: escaped and short, however large it is."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlong, short.maxlevel = 80, 80, 40, 3
    return short.repr(value)
