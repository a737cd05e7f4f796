"""Names that others chose are text: on a terminal, in tables of rich, in Markdown."""

import io
import pickle
import re

import pytest

from pretrain import cli
from pretrain.errors import ConfigError, NotFoundError, StorageError, UserError
from pretrain.escape import code_in_markdown, in_markdown, shown
from pretrain.evaluation.evaluators import Row
from pretrain.evaluation.results import table_of
from pretrain.log import say, warn

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J",  # sets the title, clears the screen
    "cat\nerror: 0 of 0",  # forges a line
    "cat\rdog",
    "photo\u202egnp.exe",  # turns the direction of writing
    "a\u2066b\u2069\u200b\u2028c",
    "\x9b31m\x7f\x00",  # C1 controls, delete, zero
    "\udcff\ud83d",  # not UTF-8
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_not_printable_is_escaped(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One printable line that can be written anywhere, by each way to the terminal; escaping again changes nothing."""
    line = shown(text)
    assert line.isprintable() and shown(line) == line and line.encode()
    say(text)
    warn(text)
    cli.tell(text)

    def fail() -> None:
        raise UserError(text)

    with pytest.raises(SystemExit):
        cli.run(fail)
    told = capsys.readouterr()
    assert told.out == f"{line}\n{line}\n" and told.err == f"warning: {line}\nerror: {line}\n"


@pytest.mark.parametrize("kind", [UserError, ConfigError, NotFoundError, StorageError])
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_an_error_is_one_line(kind: type[Exception], text: str) -> None:
    """Whoever prints or logs it, and whatever names are in it; on its way between processes too."""
    error = kind(f"{text}: no such key")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == f"{shown(text)}: no such key" and isinstance(one, kind)


def test_what_people_write_stays() -> None:
    """Letters of all languages, emoji, backslashes."""
    for text in ("", "größer", "猫 и собака", "🐈", r"C:\new\x1b", "a|b `c` <d>"):
        assert shown(text) == text


@pytest.mark.parametrize("name", ["w[/x]", "[bold]x", "[/]", "[link=file:///]x[/link]", "a\x1b[31m\nb", ":cat:"])
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A title, a column, a cell and a caption that look like rich's markup."""
    cli.print_table(name, ["metric", name], [[name, "1"]], caption=name)
    cli.print_table(name, *table_of([Row(name, name, 0.5, 3)]))
    assert capsys.readouterr().out.count(shown(name)) >= 7


def test_a_progress_bar_shows_its_title_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles name data sets. A bar shown where there was no terminal leaves nothing behind."""
    with cli.progress("elsewhere", 1, "images") as advance:
        advance(1)
    monkeypatch.setattr("sys.stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with cli.progress("a [/x] {b} \x1b]0;x\x07", 2, "images") as advance:
        advance(2)
    assert "a [/x] {b}" in re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue()) and "\x1b]0" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x|y", r"x\|y"),
        (r"x\|y", r"x\\\|y"),
        ("`a` *b* ~~c~~ $d$", r"\`a\` \*b\* \~\~c\~\~ \$d\$"),
        ("[a](http://b) ![c](d)", r"\[a](http\://b) !\[c](d)"),
        ("https://a www.b.c", r"https\://a www\.b.c"),
        ("<b>&lt;", "&lt;b>&amp;lt;"),
        ("a\n\n# b\t\x1b", r"a # b \\x1b".replace(r"\\", "\\\\")),
        ("val_top1 _x_ __init__.py", r"val_top1 \_x\_ \_\_init\_\_.py"),
        ("猫 50.00%", "猫 50.00%"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, expected: str) -> None:
    """No cell, code, emphasis, formula, link, tag or line begins in a name; inside a word "_" is nothing else."""
    assert in_markdown(text) == expected


@pytest.mark.parametrize("text", ["a", "`", "a`b``c", "``", "a\n`b"])
def test_code_in_markdown_ends_where_it_ends(text: str) -> None:
    """The fence is longer than the backticks inside."""
    code = code_in_markdown(text)
    fence = re.match("`+", code)
    assert fence and code.endswith(fence[0])
    inner = code[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner) and shown(text) == (inner.strip() if "`" in inner[1:2] else inner)
