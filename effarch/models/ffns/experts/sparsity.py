"""BlockFFN's losses, the schedule of a coefficient, and sparsity measures, arXiv 2507.08771.

    q = a / (sum_e a_e + 1e-5)                                      a: activations after their RMS norm
    chunk    = 1 - mean over chunks and e of exp(sum_(t in chunk) log(1 - q_(t,e) + 1e-5))
    locality = mean over neighbours t-1, t of one document of BCE(sigmoid(s z_(t-1)), sigmoid(s z_t))

The coefficient of the chunk loss rests for 1000 steps. From then on, every 100 steps, it begins a
linear way of 100 steps to itself times the ratio of the loss's means over the last 100 steps and the
100 before (if above 1, then at least 1.025), up to 4 times its start. Ours follows each layer's own
loss; the original has one coefficient for all layers.

Legend: N = chunks of a row, C = tokens of a chunk, Y = layers.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

REST_STEPS, WINDOW_STEPS = 1000, 100
LEAST_RISE, MOST = 1.025, 4.0
MEASURED_CHUNKS = (1, 8)
"""Consecutive tokens over which sparsity is reported."""


def chunk_loss(
    a_BTE: Float[Array, "B T E"], valid_BT: Bool[Array, "B T"], chunk_size: int
) -> Float[Array, ""]:
    """The share of experts that a chunk of tokens switches on, softly. Padding uses none."""
    if a_BTE.shape[1] % chunk_size:
        raise ValueError(
            f"blockffn.chunk_size={chunk_size} does not divide the {a_BTE.shape[1]} tokens of a row; "
            "use a divisor of data.seq_len, or chunk_coef=0."
        )
    q_BTE = a_BTE / (jnp.sum(a_BTE, axis=-1, keepdims=True) + 1e-5)
    log_off_BTE = jnp.log(1 - jnp.where(valid_BT[..., None], q_BTE, 0.0) + 1e-5)
    off_BNE = jnp.sum(rearrange(log_off_BTE, "b (n c) e -> b n c e", c=chunk_size), axis=2)
    return 1 - jnp.mean(jnp.exp(off_BNE))


def locality_loss(
    z_BTE: Float[Array, "B T E"], segments_BT: Int[Array, "B T"], sharpness: float
) -> Float[Array, ""]:
    """Binary cross-entropy between the switches of neighbouring tokens, on router logits."""
    left_BTE, right_BTE = sharpness * z_BTE[:, :-1], sharpness * z_BTE[:, 1:]
    same_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] != 0)
    bce_BTE = jax.nn.softplus(left_BTE) - left_BTE * jax.nn.sigmoid(right_BTE)
    pairs = jnp.maximum(jnp.sum(same_BT), 1)
    return jnp.sum(jnp.where(same_BT[..., None], bce_BTE, 0.0)) / (pairs * z_BTE.shape[-1])


def metrics(on_BTE: Bool[Array, "B T E"], valid_BT: Bool[Array, "B T"]) -> dict[str, Array]:
    """Token-level sparsity and that of chunks of 8 tokens (a short last chunk is left out)."""
    found, on_BTE = {}, on_BTE & valid_BT[..., None]
    for size in MEASURED_CHUNKS:
        whole = on_BTE.shape[1] // size * size
        if not whole:
            continue
        chunks = "b (n c) ... -> b n c ..."
        on_BNE = jnp.any(rearrange(on_BTE[:, :whole], chunks, c=size), axis=2)
        used_BN = jnp.any(rearrange(valid_BT[:, :whole], chunks, c=size), axis=2)
        name = "metric/token_sparsity" if size == 1 else f"metric/chunk_sparsity_{size}"
        found[name] = 1 - jnp.sum(on_BNE) / jnp.maximum(jnp.sum(used_BN) * on_BTE.shape[-1], 1)
    return found


def initial(start: float) -> Float[Array, "5"]:
    """The state of the coefficient: from, to, sum of this window, sum of the last one, steps."""
    return jnp.asarray([start, start, 0.0, 0.0, 0.0])


def coefficient(state: Float[Array, "... 5"]) -> Float[Array, "..."]:
    """The value in this step."""
    begin, end, _, _, steps = jnp.moveaxis(state, -1, 0)
    return begin + (end - begin) * (steps % WINDOW_STEPS) / WINDOW_STEPS


def advance(
    state_Y5: Float[Array, "Y 5"], loss_Y: Float[Array, " Y"], start: float
) -> Float[Array, "Y 5"]:
    """The state after a step with this loss."""
    begin, end, now, before, steps = jnp.moveaxis(state_Y5, -1, 0)
    now, steps = now + loss_Y, steps + 1
    is_over = steps % WINDOW_STEPS == 0
    ratio = now / jnp.where(before > 0, before, now)
    factor = jnp.where(ratio > 1, jnp.maximum(ratio, LEAST_RISE), ratio)
    begin = jnp.where(is_over, end, begin)
    changed = jnp.minimum(end * factor, MOST * start)
    end = jnp.where(is_over & (steps >= REST_STEPS), changed, end)
    before, now = jnp.where(is_over, now, before), jnp.where(is_over, 0.0, now)
    return jnp.stack([begin, end, now, before, steps], axis=-1)
