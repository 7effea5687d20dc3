"""Grouped matrix product as defined: every row times every matrix, all but its own masked out."""

import jax.numpy as jnp


def grouped_matmul(x, w, group_sizes, *, aligned):
    """See `api.grouped_matmul`."""
    del aligned
    ends_E = jnp.cumsum(group_sizes)
    rows_M = jnp.arange(x.shape[0])[:, None]
    own_ME = (rows_M >= ends_E - group_sizes) & (rows_M < ends_E)
    y_MEF = jnp.einsum("md,edf->mef", x, w, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(own_ME[..., None], y_MEF, 0.0), axis=1).astype(x.dtype)
