"""Reads a config from a YAML file and `key=value` overrides, and writes it; every mistake is reported in one line.

Files may come from other people: their size, nesting and references have limits, checked before anything is built.
omegaconf stays in this file and in the defaults of model.py and sections.py.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.checks import did_you_mean
from pretrain.config.hints import by_source, is_open, option_hint, other_name, uncut
from pretrain.config.model import OF_TIMM, ModelConfig
from pretrain.config.sections import Config
from pretrain.config.values import short, shown_value, type_name, with_whole_numbers, wrong_values
from pretrain.errors import PASSING_ERRORS, ConfigError, StorageError

MAX_BYTES = 100_000  # of a file or an override; a complete config has 3,000, our longest recipe 5,000
MAX_NESTING = 16  # sections and lists inside each other; ours have 3. libyaml crashes at a hundred thousand
MAX_LETTERS = 4096  # of one value: the longest path
MAX_VALUES = 2000  # of a whole config; ours have 100. omegaconf takes a millisecond for each
MAX_REFERENCES = 1000  # ${key} in a whole config; nested ones count each time they are resolved

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What omegaconf and PyYAML raise on text and values that they cannot take; PyYAML's tags fail in several ways.
_REFUSED = (
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


def load_config(path: Path | str, overrides: Sequence[str] = (), tell: Callable[[str], object] | None = None) -> Config:
    """Returns the config of a YAML file, changed by `key=value` overrides.

    If an override makes model.name a timm: model, settings of the file that have no effect on it are dropped, and
    `tell` is called with a line that names them; without `tell` they are refused. Of total_steps and total_epochs, the
    one given last counts.
    Raises ConfigError, one line that names the file or override at fault, the key and a suggestion; StorageError when
    the file cannot be read for now.
    """
    return config_from_dict(_read_yaml(Path(path)), str(path), overrides, tell)


def config_from_dict(
    values: dict[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    tell: Callable[[str], object] | None = None,
) -> Config:
    """Returns the config of nested dicts, all or part of `config_to_dict`'s, changed by overrides as in `load_config`.

    source: where the dicts come from. Raises ConfigError when `values` is not a config.
    """
    merged, given = _defaults(), set()
    changes = [(short(text), _read_override(text, overrides[n + 1 :])) for n, text in enumerate(overrides)]
    for origin, part in [(source, values), *changes]:
        before = {} if part is values else OmegaConf.to_container(merged.model)
        merged = _merge(merged, part, origin)
        keys = {key for key, _ in flatten(part)}
        _set_length(merged, keys)
        if tell and before and "model.name" in keys and (dropped := _without_effect(merged, before)):
            have = "has" if len(dropped) == 1 else "have"
            tell(f"{origin}: {', '.join(dropped)} of {source} {have} no effect on it: dropped")
            given -= {key.partition("=")[0] for key in dropped}
        given |= keys
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"no value for {', '.join(missing)}; set it in the file or as KEY=VALUE")
        written = merged.model.name
        config = OmegaConf.to_object(merged)
        assert isinstance(config, Config)
        for key in ("image_size", "patch_size"):  # a model's name may replace a default, but no given value
            if f"model.{key}" in given and (value := merged.model[key]) != (said := getattr(config.model, key)):
                plain = f"model.name={config.model.name} with image_size and patch_size"
                raise ConfigError(f"model.{key} is {value}, but {written} has {said}; remove one, or give {plain}")
    except ConfigError as error:
        raise ConfigError(by_source(error.args, source, overrides)) from None
    except _REFUSED as error:
        raise ConfigError(by_source([_first_line(error, source)], source, overrides)) from None
    return config


def model_from_dict(values: Any, source: str) -> ModelConfig:
    """Returns the model's settings from a dict of JSON values; `source` says where they come from.

    Raises ConfigError, naming the key, for a setting or a value that ModelConfig does not have.
    """
    merged = _merge(_defaults(), {"model": values}, source).model
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{source}: no value for {', '.join(missing)}")
    model = OmegaConf.to_object(merged)
    assert isinstance(model, ModelConfig)
    return model


def choices_of(part: type, name: str) -> tuple[str, ...]:
    """Returns the values that a setting of a section may have."""
    return get_args(get_type_hints(part)[name])


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON values."""
    return _plain(asdict(config))


