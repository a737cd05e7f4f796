"""A config from a YAML file and `key=value` overrides, and back; every mistake is one line.

omegaconf stays in this file and in the defaults of model.py and sections.py.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.checks import did_you_mean
from pretrain.config.model import ModelConfig
from pretrain.config.sections import Config
from pretrain.errors import ConfigError


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of a YAML file, changed by `key=value` overrides.

    Raises ConfigError, one line that names the file or the override at fault, the key and a suggestion.
    """
    return _to_config(str(path), _read_yaml(Path(path)), overrides)


def config_from_dict(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of nested dicts, as `config_to_dict` writes them or less, changed by `key=value` overrides.

    Raises ConfigError when `values` is not one.
    """
    return _to_config(source, values, overrides)


def model_from_dict(values: Any, source: str) -> ModelConfig:
    """Returns the model's settings from a dict of JSON values, of which `source` names the place.

    Raises ConfigError, naming the key, for a setting or a value that ModelConfig does not have.
    """
    merged = _merge(OmegaConf.structured(Config), {"model": values}, source).model
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
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def _merge(merged: Any, values: Any, source: str) -> Any:
    """Returns `merged` changed by `values`, which may be of any shape. Raises ConfigError."""
    try:
        values = OmegaConf.create(values)
        plain = OmegaConf.to_container(values)
        _refuse_resolvers(source, plain)  # whoever wrote it: file, override, somebody's checkpoint
        if wrong := "; ".join(_wrong_shapes(plain, _schema())):
            raise ConfigError(f"{source}: {wrong}")
        return OmegaConf.merge(merged, values)
    except ConfigError:
        raise
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None


def _wrong_shapes(values: Any, schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields what omegaconf refuses without naming the key or the value, or lets pass: sections and pairs."""
    for key, value in values.items():
        expected = schema.get(key)
        if isinstance(expected, dict):
            if isinstance(value, dict):
                yield from _wrong_shapes(value, expected, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key} is {value}, expected a section with {', '.join(expected)}"
        elif expected == "tuple[float, float]" and not isinstance(value, str):  # a string may refer to another key
            if not isinstance(value, list) or [type(item) in (int, float) for item in value] != [True, True]:
                yield f"{prefix}{key} is {value}, expected two numbers, for example [0.5, 1.0]"


def _to_config(source: str, values: Any, overrides: Sequence[str]) -> Config:
    merged, given = OmegaConf.structured(Config), set()
    for origin, part in [(source, values), *((text, _read_override(text)) for text in overrides)]:
        merged = _merge(merged, part, origin)
        given |= {key for key, _ in flatten(OmegaConf.to_container(OmegaConf.create(part)))}
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"no value for {', '.join(missing)}; set it in the file or as KEY=VALUE")
        written = merged.model.name
        config = OmegaConf.to_object(merged)
        assert isinstance(config, Config)
        for key in ("image_size", "patch_size"):  # a name's own one replaces the default, and nothing else
            if f"model.{key}" in given and (value := merged.model[key]) != (said := getattr(config.model, key)):
                plain = f"model.name={config.model.name} with image_size and patch_size"
                raise ConfigError(f"model.{key} is {value}, but {written} has {said}; remove one, or give {plain}")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None
    return config


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: cannot be read ({_reason(error)}){did_you_mean(path.name, near)}") from None
    try:
        values = OmegaConf.create(text)
    except AssertionError:  # omegaconf's answer to a file that holds one number
        values = None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return values


def _read_override(text: str) -> Any:
    key, equals, _ = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")) or key.startswith("-"):
        raise ConfigError(f"{text!r} is not an override; write KEY=VALUE, for example optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{text}: not a valid value: {' '.join(str(error).split())}") from None


def _refuse_resolvers(source: str, value: Any) -> None:
    # ${oc.env:NAME} would copy a secret into the saved config; plain ${key} references are fine. Parsed values are
    # searched: YAML has several ways to write a "$".
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_resolvers(source, item)
    elif isinstance(value, str) and "${" in re.sub(r"\$\{[\w.]+\}", "", value):
        raise ConfigError(f"{source}: {value!r}: ${{...:...}} resolvers are not allowed, only ${{key}}; give the value")


def _first_line(error: Exception) -> str:
    """The complete key, what is wrong with it, and a suggestion, from omegaconf's several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = [name for name, _ in flatten(_schema())] + [part for part in _schema() if isinstance(_schema()[part], dict)]
    if "not in" in lines[0] and key:
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f" Did you mean: '{near[0]}'?" if near else did_you_mean(key, known)
        section = key.rpartition(".")[0] or "the config"
        return f"{key}: no such key in {section}.{hint}"
    return f"{key}: {lines[0]}" if key else lines[0]


def _schema() -> dict[str, Any]:
    """Every key of the config as nested dicts, with its type's name at the leaves."""

    def describe(cls: type) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {f.name: describe(hints[f.name]) if is_dataclass(hints[f.name]) else str(f.type) for f in fields(cls)}

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
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
