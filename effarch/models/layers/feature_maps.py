"""Feature maps phi of linear attention: softmax(q k) is replaced by phi(q) phi(k).

    identity  x                      relu  relu(x)               elu  elu(x) + 1 (arXiv 2006.16236)
    taylor    [1, x, x x / sqrt 2]: 1 + z + z^2 / 2 of z = q k / sqrt(K) (Based, arXiv 2402.18668)
    dpfp      r * roll(r, 1) with r = relu([x, -x]) (arXiv 2102.11174)
    hedgehog  softmax([W x + b, -W x - b]) (arXiv 2402.04347)
    t2r       relu(W x + b) (arXiv 2103.13076)
    product   (W x + b) * (U x + c)

W is a matrix for each head: the identity at first, for `product` random as U is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effarch import names

#        features from K channels, number of learned matrices
KINDS = {
    "identity": (lambda k: k, 0),
    "relu": (lambda k: k, 0),
    "elu": (lambda k: k, 0),
    "taylor": (lambda k: 1 + k + k * (k + 1) // 2, 0),
    "dpfp": (lambda k: 2 * k, 0),
    "hedgehog": (lambda k: 2 * k, 1),
    "t2r": (lambda k: k, 1),
    "product": (lambda k: k, 2),
}


class FeatureMap(nnx.Module):
    """[B,T,H,K] -> [B,T,H,features], float32.  H*K*(K + 1) parameters for each learned matrix."""

    def __init__(
        self,
        kind: str,
        num_heads: int,
        head_dim: int,
        *,
        init_std: float = 0.02,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        features, num_maps = names.lookup(KINDS, kind, "linear_attention: feature_map")
        self.kind, self.num_maps = kind, num_maps
        self.features = features(head_dim)
        self.sizes = (num_heads, head_dim)
        if num_maps == 0:
            return
        shape = (num_maps, num_heads, head_dim, head_dim)
        kernel = jnp.broadcast_to(jnp.eye(head_dim, dtype=param_dtype), shape)
        if kind == "product":
            kernel = init_std * jax.random.normal(rngs.params(), shape, param_dtype)
        axes = (None, "heads", None, None)
        self.kernel = nnx.Param(kernel, logical=axes)
        bias = jnp.zeros(shape[:-1], param_dtype)
        self.bias = nnx.Param(bias, logical=axes[:-1], decay=False)

    def __call__(self, x_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
        x = x_BTHK.astype(jnp.float32)
        if self.num_maps:
            mapped = jnp.einsum("bthk,mhkj->mbthj", x, self.kernel[...])
            mapped += self.bias[...][:, None, None]
        if self.kind == "relu":
            return jax.nn.relu(x)
        if self.kind == "elu":
            return jax.nn.elu(x) + 1
        if self.kind == "taylor":
            return _taylor(x)
        if self.kind == "dpfp":
            r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
            return r * jnp.roll(r, 1, axis=-1)
        if self.kind == "hedgehog":
            return jax.nn.softmax(jnp.concatenate([mapped[0], -mapped[0]], axis=-1), axis=-1)
        if self.kind == "t2r":
            return jax.nn.relu(mapped[0])
        return mapped[0] * mapped[1] if self.kind == "product" else x

    def forward_flops(self, seq_len: int) -> float:
        """The learned matrices, per token."""
        num_heads, head_dim = self.sizes
        return 2.0 * self.num_maps * num_heads * head_dim**2


def _taylor(x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
    """Of the K^2 products x_i x_j only those with i <= j, the mixed ones weighted by sqrt 2."""
    width = x.shape[-1]
    x = x * width**-0.25
    rows, columns = np.triu_indices(width)
    weights = np.where(rows == columns, np.sqrt(0.5), 1.0).astype(np.float32)
    squares = x[..., rows] * x[..., columns] * weights
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)