def config_to_yaml(config: Config) -> str:
    """Returns the complete config as YAML; loading it gives an equal config."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None, width=120)
    return text.replace("\ntotal_steps: 0\n", "\ntotal_steps: 0  # from total_epochs and the size of data.train\n")


@cache
def _defaults() -> Any:
    """The config before anything is read. `_merge` copies it; omegaconf takes 20 ms to make it."""
    return OmegaConf.structured(Config)


@cache
def _default_values() -> Any:
    return OmegaConf.to_container(_defaults())


def _merge(merged: Any, values: Any, source: str) -> Any:
    """Returns `merged` changed by `values`, which may be of any shape. Raises ConfigError."""
    try:
        _check_values(values, source)  # whoever wrote it: file, override, somebody's checkpoint
        plain = with_whole_numbers(_at_home(values), _schema())
        if wrong := "; ".join(_unlike(source, *found) for found in wrong_values(plain, _schema(), _default_values())):
            raise ConfigError(f"{source}: {wrong}")
        merged = OmegaConf.merge(merged, OmegaConf.create(plain))
        _check_references(OmegaConf.to_container(merged), source)
        return merged
    except ConfigError:
        raise
    except _REFUSED as error:
        raise ConfigError(f"{source}: {_first_line(error, source)}") from None


def _unlike(source: str, key: str, value: Any, expected: str) -> str:
    """Returns what is wrong with a value; without key and value if the source is an override, which shows both."""
    given = "" if _is_override_of(key, source) else f"{key} is {shown_value(value)}, "
    return f"{given}expected {expected}"


def _is_override_of(key: str, source: str) -> bool:
    return source.startswith(f"{key}=")


def _at_home(values: Any) -> Any:
    """Returns the values with a leading ~ expanded to the user's home, which a shell does not do after `key=`."""
    if isinstance(values, dict):
        return {key: _at_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_at_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values


def _set_length(merged: Any, keys: set[str]) -> None:
    """A source that gives only one of total_steps and total_epochs replaces the other; a saved config has both."""
    if "total_epochs" in keys and "total_steps" not in keys and merged.total_epochs is not None:
        merged.total_steps = 0  # until the size of the data is known
    if "total_steps" in keys and "total_epochs" not in keys:
        merged.total_epochs = None


def _without_effect(merged: Any, before: Any) -> list[str]:
    """Resets the model's settings from earlier sources that a timm: model does not take; returns them."""
    name = str(merged.model.name)
    if not name.startswith("timm:") or str(before["name"]).startswith("timm:"):
        return []
    found = []
    for f in fields(ModelConfig):
        if f.name not in OF_TIMM and before[f.name] == merged.model[f.name] != f.default:
            found.append(f"model.{f.name}={before[f.name]}")
            merged.model[f.name] = f.default
    return found


def _read_yaml(path: Path) -> Any:
    if path.suffix == ".py":
        raise ConfigError(f"{path}: is a Python file, expected YAML, as in configs/ (docs/coming_from.md)")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
            raise StorageError(f"{path}: cannot be read for now ({error.strerror})") from None
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"{path}: cannot be read ({reason}){did_you_mean(path.name, near)}") from None
    try:
        _check_text(text, str(path))
        values = OmegaConf.to_container(OmegaConf.create(text))
    except ConfigError:
        raise
    except AssertionError:  # omegaconf's answer to a file that holds one number
        values = None
    except _REFUSED as error:
        raise _refusal(str(path), "not valid YAML", error) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return values


def _refusal(source: str, what: str, error: Exception) -> ConfigError:
    told = " ".join(str(error).replace('"<unicode string>", ', "").replace('"<byte string>", ', "").split())
    return ConfigError(f"{source}: {what}: {short(told, 600)}")


def _read_override(text: str, following: Sequence[str]) -> Any:
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")) or key.startswith("-"):
        hint = f"; {option_hint(text)}" if key.startswith("--") else ", for example optim.lr=1e-3"
        raise ConfigError(f"{short(text)!r} is not an override; write KEY=VALUE{short(hint)}")
    if key.count(".") >= MAX_NESTING:
        raise ConfigError(f"{short(text)}: is nested more than {MAX_NESTING} deep")
    try:
        _check_text(value, short(text))
        return OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except ConfigError:
        raise
    except _REFUSED as error:
        if is_open(text):
            whole = uncut(text, following)
            way_out = f"put it in quotes: {whole}" if whole else "its closing bracket is missing"
            raise ConfigError(f"{short(text)}: ends within brackets; {way_out}") from None
        raise _refusal(short(text), "not a valid value", error) from None


