"""The token table, also the output head when the two are tied."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effarch.models.context import Context


class Embedding(nnx.Module):
    """x = scale * table[token].  W*D parameters, no FLOPs; table ~ N(0, init_std)."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        scale: float = 1.0,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        table = init_std * jax.random.normal(rngs.params(), (vocab_size, width), param_dtype)
        self.table = nnx.Param(table, logical=("vocab", "embed"))
        self.scale, self.dtype = scale, dtype

    def __call__(self, tokens_BT: Int[Array, "B T"], ctx: Context) -> Float[Array, "B T D"]:
        # A table split along its width would be gathered whole, token by token.
        table_WD = ctx.shard(self.table[...].astype(self.dtype), "vocab", None)
        x_BTD = jnp.take(table_WD, tokens_BT, axis=0)
        return x_BTD if self.scale == 1.0 else self.scale * x_BTD
