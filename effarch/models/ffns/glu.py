"""Gated linear unit: GLU Variants Improve Transformer, arXiv 2002.05202.

y = (act(x W_gate) * (x W_up)) W_down
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.models.context import Context
from effarch.models.layers import linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
}


class Glu(nnx.Module):
    """y = W_down(act(W_gate x) * (W_up x)).  6*D*F FLOPs per token, 3*D*F parameters."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "silu",
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`hidden` None: 8/3 of the width, rounded up to a multiple of 256 (as Llama does)."""
        hidden = hidden or -(-int(width * 8 / 3) // 256) * 256
        self.activation = names.lookup(ACTIVATIONS, activation, "glu.activation")
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.up = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.down = linear.Linear(hidden, width, axes=("ffn", "embed"), **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        h_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(ctx.shard(h_BTF, "batch", "time", "ffn")), {}
