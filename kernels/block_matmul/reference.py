"""The product by its definition: a small product for each block of the contraction, scaled.

Legend: J = blocks.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.quantize import formats


def block_matmul(a, b, size):
    """y [M,N] float32 without the tensor scales; `size` is that of all blocks."""
    a_MK, b_KN = (formats.decode(x.codes, x.format.element) for x in (a, b))
    scales_a, scales_b = (x.scales.astype(jnp.float32) for x in (a, b))
    if 1 in dict(b.axes):
        scales_b = jnp.repeat(scales_b, size, axis=1)
    a_MJK, b_JKN = a_MK.reshape(len(a_MK), -1, size), b_KN.reshape(-1, size, b_KN.shape[1])
    exact = jax.lax.Precision.HIGHEST
    products_JMN = jnp.einsum("mjk,jkn->jmn", a_MJK, b_JKN, precision=exact)
    return jnp.sum(products_JMN * scales_a.T[:, :, None] * scales_b[:, None], axis=0)
