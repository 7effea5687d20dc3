"""Output projection and cross-entropy in one operation, so that the logits are never all held.

    logits = x @ head                       (softcap c: c tanh(logits / c))
    ce     = logsumexp(logits) - logits[target]
    total  = sum over tokens of weight * (ce + z_loss * logsumexp^2)

The z-loss is that of PaLM, arXiv 2204.02311; a fused form of the whole is in 2410.10989 (Liger).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels import dispatch

BACKENDS = ("xla", "reference")


def linear_cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D W"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Returns (total, {"ce", "logsumexp", "hit"}): a float32 scalar and float32 values of each token.

    `hit` is 1 where no word scores above the target, else 0.

    The product takes operands of x's dtype (head is cast to it) and sums in float32. `total` is
    differentiable with respect to x, head and weights; the values of each token carry no gradient.
    A target outside [0, W) is harmless where its weight is 0 and counts as a logit of 0 elsewhere.
    `chunk_size` is the number of time steps whose logits, [B, chunk_size, W] in float32, are held
    at once; by default as many as stay within a fixed budget. Reverse mode only;
    `backend="reference"` holds all logits and can be differentiated in any way.
    Raises ValueError for arguments that do not fit.
    """
    _check(x, head, targets, weights, softcap, z_loss, chunk_size)
    total, ce_BT, logsumexp_BT, hit_BT = dispatch.call(
        "cross_entropy",
        "linear_cross_entropy",
        BACKENDS,
        backend,
        x,
        head.astype(x.dtype),
        targets,
        weights.astype(jnp.float32),
        softcap=None if softcap is None else float(softcap),
        z_loss=float(z_loss),
        chunk_size=chunk_size,
    )
    token = {"ce": ce_BT, "logsumexp": logsumexp_BT, "hit": hit_BT}
    return total, jax.lax.stop_gradient(token)


def _check(x, head, targets, weights, softcap, z_loss, chunk_size) -> None:
    if x.ndim != 3 or head.ndim != 2 or x.shape[2] != head.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: x {x.shape} and head {head.shape} do not fit; give x [B,T,D] "
            "and head [D,W]."
        )
    for name, y, kind in (("targets", targets, jnp.integer), ("weights", weights, jnp.floating)):
        if y.shape != x.shape[:2] or not jnp.issubdtype(y.dtype, kind):
            raise ValueError(
                f"linear_cross_entropy: {name} is {y.dtype}{list(y.shape)}; give {kind.__name__} "
                f"numbers of shape {list(x.shape[:2])}."
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_cross_entropy: softcap is {softcap}; give a number > 0, or None for none."
        )
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}; give a number >= 0.")
    if chunk_size is not None and (int(chunk_size) != chunk_size or chunk_size < 1):
        raise ValueError(
            f"linear_cross_entropy: chunk_size is {chunk_size}; give a whole number of tokens >= 1."
        )
