"""Shared by the sections' checks: messages for numbers out of range, suggestions, what differs from the defaults."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def non_defaults(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields key and value of each setting that differs from its default, or has none."""
    for f in fields(part):
        value = getattr(part, f.name)
        if is_dataclass(value):
            yield from non_defaults(value, f"{prefix}{f.name}.")
        elif value != (f.default if f.default_factory is DATACLASS_MISSING else f.default_factory()):
            yield prefix + f.name, value


def outside(part: Any, section: str, **limits: tuple[float, float]) -> Iterator[str]:
    """Yields a sentence for each named number of `part` that lies outside its (lowest, highest); null is fine."""
    for name, (low, high) in limits.items():
        value = getattr(part, name)
        if value is not None and not low <= value <= high:
            yield f"{section}.{name}".lstrip(".") + f" is {value}, expected {low} to {high}"


def did_you_mean(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean: '{near[0]}'?" if near else ""


def timm_models() -> list[str]:
    """Returns the names of timm's models, read from its source: importing it takes seconds, and imports torch."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations or [] if spec else []
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in Path(folder, "models").glob("*.py")]
    return sorted(name for text in texts for name in re.findall(r"^@register_model\ndef (\w+)\(", text, re.MULTILINE))
