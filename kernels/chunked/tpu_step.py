"""One token of a recurrence with a matrix state on a TPU: each state is read and written once, in place.

    S <- diag(exp g) S;   S <- S + k w^T;   o = S^T q        w = v, or of the delta rule beta (v - S^T k)

Legend: HB value heads of a grid step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying

_MOST_NUMBERS = 2**18
"""Of the states of a grid step: 1 MB, held four times (two steps, in and out)."""


def run(state, q, k, v, beta, g, *, scale, interpret=False) -> tuple[jax.Array, jax.Array]:
    """o [B,HV,V] float32 and the new state; arguments as `api.gated_delta_rule_step`, beta or None.

    The new state takes the old one's memory where that is donated.
    """
    check("tpu", state, interpret)
    state, q, k, v, beta, g = varying.align([state, q, k, v, beta, g])
    batch, heads, key, value = state.shape
    group = heads // q.shape[1]
    q, k = q.astype(jnp.float32) * scale, k.astype(jnp.float32)
    keys = [jnp.repeat(x, group, axis=1) for x in (q, k)]
    if g is not None:
        decay = jnp.exp(g.astype(jnp.float32))
        keys.append(decay if g.ndim == 3 else jnp.broadcast_to(decay[..., None], keys[0].shape))
    values = [v.astype(jnp.float32)]
    if beta is not None:
        values.append(jnp.broadcast_to(beta.astype(jnp.float32)[..., None], v.shape))
    count = _heads_a_step(heads, key * value)

    def rows(arrays):
        """[B,J,parts*HB,width], the parts of a step one after the other."""
        width = arrays[0].shape[-1]
        parts = [x.reshape(batch, -1, count, width) for x in arrays]
        joined = jnp.concatenate(parts, axis=2)
        spec = pl.BlockSpec((None, None, joined.shape[2], width), lambda b, j: (b, j, 0, 0))
        return spec, joined

    states = pl.BlockSpec((None, count, key, value), lambda b, j: (b, j, 0, 0))
    (key_spec, keys), (value_spec, values) = rows(keys), rows(values)
    o_spec = pl.BlockSpec((None, None, count, value), lambda b, j: (b, j, 0, 0))
    o_shape = (batch, heads // count, count, value)
    after, o = pl.pallas_call(
        functools.partial(_kernel, count, g is not None, beta is not None),
        grid=(batch, heads // count),
        in_specs=[states, key_spec, value_spec],
        out_specs=[states, o_spec],
        out_shape=[varying.shape_like(x, jnp.float32, state) for x in (state.shape, o_shape)],
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="recurrent_step",
    )(state, keys, values)
    return o.reshape(v.shape), after


def check(kind: str, state: jax.Array, interpret: bool) -> None:
    """Raises `Unsupported` for another platform and for states that the kernels do not take."""
    dispatch.require(kind, interpret)
    if state.dtype != jnp.float32:
        raise dispatch.Unsupported(f"the state is {state.dtype}; it must be float32")
    if state.shape[2] % 8 or state[0, 0].size > _MOST_NUMBERS:
        raise dispatch.Unsupported(
            f"a state of {state.shape[2]} x {state.shape[3]}; its keys must be a multiple of 8, and it "
            f"may have {_MOST_NUMBERS} numbers"
        )


def _heads_a_step(heads, size):
    return max(x for x in range(1, heads + 1) if heads % x == 0 and x * size <= _MOST_NUMBERS)


def _kernel(count, has_decay, corrects, state_ref, keys_ref, values_ref, after_ref, o_ref):
    columns = keys_ref[...].T
    for head in range(count):
        state = state_ref[head]

        def column(part, head=head, like=state):
            at = part * count + head
            return jnp.broadcast_to(columns[:, at : at + 1], like.shape)

        q, k = column(0), column(1)
        if has_decay:
            state = state * column(2)
        written = values_ref[head : head + 1, :]
        if corrects:
            known = jnp.sum(state * k, axis=0, keepdims=True)
            written = values_ref[count + head : count + head + 1, :] * (written - known)
        state = state + k * written
        after_ref[head] = state
        o_ref[head : head + 1, :] = jnp.sum(state * q, axis=0, keepdims=True)
