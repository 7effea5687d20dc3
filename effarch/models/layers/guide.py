"""Self-guided training: a dense matrix beside the factors, faded out, arXiv 2406.16450, section 4.

    y = alpha x W + (1 - alpha) S(x),   alpha = (1 + cos(pi t / guided_steps)) / 2 until t = guided_steps

W starts as the product of the factors, so that nothing changes at first (the authors' code leaves the
shuffles of block_shuffle out there; ours does not). With `reduce_flops` a layer uses S(x) alone in a
share 1 - alpha of its steps, drawn at random. From `guided_steps` on W costs no time; it stays in the
parameters until `detach`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import linear
from effarch.models.state import ModelState
from effarch.quantization import matmul

_KEY = 1 << 21  # folded into the layer's key, away from the numbers that layers use themselves


class Guide(nnx.Module):
    """W and how far it is faded out.  I*O parameters, 2*I*O FLOPs per token of guided steps."""

    chance = None
    """A random number from 0 to 1 of this layer and step; handed out by `prepare`."""

    def __init__(self, layer: linear.Linear, kernel, *, steps: int, reduce_flops: bool):
        """`kernel`: W at first."""
        self.kernel = nnx.Param(kernel, logical=layer.axes, units=layer.units)
        self.progress = ModelState(jnp.zeros((), jnp.int32), logical=())
        self.steps, self.reduce_flops, self.dtype = steps, reduce_flops, layer.dtype

    def share(self) -> Float[Array, ""]:
        """alpha."""
        part = jnp.minimum(self.progress[...] / self.steps, 1.0)
        return 0.5 * (1 + jnp.cos(jnp.pi * part))

    def matrix(self, factored: Float[Array, "I O"]) -> Float[Array, "I O"]:
        """What x is multiplied by, given what the factors multiply it by."""
        alpha = self.share()
        return alpha * self.kernel[...] + (1 - alpha) * factored

    def __call__(self, x: Float[Array, "... I"], structure) -> Float[Array, "... O"]:
        """`structure`: S, a function of x."""
        alpha, kernel = self.share(), self.kernel[...]
        in_use = self.progress[...] < self.steps
        if self.chance is not None:
            in_use &= self.chance < alpha

        def guided(x):
            y = matmul.matmul(x, kernel, dtype=self.dtype)
            return (alpha * y + (1 - alpha) * structure(x)).astype(self.dtype)

        return jax.lax.cond(in_use, guided, structure, x)

    def next_state(self, state: dict, aux: dict, probes: dict) -> dict:
        """progress [layers]: steps done."""
        return {"progress": state["progress"] + 1}


def prepare(block: nnx.Module, ctx: Context) -> None:
    """Hands the guides of a block that save FLOPs a random number each."""
    guides = [node for _, node in nnx.iter_graph(block) if isinstance(node, Guide)]
    drawing = [guide for guide in guides if guide.reduce_flops]
    if drawing and ctx.train and ctx.key is not None:
        key = jax.random.fold_in(ctx.key, _KEY)
        for guide, chance in zip(drawing, jax.random.uniform(key, (len(drawing),))):
            guide.chance = chance


def detach(model: nnx.Module) -> None:
    """Takes the guides of a model away; after `guided_steps` steps this changes no output."""
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, linear.Linear) and node.guide is not None:
            del node.guide