def _check_text(text: str, source: str) -> None:
    """Raises ConfigError for YAML that is too large, too deep, or has too long a value; its parser has no such limits.

    It counts the parser's events, which needs no recursion, and stops at the limits.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ConfigError(f"{source}: has more than {MAX_BYTES:,} bytes, which is the limit of a config")
    depth = values = 0
    for event in _events(text, source):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_LETTERS:
            raise ConfigError(f"{source}: {short(event.value)} has more than {MAX_LETTERS:,} letters")
        values += isinstance(event, yaml.NodeEvent)  # keys too
        if depth > MAX_NESTING:
            raise ConfigError(f"{source}: is nested more than {MAX_NESTING} deep")
        if values > 2 * MAX_VALUES:
            raise ConfigError(f"{source}: has more than {MAX_VALUES:,} values")


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        if "maximum nesting depth" in str(error):  # libyaml's own limit, 1000, since PyYAML 6.0.4; before any event
            raise ConfigError(f"{source}: is nested more than {MAX_NESTING} deep") from None
        raise


def _check_values(values: Any, source: str) -> None:
    """Raises ConfigError for more or deeper values than a config has, and for resolvers.

    ${oc.env:NAME} would copy a secret into the saved config; plain ${key} references are fine. Parsed values are
    searched: YAML has several ways to write a "$".
    """
    for number, value in enumerate(_leaves(values, source)):
        if number >= MAX_VALUES:
            raise ConfigError(f"{source}: has more than {MAX_VALUES:,} values")
        if isinstance(value, str) and len(value) > MAX_LETTERS:
            raise ConfigError(f"{source}: {short(value)} has more than {MAX_LETTERS:,} letters")
        if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
            raise ConfigError(
                f"{source}: {short(value)!r}: ${{...:...}} resolvers are not allowed, only ${{key}}; give the value"
            )


def _leaves(value: Any, source: str, depth: int = 0) -> Iterator[Any]:
    if depth > MAX_NESTING:
        raise ConfigError(f"{source}: is nested more than {MAX_NESTING} deep")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, source, depth + 1)
    else:
        yield value


_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")  # leading dots count sections upwards; one is the value's own


def _check_references(config: Any, source: str) -> None:
    """Raises ConfigError for references that expand too far: each of them may name a value that contains more."""
    counts: dict[str, int] = {}

    def count(value: Any, key: str, steps: int) -> int:
        if steps > 2 * MAX_NESTING:
            raise ConfigError(f"{source}: {key}: its ${{key}} references are circular or nested too deeply")
        if key not in counts and isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            counts[key] = sum(count(item, f"{key}.{name}".lstrip("."), steps + 1) for name, item in items)
        elif key not in counts:
            found = [_referred(key, *match.groups()) for match in _REFERENCE.finditer(str(value))]
            counts[key] = sum(1 + count(_value_at(config, name), name, steps + 1) for name in found)
        return counts[key]

    if (total := count(config, "", 0)) > MAX_REFERENCES:
        raise ConfigError(
            f"{source}: has {total:,} ${{key}} references, nested ones included; at most {MAX_REFERENCES:,}"
        )


def _referred(key: str, dots: str, name: str) -> str:
    """The complete key of a reference in the value of `key`."""
    above = key.split(".")[: -len(dots)] if dots else []
    return ".".join([*above, name])


def _value_at(config: Any, key: str) -> Any:
    """The value of a key such as data.train or stair_steps.0, None where there is none."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict):
            config = config.get(part)
        else:
            return None
    return config


def _first_line(error: Exception, source: str) -> str:
    """Makes omegaconf's several lines one: the complete key, what is wrong with it, and a suggestion.

    source: if it is an override of the key, the key is left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = [name for name, _ in flatten(_schema())] + [part for part in _schema() if isinstance(_schema()[part], dict)]
    told = f"{key}: " if key and not _is_override_of(key, source) else ""
    if "not in" in lines[0] and key:
        if (meant := other_name(key)) and key not in known:
            return f"{told}no such key; here it is {meant}"
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f" Did you mean: '{near[0]}'?" if near else did_you_mean(key, known)
        section = key.rpartition(".")[0] or "the config"
        return f"{told}no such key in {section}.{hint}"
    return told + lines[0]


@cache
def _schema() -> dict[str, Any]:
    """Every key of the config as nested dicts, with its type's name at the leaves."""

    def describe(cls: Any) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {name: describe(hint) if is_dataclass(hint) else type_name(hint) for name, hint in hints.items()}

    return describe(Config)


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
