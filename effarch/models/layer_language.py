"""The layer language: one line of text says which block stands at which layer.

    text   := clause (";" clause)*            clause := ["first" | "repeat" | "last"] ":" sum
    sum    := term ("+" term)*                term   := [COUNT "*"] mixer "/" ffn

`first` and `last` are laid once, `repeat` fills what is left of the depth and is cut off there. A text
without a colon is the `repeat` clause. Example: `first: attention/glu; repeat: 3*gated_delta_net/glu +
attention/glu`. A mixer or ffn is the name of a section of `config.model.blocks`; an ffn may be `none`.
"""

import dataclasses
import re

CLAUSES = ("first", "repeat", "last")
_TERM = re.compile(r"^(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)\s*/\s*([A-Za-z_]\w*)$")


@dataclasses.dataclass(frozen=True)
class Layer:
    """What stands at one layer: the names of two sections of `config.model.blocks`."""

    mixer: str
    ffn: str

    def __str__(self) -> str:
        return f"{self.mixer}/{self.ffn}"


@dataclasses.dataclass(frozen=True)
class Run:
    """`repeats` equal periods, beginning at layer `start`; scanned together."""

    start: int
    period: tuple[Layer, ...]
    repeats: int


def parse(text: str) -> dict[str, tuple[Layer, ...]]:
    """The blocks of each clause: {"first": ..., "repeat": ..., "last": ...}, empty if absent."""
    clauses: dict[str, tuple[Layer, ...]] = {}
    for part in text.split(";"):
        if not part.strip():
            continue
        name, colon, body = part.partition(":")
        name, body = (name.strip(), body) if colon else ("repeat", name)
        if name not in CLAUSES:
            raise ValueError(
                f"model.layers: {name!r} is not a clause; write first:, repeat: or last:, as in "
                "'first: attention/glu; repeat: 3*gated_delta_net/glu + attention/glu'."
            )
        if name in clauses:
            raise ValueError(f"model.layers: the clause {name!r} stands twice; join both with '+'.")
        clauses[name] = tuple(layer for term in body.split("+") for layer in _parse_term(term))
    if not clauses:
        raise ValueError("model.layers is empty; write for example 'attention/glu'.")
    return {name: clauses.get(name, ()) for name in CLAUSES}


def _parse_term(term: str) -> tuple[Layer, ...]:
    match = _TERM.match(term.strip())
    if match is None:
        raise ValueError(
            f"model.layers: {term.strip()!r} is not a block; write mixer/ffn or 3*mixer/ffn, "
            "with ffn 'none' for a layer without feed-forward."
        )
    count, mixer, ffn = match.groups()
    if count == "0":
        raise ValueError(f"model.layers: {term.strip()!r} repeats a block 0 times; leave it out.")
    return (Layer(mixer, ffn),) * int(count or 1)


def runs(text: str, depth: int) -> tuple[Run, ...]:
    """The `depth` layers that `text` describes, cut into runs of equal periods."""
    clauses = parse(text)
    first, repeat, last = (clauses[name] for name in CLAUSES)
    middle = depth - len(first) - len(last)
    if middle < 0:
        raise ValueError(
            f"model.depth={depth} is less than the {len(first)} first and {len(last)} last layers of "
            "model.layers; raise model.depth or shorten those clauses."
        )
    if middle > 0 and not repeat:
        raise ValueError(
            f"model.layers describes {len(first) + len(last)} layers but model.depth={depth}; add a "
            "repeat: clause or set model.depth to match."
        )
    whole, rest = divmod(middle, len(repeat)) if repeat else (0, 0)
    found: list[Run] = []
    start = 0
    for part in (first, repeat * whole, repeat[:rest], last):
        if part:
            period = _smallest_period(part)
            found.append(Run(start, part[:period], len(part) // period))
            start += len(part)
    return tuple(found)


def layers(text: str, depth: int) -> tuple[Layer, ...]:
    """The `depth` layers that `text` describes, one by one."""
    return tuple(layer for run in runs(text, depth) for layer in run.period * run.repeats)


def _smallest_period(part: tuple[Layer, ...]) -> int:
    for period in range(1, len(part) + 1):
        if len(part) % period == 0 and part == part[:period] * (len(part) // period):
            return period
    raise AssertionError("a tuple is its own period")
