"""The elementwise recurrence of HGRN (arXiv 2311.04823): the function that layers call.

h_t = exp(g_t) h_{t-1} + x_t
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch, recurrent_arguments

BACKENDS = ("reference", "xla")


def vector_recurrence(
    x: jax.Array,
    g: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All states h [B,T,D] in x's dtype and the final state [B,D].

    x and g (log decay, at most 0) [B,T,D]. initial_state [B,D] belongs to the first segment of each
    row. segment_ids [B,T], integer: constant inside a document; nothing passes from one document to
    the next. 0 is padding, anywhere in the row: outputs 0, the state passes it unchanged.
    The final state is the one after the row's last token that is not padding. It is float32
    (float64 for float64 inputs, which are computed in float64; all others in float32).
    backend: "xla", "reference" (also for forward-mode derivatives) or None for the fastest.
    """
    op = "vector_recurrence"
    x, g = jnp.asarray(x), jnp.asarray(g)
    initial_state, segment_ids = (
        None if a is None else jnp.asarray(a) for a in (initial_state, segment_ids)
    )
    recurrent_arguments.check_floats(op, x=x, g=g, initial_state=initial_state)
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x has shape {x.shape}; give [batch, time, channels], time at least 1."
        )
    recurrent_arguments.check_shape(op, "g", g, x.shape)
    recurrent_arguments.check_shape(op, "initial_state", initial_state, (x.shape[0], x.shape[2]))
    recurrent_arguments.check_segment_ids(op, segment_ids, x.shape[:2])
    return dispatch.call(
        op, op, BACKENDS, backend, x, g, initial_state=initial_state, segment_ids=segment_ids
    )
