"""Compiled programs as text: instructions, and how often each of them runs.

The compilers' own cost analysis counts the body of a loop once (and is absent for GPUs), so figures
of a step are sums over instructions times executions: a loop's body runs as often as its trip count
says, or the bound in its condition; every branch of a conditional counts.
"""

import dataclasses
import math
import re

BITS = {"pred": 8, "c64": 64, "c128": 128}
"""Types whose name does not end in their width; the rest do (bf16, s32, f8e4m3fn: 8)."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_END = re.compile(r'\}(, execution_thread="[^"]*")?')
_HEAD = re.compile(r"^\s+(?:ROOT )?%([^\s=]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation|called_computations"
    r"|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        width = re.match(r"[a-z]+(\d+)", self.dtype)
        return self.size * (BITS.get(self.dtype) or int(width.group(1))) / 8 if width else self.size

    @property
    def is_in_hbm(self) -> bool:
        """False for what a TPU holds in its on-chip memories, which the layout marks S(1), S(2)..."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    """What follows the operands."""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        return tuple(name for group in _CALLED.findall(self.text) for name in _NAME.findall(group))

    @property
    def num_bytes(self) -> float:
        return sum(shape.num_bytes for shape in self.shapes)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    executions: dict[str, float]
    """How often each computation runs in a step; those inside fusions and reductions included."""
    fused: frozenset[str]
    """Computations whose intermediate results stay on the chip."""
    unknown_loops: frozenset[str]
    """Loops whose number of executions the text does not tell; their bodies count once."""

    def instructions(self, *, fused: bool):
        """(instruction, its computation, executions), with or without the insides of fusions."""
        for name, computation in self.computations.items():
            if self.executions.get(name) and (fused or name not in self.fused):
                for instruction in computation.values():
                    yield instruction, computation, self.executions[name]


def parse(text: str) -> Program:
    """The program that `Compiled.as_text()` shows."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _lines(text):
        if current is None:
            match = _COMPUTATION.match(line)
            if match:
                current = computations.setdefault(match.group(2), {})
                entry = match.group(2) if match.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("compiled text: it has no ENTRY computation.")
    counter = _Counter(computations)
    counter.count(entry, 1.0, is_fused=False)
    return Program(
        computations, counter.executions, frozenset(counter.fused), frozenset(counter.unknown)
    )


def _lines(text: str) -> list[str]:
    """Lines; what a kernel wrote over several lines, such as its notes for a profiler, is one."""
    joined: list[str] = []
    for line in text.splitlines():
        if line[:1] in ('"', "}") and not _END.fullmatch(line):
            joined[-1] += line
        else:
            joined.append(line)
    return joined


def _parse_instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode, _, _ = line[stop:].strip().partition("(")
    opening = line.index("(", stop)
    closing = _closing(line, opening)
    return Instruction(
        name=head.group(1),
        opcode=opcode,
        shapes=shapes(line[start:stop]),
        operands=tuple(_NAME.findall(line[opening:closing])),
        text=line[opening : closing + 1] * (opcode in ("constant", "parameter"))
        + line[closing + 1 :],
    )


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in the text of a type, tuples flattened."""
    return tuple(
        Shape(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"compiled text: a parenthesis is not closed in {line[:80]!r}.")


class _Counter:
    """Walks from the entry through everything that is called."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self.executions: dict[str, float] = {}
        self.fused: set[str] = set()
        self.unknown: set[str] = set()

    def count(self, name: str, times: float, *, is_fused: bool) -> None:
        self.executions[name] = self.executions.get(name, 0.0) + times
        if is_fused:
            self.fused.add(name)
        for instruction in self.computations[name].values():
            trips = 1
            if instruction.opcode == "while":
                trips = self._trips(instruction)
            inside = is_fused or instruction.opcode not in ("while", "conditional", "call")
            for called in instruction.called:
                self.count(called, times * trips, is_fused=inside)

    def _trips(self, loop: Instruction) -> int:
        trips = trip_count(self.computations, loop)
        if trips is None:
            self.unknown.add(loop.name)
        return trips or 1


def trip_count(computations: dict[str, Computation], loop: Instruction) -> int | None:
    """How often the loop runs: as the compiler notes it, else the one constant in its condition."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.text).group(1)
    bounds = [
        int(bound)
        for instruction in computations[condition].values()
        if instruction.opcode == "constant" and instruction.shapes[0].dtype in ("s32", "u32", "s64")
        for bound in re.findall(r"^\((\d+)\)", instruction.text)
    ]
    return bounds[0] if len(bounds) == 1 else None
