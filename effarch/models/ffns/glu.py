"""Gated linear unit: GLU Variants Improve Transformer, arXiv 2002.05202.

y = (act(x W_gate) * (x W_up)) W_down
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import remat
from effarch.models.context import Context
from effarch.models.layers import activations, linear
from effarch.quantization import saved


class Glu(nnx.Module):
    """y = W_down(act(W_gate x) * (W_up x)).  6*D*F FLOPs per token, 3*D*F parameters."""

    saved_group = 0
    """Above 0 the backward pass has the gate's and up's results as FP8 copies in such groups."""

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
        hidden = hidden or default_hidden(width)
        self.activation = activations.make(activation, "glu.activation", param_dtype=param_dtype)
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.up = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.down = linear.Linear(hidden, width, axes=("ffn", "embed"), **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        gate_BTF = remat.tag(self.gate(x_BTD), "ffn_gate")
        up_BTF = remat.tag(self.up(x_BTD), "ffn_up")
        if self.saved_group and not isinstance(self.activation, nnx.Module):
            function = functools.partial(_gated, self.activation)
            h_BTF = saved.small(function, self.saved_group, (gate_BTF, up_BTF), ())
        else:
            h_BTF = _gated(self.activation, gate_BTF, up_BTF)
        h_BTF = remat.tag(h_BTF, "ffn_hidden")
        return self.down(ctx.shard(h_BTF, "batch", "time", "ffn")), {}


def _gated(activation, gate_BTF, up_BTF):
    return activation(gate_BTF) * up_BTF


def default_hidden(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256."""
    return -(-int(width * 8 / 3) // 256) * 256
