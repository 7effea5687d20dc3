"""PTX and ptxas: warp instructions of a GPU kernel, registers, spills, shared and matrix instructions.

The unit is warp instructions a token and head: PTX instructions that a warp issues x warps of a block x
blocks. It is static: a loop's body counts as often as the constant it compares with says, all branches
count, and one matrix instruction counts as one, however large.
"""

import math
import os
import pathlib
import re
import shutil
import subprocess

MATRIX = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma."}
"""Name in the report: how such instructions begin."""

_ENTRY = re.compile(r"\.entry (\w+)")
_LABEL = re.compile(r"^(\$?\w+):")
_BRANCH = re.compile(r"(?:@(!?)(%p\d+)\s+)?bra(?:\.uni)?\s+(\$?\w+);")
_COMPARE = re.compile(r"setp\.(\w+)\.\w+\s+(%p\d+), (%\w+), (-?\d+);")
_INCREASE = re.compile(r"add\.\w+\s+(%\w+), (%\w+), (-?\d+);")
_THREADS = re.compile(r"\.(?:reqntid|maxntid) (\d+)")
_PALLAS = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call"')  # f, jvp(f), transpose(jvp(f))
_THUNK = re.compile(r"\] (\S+) grid: \[([\d, ]*)\].*?shared_memory: (\d+) bytes")


def read(dump: pathlib.Path, token_heads: int) -> list[dict]:
    """The kernels of a dumped program, XLA's own included."""
    launches = {}
    for thunks in sorted(dump.glob("*thunk_sequence.txt")):
        for name, grid, shared in _THUNK.findall(thunks.read_text()):
            launches[name] = (math.prod(int(x) for x in grid.split(",")), int(shared))
    ours = set(_PALLAS.findall((dump / "program.txt").read_text()))
    kernels = []
    for path in sorted(dump.glob("*.ptx")):
        text = path.read_text()
        for name, body in zip(_ENTRY.findall(text), _ENTRY.split(text)[2::2]):
            blocks, shared = launches.get(name, (0, 0))
            found = kernel(body, blocks, token_heads) | {"shared_bytes": shared}
            named = {"name": name, "is_pallas": name in ours}
            kernels.append({**named, **found, **_assembled(path, text, name)})
    return kernels


def kernel(body: str, blocks: int, token_heads: int) -> dict:
    """Figures of one kernel from its PTX and the number of its blocks."""
    warps = math.ceil(int(_THREADS.search(body).group(1)) / 32)
    matrix = {kind: body.count(start) for kind, start in MATRIX.items() if start in body}
    issued = issued_by_warp(body) * warps * blocks / token_heads
    return dict(warps=warps, blocks=blocks, per_token_and_head=issued, matrix=matrix)


def issued_by_warp(body: str) -> float:
    """Instructions of one warp, loops counted by their trips (1 if the PTX does not tell)."""
    lines = [line.strip() for line in body.splitlines()]
    start = lines.index("{") + 1
    stop = next(i for i in range(len(lines) - 1, start, -1) if lines[i] == "}")
    lines = lines[start:stop]
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    branches = [(i, *m.groups()) for i, line in enumerate(lines) if (m := _BRANCH.search(line))]
    loops = {}  # first line: last line and the predicates that decide on another trip
    for i, _, predicate, label in branches:
        first = labels.get(label, i)
        if first < i:
            loops[first] = (i, [*loops.get(first, (i, []))[1], predicate])
    weights = [1.0] * len(lines)
    for first, (last, predicates) in loops.items():
        inside = [b for b in branches if first <= b[0] <= last]
        predicates += [b[2] for b in inside if not first <= labels.get(b[3], first) <= last]
        body = lines[first : last + 1]
        trips = max(_trips(body, predicate) for predicate in predicates)
        weights[first : last + 1] = [x * trips for x in weights[first : last + 1]]
    return sum(x for x, line in zip(weights, lines) if _is_instruction(line))


def _trips(loop: list[str], predicate: str | None) -> int:
    """How often a loop runs that counts by a constant, from 0 to the constant of its last comparison.

    It may count down. If the counter is compared before it is changed, the constant is that of the
    last trip.
    """
    compares = [m for line in loop if (m := _COMPARE.search(line)) and m.group(2) == predicate]
    if not compares:
        return 1
    kind, _, counter, bound = compares[-1].groups()
    steps = [m for line in loop if (m := _INCREASE.search(line))]
    including = kind in ("le", "ls")
    for group, more in ((1, 0), (2, 1)):
        step = next((int(m.group(3)) for m in steps if m.group(group) == counter), 0)
        if step:
            return max(1, -(-abs(int(bound)) // abs(step)) + more + including)
    return max(1, abs(int(bound)) + 1 + including)


def _is_instruction(line: str) -> bool:
    return line.endswith(";") and not line.startswith((".", "//", "{", "}", ")", "("))


def _assembled(path: pathlib.Path, text: str, name: str) -> dict:
    """What ptxas, if there is one, makes of it."""
    found = dict(registers=None, spill_bytes=None)
    if shutil.which("ptxas") is None:
        return found
    arch = re.search(r"\.target (\w+)", text).group(1)
    command = ["ptxas", f"-arch={arch}", "-v", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.partition(f"'{name}'")[2]
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores", said)
    for key, match in (("registers", registers), ("spill_bytes", spills)):
        found[key] = int(match.group(1)) if match else None
    return found
