"""The TPU compiler's listings: VLIW bundles of a kernel, how full its units are, spills and VMEM.

A bundle issues in one cycle; stalls and waiting for memory are not in it. What a grid step runs lies at
loop depth 1 of the listing, so bundles x grid steps is the static cycle count of a kernel. Bodies of
inner loops (depth 2 and more) are listed apart, once.
"""

import collections
import math
import pathlib
import re

UNITS = {
    "MXU": "MXU",
    "XLU": "XLU",
    "VPU": "VALU",
    "EUP": "EUP",
    "load": "VLOAD",
    "store": "VSTORE",
}
"""Name in the report: name in the listing."""

_TABLE = "-final_hlo-static-per-bundle-utilization.txt"
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
_BOUNDS = re.compile(r"iteration_bounds: \(([\d, ]*)\)")
_EXIT = re.compile(r"^[^>{]*> \{.*scmp\.ge\.\S+ %\w+, (\d+) /\* loop exit test", re.MULTILINE)
_CALL = re.compile(r"%([\w.\-]+) = .*custom_call_target=\"tpu_custom_call\"")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')


def read(dump: pathlib.Path, token_heads: int) -> list[dict]:
    """The Pallas kernels of a dumped program, in the program's order."""
    kernels = []
    for line in (dump / "program.txt").read_text().splitlines():
        call = _CALL.search(line)
        if call:
            found = kernel(*_files(dump, call.group(1)), token_heads)
            vmem = _VMEM.search(line)
            bytes_used = int(vmem.group(1)) if vmem else None
            named = {"name": _plain(call.group(1)), "is_pallas": True}
            kernels.append({**named, **found, "vmem_bytes": bytes_used})
    return kernels


def kernel(table: pathlib.Path, listing: pathlib.Path, token_heads: int) -> dict:
    """Figures of one kernel from its two files; those in percent are of depth 1."""
    text = listing.read_text()
    header, capacity, rows = _utilization(table)
    depths = [m.group(1).count(">") for line in text.splitlines() if (m := _BUNDLE.match(line))]
    if len(depths) != len(rows):
        raise ValueError(f"{listing.name}: {len(depths)} bundles, but {len(rows)} in {table.name}.")
    steps = _steps(text)
    counts = collections.Counter(depths)
    step = [row for row, depth in zip(rows, depths) if depth == 1]
    sums = {name: sum(row[i] for row in step) for i, name in enumerate(header)}
    room = {name: capacity[i] * max(len(step), 1) for i, name in enumerate(header)}
    return {
        "bundles": len(step),
        "steps": steps,
        "per_token_and_head": len(step) * steps / token_heads,
        "inner_loop_bundles": sum(count for depth, count in counts.items() if depth > 1),
        "occupancy": {unit: sums[column] / room[column] for unit, column in UNITS.items()},
        "spill_stores": sums["VSTORE:SPILL"],
        "spill_loads": sums["VLOAD:FILL"],
    }


def _steps(text: str) -> int:
    """Steps of the grid: told with the blocks that come from slow memory, if any do.

    Where XLA has put all operands into fast memory the outer loop tells: it makes two trips more, one to
    fetch the first block and one to put the last away.
    """
    if bounds := _BOUNDS.search(text):
        return math.prod(int(x) for x in bounds.group(1).split(",") if x.strip())
    trips = _EXIT.search(text)
    return int(trips.group(1)) - 2 if trips else 1


def _files(dump: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
    tables = [
        x for x in dump.glob(f"*{_TABLE}") if re.match(rf"\d+-{re.escape(name)}-\d+-", x.name)
    ]
    if not tables:
        raise ValueError(
            f"the compiler left no listing of {name}: this libtpu is not one that the report knows."
        )
    stamp = tables[0].name.split("-")[0]
    listings = [
        x
        for x in dump.glob(f"{stamp}-*-final_bundles.txt")
        if "schedule-analysis" not in x.name and x.name.startswith(f"{stamp}-{name}-")
    ]
    return tables[0], listings[0]


def _utilization(table: pathlib.Path) -> tuple[list[str], list[int], list[list[int]]]:
    """Names of the units, how many a bundle holds of each, and a row a bundle."""
    lines = table.read_text().splitlines()
    header = [name.strip() for name in lines[1].split(",")]
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    return header, [int(x) for x in lines[2].split()], rows


def _plain(name: str) -> str:
    """`jvp_delta_rule_forward_.1` -> `delta_rule_forward`."""
    return re.sub(r"^(jvp|transpose|checkpoint|_)+|[_.\d]+$", "", name)
