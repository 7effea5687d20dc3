"""How far back the taps of each token may reach."""

import jax
import jax.numpy as jnp


def count(docs: jax.Array, is_real: jax.Array, most: int, follows_initial: bool) -> jax.Array:
    """int32 [B,T]: how many inputs before a token belong to it, at most `most`; -1 for padding.

    docs and is_real [B,T]; with `follows_initial` the row's first document has `most` before the row.
    """
    time = jnp.arange(docs.shape[1])
    follows = is_real[:, :-1] & (docs[:, 1:] == docs[:, :-1])
    begins = is_real & ~jnp.pad(follows, ((0, 0), (1, 0)))
    age = time - jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    if follows_initial:
        age = jnp.where(jnp.cumsum(begins, axis=1) <= 1, most, age)
    return jnp.where(is_real, jnp.minimum(age, most), -1)
