"""Reads a user's list of classes, and finds the label of a folder in it: by name, never by position."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config import MAX_CLASSES
from pretrain.config.checks import did_you_mean
from pretrain.data.classes import MAX_NAME_LETTERS
from pretrain.data.inside import file_inside
from pretrain.errors import UserError
from pretrain.json_files import brief, is_text, read_json
from pretrain.shards.imagenet import wnids

MAX_TEXT_BYTES = 64 << 20  # of a .txt: a million names of sixty letters


class ClassList(NamedTuple):
    """Names of classes, in the order of their labels."""

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()  # other names that their folders may have: WordNet ids
    source: str = ""  # for messages


def read_class_list(path: Path) -> ClassList:
    """Reads the classes of a JSON or .txt file. Raises UserError when it has none of these forms.

    JSON: a list of names, {"names": [...], "wnids": [...]}, {"0": [id, name]}, or {"0": name}; a name may be a list of
    synonyms. .txt: a name in each line, as Google lists ImageNet-21k's WordNet ids.
    """
    try:
        values = _lines(path) if path.suffix == ".txt" else read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _class_list(values, str(path))
    except ValueError as error:
        raise UserError(f'{path}: expected a JSON list of names, or an object with "names" ({error})') from None


def own_classes(out: Path) -> ClassList | None:
    """Returns the classes of the data set in a folder, None where there is none, or it has no names.

    A set that is indexed again would lose them otherwise. Raises UserError as `read_class_list`.
    """
    path = out / "classes.json"
    if not (out / "manifest.json").exists() or not path.exists():
        return None
    file_inside(out, path)
    return read_class_list(path)


def _lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        text = file.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"{path}: more than {MAX_TEXT_BYTES:,} bytes, which is the limit of a list of classes")
    try:
        return [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8") from None


def _class_list(values: Any, source: str) -> ClassList:
    ids: Any = ()
    if isinstance(values, dict) and values and set(values) == {str(number) for number in range(len(values))}:
        rows = [values[str(number)] for number in range(len(values))]
        if all(isinstance(row, list) and len(row) == 2 for row in rows):  # Keras: {"0": ["n01440764", "tench"], ...}
            ids, names = [row[0] for row in rows], [row[1] for row in rows]
        else:  # transformers' id2label: {"0": "tench", ...}
            names = rows
    elif isinstance(values, dict):
        names, ids = values.get("names"), values.get("wnids") or values.get("ids") or ()
    else:
        names = values
    if not isinstance(names, list) or not names or not isinstance(ids, (list, tuple)):
        raise ValueError("names and wnids must be lists")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{len(names)} names, at most {MAX_CLASSES}")
    if ids and len(ids) != len(names):
        raise ValueError(f"{len(names)} names and {len(ids)} wnids")
    return ClassList(tuple(map(_words, names)), tuple(map(_words, ids)), source)


def _words(name: Any) -> str:
    """A name, which may be a list of synonyms. Raises ValueError when it is something else."""
    words = [name] if isinstance(name, str) else name
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w and is_text(w) for w in words):
        raise ValueError(f"{brief(name)} is not a name")
    if len(joined := ", ".join(words)) > MAX_NAME_LETTERS:
        raise ValueError(f"{brief(joined)} has {len(joined)} letters, at most {MAX_NAME_LETTERS}")
    return joined


def labels_of(found: Sequence[str], classes: ClassList) -> tuple[list[int], str]:
    """Returns the label of each name in a source, and by what they were recognised, for the user.

    found: names of folders, or of an archive's classes. The first way that gives all of them a label is used: the
    classes' names, their ids, names that look equal (composed and decomposed accents), ImageNet's WordNet ids where
    there are 1000 names without ids of their own, numbers. Raises UserError that names the first one without a class.
    """
    numbers = {name: int(name) for name in found if name.isascii() and name.isdigit()}
    is_imagenet = not classes.ids and len(classes.names) == len(wnids())
    ways = (
        ("name", _places(classes.names)),
        ("id", _places(classes.ids)),
        ("name, accents composed", _places([unicodedata.normalize("NFC", name) for name in classes.names])),
        ("WordNet id in ImageNet's order", _places(wnids() if is_imagenet else ())),
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
