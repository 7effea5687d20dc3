"""The short convolution token by token, with the window of the last inputs as the state."""

import jax
import jax.numpy as jnp

from effarch.kernels import varying


def short_conv(x, kernel, *, bias=None, activation=None, initial=None, segment_ids=None):
    """See `api.short_conv`."""
    dtype = jnp.result_type(jnp.float32, x)
    batch, length, channels = x.shape
    if initial is None:
        initial = jnp.zeros((batch, kernel.shape[0] - 1, channels), dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    out_dtype = x.dtype
    x, kernel, bias, window, segment_ids = varying.align(
        [x.astype(dtype), kernel, bias, initial.astype(dtype), segment_ids]
    )

    def token(carry, inputs):
        window, document = carry
        x, segment = inputs
        is_real = segment != 0
        is_new = is_real & (document != 0) & (segment != document)
        before = jnp.where(is_new[:, None, None], 0, window)
        taps = jnp.concatenate([before, x[:, None]], axis=1)
        y = jnp.sum(taps * kernel.astype(dtype), axis=1)
        y = y if bias is None else y + bias.astype(dtype)
        y = jax.nn.silu(y) if activation == "silu" else y
        window = jnp.where(is_real[:, None, None], taps[:, 1:], window)
        return (window, jnp.where(is_real, segment, document)), jnp.where(is_real[:, None], y, 0)

    start = (window, jnp.zeros_like(segment_ids[:, 0]))
    (window, _), y = jax.lax.scan(token, start, (jnp.moveaxis(x, 1, 0), segment_ids.T))
    return jnp.moveaxis(y, 0, 1).astype(out_dtype), window.astype(out_dtype)
