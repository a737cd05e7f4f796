"""The score that a recipe's header promises, for runs that follow the recipe."""

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from pretrain.config import MAY_CHANGE, Config, config_to_dict, load_config
from pretrain.config.reading import flatten
from pretrain.errors import ConfigError
from pretrain.report.files import read_text

_FREE = {*MAY_CHANGE, "name", "seed"} - {"data.reweight"}  # settings that do not affect a score

_NO_PROMISE = re.compile(r"(?:[^:]+: )?(?:none|not measured)\b")  # also after the model's name, in a line of the table


@dataclass(frozen=True)
class Target:
    """The score that the recipe's header promises."""

    recipe: str  # the config file, as the command named it
    score: str


def read_target(folder: Path, recipe: str | None, config: Config | None) -> Target | None:
    """Returns the score that `recipe` promises, by the copy in the run's folder; None without one.

    None also when the run does not follow the recipe: another data set, start, model, length, rate or loss has another
    score.
    """
    text = read_text(folder, "recipe.yaml") if recipe else None
    if not recipe or not text or config is None:
        return None
    name = folder.resolve().name
    score = recipe_score(text, name)
    if score is None or _NO_PROMISE.match(score) or not _is_the_recipes(config, folder / "recipe.yaml", text, name):
        return None
    return Target(recipe, score)


def _is_the_recipes(config: Config, path: Path, text: str, name: str) -> bool:
    line = _table_line(text, name)
    overrides = _of_command(text) if line is None else _overrides(line)
    try:
        return _decides(config) == _decides(load_config(path, overrides))
    except (ConfigError, OSError):  # of another version
        return False


def _decides(config: Config) -> tuple[Any, ...]:
    """Returns all settings that a score depends on. Of paths only the end, since data may have been moved."""
    data = [(_end(source.path), source.weight) for source in config.data.sources]
    settings = {key: value for key, value in flatten(config_to_dict(config)) if key not in _FREE}
    return data, _end(config.init_from), _end(config.branch_from), settings


def _end(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    return path.parts[-3 if path.parent.name == "checkpoints" else -2 :]


def _of_command(text: str) -> list[str]:
    """Returns the overrides in the header's command line, without optional ones in brackets."""
    line = next((line for line in _header(text) if line.startswith(" command:")), "")
    return re.findall(r"\s([a-z_.]+=[^\s\]]+)(?=\s|$)", line)


def recipe_score(text: str, name: str) -> str | None:
    """Returns the `score:` paragraph of a config's header, preceded by the line of run `name` in its table, if any."""
    header = _header(text)
    begin = next((i for i, line in enumerate(header) if line.startswith(" score:")), None)
    if begin is None:
        return None
    more = takewhile(lambda line: line.startswith("   ") and "|" not in line, header[begin + 1 :])  # not the table
    words = " ".join([header[begin].partition(":")[2].strip(), *map(str.strip, more)])
    cells = _table_line(text, name)
    return words if cells is None else f"{cells[0]}: {cells[2]}. {words}"


def _header(text: str) -> list[str]:
    return [line.removeprefix("#").rstrip() for line in text.splitlines() if line.startswith("#")]


def _table_line(text: str, name: str) -> list[str] | None:
    """Returns the four cells of run `name` in the header's table: model, days, score, overrides."""
    own = re.search(r"^name: *(\S+)", text, flags=re.MULTILINE)
    for line in _header(text):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and (
            f"name={name}" in cells[3].split() or (cells[3] == "(this file)" and own and own[1] == name)
        ):
            return cells
    return None


def _overrides(cells: list[str]) -> list[str]:
    return [] if cells[3] == "(this file)" else cells[3].split()
