"""The experts of a layer: E feed-forwards of equal shape, computed on rows sorted by expert."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.models.ffns.experts import products
from effarch.models.ffns.experts.exchange import Exchange
from effarch.models.layers import activations


class Experts(products.GroupedProducts):
    """y = (act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down, by each row's expert.

    6*D*F*K FLOPs per token and 3*D*F*E parameters, two thirds of that without gate.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int,
        gated: bool = True,
        activation: str = "silu",
        backend: str | None = None,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = names.lookup(activations.FUNCTIONS, activation, "moe.activation")
        self.sizes, self.top_k, self.gated = (num_experts, width, hidden), top_k, gated
        self.backend, self.dtype = backend, dtype

        def param(shape, axes):
            kernel = init_std * jax.random.normal(rngs.params(), shape, param_dtype)
            return nnx.Param(kernel, logical=("experts", *axes))

        if gated:
            self.gate = param((num_experts, width, hidden), ("embed", "ffn"))
        self.up = param((num_experts, width, hidden), ("embed", "ffn"))
        self.down = param((num_experts, hidden, width), ("ffn", "embed"))

    @property
    def product_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of one expert's products."""
        _, width, hidden = self.sizes
        return (width, hidden), (hidden, width)

    @property
    def row_widths(self) -> tuple[int, int]:
        """Numbers of a row that travels to an expert, and of one that comes back."""
        return self.sizes[1], self.sizes[1]

    def weights(self) -> dict[str, Array]:
        """The arrays that `compute` takes."""
        kept = ("gate", "up", "down") if self.gated else ("up", "down")
        return {name: getattr(self, name)[...] for name in kept}

    def logical(self) -> dict[str, tuple[str | None, ...]]:
        """How a device sees them: its own experts and hidden channels."""
        way_in, way_out = ("experts", None, "ffn"), ("experts", "ffn", None)
        return {"gate": way_in, "up": way_in, "down": way_out}

    def compute(self, weights: dict[str, Array], x_ND, ids_NK, weights_NK, exchange: Exchange):
        """The weighted sum over the chosen experts [N,D], and which choices had a row; on one
        device's pieces."""

        def apply(x_MD, plan):
            return self.feed_forward(x_MD, weights, self.activation, plan)

        return exchange.combined(apply, x_ND.astype(self.dtype), ids_NK, weights_NK)

    def forward_flops(self, seq_len: int) -> float:
        """Per token, of its `top_k` experts; the sequence length does not matter."""
        _, width, hidden = self.sizes
        return (6.0 if self.gated else 4.0) * width * hidden * self.top_k

    def idle_params(self) -> int:
        """Weights of the experts that a token does not choose."""
        num_experts, width, hidden = self.sizes
        return (3 if self.gated else 2) * width * hidden * (num_experts - self.top_k)


class TokenGate(nnx.Module):
    """sigmoid(x w): one number a token.  D parameters, 2*D FLOPs per token."""

    def __init__(
        self, width: int, *, init_std: float = 0.02, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kernel = init_std * jax.random.normal(rngs.params(), (width, 1), param_dtype)
        self.kernel = nnx.Param(kernel, logical=("embed", None))
        self.width = width

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T 1"]:
        z_BT1 = x_BTD.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)
        return jax.nn.sigmoid(z_BT1).astype(x_BTD.dtype)

    def forward_flops(self, seq_len: int) -> float:
        """Per token; the sequence length does not matter."""
        return 2.0 * self.width
