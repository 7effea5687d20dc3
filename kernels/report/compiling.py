"""Compiles a case in a process of its own and reads what the compilers left behind.

A process of its own because flags of the compilers are read once, and because the GPU compiler ends
the whole process where it meets what it cannot do. Run as a module this is that process.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from effarch.kernels.report import cases, gpu_listing, tpu_listing

PROGRAM = "program.txt"
"""In the folder of dumps: the compiled program as XLA shows it."""


def measure(case: cases.Case, *, keep: str | None = None) -> dict:
    """All figures of a case as plain values; `keep` is a folder for the dumps. Raises ValueError."""
    from effarch.parallel import topologies

    platform = topologies.parse(case.target).device.platform
    listing = tpu_listing if platform == "tpu" else gpu_listing
    with tempfile.TemporaryDirectory() as scratch:
        dump = pathlib.Path(keep or scratch)
        dump.mkdir(parents=True, exist_ok=True)
        found = _compile(case, dump)
        kernels = listing.read(dump, case.spec.token_heads)
        found["xla_cycles"] = _xla_cycles(dump, case.spec.token_heads)
    ours = [kernel["per_token_and_head"] for kernel in kernels if kernel["is_pallas"]]
    total = sum(ours) if ours else None
    return {"case": case.to_dict(), "per_token_and_head": total, **found, "kernels": kernels}


def _compile(case: cases.Case, dump: pathlib.Path) -> dict:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is loaded from it leaves no listings
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_emitter_re=.*",
        "LLVM_DISABLE_SYMBOLIZATION": "1",  # a crash would take minutes to end
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps(case.to_dict()), str(dump)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(_reason(case, done))
    return json.loads(done.stdout.splitlines()[-1])


def _reason(case: cases.Case, done: subprocess.CompletedProcess) -> str:
    """One sentence for a process that failed: its own ValueError, or the compiler's last word."""
    lines = [line for line in done.stderr.splitlines() if re.match(r"\w[\w.]*: |LLVM ERROR", line)]
    last = lines[-1] if lines else f"the compiler ended with code {done.returncode}"
    kind, _, text = last.partition(": ")
    if kind == "ValueError":
        return text
    return f"{case.op} with backend {case.backend} does not compile for {case.target}: {last}"


def _xla_cycles(dump: pathlib.Path, token_heads: int) -> float | None:
    """Cycles per token and head that the TPU compiler states for its own operations; None on GPUs."""
    from effarch.aot import hlo

    total = None
    program = hlo.parse((dump / PROGRAM).read_text())
    for instruction, _, executions in program.instructions(fused=False):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        if cycles and instruction.opcode != "custom-call":
            total = (total or 0.0) + executions * int(cycles.group(1)) / token_heads
    return total


def _compile_here(case: cases.Case, dump: pathlib.Path) -> None:
    import importlib.metadata

    import jax

    from effarch.kernels import platform
    from effarch.parallel import topologies

    target = topologies.parse(case.target)
    mesh = jax.sharding.Mesh(topologies.devices(target)[:1], ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with platform.tracing_for(target.device.platform), jax.sharding.set_mesh(mesh):
        function, arguments = cases.program(case, place)
        compiled = jax.jit(function).lower(*arguments).compile()
    (dump / PROGRAM).write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    compiler = "libtpu" if target.device.platform == "tpu" else "jax-cuda13-pjrt"
    versions = {name: importlib.metadata.version(name) for name in ("jax", compiler)}
    print(json.dumps({"temporary_bytes": memory.temp_size_in_bytes, "versions": versions}))


if __name__ == "__main__":
    _compile_here(cases.Case.from_dict(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))
