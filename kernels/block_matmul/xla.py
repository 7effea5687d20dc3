"""The product in plain JAX: both arrays with their scales applied, then one product."""

import jax
import jax.numpy as jnp

from effarch.kernels.block_matmul import api
from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize import formats


def block_matmul(a, b, size):
    """See `reference.block_matmul`."""
    del size
    is_exact = api.is_exact_in_bfloat16(a) and api.is_exact_in_bfloat16(b)
    operands = [_applied(x).astype(jnp.bfloat16 if is_exact else jnp.float32) for x in (a, b)]
    precision = None if is_exact else jax.lax.Precision.HIGHEST
    return jnp.matmul(*operands, precision=precision, preferred_element_type=jnp.float32)


def _applied(x):
    values = formats.decode(x.codes, x.format.element)
    return quantize.rescale(values, x.scales.astype(jnp.float32), x.axes)
