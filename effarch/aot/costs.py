"""How long the compiled operations take on a device, instruction by instruction.

Where the compiler states its own estimate (TPU: cycles of every fusion), that; else the longer of
FLOPs / peak and bytes / HBM bandwidth. Bytes are those that leave or enter HBM: operands and results
of a fusion, slices where it only slices. Collectives are not counted here.
"""

import dataclasses
import math
import re

from effarch.aot import collectives, hlo, products
from effarch.parallel import topologies

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
    *("call-start", "call-update"),
}
"""They move nothing themselves."""
_FUSIONS = ("fusion", "fusion-start")
_TRANSFERS = ("copy-start", "slice-start")
"""They run beside other operations."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step on one device."""

    seconds: float
    """If nothing waits for another device."""
    matmul_flops: float
    """In products that the text shows as such; 0 on TPUs, which write them as convolutions."""
    hbm_bytes: float


def read(program: hlo.Program, target: topologies.Target) -> Costs:
    """Sums over all instructions outside fusions, times executions."""
    device = target.device
    seconds = flops = traffic = 0.0
    for instruction, computation, executions in program.instructions(fused=False):
        opcode = instruction.opcode
        base = opcode.removesuffix("-start")
        if opcode in _FREE or opcode.endswith("-done") or base in collectives.KINDS:
            continue
        own_flops = _flops(instruction, computation, program)
        own_bytes = _bytes(instruction, computation, program)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        if cycles and device.clock:
            own_seconds = int(cycles.group(1)) / device.clock
        else:
            own_seconds = max(own_flops / device.peak_flops, own_bytes / device.hbm_bandwidth)
        seconds += executions * own_seconds * (opcode not in _TRANSFERS)
        flops += executions * own_flops
        traffic += executions * own_bytes
    return Costs(seconds, flops, traffic)


def _flops(instruction: hlo.Instruction, computation: hlo.Computation, program) -> float:
    """Of the products in an instruction and in all that it calls."""
    if instruction.opcode == "dot":
        return _product(instruction, computation, r"lhs_contracting_dims=\{([\d,]*)\}")
    if products.is_library_call(instruction):
        return _product(instruction, computation, r'"lhs_contracting_dimensions":\[([\d",]*)\]')
    if instruction.opcode not in _FUSIONS:
        return 0.0
    return sum(
        _flops(inner, program.computations[name], program)
        for name in instruction.called
        for inner in program.computations[name].values()
    )


def _product(instruction, computation, contracted: str) -> float:
    left = computation[instruction.operands[0]].shapes[0]
    dims = re.search(contracted, instruction.text).group(1).replace('"', "")
    depth = math.prod(left.dims[int(dim)] for dim in dims.split(",") if dim)
    return 2.0 * instruction.shapes[0].size * depth


def _bytes(instruction: hlo.Instruction, computation: hlo.Computation, program) -> float:
    """HBM bytes that an instruction reads and writes."""
    opcode = instruction.opcode
    result = _in_hbm(instruction)
    if opcode == "copy-start":
        return result  # its tuple names destination and source
    if opcode == "slice-start":
        source, piece, *_ = instruction.shapes
        return piece.num_bytes * (source.is_in_hbm + piece.is_in_hbm)
    if opcode in ("dynamic-slice", "gather"):
        return 2 * result
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(computation[instruction.operands[1]])
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode not in _FUSIONS:
        return result + sum(_in_hbm(operand) for operand in operands)
    inner = program.computations[instruction.called[0]]
    parameters = {
        int(re.match(r"\((\d+)\)", one.text).group(1)): one.name
        for one in inner.values()
        if one.opcode == "parameter"
    }
    read = sum(
        min(_in_hbm(operand), _used(inner, parameters[index]))
        for index, operand in enumerate(operands)
    )
    return read + min(result, _written(inner))


def _in_hbm(instruction: hlo.Instruction) -> float:
    return sum(shape.num_bytes for shape in instruction.shapes if shape.is_in_hbm)


def _used(inner: hlo.Computation, name: str) -> float:
    """Bytes of a fusion's operand that it reads: slices, if it only takes slices."""
    total = 0.0
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _used(inner, user.name)
        elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        else:
            return math.inf
    return total


def _written(inner: hlo.Computation) -> float:
    """Bytes of a fusion's result that are new: the update, where it updates a slice in place."""
    used = {name for instruction in inner.values() for name in instruction.operands}
    root = next(one for one in reversed(inner.values()) if one.name not in used)
    return _new_bytes(inner, root)


def _new_bytes(inner: hlo.Computation, one: hlo.Instruction) -> float:
    if one.opcode == "dynamic-update-slice":
        return inner[one.operands[1]].num_bytes
    if one.opcode in ("tuple", "bitcast"):
        return sum(_new_bytes(inner, inner[name]) for name in one.operands)
    return one.num_bytes
