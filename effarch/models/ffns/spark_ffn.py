"""Spark Transformer's feed-forward, arXiv 2506.06644: a part of the input predicts which neurons matter.

    y = (gelu(TopK_k(x[:R] W_predictor)) * (x[R:] W_up)) W_down

TopK is the statistical, soft-thresholded one (`kernels.statistical_top_k`) and comes before the gelu.
The predictor is the gate: it costs no parameter beyond those of an ungated layer, so that F is 1.5 times
that of a gated layer of equal parameters. Which R coordinates are the first is of no meaning; the model
learns to place there what predicts.

Legend: R = width of the predictor's input, P = D - R.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.topk import api as topk
from effarch.models import remat
from effarch.models.context import Context
from effarch.models.ffns import active, glu
from effarch.models.layers import linear


class SparkFfn(nnx.Module):
    """2*D*F parameters; 4*D*F FLOPs per token, of which 2*R*F + 2*(2 D - R)*k serve active neurons.

    In training all are computed; in decoding only active neurons are read.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        predictor_width: int | None = None,
        active_fraction: float = 0.08,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """k is `active_fraction` of F, to the nearest whole number. None means: `hidden` (F) 1.5 times
        that of `glu`, for equal parameters; `predictor_width` (R) half the width. Initial weights of
        predictor and up have standard deviation R^-0.5 and P^-0.5: gelu wants scores of order 1."""
        hidden = hidden or glu.default_hidden(width) * 3 // 2
        split = predictor_width or width // 2
        if not 0 < split < width:
            raise ValueError(
                f"spark_ffn.predictor_width={split} must leave a part of model.width={width}; use about "
                "half of it."
            )
        active.check_fraction("spark_ffn", active_fraction)
        self.split, self.num_active = split, max(1, round(active_fraction * hidden))
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        axes = ("embed", "ffn")
        self.predictor = linear.Linear(split, hidden, axes=axes, init_std=split**-0.5, **shared)
        rest = width - split
        self.up = linear.Linear(
            rest, hidden, axes=axes, by_outputs=True, init_std=rest**-0.5, **shared
        )
        self.down = linear.Linear(hidden, width, axes=axes[::-1], init_std=init_std, **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        x_BTD = ctx.shard(x_BTD, "batch", "time", None)  # whole before it is cut
        args = (x_BTD[..., self.split :], self.up, self.down, ctx)
        y_BTD, h_BTF = active.finish(self.gate(x_BTD, ctx), *args)
        return y_BTD, {"metric/active_fraction": active.fraction(h_BTF, ctx)} if ctx.train else {}

    def gate(self, x_BTD: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T F"]:
        """What multiplies each neuron: 0 for those that are not active."""
        s_BTF = self.predictor(x_BTD[..., : self.split])
        s_BTF = remat.tag(s_BTF, "ffn_gate")
        return jax.nn.gelu(self._top_k(s_BTF, ctx), approximate=True)

    def _top_k(self, s_BTF: Float[Array, "B T F"], ctx: Context) -> Float[Array, "B T F"]:
        """Each device has its tokens; where neurons are split, one alone knows no token's threshold."""

        def on_pieces(s_BTF):
            return (topk.statistical_top_k(s_BTF, self.num_active),)

        axes = ("batch", "time", "ffn")
        s_BTF = ctx.shard(s_BTF, *axes)
        if ctx.layout is not None and ctx.layout.parts("ffn") > 1:
            return on_pieces(s_BTF)[0]
        return ctx.local(on_pieces, (s_BTF,), (axes,), (axes,))[0]

    def idle_flops(self, seq_len: int) -> float:
        """Forward FLOPs per token of inactive neurons; the sequence length does not matter."""
        hidden, width = self.down.sizes
        return 2.0 * (2 * width - self.split) * (hidden - self.num_active)
