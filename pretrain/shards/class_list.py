"""The classes that a user gives, and which label a folder has among them: by its name, never by its position."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config.checks import did_you_mean
from pretrain.errors import UserError
from pretrain.shards.imagenet import wnids


class ClassList(NamedTuple):
    """Names of classes, in the order of their labels."""

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()  # what their folders may be called besides: WordNet ids
    source: str = ""  # for messages


def read_class_list(path: Path) -> ClassList:
    """Returns the classes of a JSON file: a list of names, {"names": [...], "wnids": [...]}, or {"0": [id, name], ...}.

    A name may be a list of words for it. Raises UserError when it is none of these.
    """
    try:
        return _class_list(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f'{path}: expected a JSON list of names, or an object with "names" ({error})') from None


def _class_list(values: Any, source: str) -> ClassList:
    if isinstance(values, dict) and values and set(values) == {str(number) for number in range(len(values))}:
        rows = [values[str(number)] for number in range(len(values))]  # Keras: {"0": ["n01440764", "tench"], ...}
        return ClassList(tuple(str(row[1]) for row in rows), tuple(str(row[0]) for row in rows), source)
    names = values["names"] if isinstance(values, dict) else values
    ids = (values.get("wnids") or values.get("ids") or ()) if isinstance(values, dict) else ()
    if isinstance(names, str) or (ids and len(ids) != len(names)):
        raise ValueError("names and wnids must be lists of the same length")
    return ClassList(tuple(n if isinstance(n, str) else ", ".join(n) for n in names), tuple(map(str, ids)), source)


def labels_of(found: Sequence[str], classes: ClassList) -> tuple[list[int], str]:
    """Returns the label of each name that a source has, and by what they were recognised, to be told.

    found: names of folders, or of an archive's classes. The first way in which all of them have one is taken: the
    classes' names, their ids, names that look equal (composed and decomposed accents), ImageNet's WordNet ids where
    there are 1000 classes, numbers. Raises UserError that names the first one without a class.
    """
    numbers = {name: int(name) for name in found if name.isascii() and name.isdigit()}
    ways = (
        ("name", _places(classes.names)),
        ("id", _places(classes.ids)),
        ("name, accents composed", _places([unicodedata.normalize("NFC", name) for name in classes.names])),
        ("WordNet id in ImageNet's order", _places(wnids() if len(classes.names) == len(wnids()) else ())),
        ("number", {name: [n] for name, n in numbers.items() if n < len(classes.names)}),
    )
    for way, places in ways:
        keys = [unicodedata.normalize("NFC", name) if "accents" in way else name for name in found]
        if all(len(places.get(key, ())) == 1 for key in keys):
            labels = [places[key][0] for key in keys]
            if len(set(labels)) < len(labels):
                again = next(i for i, label in enumerate(labels) if label in labels[:i])
                first = found[labels.index(labels[again])]
                raise UserError(f"{first!r} and {found[again]!r} are the same class of {classes.source}; join them")
            return labels, way
    likeliest = max((places for _, places in ways), key=lambda places: sum(name in places for name in found))
    return _refuse(found, classes, likeliest)


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _refuse(found: Sequence[str], classes: ClassList, places: dict[str, list[int]]) -> Any:
    for name in found:
        if len(places.get(name, ())) > 1:
            where = ", ".join(map(str, places[name]))
            raise UserError(
                f"{name!r} stands several times in {classes.source} ({where}); name folders by id or number"
            )
    missing = next(name for name in found if name not in places)
    hint = did_you_mean(missing, classes.names)
    known = f"{len(classes.names)} names, the first {classes.names[0]!r}" if classes.names else "no names"
    raise UserError(f"{missing!r} is not one of the classes of {classes.source} ({known}); add it, or rename it.{hint}")
