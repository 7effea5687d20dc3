"""A language model: embedding, blocks, norm, head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effarch.models import head_loss, parameters, stack
from effarch.models.context import Context
from effarch.models.layers import embedding, linear, norm


class LanguageModel(nnx.Module):
    """tokens [B,T] -> stream [B,T,D]; `loss` and `logits` apply the head.

    `layers` maps stack names (`0+4x2`) to stacked blocks, `runs` lists the stacks that are run together.
    """

    def __init__(
        self,
        *,
        embed: embedding.Embedding,
        layers: dict[str, nnx.Module],
        runs: tuple[tuple[str, ...], ...],
        embed_norm: norm.RMSNorm | None,
        final_norm: norm.RMSNorm | None,
        head: linear.Linear | None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        z_loss: float = 0.0,
        unroll: bool = False,
        remat: str = "none",
    ):
        """`head` None ties the head to the embedding table."""
        self.embed, self.layers, self.runs = embed, nnx.Dict(layers), runs
        self.embed_norm, self.final_norm, self.head = embed_norm, final_norm, head
        self.logit_scale, self.logit_softcap, self.z_loss = logit_scale, logit_softcap, z_loss
        self.unroll, self.remat = unroll, remat

    def __call__(self, tokens_BT: Int[Array, "B T"], ctx: Context, cache: dict | None = None):
        """Returns the stream for the head [B,T,D], the cache and aux: {stack: {name: [repeats, ...]}}.

        The stream is normed and multiplied by `logit_scale`.
        """
        x_BTD = self.enter(tokens_BT, ctx)
        new_cache, aux = {}, {}
        for names in self.runs:
            x_BTD, caches, auxes = stack.apply(
                [self.layers[name] for name in names],
                x_BTD,
                ctx,
                None if cache is None else [cache[name] for name in names],
                first_layer=parameters.stack_layers(names[0])[0],
                unroll=self.unroll,
                remat=self.remat,
            )
            new_cache |= dict(zip(names, caches))
            aux |= dict(zip(names, auxes))
        return self.leave(x_BTD), None if cache is None else new_cache, aux

    def enter(self, tokens_BT: Int[Array, "B T"], ctx: Context) -> Float[Array, "B T D"]:
        """The stream before the first layer."""
        x_BTD = ctx.shard(self.embed(tokens_BT, ctx), "batch", "stream", None)
        return x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)

    def leave(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream for the head, from that after the last layer."""
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD if self.logit_scale == 1.0 else self.logit_scale * x_BTD

    def head_matrix(self) -> Float[Array, "D W"]:
        """The output matrix; the transposed table if tied."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Float32 scores of every word. For a loss use `loss`, which never holds them all."""
        head_DW = self.head_matrix().astype(x_BTD.dtype)
        scores = jnp.einsum("btd,dw->btw", x_BTD, head_DW, preferred_element_type=jnp.float32)
        if self.logit_softcap:
            scores = self.logit_softcap * jnp.tanh(scores / self.logit_softcap)
        return scores

    def loss(self, batch: dict[str, Array], ctx: Context):
        """The weighted sum over tokens of cross-entropy (nats) and z-loss, {"ce": [B,T], ...}, aux."""
        ctx = dataclasses.replace(
            ctx, segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        x_BTD, _, aux = self(batch["inputs"], ctx)
        total, token = head_loss.head_loss(
            x_BTD,
            self.head_matrix().astype(x_BTD.dtype),
            batch["targets"],
            batch["loss_weights"],
            ctx.layout,
            softcap=self.logit_softcap,
            z_loss=self.z_loss if ctx.train else 0.0,
        )
        return total, token, aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty decode cache for sequences of up to `length` tokens."""
        caches = {}
        for name, block in self.layers.items():
            shape = (len(parameters.stack_layers(name)),)
            one = block.mixer.init_cache(batch, length)
            caches[name] = jax.tree.map(functools.partial(_stacked, shape), one)
        return caches


def _stacked(shape: tuple[int, ...], x: Array) -> Array:
    return jnp.broadcast_to(x, shape + x.shape)
