"""The second half of a sparse feed-forward for few tokens: only the neurons in use are read.

    y_b = sum over f with gate_bf != 0 of gate_bf (x_b . up_f) down_f

Both tables are neuron-major: row f holds all of neuron f, so that an active neuron is two contiguous
reads. What decides which gates are 0 does not matter here: a statistical threshold, a ReLU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels import dispatch

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
MOST_TOKENS = 16
"""Beyond so many tokens at a time their neurons together are nearly all of them."""
MOST_ACTIVE = 0.75
"""The share of active neurons above which reading in order is faster."""


def sparse_ffn(
    gate: Float[Array, "B F"],
    x: Float[Array, "B P"],
    up: Float[Array, "F ..."],
    down: Float[Array, "F ..."],
    *,
    backend: str | None = None,
) -> Float[Array, "B D"]:
    """y [B,D] in x's dtype; sums in float32.

    A neuron is read if any of the B tokens has a gate for it. Where too many are in use for that to
    pay, everything is read in order; that is decided by their number, at run time.
    Weights may be of another dtype than x; what is read is cast. Meant for decoding: values and
    forward derivatives only, and of the Pallas kernels values only. Raises ValueError for shapes
    that do not fit.

    A table may be folded, [F, width / 128, 128]: on TPUs a row can be fetched alone only from such a
    one, so for others `backend=None` takes "xla" there.
    """
    gate, x, up, down = (jnp.asarray(array) for array in (gate, x, up, down))
    are_arrays = gate.ndim == x.ndim == 2 and {up.ndim, down.ndim} <= {2, 3}
    if (
        not are_arrays
        or gate.shape != (x.shape[0], up.shape[0])
        or x.shape[1] != up.size // max(len(up), 1)
        or down.shape[0] != up.shape[0]
    ):
        raise ValueError(
            f"sparse_ffn: gate {gate.shape}, x {x.shape}, up {up.shape} and down {down.shape} do not "
            "fit; give gate [B,F], x [B,P], up [F,P] and down [F,D]."
        )
    return dispatch.call("sparse_ffn", "sparse_ffn", BACKENDS, backend, gate, x, up, down)


def unfolded(table: jax.Array) -> Float[Array, "F width"]:
    """A table as a matrix."""
    return table.reshape(len(table), -1)


def may_pay(num_tokens: int) -> bool:
    """Whether the neurons of so many tokens together can be few; known before compiling."""
    return num_tokens <= MOST_TOKENS


def pays(num_active: jax.Array, hidden: int) -> jax.Array:
    """Whether reading `num_active` rows here and there beats reading all `hidden` in order."""
    return num_active < MOST_ACTIVE * hidden
