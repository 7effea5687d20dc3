"""What would make a step fit: predictions from one compile, cheap enough for every report.

Of the temporary bytes, the gradients stay; the rest is taken to be proportional to the rows of a
micro-batch. With full rematerialisation it is one period's share and the input of every period.
`effarch.aot.search` compiles such candidates and so knows.
"""

import dataclasses
import math

import jax.numpy as jnp

from effarch.aot import memory
from effarch.models import build, layer_language
from effarch.parallel import mesh as mesh_lib
from effarch.training import setup as setup_lib


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting and what a device would then hold."""

    setting: str
    total: float
    fits: bool


def changes(setup: setup_lib.Setup, held: memory.Memory) -> list[Change]:
    """Micro-batches, rematerialisation, parameter pieces: each alone, then together."""
    config, shape = setup.config, setup.layout.mesh.shape
    gradients = _gradient_bytes(setup)
    activations = max(held.temporary - gradients, 0.0)
    found = []

    def propose(setting: str, total: float) -> None:
        found.append(Change(setting, total, total <= held.capacity))

    rows = micro_batch_rows(setup)
    k = micro_batches(setup, held)
    fixed = held.state + held.batch + gradients
    if rows > 1:
        setting = f"train.accumulate={config.train.accumulate * k}"
        propose(setting, fixed + activations / k)
    if config.model.remat != "full":
        propose("model.remat=full", fixed + _rematerialised(setup, activations, rows))
    if shape["data"] > 1:
        pieces = shape["data"]
        fsdp = shape["fsdp"] * pieces
        shared = (held.state + gradients) / pieces
        propose(f"mesh.data=1, mesh.fsdp={fsdp}", shared + held.batch + activations)
    if not any(change.fits for change in found) and rows > 1 and config.model.remat != "full":
        kept = _rematerialised(setup, activations, rows)
        setting = f"model.remat=full, train.accumulate={config.train.accumulate * rows}"
        propose(setting, fixed + kept / rows)
    return found


def micro_batch_rows(setup: setup_lib.Setup) -> int:
    """Rows of a micro-batch on one device."""
    parts = math.prod(setup.layout.mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
    return setup.config.data.batch_size // setup.config.train.accumulate // parts


def micro_batches(setup: setup_lib.Setup, held: memory.Memory) -> int:
    """The smallest divisor of its rows by which a micro-batch must shrink to fit; all, if none does."""
    rows, gradients = micro_batch_rows(setup), _gradient_bytes(setup)
    room = held.capacity - held.state - held.batch - gradients
    activations = held.temporary - gradients
    fitting = [k for k in range(1, rows + 1) if rows % k == 0 and activations / k <= room]
    return fitting[0] if fitting else rows


def _gradient_bytes(setup: setup_lib.Setup) -> float:
    params = setup.abstract._replace(step=None, model_state=None, opt_state=None)
    places = setup.shardings._replace(step=None, model_state=None, opt_state=None)
    return memory.state_bytes(params, places)


def _rematerialised(setup: setup_lib.Setup, activations: float, rows: int) -> float:
    """Bytes of activations if each period kept only its input."""
    model, data = setup.config.model, setup.config.data
    periods = sum(run.repeats for run in layer_language.runs(model.layers, model.depth))
    itemsize = jnp.dtype(build.activation_dtype(model.dtype)).itemsize
    stream = rows * data.seq_len / setup.layout.mesh.shape["context"] * model.width * itemsize
    return activations / periods + periods * stream
