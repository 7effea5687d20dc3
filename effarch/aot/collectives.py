"""What travels between devices in a step, read from the compiled text.

Bytes are those that arrive at one device, with the best known algorithms, for S bytes of the whole
array and n devices of a group: (n - 1) / n S for all-gather, reduce-scatter and all-to-all, twice
that for all-reduce, S for a permutation. Where a group spans h hosts of m devices, S (h - 1) / (h m)
of these come over the network (twice for all-reduce).
"""

import dataclasses
import re

import numpy as np

from effarch.aot import hlo
from effarch.parallel import topologies

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction, as often as it runs in a step."""

    kind: str
    group: int
    """Devices that take part together."""
    executions: float
    num_bytes: float
    """Arriving at a device in one execution."""
    seconds: float
    """The least that one execution takes on the target's links."""
    is_async: bool
    """Whether other work may run meanwhile."""


def read(program: hlo.Program, target: topologies.Target) -> list[Collective]:
    """Every collective of the program."""
    found = []
    for instruction, computation, executions in program.instructions(fused=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS and not instruction.opcode.endswith("-done"):
            found.append(_read_one(kind, instruction, computation, executions, target))
    return [collective for collective in found if collective.group > 1]


def _read_one(kind, instruction, computation, executions, target) -> Collective:
    if kind == "all-reduce" and _is_sliced(instruction, computation):
        kind = "reduce-scatter"
    own = sum(computation[name].num_bytes for name in instruction.operands if name in computation)
    members = group(instruction.text, target.num_devices)
    size = len(members)
    whole = own * size if kind == "all-gather" else own
    passes = 2 if kind == "all-reduce" else 1
    arriving = whole if kind == "collective-permute" else passes * whole * (size - 1) / size
    device, seconds = target.device, 0.0
    seconds = arriving / device.link_bandwidth
    if target.devices_per_host is not None:
        hosts = len({member // target.devices_per_host for member in members})
        if hosts > 1:
            per_host = size / hosts
            outside = passes * whole * (hosts - 1) / hosts / per_host
            if kind == "collective-permute":
                outside = whole
            seconds = max(seconds, outside / device.network_bandwidth)
    return Collective(
        kind,
        size,
        executions,
        arriving,
        seconds,
        is_async=instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.text,
    )


def _is_sliced(instruction, computation) -> bool:
    """An all-reduce of which each device keeps its slice: how the TPU compiler writes reduce-scatter."""
    users = [other for other in computation.values() if instruction.name in other.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def group(text: str, num_devices: int) -> list[int]:
    """The devices of the first group; for a permutation, all that take part."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return sorted({int(number) for number in re.findall(r"\d+", pairs.group(1))})
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return [int(number) for number in listed.group(1).split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = (_numbers(part) for part in iota.groups())
        ids = np.arange(np.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
    named = re.search(r"replica_groups=@?\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named:
        return _along_axes(*named.groups())
    return list(range(num_devices))


def _along_axes(axes: str, chosen: str) -> list[int]:
    """The group of device 0 along some axes of a mesh: `'a'=2,'b'=4`, `'b'` or `'b':(1)2` (a part)."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    ids = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        count, step = sizes[name], strides[name]
        if part:
            step *= count // (int(before) * int(part))
            count = int(part)
        ids = (ids[:, None] + step * np.arange(count)).reshape(-1)
    return ids.tolist()


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def totals(found: list[Collective]) -> list[dict]:
    """One row a kind and group size: instructions run, bytes arriving and least seconds a step."""
    rows: dict[tuple[str, int], dict] = {}
    for one in found:
        row = rows.setdefault(
            (one.kind, one.group),
            {"kind": one.kind, "devices": one.group, "count": 0, "bytes": 0.0, "seconds": 0.0},
        )
        row["count"] += int(one.executions)
        row["bytes"] += one.executions * one.num_bytes
        row["seconds"] += one.executions * one.seconds
    return sorted(rows.values(), key=lambda row: -row["bytes"])
