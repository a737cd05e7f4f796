"""Findings of one rank, and of all ranks as one table of 80 columns, the worst first. Imports no torch."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pretrain.json_files import Fields

# From worst to best: a run would end or be wrong; storage fails for now; a run would be slow or may fail; good.
STATES = ("RED", "AWAY", "warn", "ok")
RED, AWAY, WARN, OK = STATES
WIDTH = 80
_NAMED = 3  # nodes, ranks or different answers that a line names
_MAX_TEXT = 4096


@dataclass(frozen=True)
class Finding:
    """What a check has found on one rank, or, as a row of the table, on all."""

    check: str
    state: str  # of STATES
    found: str
    remedy: str = ""
    value: float | None = None  # more is better; the rank with the least is shown
    differs: str = ""  # the state when ranks found different things; "": they may differ

    def __post_init__(self) -> None:
        assert self.state in STATES and self.differs in ("", *STATES)


def size(num_bytes: float) -> str:
    """Returns bytes as a text."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Returns findings for `from_json` on another rank, with texts cut to the length that it accepts."""
    return [
        {key: value[:_MAX_TEXT] if isinstance(value, str) else value for key, value in asdict(finding).items()}
        for finding in findings
    ]


def from_json(parts: Iterable[Fields]) -> list[Finding]:
    """Returns the findings of `as_json`. Raises UserError."""
    return [_read(part) for part in parts]


def _read(part: Fields) -> Finding:
    state, differs = part.text("state"), part.text("differs", "")
    if state not in STATES or differs not in ("", *STATES):
        part.wrong("state", f"one of {', '.join(STATES)}")
    value = part.number("value", -1e30, 1e30) if part.has("value") else None
    texts = [part.text(key, "", max_letters=_MAX_TEXT) for key in ("check", "found", "remedy")]
    return Finding(texts[0], state, texts[1], texts[2], value, differs)


def merged(found: Mapping[int, list[Finding]], hosts: Mapping[int, str]) -> list[Finding]:
    """Returns the table of all ranks, the worst first: a row per check, which names ranks where they differ.

    found: by rank. hosts: each rank's node.
    """
    checks = list(dict.fromkeys(finding.check for findings in found.values() for finding in findings))
    rows = []
    for check in checks:
        rows += _rows(check, {rank: f for rank, several in found.items() for f in several if f.check == check}, hosts)
    return sorted(rows, key=lambda row: STATES.index(row.state))  # stable: checks stay in order


def _rows(check: str, found: dict[int, Finding], hosts: Mapping[int, str]) -> Iterator[Finding]:
    answers = list(dict.fromkeys(finding.found for finding in found.values()))
    first = next(iter(found.values()))
    if len(answers) > 1 and first.differs:
        found = {rank: replace(f, state=min(f.state, first.differs, key=STATES.index)) for rank, f in found.items()}
    worst = min((finding.state for finding in found.values()), key=STATES.index)
    bad = {rank: finding for rank, finding in found.items() if finding.state == worst}
    if all(finding.value is not None for finding in bad.values()):  # a quantity: show the least
        rank, least = min(bad.items(), key=lambda item: item[1].value or 0.0)
        alike = len({finding.found for finding in bad.values()}) == 1
        where = place(bad if alike else [rank], found, hosts)
        if worst == OK and len(set(hosts.values())) == 1:
            where = ""  # ranks of one machine read the same quantity at different moments
        told = least.found + (f" ({where}{'' if alike else ', the least'})" if where else "")
        yield Finding(check, worst, told, least.remedy)
        return
    groups: dict[str, list[int]] = {}
    for rank, finding in bad.items():
        groups.setdefault(finding.found, []).append(rank)
    texts = [text + (f" ({where})" if (where := place(some, found, hosts)) else "") for text, some in groups.items()]
    remedies = list(dict.fromkeys(finding.remedy for finding in bad.values() if finding.remedy))
    if len(groups) > 1 and first.differs:
        remedies = remedies or ["give all nodes the same"]
    yield Finding(check, worst, _some(texts, "; "), "; ".join(remedies[:_NAMED]))


def place(some: Iterable[int], asked: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Names some of the ranks that were asked, by node if all of a node's ranks are among them; "" if it is all."""
    chosen, all_asked = sorted(some), set(asked)
    if set(chosen) == all_asked:
        return ""
    names = list(dict.fromkeys(hosts[rank] for rank in chosen))
    if {rank for rank in all_asked if hosts[rank] in names} == set(chosen):
        return _some(names)
    if len(set(hosts.values())) == 1:
        return f"rank{'s' * (len(chosen) > 1)} {_some(map(str, chosen))}"
    return _some([f"rank {rank} on {hosts[rank]}" for rank in chosen])


def _some(names: Iterable[str], between: str = ", ") -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
    return between.join(listed[:_NAMED]) + more


def lines(rows: Sequence[Finding]) -> Iterator[str]:
    """Yields the lines of the table, each row with its remedy below, wrapped at WIDTH characters between words."""
    column = 8 + max((len(row.check) for row in rows), default=0)
    for row in rows:
        yield from _wrapped(f"{row.state:5} {row.check}".ljust(column), row.found)
        if row.remedy:
            yield from _wrapped(" " * column, f"-> {row.remedy}")


def _wrapped(begin: str, text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, begin, " " * len(begin), break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text)
