"""What `data.train` and `data.reweight` may be: a set, or a mixture of sets with weights that may change at a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from pretrain.errors import ConfigError

MAX_SOURCES = 64  # sets of a mixture: each has a schedule and open files in every process
MAX_WEIGHT = 1e15  # numbers of samples may be weights
MAX_REWEIGHT_STEP = 1 << 38  # the last at which weights may change: slots are counted in 64 bits
_LETTERS = 80  # of a value, in an error
_EXAMPLE = "[{path: data/a, weight: 0.6}, {path: data/b, weight: 0.4}]"


class Source(NamedTuple):
    """A set of training images, in a mixture or alone."""

    path: Path
    weight: float = 1.0  # its share of all samples is this / the sum over all sets

    def __repr__(self) -> str:
        """As YAML has it, for tables of settings."""
        return f"{{path: {self.path}, weight: {self.weight}}}"


@dataclass
class Reweight:
    """Other weights of a mixture from a step on."""

    step: int = MISSING  # the first with these weights
    weights: list[float] = MISSING  # of the sets in the order of data.train; 0: nothing is taken from a set


def training_data(value: Any) -> Path | tuple[Source, ...]:
    """The value of data.train: a path, or the sets of a mixture. Raises ConfigError for anything else."""
    if isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= MAX_SOURCES:
        expected = f"the path of one set, or 2 to {MAX_SOURCES} sets as {_EXAMPLE}"
        raise ConfigError(f"data.train is {str(value)[:_LETTERS]}, expected {expected}")
    return tuple(_source(place, item) for place, item in enumerate(value))


def _source(place: int, item: Any) -> Source:
    values = item._asdict() if isinstance(item, Source) else item
    if not isinstance(values, dict) or set(values) != {"path", "weight"}:
        raise ConfigError(
            f"data.train[{place}] is {str(item)[:_LETTERS]!r}, expected path and weight, as in {_EXAMPLE}"
        )
    path, weight = values["path"], values["weight"]
    if not isinstance(path, (str, Path)) or not str(path):
        raise ConfigError(f"data.train[{place}].path is {str(path)[:_LETTERS]!r}, expected a path")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= MAX_WEIGHT:
        found, expected = str(weight)[:_LETTERS], f"a number from 0 to {MAX_WEIGHT:g}"
        raise ConfigError(f"data.train[{place}].weight is {found!r}, expected {expected}")
    return Source(Path(path), weight)


def phases(sources: Sequence[Source], reweight: Sequence[Reweight]) -> list[tuple[int, list[float]]]:
    """Returns (first step, weights of the sources) for each phase, in order."""
    return [(0, [source.weight for source in sources]), *((new.step, new.weights) for new in reweight)]


def weight_problems(sources: Sequence[Source], reweight: Sequence[Reweight]) -> Iterator[str]:
    """Yields a sentence for each thing that is wrong with the weights."""
    found, count = phases(sources, reweight), len(sources)
    if count == 1:
        if reweight:
            yield "data.reweight changes the weights of a mixture, but data.train is one set"
        return
    steps = [step for step, _ in found]
    if steps != sorted(set(steps)) or steps[-1] > MAX_REWEIGHT_STEP:
        yield f"data.reweight has steps {steps[1:]}, expected rising ones from 1 to {MAX_REWEIGHT_STEP:,}"
    for place, (_, weights) in enumerate(found):
        name = f"data.reweight[{place - 1}].weights is {weights}" if place else f"data.train has weights {weights}"
        if len(weights) != count or not all(0 <= weight <= MAX_WEIGHT for weight in weights) or not any(weights):
            yield f"{name}, expected {count} numbers from 0 to {MAX_WEIGHT:g}, not all 0"
    for place, source in enumerate(sources):
        if not any(weights[place : place + 1] != [0] for _, weights in found):
            yield f"data.train[{place}] ({source.path}) has weight 0 in all steps; leave it out, or reweight it"
