"""The short convolution as a sum of W shifted products, which XLA fuses into one pass over x.

The gradient is written out: the transpose of the shifts is again a sum of shifted products, and the
pre-activation is recomputed rather than stored.
Legend: W taps, E = W-1+T inputs including those before the row.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.chunked import documents


def short_conv(x, kernel, *, bias=None, activation=None, initial=None, segment_ids=None):
    """See `api.short_conv`."""
    bias = jnp.zeros(x.shape[2], kernel.dtype) if bias is None else bias
    x, kernel, bias, initial, segment_ids = varying.align([x, kernel, bias, initial, segment_ids])
    inputs, docs, is_real, tail = prepared(x, kernel.shape[0] - 1, initial, segment_ids)
    y = _convolve(inputs, kernel, bias, docs, activation)
    return y if is_real is None else jnp.where(is_real[..., None], y, 0), tail


def prepared(x, before: int, initial, segment_ids) -> tuple:
    """The inputs [B,E,D] with the W-1 before the row, their documents [B,E], who is real, the tail.

    Documents and `is_real` [B,T] are None without segment ids; padding counts as inputs of 0.
    """
    batch, length, channels = x.shape
    starts_empty = initial is None
    initial = jnp.zeros_like(x, shape=(batch, before, channels)) if starts_empty else initial
    initial = initial.astype(x.dtype)
    if segment_ids is None:
        inputs = jnp.concatenate([initial, x], axis=1)
        return inputs, None, None, inputs[:, length:]
    is_real = segment_ids != 0
    docs = documents.document_index(segment_ids)
    inputs = jnp.concatenate([initial, jnp.where(is_real[..., None], x, 0)], axis=1)
    inputs = inputs if starts_empty else _behind_padding(inputs, initial, is_real)
    docs = jnp.pad(docs, ((0, 0), (before, 0)))  # the row's first document is number 0
    return inputs, docs, is_real, _tail(inputs, docs, is_real, before)


def _behind_padding(inputs, initial, is_real):
    """[initial, x] with the padding in front of the first real token moved to the very front."""
    length, before = is_real.shape[1], initial.shape[1]
    first_real = jnp.where(jnp.any(is_real, axis=1), jnp.argmax(is_real, axis=1), length)
    place = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(place)(inputs.at[:, :before].set(0), initial, first_real)


def _tail(inputs, docs, is_real, before):
    """The last W-1 inputs up to the last real token, zero where they are of another document."""
    length = is_real.shape[1]
    last = length - jnp.argmax(is_real[:, ::-1], axis=1)
    start = jnp.where(jnp.any(is_real, axis=1), last, length)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=before)
    of_last = jax.vmap(cut)(docs, start) == docs[:, -1:]
    return jnp.where(of_last[..., None], jax.vmap(cut)(inputs, start), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(inputs, kernel, bias, docs, activation):
    """y [B,T,D] from inputs [B,E,D] and document numbers [B,E] (or None)."""
    y = _before_activation(inputs, kernel, bias, docs)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(inputs.dtype)


def _forward(inputs, kernel, bias, docs, activation):
    return _convolve(inputs, kernel, bias, docs, activation), (inputs, kernel, bias, docs)


def _backward(activation, saved, d_y):
    inputs, kernel, bias, docs = saved
    taps, before = kernel.shape[0], kernel.shape[0] - 1
    length = d_y.shape[1]
    dtype = jnp.result_type(jnp.float32, inputs)
    d_y = d_y.astype(dtype)
    if activation == "silu":
        y = _before_activation(inputs, kernel, bias, docs)
        gate = jax.nn.sigmoid(y)
        d_y = d_y * gate * (1 + y * (1 - gate))
    d_kernel = []
    d_inputs = 0
    padded = jnp.pad(d_y, ((0, 0), (before, before), (0, 0)))
    padded_docs = None if docs is None else jnp.pad(docs, ((0, 0), (0, before)))
    for tap in range(taps):
        shift = before - tap  # how far this tap looks back
        products = d_y * inputs[:, tap : tap + length].astype(dtype)
        reaching = padded[:, shift : shift + before + length] * kernel[tap].astype(dtype)
        if docs is not None:
            products = jnp.where(_same(docs, tap, before, length), products, 0)
            reaches = padded_docs[:, shift : shift + before + length] == docs
            reaching = jnp.where(reaches[..., None], reaching, 0)
        d_kernel.append(jnp.sum(products, axis=(0, 1)))
        d_inputs = d_inputs + reaching
    d_kernel = jnp.stack(d_kernel).astype(kernel.dtype)
    d_bias = jnp.sum(d_y, axis=(0, 1)).astype(bias.dtype)
    return d_inputs.astype(inputs.dtype), d_kernel, d_bias, None


_convolve.defvjp(_forward, _backward)


def _before_activation(inputs, kernel, bias, docs):
    before = kernel.shape[0] - 1
    length = inputs.shape[1] - before
    dtype = jnp.result_type(jnp.float32, inputs)
    y = bias.astype(dtype)
    for tap in range(kernel.shape[0]):
        term = inputs[:, tap : tap + length].astype(dtype) * kernel[tap].astype(dtype)
        if docs is not None:
            term = jnp.where(_same(docs, tap, before, length), term, 0)
        y = y + term
    return y


def _same(docs, tap, before, length):
    """Whether input t - W + 1 + tap is of the document of token t, [B,T,1]."""
    return (docs[:, tap : tap + length] == docs[:, before:])[..., None]
