"""The linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.quantization import matmul


class Linear(nnx.Module):
    """y = x W + b.  2*I*O FLOPs per token, I*O (+O) parameters; W ~ N(0, init_std)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool = False,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        kernel = init_std * jax.random.normal(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel, logical=axes)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), logical=(axes[1],))
        self.use_bias = use_bias
        self.sizes = shape
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = matmul.matmul(x, self.kernel[...], dtype=self.dtype)
        return y + self.bias[...].astype(y.dtype) if self.use_bias else y

    def forward_flops(self, seq_len: int) -> float:
        """Per token; the sequence length does not matter."""
        return 2.0 * self.sizes[0] * self.sizes[1]
