"""A block: a mixer along time and an ffn along channels, each normed and residual."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import remat
from effarch.models.context import Context
from effarch.models.layers import norm

PLACEMENTS = ("pre", "post", "peri")


class Residual(nnx.Module):
    """The norms around one branch F.

    pre: x + F(N(x)); post: N(x + F(x)); peri: x + N_out(F(N_in(x))) (Peri-LN, arXiv 2502.02732).
    What is added to x is multiplied by `scale`.
    """

    def __init__(
        self,
        width: int,
        *,
        placement: str = "pre",
        scale: float = 1.0,
        eps: float = 1e-6,
        param_dtype=jnp.float32,
    ):
        if placement not in PLACEMENTS:
            raise ValueError(
                f"model.norm.placement={placement!r} is not known; use {', '.join(PLACEMENTS)}."
            )
        self.placement, self.scale = placement, scale
        if placement in ("pre", "peri"):
            self.norm_in = norm.RMSNorm(width, eps=eps, param_dtype=param_dtype)
        if placement in ("post", "peri"):
            self.norm_out = norm.RMSNorm(width, eps=eps, param_dtype=param_dtype)

    def enter(self, x_BTD: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        """What the branch reads."""
        x_BTD = x_BTD if self.placement == "post" else self.norm_in(x_BTD)
        return ctx.shard(x_BTD, "batch", "time", None)

    def leave(self, x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"], ctx: Context):
        """The stream after the branch gave y."""
        y_BTD = ctx.shard(y_BTD, "batch", "stream", None)
        if self.placement == "peri":
            y_BTD = self.norm_out(y_BTD)
        x_BTD = x_BTD + (y_BTD if self.scale == 1.0 else self.scale * y_BTD)
        return self.norm_out(x_BTD) if self.placement == "post" else x_BTD


class Block(nnx.Module):
    """(x, ctx, cache) -> (x, cache, aux); `ffn` may be None."""

    def __init__(
        self,
        width: int,
        *,
        mixer,
        ffn,
        norm_placement: str,
        norm_eps: float,
        param_dtype,
        residual_scale: float = 1.0,
    ):
        options = dict(placement=norm_placement, scale=residual_scale, eps=norm_eps)
        options |= dict(param_dtype=param_dtype)
        self.mixer = mixer
        self.mixer_residual = Residual(width, **options)
        self.ffn = ffn
        if ffn is not None:
            self.ffn_residual = Residual(width, **options)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache=None):
        """Returns the stream, the mixer's cache and the aux of mixer and ffn together."""
        z_BTD = remat.tag(self.mixer_residual.enter(x_BTD, ctx), "mixer_in")
        y, cache, aux = self.mixer(z_BTD, ctx, cache)
        x_BTD = self.mixer_residual.leave(x_BTD, remat.tag(y, "mixer_out"), ctx)
        if self.ffn is not None:
            z_BTD = remat.tag(self.ffn_residual.enter(x_BTD, ctx), "ffn_in")
            y, ffn_aux = self.ffn(z_BTD, ctx)
            x_BTD = self.ffn_residual.leave(x_BTD, remat.tag(y, "ffn_out"), ctx)
            aux = aux | ffn_aux
        return x_BTD, cache, aux
