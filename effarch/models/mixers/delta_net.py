"""DeltaNet: Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484.

    S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    b = sigmoid(x W_b), doubled with negative eigenvalues (arXiv 2411.12537);   y = RMSNorm(o) W_out

q, k and v pass a causal depthwise convolution with SiLU; q and k are L2-normalised. The paper's other
choices for q and k: relu, elu(x) + 1 or nothing in place of SiLU, and channels that sum to 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.models.context import Context
from effarch.models.layers import executed, heads, linear, memory, norm, short_convs

QK_ACTIVATIONS = {
    "silu": lambda x: x,  # the convolution's own
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}
QK_NORMS = {"l2": norm.l2_normalize, "sum": norm.sum_normalize}


class DeltaNet(nnx.Module):
    """4 D^2 + D H + 3 W D + K parameters with H K = D (+ D^2 with gate)."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 128,
        conv_size: int = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        use_gate: bool = False,
        allow_neg_eigval: bool = False,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """num_heads None: width / head_dim; conv_size 0 leaves the convolutions out. `qk_activation` is
        silu, relu, elu (+ 1) or identity, `qk_norm` l2 or sum (for channels that are not negative)."""
        num_heads = heads.count("delta_net", width, num_heads, head_dim)
        names.lookup(QK_ACTIVATIONS, qk_activation, "delta_net: qk_activation")
        names.lookup(QK_NORMS, qk_norm, "delta_net: qk_norm")
        if qk_norm == "sum" and qk_activation not in ("relu", "elu"):
            raise ValueError(
                f"delta_net: qk_norm='sum' divides by sums that qk_activation={qk_activation!r} lets "
                "vanish; choose relu or elu."
            )
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.num_heads, self.head_dim = num_heads, head_dim
        self.use_gate, self.beta_scale = use_gate, 2.0 if allow_neg_eigval else 1.0
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner, columns = num_heads * head_dim, ("embed", "heads")
        self.q = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.k = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.v = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.beta = linear.Linear(width, num_heads, axes=columns, **shared)
        self.out = linear.Linear(inner, width, axes=("heads", "embed"), head_dim=head_dim, **shared)
        self.out_norm = norm.RMSNorm(head_dim, eps=norm_eps, param_dtype=param_dtype)
        if use_gate:
            self.gate = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        sizes = {"q": inner, "k": inner, "v": inner}
        is_linear = () if qk_activation == "silu" else ("q", "k")
        self.conv = short_convs.ShortConvs(sizes, conv_size, linear=is_linear, **shared)
        self.memory = memory.Memory(
            *(num_heads, head_dim, head_dim),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        projected = {"q": self.q(x_BTD), "k": self.k(x_BTD), "v": self.v(x_BTD)}
        projected, tails = self.conv(projected, ctx, None if cache is None else cache["conv"])
        q, k, v = (heads.split(projected[name], self.num_heads, ctx) for name in "qkv")
        activation, normalize = QK_ACTIVATIONS[self.qk_activation], QK_NORMS[self.qk_norm]
        q, k = (normalize(activation(x)) for x in (q, k))
        beta_BTH = self.beta_scale * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        o, state = self.memory.delta_rule(q, k, v, beta_BTH, None, ctx, cache)
        o_BTF = heads.join(self.out_norm(o), ctx)
        if self.use_gate:
            o_BTF = o_BTF * jax.nn.silu(self.gate(x_BTD))
        aux = {"metric/delta_beta": jnp.mean(beta_BTH)}
        return self.out(o_BTF), None if cache is None else state | {"conv": tails}, aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state and the convolutions' last inputs; `length` does not matter."""
        return self.memory.init_cache(batch) | {"conv": self.conv.init_cache(batch)}

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (read, write, read out) per token; no projections or convolutions."""
        return 6.0 * self.num_heads * self.head_dim**2

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.delta_rule, seq_len)
