"""Drawing the next token from its scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits_BW: Float[Array, "B W"],
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " B"]:
    """One token a row; temperature 0 takes the best one.

    top_k > 0 keeps the k best tokens; top_p < 1 then keeps the fewest best ones whose probabilities
    reach top_p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    logits_BW = logits_BW.astype(jnp.float32) / temperature
    if top_k:
        best, _ = jax.lax.top_k(logits_BW, min(top_k, logits_BW.shape[-1]))
        logits_BW = jnp.where(logits_BW < best[:, -1:], -jnp.inf, logits_BW)
    if top_p < 1:
        logits_BW = jnp.where(_in_nucleus(logits_BW, top_p), logits_BW, -jnp.inf)
    return jax.random.categorical(key, logits_BW, axis=-1).astype(jnp.int32)


def _in_nucleus(logits_BW: Float[Array, "B W"], top_p: float) -> Array:
    order = jnp.argsort(-logits_BW, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(logits_BW, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the better tokens
    return jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
