"""Which number formats the matrix products of a compiled step multiply.

Products inside kernels (Pallas, cuDNN) do not show in the text and are not counted.
"""

from effarch.aot import hlo

_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def is_library_call(instruction: hlo.Instruction) -> bool:
    """Whether cuBLAS does this product."""
    return instruction.opcode == "custom-call" and any(x in instruction.text for x in _GEMMS)


def read(program: hlo.Program) -> dict[str, int]:
    """Types of both operands, as "bf16 x bf16" -> products of a step on one device, most first.

    TPUs write products as convolutions; both are counted, inside fusions too.
    """
    found: dict[str, int] = {}
    for instruction, computation, executions in program.instructions(fused=True):
        if instruction.opcode in ("dot", "convolution") or is_library_call(instruction):
            pair = [computation[name].shapes[0].dtype for name in instruction.operands[:2]]
            name = " x ".join(pair)
            found[name] = found.get(name, 0) + round(executions)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
