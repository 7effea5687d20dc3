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
_INCREASE = re.compile(r"add\.\w+\s+(%\w+), (%\w+), (\d+);")
_THREADS = re.compile(r"\.(?:reqntid|maxntid) (\d+)")
_PALLAS = re.compile(r'op_name="[^"]*?(\w+)/pallas_call"')
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
    weights = [1.0] * len(lines)
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch.group(3), i) < i:
            first = labels[branch.group(3)]
            trips = _trips(lines[first : i + 1], branch.group(2))
            weights[first : i + 1] = [x * trips for x in weights[first : i + 1]]
    return sum(x for x, line in zip(weights, lines) if _is_instruction(line))


def _trips(loop: list[str], predicate: str | None) -> int:
    """How often a loop runs that counts by a constant, from 0 to the constant of its last comparison.

    If the counter is compared before it is increased, the constant is that of the last trip.
    """
    compares = [m for line in loop if (m := _COMPARE.search(line)) and m.group(2) == predicate]
    if not compares:
        return 1
    kind, _, counter, bound = compares[-1].groups()
    steps = [m for line in loop if (m := _INCREASE.search(line))]
    step = next((int(m.group(3)) for m in steps if m.group(1) == counter), None)
    if step is not None:
        return max(1, -(-int(bound) // step) + (kind in ("le", "ls")))
    step = next((int(m.group(3)) for m in steps if m.group(2) == counter), 1)
    return max(1, -(-int(bound) // step) + 1 + (kind in ("le", "ls")))


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
