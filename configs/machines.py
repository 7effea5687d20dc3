"""Meshes and batches of the shipped sizes on machines: `gated_deltanet:size=1.3b,on=v6e-64`.

Parameters are cut over `fsdp` as far as one fast network reaches; `data` makes copies beyond. Every
device then has the rows of its micro-batch alone, so no head needs to be cut. Tokens stay those of the
published run: a larger batch takes fewer steps. Whether a size fits is answered by effarch.compile.
"""

from ml_collections import ConfigDict

from effarch import names

#              mesh, rows of 4096 tokens a step, rows a device and micro-batch
MACHINES = {
    "h100x8": ({"fsdp": 8}, 128, 4),
    "v6e-64": ({"fsdp": 64}, 128, 2),
    "v5p-1024": ({"data": 8, "fsdp": 128}, 1024, 1),
}


def place(c: ConfigDict, machine: str) -> None:
    """Sets mesh, batch, micro-batches, steps and remat of `c` for a machine; "" leaves it."""
    if not machine:
        return
    shape, rows, rows_at_once = names.lookup(MACHINES, machine, "on")
    devices = 1
    for axis, size in shape.items():
        c.mesh[axis] = size
        devices *= size
    tokens = c.train.num_steps * c.data.batch_size
    warmup = c.optimizer.schedule.warmup_steps * c.data.batch_size
    c.data.batch_size = rows
    c.train.accumulate = max(1, rows // (devices * rows_at_once))
    c.train.num_steps = tokens // rows
    c.optimizer.schedule.warmup_steps = max(1, warmup // rows)
    c.model.remat = "full"
