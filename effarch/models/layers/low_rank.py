"""A linear layer through a bottleneck, as gates of recurrent mixers have it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.layers import linear


class LowRank(nnx.Module):
    """y = x W_down W_up + b.  R*(I + O) (+ O) parameters."""

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool = False,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = linear.Linear(in_features, rank, axes=(axes[0], "rank"), **shared)
        self.up = linear.Linear(
            rank, out_features, axes=("rank", axes[1]), use_bias=use_bias, **shared
        )

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.up(self.down(x))
