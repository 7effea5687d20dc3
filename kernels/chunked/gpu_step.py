"""One token of a recurrence with a matrix state on a GPU: each state is read and written once, in place.

Notation as in `tpu_step`. A program has some columns of a head's state: columns do not meet.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.chunked import tpu_step

_COLUMNS = 32


def run(state, q, k, v, beta, g, *, scale, interpret=False) -> tuple[jax.Array, jax.Array]:
    """o [B,HV,V] float32 and the new state; arguments as `tpu_step.run`."""
    tpu_step.check("gpu", state, interpret)
    state, q, k, v, beta, g = varying.align([state, q, k, v, beta, g])
    batch, heads, key, value = state.shape
    columns, group = min(_COLUMNS, value), heads // q.shape[1]
    if key & (key - 1) or value % columns or columns & (columns - 1):
        raise dispatch.Unsupported(
            f"a state of {key} x {value}; its sides must be a power of two and one, or {_COLUMNS}'s "
            "multiple"
        )

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda j, r: index(j, r // heads, r % heads))

    matrix = spec((None, None, key, columns), lambda j, b, h: (b, h, 0, j))
    by_key = spec((None, None, key), lambda j, b, h: (b, h // group, 0))
    by_value = spec((None, None, columns), lambda j, b, h: (b, h, j))
    number = spec((None, 1), lambda j, b, h: (b, h))
    decay = spec((None, None, key), lambda j, b, h: (b, h, 0))
    inputs = dict(
        state=(matrix, state),
        q=(by_key, q.astype(jnp.float32) * scale),
        k=(by_key, k),
        v=(by_value, v),
        beta=(number, beta),
        g=(number if g is None or g.ndim == 2 else decay, g),
    )
    inputs = {name: pair for name, pair in inputs.items() if pair[1] is not None}

    def kernel(*refs):
        _kernel(**dict(zip((*inputs, "after", "o"), refs)))

    after, o = pl.pallas_call(
        kernel,
        grid=(value // columns, batch * heads),
        in_specs=[spec for spec, _ in inputs.values()],
        out_specs=[matrix, by_value],
        out_shape=[varying.shape_like(x, jnp.float32, state) for x in (state.shape, v.shape)],
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="recurrent_step",
    )(*(array for _, array in inputs.values()))
    return o, after


def _kernel(*, state, q, k, v, after, o, beta=None, g=None):
    matrix, keys = state[...], k[...].astype(jnp.float32)[:, None]
    if g is not None:
        decay = jnp.exp(g[...].astype(jnp.float32))
        matrix *= decay[:, None]
    written = v[...].astype(jnp.float32)
    if beta is not None:
        known = jnp.sum(matrix * keys, axis=0)
        written = beta[...].astype(jnp.float32) * (written - known)
    matrix += keys * written[None, :]
    after[...] = matrix
    o[...] = jnp.sum(matrix * q[...][:, None], axis=0)
