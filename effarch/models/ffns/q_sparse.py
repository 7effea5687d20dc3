"""Q-Sparse: every product reads only the largest of its inputs, arXiv 2407.10969.

    Q(x) = z / sqrt(mean(z^2)),   z = x where |x| is among the K largest of its token, else 0
    y    = Q((Q(x) W_up) * relu(Q(x) W_gate)^2) W_down

Backward the mask is left out (straight-through): dx = dz, for all entries. The paper does not give the
factor of its rescaling; ours is the root mean square.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.topk import api as topk
from effarch.models.context import Context
from effarch.models.ffns import active, glu
from effarch.models.layers import linear


class QSparseFfn(nnx.Module):
    """3*D*F parameters; 6*D*F FLOPs per token, of which the share `active_fraction` is needed."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        active_fraction: float = 0.6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`active_fraction`: K over the number of inputs, of all three products. `hidden` None: as in
        `glu`."""
        active.check_fraction("q_sparse", active_fraction)
        hidden = hidden or glu.default_hidden(width)
        self.active_fraction = active_fraction
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.up = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.down = linear.Linear(hidden, width, axes=("ffn", "embed"), **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        z_BTD = active.rescaled(masked(x_BTD, self.active_fraction))
        h_BTF = self.up(z_BTD) * jnp.square(jax.nn.relu(self.gate(z_BTD)))
        h_BTF = masked(ctx.shard(h_BTF, "batch", "time", "ffn"), self.active_fraction)
        aux = {"metric/active_fraction": active.fraction(h_BTF, ctx)} if ctx.train else {}
        return self.down(active.rescaled(h_BTF)), aux

    def idle_flops(self, seq_len: int) -> float:
        """Forward FLOPs per token of inputs that are 0; the sequence length does not matter."""
        return (1 - self.active_fraction) * 3 * self.down.forward_flops(seq_len)


def masked(x: Float[Array, "... F"], fraction: float) -> Float[Array, "... F"]:
    """x with all but this share of its largest magnitudes set to 0; backward the identity."""
    keep = topk.largest(jnp.abs(x), max(1, round(fraction * x.shape[-1])))
    return x + jax.lax.stop_gradient(jnp.where(keep, 0, -x))
