"""Checks single values of a config before omegaconf sees them; a message says what is expected."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, get_args

from omegaconf import MISSING

SHOWN_LETTERS = 200  # of a value in a message

# What a setting of each type expects. Choices are not here: omegaconf's own message lists them.
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "tuple[float, float]": "two numbers",
    "tuple[float, float, float]": "three numbers",
}
_OR_NULL = " | None"
_EXACT = 2.0**53  # below it a float holds each whole number exactly
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")  # as omegaconf reads texts


def wrong_values(
    values: Any, schema: dict[str, Any], defaults: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, str]]:
    """Yields key, value and what is expected of it, for each value that a config of this schema cannot have.

    schema: the types' names by key, nested. defaults: the config's own values, some of which serve as examples.
    Unknown keys are skipped, and so are texts with ${key} or ???, whose values are not known yet.
    """
    for key, value in values.items():
        expected = schema.get(key)
        if isinstance(expected, dict):
            if isinstance(value, dict):
                yield from wrong_values(value, expected, defaults[key], f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value, _section(key, value, expected)
        elif f"{prefix}{key}" in ("data.train", "data.reweight") and isinstance(value, dict):
            yield f"{prefix}{key}", value, "a list: each entry with a dash, or in [ ]"
        elif isinstance(expected, str) and not _fits(value, expected):
            yield f"{prefix}{key}", value, _words(expected, defaults[key])


def with_whole_numbers(value: Any, expected: Any) -> Any:
    """Returns a value with 1000 in place of 1e3, which YAML reads as a float, where a whole number is expected.

    expected: the type's name; for a section, the names by key, nested; None: unknown.
    """
    if isinstance(expected, dict) and isinstance(value, dict):
        return {key: with_whole_numbers(item, expected.get(key)) for key, item in value.items()}
    kind = expected.removesuffix(_OR_NULL) if isinstance(expected, str) else ""
    if kind == "list[int]" and isinstance(value, list):
        return [with_whole_numbers(item, "int") for item in value]
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return int(value) if kind == "int" and is_whole else value


def shown_value(value: Any) -> str:
    """Returns a value as a config writes it, cut where it is long: null and true, texts in quotes."""
    return short(json.dumps(value) if value is None or isinstance(value, bool) else repr(value))


def short(value: Any, letters: int = SHOWN_LETTERS) -> str:
    """Returns a value as text, cut where it is long."""
    text = str(value)
    return text if len(text) <= letters else f"{text[:letters]}..."


def type_name(hint: Any) -> str:
    """Returns how a setting's type is written: `int`, `Path | None`, `list[int]`."""
    if isinstance(hint, UnionType):
        return " | ".join("None" if part is NoneType else type_name(part) for part in get_args(hint))
    return hint.__name__ if type(hint) is type else str(hint)


def _section(key: str, value: Any, keys: dict[str, Any]) -> str:
    if key == "model" and isinstance(value, str):  # as in an args.yaml of timm
        return (
            f"a section: write model.name={value}, or model.name=timm:{value} for a model of timm's; its other keys: "
            "docs/coming_from.md"
        )
    return f"a section with {', '.join(keys)}"


def _fits(value: Any, expected: str) -> bool:
    """Whether omegaconf accepts the value, or refuses it with a better message than ours."""
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return True
    kind = expected.removesuffix(_OR_NULL)
    if value is None or (value == "None" and kind != expected):  # Python's "None" would be a text
        return value is None and (kind != expected or kind not in _EXPECTED)
    if kind == "int":
        return _reads(int, value)
    if kind == "float":
        return _reads(float, value)
    if kind == "bool":
        return isinstance(value, (bool, int)) or str(value).lower() in _BOOLEANS
    if kind in ("str", "Path"):
        return not isinstance(value, (list, dict))
    if kind.startswith("list[") and kind in _EXPECTED:
        return isinstance(value, (list, tuple)) and all(_fits(item, kind[len("list[") : -1]) for item in value)
    if kind.startswith("tuple["):
        numbers = kind.count("float")
        is_list = isinstance(value, (list, tuple))  # a dict made in Python may hold a tuple
        return is_list and [type(item) in (int, float) for item in value] == [True] * numbers
    return True


def _reads(number: type, value: Any) -> bool:
    """Whether a value reads as a number of the type, as texts of digits do too."""
    if isinstance(value, (bool, list, dict)) or (number is int and isinstance(value, float)):
        return False
    try:
        number(value)
    except OverflowError:  # reported as such
        return True
    except (TypeError, ValueError):
        return False
    return True


def _words(expected: str, default: Any) -> str:
    kind = expected.removesuffix(_OR_NULL)
    words = _EXPECTED.get(kind, kind)
    if kind != expected:
        words += ", or null for none"
    if isinstance(default, (list, tuple)) and default:
        return f"{words}, for example {list(default)}"
    if kind not in ("int", "float"):
        return words
    example = default if isinstance(default, (int, float)) and default else {"int": "1000", "float": "1e-3"}[kind]
    return f"{words}, for example {example}"
