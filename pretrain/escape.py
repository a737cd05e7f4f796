"""Escapes untrusted text for terminals, Markdown and pages that are passed on: names can contain anything."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


def shown(text: object) -> str:
    """Returns a text as one line that cannot control a terminal and that any file can hold.

    Unprintable characters are escaped as Python does: ESC as \\x1b, a newline as \\n, a reversal of the direction of
    writing as \\u202e, a byte that is not UTF-8 as \\udcff. A text that was escaped already stays as it is.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def in_markdown(text: object) -> str:
    """Returns text that Markdown shows as it is: no cell, tag, link, code, formula or emphasis begins in it."""
    plain = shown(" ".join(str(text).split()))
    plain = re.sub(r"([\\|\[`*~$])", r"\\\1", plain)
    plain = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # inside a word it has no effect
    plain = plain.replace("://", r"\://").replace("www.", r"www\.")  # GitHub makes links of bare addresses
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Collection[int] = (0,)
) -> list[str]:
    """Returns the lines of a table, whose cells may hold anything; text_columns are aligned left."""
    rule = ["---" if column in text_columns else "---:" for column in range(len(header))]
    names, *cells = ([in_markdown(cell) for cell in row] for row in (header, *rows))
    return ["| " + " | ".join(row) + " |" for row in (names, rule, *cells)]


def code_in_markdown(text: object) -> str:
    """Returns text as a piece of code inside a Markdown line: its fence is longer than any backticks in it."""
    plain = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " * (plain[:1] == "`" or plain[-1:] == "`")
    return f"{fence}{pad}{plain}{pad}{fence}"


# An absolute path, with the character in front of it, if any: one that may precede a path.
_ABSOLUTE = re.compile(r"""(^|[\s='"\[(,])/(?:[^\s/'",\])]+/)*([^\s/'",\])]+/[^\s/'",\])]+)""", re.MULTILINE)


def portable(text: str, *, whole: bool = False) -> str:
    """Returns a text whose paths below the working folder are relative, and others cut to their last two parts.

    A page that is passed on need not show whose disk it was. whole: paths stay usable, so only the first is done.
    """
    here = str(Path.cwd())
    if here != "/":
        text = re.sub(
            rf"(?<![^\s='\"\[(,:]){re.escape(here)}(/|(?![^\s'\",\])]))", lambda found: "" if found[1] else ".", text
        )
    return text if whole else _ABSOLUTE.sub(r"\1.../\2", text)


def portable_path(path: Path | str) -> str:
    """Returns what `portable` makes of a text that is one path, whatever characters are in it."""
    found, here = Path(path), Path.cwd()
    if not found.is_absolute():
        return str(path)
    if found.is_relative_to(here) and here != Path("/"):
        return str(found.relative_to(here))
    return str(Path("...", *found.parts[1:][-2:]))
