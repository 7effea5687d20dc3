"""What feed-forwards with inactive neurons share: their second half, their measures, their check."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels.sparse_ffn import api as sparse_ffn
from effarch.models import remat
from effarch.models.context import Context
from effarch.models.layers import linear


def finish(
    gate_BTF: Float[Array, "B T F"],
    x_BTP: Float[Array, "B T P"],
    up: linear.Linear,
    down: linear.Linear,
    ctx: Context,
):
    """((gate * (x W_up)) W_down, the hidden activations or None).

    Where one token a row is decoded on one device, only neurons with a gate are read: `up` must keep
    its kernel by outputs. The hidden activations are then not made.
    """
    are_plain = all(layer.quantizer is layer.adapter is None for layer in (up, down))
    if are_plain and _is_decoding(gate_BTF, ctx):
        args = (gate_BTF[:, 0], x_BTP[:, 0].astype(down.dtype), up.kernel[...], down.kernel[...])
        return sparse_ffn.sparse_ffn(*args)[:, None], None
    h_BTF = remat.tag(gate_BTF * remat.tag(up(x_BTP), "ffn_up"), "ffn_hidden")
    return down(ctx.shard(h_BTF, "batch", "time", "ffn")), h_BTF


def _is_decoding(gate_BTF, ctx: Context) -> bool:
    batch, length, _ = gate_BTF.shape
    is_alone = ctx.layout is None or ctx.layout.mesh.size == 1
    return not ctx.train and is_alone and length == 1 and sparse_ffn.may_pay(batch)


def fraction(h_BTF: Float[Array, "B T F"], ctx: Context) -> Float[Array, ""]:
    """The share of hidden activations that are not 0, over tokens that are not padding."""
    return mean(h_BTF != 0, ctx)


def density(h_BTF: Float[Array, "B T F"], ctx: Context, eps: float = 1e-7) -> Float[Array, ""]:
    """DEFT's soft count of active neurons, mean of h^2 / (h^2 + eps), arXiv 2402.01911; float32."""
    square = jnp.square(h_BTF.astype(jnp.float32))
    return mean(1 - eps / (square + eps), ctx)  # the quotient's gradient would cancel for large h


def mean(values_BTF: Array, ctx: Context) -> Float[Array, ""]:
    """The mean over hidden units and tokens that are not padding."""
    if ctx.segment_ids is None:
        return jnp.mean(values_BTF, dtype=jnp.float32)
    real_BT1 = (ctx.segment_ids != 0)[..., None]
    total = jnp.sum(jnp.where(real_BT1, values_BTF, 0), dtype=jnp.float32)
    return total / (jnp.maximum(jnp.sum(real_BT1), 1) * values_BTF.shape[-1])


def check_fraction(kind: str, active_fraction: float) -> None:
    """Raises ValueError unless it is above 0 and at most 1."""
    if not 0 < active_fraction <= 1:
        raise ValueError(
            f"{kind}.active_fraction={active_fraction} must be above 0 and at most 1 (all neurons)."
        )


def rescaled(x: Float[Array, "... F"], eps: float = 1e-12) -> Float[Array, "... F"]:
    """x / sqrt(mean(x^2)), float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)
