"""Text that others wrote, as a terminal and Markdown may show it: names of files and classes can hold anything."""

import re


def shown(text: object) -> str:
    """Returns a text as one line that does nothing to a terminal and that any file can take.

    What is not printable is escaped as Python does: ESC is \\x1b, a newline \\n, a letter that turns the direction of
    writing \\u202e, a byte that is not UTF-8 \\udcff. A text that was escaped already stays as it is.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def in_markdown(text: object) -> str:
    """Returns text that Markdown shows as it is: no cell, tag, link, code, formula or emphasis begins in it."""
    plain = shown(" ".join(str(text).split()))
    plain = re.sub(r"([\\|\[`*~$])", r"\\\1", plain)
    plain = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # inside a word it is only itself
    plain = plain.replace("://", r"\://").replace("www.", r"www\.")  # GitHub makes links of bare addresses
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def code_in_markdown(text: object) -> str:
    """Returns text as a piece of code inside a Markdown line: its fence is longer than any backticks in it."""
    plain = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " * (plain[:1] == "`" or plain[-1:] == "`")
    return f"{fence}{pad}{plain}{pad}{fence}"
