"""What a layer is told about the batch and the run besides its input."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effarch.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Arrays are traced, the rest is static. `Context()` serves in a notebook."""

    segment_ids: Int[Array, "B T"] | None = None
    """Document number of each token in its row; 0 is padding. None: one document, no padding."""
    positions: Int[Array, "B T"] | None = None
    """Position of each token in its document. None: 0, 1, 2, ... along the row."""
    key: jax.Array | None = None
    """Random key of this layer and step; None where nothing random is wanted."""
    layout: sharding.Layout | None = dataclasses.field(default=None, metadata={"static": True})
    """Mesh and rules; None outside a run, where sharding constraints are the identity."""
    train: bool = dataclasses.field(default=True, metadata={"static": True})
    """False in evaluation and generation."""
    quantized: bool = dataclasses.field(default=True, metadata={"static": True})
    """False where quantized layers are to use their plain product."""

    def shard(self, x: Array, *logical: str | None) -> Array:
        """Constrains x to the mesh by its logical axes, one a dimension."""
        return x if self.layout is None else self.layout.constrain(x, logical)

    def local(self, function, arrays, inputs, outputs, *, checked=True):
        """`function(*arrays)` on each device's own pieces (`Layout.local`); plain without mesh."""
        if self.layout is None or self.layout.mesh.size == 1:
            return function(*arrays)
        return self.layout.local(function, arrays, inputs, outputs, checked)

    def token_positions(self, x_BTD: Array) -> Int[Array, "B T"]:
        """`positions`, or 0, 1, 2, ... for every row."""
        if self.positions is not None:
            return self.positions
        batch, length = x_BTD.shape[:2]
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
