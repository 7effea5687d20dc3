"""The feed-forward without gate: y = act(x W_up) W_down, Attention Is All You Need, arXiv 1706.03762.

With `activation="poly_norm"` and a hidden width of 4 D it is the layer of arXiv 2411.03884.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import remat
from effarch.models.context import Context
from effarch.models.layers import activations, linear
from effarch.quantization import saved


class Mlp(nnx.Module):
    """y = W_down(act(W_up x)).  4*D*F FLOPs per token, 2*D*F parameters (and 4 of a polynomial)."""

    saved_group = 0
    """Above 0 the backward pass has the result of `up` as FP8 copies in such groups."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu_tanh",
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`hidden` None: 4 times the width."""
        hidden = hidden or 4 * width
        self.activation = activations.make(activation, "mlp.activation", param_dtype=param_dtype)
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.down = linear.Linear(hidden, width, axes=("ffn", "embed"), **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        up_BTF = remat.tag(self.up(x_BTD), "ffn_up")
        if self.saved_group and not isinstance(self.activation, nnx.Module):
            h_BTF = saved.small(self.activation, self.saved_group, (up_BTF,), ())
        else:
            h_BTF = self.activation(up_BTF)
        h_BTF = remat.tag(h_BTF, "ffn_hidden")
        return self.down(ctx.shard(h_BTF, "batch", "time", "ffn")), {}
