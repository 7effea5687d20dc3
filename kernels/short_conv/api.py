"""Short causal depthwise convolution along time: the function that recurrent layers call."""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
ACTIVATIONS = ("silu", None)


def short_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: str | None = "silu",
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = act(sum_j kernel_j x_(t-W+1+j) + bias), one filter of W taps per channel.

    x [B,T,D]; kernel [W,D], its last row meets the current token; bias [D]; activation "silu" or None.
    initial [B,W-1,D]: the inputs before the row, which belong to the row's first document (default:
    zeros). segment_ids [B,T], integer: taps stop at document boundaries; 0 is padding, which stands
    before, between and after documents and gives zeros.
    backend: "xla", "reference", "pallas_tpu" (at most 7 taps, multiples of 128 channels), "pallas_gpu"
    (multiples of 16 channels) or None for the fastest.
    Returns y [B,T,D] and tail [B,W-1,D], the `initial` that continues the row's last document:
    its last W-1 inputs, zeros where the document is shorter. Both in x's dtype.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(
            f"short_conv: x has shape {x.shape}; give [batch, time, channels], time at least 1."
        )
    batch, length, channels = x.shape
    if kernel.ndim != 2 or kernel.shape[0] == 0 or kernel.shape[1] != channels:
        raise ValueError(
            f"short_conv: kernel has shape {kernel.shape}; give [taps, {channels}], taps at least 1."
        )
    bias = None if bias is None else jnp.asarray(bias)
    initial = None if initial is None else jnp.asarray(initial)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    _check_shape("bias", bias, (channels,))
    _check_shape("initial", initial, (batch, kernel.shape[0] - 1, channels))
    _check_shape("segment_ids", segment_ids, (batch, length))
    for name, array in dict(x=x, kernel=kernel, bias=bias, initial=initial).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"short_conv: {name} has dtype {array.dtype}; give a floating-point array."
            )
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"short_conv: segment_ids has dtype {segment_ids.dtype}; give integers.")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"short_conv: activation {activation!r} does not exist; choose 'silu' or None."
        )
    return dispatch.call(
        "short_conv",
        "short_conv",
        BACKENDS,
        backend,
        *(x, kernel),
        bias=bias,
        activation=activation,
        initial=initial,
        segment_ids=segment_ids,
    )


def _check_shape(name: str, array: jax.Array | None, expected: tuple[int, ...]) -> None:
    if array is not None and array.shape != expected:
        raise ValueError(
            f"short_conv: {name} has shape {array.shape}; with this x and kernel it must be "
            f"{expected}."
        )
