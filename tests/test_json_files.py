"""JSON of strangers: every wrong type, range, size and nesting is one UserError that names place and key."""

import json
import math
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.json_files import MAX_DEPTH, MAX_MARKS, Fields, parse_json, read_bytes, read_json

DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 200 + "]" * 200,
    "objects": '{"a":' * 100_000,
    "one too deep": "[" * (MAX_DEPTH + 1) + "0" + "]" * (MAX_DEPTH + 1),
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_deep_nesting_is_refused(text: str) -> None:
    """Whether the parser's own limit is met or ours."""
    with pytest.raises(UserError, match="here: is (nested more|not JSON)"):
        parse_json(text, "here")


def test_allowed_nesting_is_read() -> None:
    """As deep as the limit says."""
    text = "[" * MAX_DEPTH + "0" + "]" * MAX_DEPTH
    assert parse_json(text, "here") == json.loads(text)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"9" * 5000, b"{'a': 1}", b"nul", b"[1,]", b"\xef\xbb\xbf1"])
def test_what_is_no_json_is_refused(text: bytes, tmp_path: Path) -> None:
    """One line with the file's name."""
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="file.json: is not JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """By its size, which the error tells."""
    path = tmp_path / "file.json"
    path.write_text("1" * 1001)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        read_json(path, max_bytes=1000)
    assert len(read_bytes(path, max_bytes=1 << 50)) == 1001, "no memory is taken for bytes that are not there"


@pytest.mark.parametrize("item", [b"[],", b"{},", b'{"a":1},', b'"ab",', b"1.5,"])
def test_values_are_counted_before_they_are_built(item: bytes) -> None:
    """Thirty megabytes of small values would become hundreds."""
    with pytest.raises(UserError, match="here: holds more than 3,145,728 values"):
        parse_json(b"[" + item * (MAX_MARKS // sum(map(item.count, (b",", b":", b"[", b"{"))) + 1) + b"0]", "here")


WRONG = [
    (value, ask)
    for ask, values in {
        "integer": [True, 1.0, "1", [], {}, -1, 11, 10**40, float("nan"), float("inf")],
        "number": [True, "1", [], {}, -1, 11, 10**400, float("nan"), float("inf")],
        "numbers": ["abc", 1, {}, [True], ["1"], [None], [5, 11], [float("nan")], [[5]]],
        "items": ["abc", 1, {}],
        "flag": [0, 1, "true", []],
        "text": [1, True, [], "\ud800", "a" * 5000],
        "texts": ["abc", 1, [1], [None], [["a"]], ["\udfff"], {"a": "b"}],
        "part": [1, "a", []],
        "parts": [1, "a", {}, [1], [[]], [None]],
    }.items()
    for value in [*values, None]
]


@pytest.mark.parametrize(("value", "ask"), WRONG, ids=lambda item: repr(item)[:24])
def test_every_other_type_is_refused(value: object, ask: str) -> None:
    """With the place and the key, in one short line."""
    bounds = (0, 10) if ask in ("integer", "number", "numbers") else ()
    with pytest.raises(UserError, match="here: key") as caught:
        getattr(Fields({"key": value}, "here"), ask)("key", *bounds)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_is_finite_within_any_bounds(text: str) -> None:
    """Also where no bound leaves the infinite ones out."""
    fields = Fields(parse_json(f'{{"key": {text}}}', "here"), "here")
    with pytest.raises(UserError, match="here: key is (nan|inf|-inf), expected a"):
        fields.number("key", -math.inf, math.inf)


def test_items_of_a_list_are_named_by_their_place() -> None:
    """In errors too."""
    fields = Fields({"a": [1, 2.5, "b"]}, "here")
    each = fields.items("a")
    assert each.values == {"a[0]": 1, "a[1]": 2.5, "a[2]": "b"}
    assert Fields({"a": [1, 2.5]}, "here").numbers("a", 0, 3) == [1.0, 2.5]
    with pytest.raises(UserError, match=r"here: a\[2\] is 'b', expected a number from 0 to 3"):
        fields.numbers("a", 0, 3)
    assert fields.items("gone", ()).values == {}


def test_missing_keys_have_defaults_where_one_is_given() -> None:
    """null counts as missing."""
    fields = Fields({"null": None, "a": {"b": [{"c": 3}]}}, "here")
    assert fields.integer("null", 1, 9, 5) == fields.integer("gone", 1, 9, 5) == 5
    assert not fields.has("null") and not fields.has("gone") and fields.has("a")
    assert fields.part("a").parts("b")[0].integer("c", 0, 9) == 3
    with pytest.raises(UserError, match="here: gone is missing"):
        fields.text("gone")
    with pytest.raises(UserError, match=r"here: a: b\[0\]: d is missing"):
        fields.part("a").parts("b")[0].text("d")
