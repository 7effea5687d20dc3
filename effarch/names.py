"""Names: looked up with help where one is not known, given values, as patterns."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, field: str) -> T:
    """table[name], or a ValueError of one sentence with the nearest name."""
    if name not in table:
        raise ValueError(f"{field}={name!r} is not known. {did_you_mean(name, table)}")
    return table[name]


def refuse_unknown(given: Iterable[str], known: Iterable[str], field: str) -> None:
    """A ValueError for the first given name that is not known; `field` is what holds the names."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{field}.{name} is not an option. {did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`Known: a, b, c. Did you mean 'b'?`"""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    text = f"Known: {', '.join(known)}."
    return f"{text} Did you mean {near[0]!r}?" if near else text


def pairs(text: str, flag: str) -> dict[str, str]:
    """`a=x,b=y` as a dict."""
    parts = [part.partition("=") for part in text.split(",") if part]
    for name, equals, value in parts:
        if not (name and equals and value):
            raise ValueError(f"{flag}: {name!r} has no value; write {flag}=NAME=VALUE,...")
    return {name: value for name, _, value in parts}


def glob(pattern: str) -> re.Pattern:
    """A pattern over paths: `*` is any part of one level, `**` any number of whole levels."""
    *levels, last = pattern.strip("/").split("/")
    pieces = ["(?:[^/]+/)*" if level == "**" else _level(level) + "/" for level in levels]
    return re.compile("".join(pieces) + (".+" if last == "**" else _level(last)))


def _level(text: str) -> str:
    if text == "*":
        return "[^/]+"
    return "[^/]*".join(re.escape(part) for part in text.split("*"))
