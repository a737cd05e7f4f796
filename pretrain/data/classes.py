"""Compares two lists of class names: labels are matched by name, never by position."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from pretrain.errors import UserError
from pretrain.json_files import brief, is_text

MAX_NAME_LETTERS = 4096  # of a class name, which may list all synonyms
_UNUSED = "unused "  # followed by a number: names a head's output for which the data set had no class


class ClassMatch(NamedTuple):
    """What the labels of one side mean on the other."""

    labels: tuple[int, ...] | None  # our label for each of their labels; None: the same
    told: str | None  # one line for the user, if there is something to report


def match_classes(
    theirs: Sequence[str], num_theirs: int, ours: Sequence[str], num_ours: int, *, their_place: str, our_place: str
) -> ClassMatch:
    """Returns how labels of a data set (`theirs`) map to labels of another set or of weights (`ours`).

    Names in another order, a subset of the names, and names that differ only in composed or decomposed accents are
    mapped by name. Where one side has no names, or the sides' names are of different kinds (WordNet ids and words),
    labels are taken unchanged. `told` reports either case. Raises UserError, naming the first difference, when a class
    has no counterpart, or when one side's names are numbers that differ from its labels and the other has no names.
    """
    for place, names, number in ((their_place, theirs, num_theirs), (our_place, ours, num_ours)):
        if names and len(names) != number:
            raise UserError(f"{place} has {len(names)} class names for {number} classes")
    without = [
        place
        for place, names, others in ((their_place, theirs, ours), (our_place, ours, theirs))
        if not names or (not has_names(names) and not _are_digits(_used(others)))
    ]
    of_two_kinds = not without and _are_ids(theirs).isdisjoint(_are_ids(ours))
    if num_theirs > num_ours and (without or of_two_kinds):  # by names, the class that is missing is named
        raise UserError(f"{their_place} has {num_theirs} classes, {our_place} has {num_ours}")
    if len(without) == 2 or list(theirs) == list(ours):
        return ClassMatch(None, None)
    if without:
        for place, names in ((their_place, theirs), (our_place, ours)):
            _refuse_other_numbers(names, place, without[0])
        return ClassMatch(None, f"{without[0]} has no class names: labels are taken to mean the same")
    if of_two_kinds:
        kinds = f"class names of {their_place} ({theirs[0]!r}) and {our_place} ({ours[0]!r}) are of different kinds"
        if len(_used(theirs)) != len(_used(ours)):
            raise UserError(f"{kinds}, and not as many ({num_theirs}, {num_ours}); give both the same names")
        return ClassMatch(None, f"{kinds}: labels are taken to mean the same")
    return _by_name(theirs, ours, their_place, our_place)


def join_classes(
    lists: Sequence[Sequence[str]], places: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Returns the classes of several sets joined by name, and for each set the joined label of each of its labels.

    The first set's classes come first, then those that each further set adds. lists: each set's class names; places:
    what messages call the sets. Raises UserError when a set has no class names, or one name twice.
    """
    together: dict[str, int] = {}
    names: list[str] = []
    meanings: list[tuple[int, ...]] = []
    for own, place in zip(lists, places):
        if not has_names(own):
            raise UserError(f"{place} has no class names, by which classes are joined; give it some with --classes")
        for name in own:
            if together.setdefault(_normal(name), len(names)) == len(names):
                names.append(name)
        meanings.append(tuple(together[_normal(name)] for name in own))
        if len(set(meanings[-1])) < len(own):
            twice = next(name for number, name in enumerate(own) if meanings[-1][number] in meanings[-1][:number])
            raise UserError(f"{place}: class {twice!r} stands twice in its list")
    return tuple(names), meanings


def _refuse_other_numbers(names: Sequence[str], place: str, without: str) -> None:
    """Raises UserError when names are numbers that differ from their labels, as folders 0, 1, 10, 2, sorted as text.

    A label 2 without a name may then mean the class called 2, or the third class.
    """
    numbers = _used(names)
    for label, name in enumerate(numbers if _are_digits(numbers) else ()):
        if int(name) != label:
            raise UserError(
                f"{place}: class {label} is called {name!r}, and {without} has labels without names, which may mean "
                "either; make one of them anew with tools/make_shards.py --classes"
            )


