"""What XLA's partitioner is told, what it says while it compiles, and which arrays a mesh leaves whole.

The last two are performance bugs that nobody sees: an array that is gathered whole on every device
because no sharding leads from one use to the next, and a large parameter that no rule of the table
splits.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

REMATERIALIZATION = "Involuntary full rematerialization"
LARGE = 2**20
"""Bytes from which an array is worth a word."""

_WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def options(mesh: Mesh) -> dict[str, str] | None:
    """Compiler options of a step on this mesh.

    On TPUs a weight is gathered before its product. By default, where operands reach 256 MB, the
    partitioner multiplies a shard at a time, and activations pass through HBM as often as there are
    shards: 1.35 s against 0.61 s a step by the compiler's count (experiments/compile_table).
    """
    if mesh.devices.flat[0].platform == "tpu" and mesh.size > 1:
        return {_WINDOWED: "1000000"}
    return None


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collects the partitioner's complaints of the compiles inside; all else still goes to stderr."""
    complaints: list[str] = []
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield complaints
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if REMATERIALIZATION in line:
                    complaints.append(line)
                else:
                    print(line, file=sys.stderr)


def left_whole(abstract: Any, shardings: Any) -> dict[str, int]:
    """{path: bytes} of the large arrays that every device of the mesh holds whole."""
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings)):
        size = leaf.size * leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 0
        if size >= LARGE and place.is_fully_replicated:
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = size
    return found
