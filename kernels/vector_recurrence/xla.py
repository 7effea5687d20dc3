"""The elementwise recurrence: token after token on a CPU, in pieces on accelerators.

A token is elementwise work on as many channels as the model is wide. A CPU does it best in order, where
every number is read once; pieces carry products along and read them again. An accelerator needs fewer
and larger steps: all pieces run step by step at once, then they are joined. With a_t = exp(g_t), 0 at
the start of a document and 1 at padding, and P_t the product of the a of a piece through t:

    h_t = (the recurrence of the piece from zero)_t + P_t h_(end of the piece before)

That is 2T multiply-adds and C + T / C steps, on products that never exceed 1. The gradient is the same
recurrence backwards: dh_t = dy_t + a_(t+1) dh_(t+1), dx = dh, da_t = h_(t-1) dh_t.
Legend: N pieces, C tokens of a piece.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.chunked import documents

PIECE = 64


def vector_recurrence(x, g, *, initial_state=None, segment_ids=None):
    """See `api.vector_recurrence`."""
    dtype = jnp.result_type(jnp.float32, x)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), dtype)
    out_dtype = x.dtype
    x, g, initial_state, segment_ids = varying.align(
        [x.astype(dtype), g.astype(dtype), initial_state.astype(dtype), segment_ids]
    )
    if segment_ids is None:
        h = _recurrence(x, jnp.exp(g), initial_state)
        return h.astype(out_dtype), h[:, -1]
    is_real = (segment_ids != 0)[..., None]
    docs = documents.document_index(segment_ids)
    starts = jnp.pad(docs[:, 1:] != docs[:, :-1], ((0, 0), (1, 0)))[..., None]
    # Masks go in before the exponential, so that they reach the gradient of g.
    decay = jnp.exp(jnp.where(starts, -jnp.inf, jnp.where(is_real, g, 0)))
    h = _recurrence(jnp.where(is_real, x, 0), decay, initial_state)
    return jnp.where(is_real, h, 0).astype(out_dtype), h[:, -1]


@jax.custom_vjp
def _recurrence(x, decay, initial):
    """h_t = decay_t h_{t-1} + x_t for x and decay [B,T,D] and initial [B,D]."""
    return jax.lax.platform_dependent(x, decay, initial, cpu=_in_order, default=_in_pieces)


def _in_order(x, decay, initial):
    def token(h, inputs):
        x, decay = inputs
        h = decay * h + x
        return h, h

    _, h = jax.lax.scan(token, initial, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(decay, 1, 0)))
    return jnp.moveaxis(h, 0, 1)


def _in_pieces(x, decay, initial):
    batch, length, width = x.shape
    filled = ((0, 0), (0, -length % PIECE), (0, 0))
    by_step = [
        jnp.moveaxis(jnp.pad(a, filled).reshape(batch, -1, PIECE, width), 2, 0) for a in (x, decay)
    ]

    def within(carry, inputs):
        h, product = carry
        x, decay = inputs
        carry = decay * h + x, decay * product
        return carry, carry

    start = jnp.zeros_like(by_step[0][0]), jnp.ones_like(by_step[0][0])
    (end, whole), (local, product) = jax.lax.scan(within, start, by_step)  # [C,B,N,D]

    def join(h, inputs):
        end, whole = inputs
        return end + whole * h, h

    ends = (jnp.moveaxis(end, 1, 0), jnp.moveaxis(whole, 1, 0))
    _, entering = jax.lax.scan(join, initial, ends)
    h = local + product * jnp.moveaxis(entering, 0, 1)
    return jnp.moveaxis(h, 0, 2).reshape(batch, -1, width)[:, :length]


def _forward(x, decay, initial):
    h = _recurrence(x, decay, initial)
    return h, (h, decay, initial)


def _backward(saved, d_y):
    h, decay, initial = saved
    after = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
    backwards = (d_y[:, ::-1], after[:, ::-1], jnp.zeros_like(initial))
    d_h = _recurrence(*backwards)[:, ::-1]
    before = jnp.concatenate([initial[:, None], h[:, :-1]], axis=1)
    return d_h, before * d_h, decay[:, 0] * d_h[:, 0]


_recurrence.defvjp(_forward, _backward)