def _by_name(theirs: Sequence[str], ours: Sequence[str], their_place: str, our_place: str) -> ClassMatch:
    places: dict[str, int] = {}
    twice: dict[str, int] = {}  # second position of a name that occurs twice
    for place, name in enumerate(map(_normal, ours)):
        if places.setdefault(name, place) != place:
            twice.setdefault(name, place)
    for number, name in enumerate(theirs):
        if number < len(ours) and ours[number] == f"{_UNUSED}{number}":
            places.setdefault(_normal(name), number)  # the unused output of this number takes the class
        if second := twice.get(_normal(name)):
            raise UserError(
                f"{our_place}: classes {places[_normal(name)]} and {second} are both called {name!r}, so class "
                f"{number} of {their_place} cannot be told; give both sides the same names in the same order"
            )
        if _normal(name) not in places:
            own = f"{ours[number]!r}" if number < len(ours) else "none"
            raise UserError(
                f"{their_place}: class {number} is {name!r}, which {our_place} does not have (its class {number} is "
                f"{own}); make the set with tools/make_shards.py --classes and the other side's names"
            )
    labels = tuple(places[_normal(name)] for name in theirs)
    if len(set(labels)) < len(labels):
        again = next(n for n, label in enumerate(labels) if label in labels[:n])
        raise UserError(f"{their_place}: class {again}, {theirs[again]!r}, stands twice in its list")
    some = f"{len(theirs)} of the {len(ours)} classes" if len(theirs) < len(ours) else f"the {len(ours)} classes"
    order = "" if labels == tuple(range(len(labels))) else ", in another order"
    told = f"{their_place} has {some} of {our_place}{order}: mapped by name"
    return ClassMatch(None if labels == tuple(range(len(labels))) else labels, told)


def check_names(names: object, num_classes: int, source: str) -> tuple[str, ...]:
    """Returns the names of a set's classes. Raises UserError unless they are as many texts as there are classes."""
    if not isinstance(names, (list, tuple)):
        raise UserError(f"{source}: is {brief(names)}, expected a list of names")
    if len(names) != num_classes:
        raise UserError(f"{source}: has {len(names)} class names for {num_classes} classes")
    for number, name in enumerate(names):
        if not is_text(name) or len(name) > MAX_NAME_LETTERS:
            raise UserError(
                f"{source}: class {number} is {brief(name)}, expected a name of at most {MAX_NAME_LETTERS} letters"
            )
    return tuple(names)


def names_of_head(class_names: Sequence[str], num_outputs: int) -> tuple[str, ...]:
    """Returns a name for each output of a head that was trained on these classes; () where they have no names.

    An output beyond the classes, as when 21,841 classes are trained with model.num_classes=21843, is "unused 21841":
    without a name for it all names would be dropped, and labels would be matched by position.
    """
    if len(class_names) < num_outputs and not has_names(class_names):
        return ()
    return (*class_names, *(f"{_UNUSED}{number}" for number in range(len(class_names), num_outputs)))


def _used(class_names: Sequence[str]) -> list[str]:
    """The names without those of unused outputs, which come last."""
    return [name for name in class_names if not name.startswith(_UNUSED)]


def has_names(class_names: Sequence[str]) -> bool:
    """Returns whether there are real names: a set whose labels came without any has "0", "1", "2", ... instead."""
    return bool(class_names) and list(class_names) != [str(number) for number in range(len(class_names))]


def _are_digits(class_names: Sequence[str]) -> bool:
    """Whether all names are numbers, as of folders 1, 3, 10: names too, if the other side's are numbers as well."""
    return bool(class_names) and all(name.isascii() and name.isdigit() for name in class_names)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _are_ids(class_names: Sequence[str]) -> set[bool]:
    """Which kinds of names occur: True for WordNet ids (n01440764), False for words; the two cannot be compared.

    Both occur where sets of either kind were joined.
    """
    return {re.fullmatch(r"n\d{8}", name) is not None for name in _used(class_names)}
