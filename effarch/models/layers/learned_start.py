"""The state that a recurrent mixer has before the first token of a document, zeros or learned.

State tuning (RWKV-7, arXiv 2503.14456) trains nothing else: freeze all but `layers/*/mixer/**/start/*`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effarch.kernels.chunked import documents
from effarch.kernels.vector_recurrence import api as vector_recurrence
from effarch.models.context import Context


class Start(nnx.Module):
    """What a state is before the first token: zeros, or learned from zeros (without weight decay)."""

    def __init__(self, shape: tuple[int, ...], *, learned: bool):
        self.shape, self.is_learned = shape, learned
        if learned:
            axes = ("heads", *(None,) * (len(shape) - 1))
            self.value = nnx.Param(jnp.zeros(shape), logical=axes, decay=False)

    def initial_state(self, batch: int, cache: dict | None) -> Float[Array, "B ..."] | None:
        """The state before the first token at hand, None for zeros."""
        if not self.is_learned:
            return None if cache is None else cache["state"]
        start = jnp.broadcast_to(self.value[...], (batch, *self.shape))
        if cache is None:
            return start
        begun = cache["begun"].reshape(batch, *(1,) * len(self.shape))
        return jnp.where(begun, cache["state"], start)

    def init_cache(self, batch: int) -> dict[str, Array]:
        """A state that has seen nothing, and with a learned start whether it has seen something."""
        cache = {"state": jnp.zeros((batch, *self.shape), jnp.float32)}
        return cache | {"begun": jnp.zeros((batch,), bool)} if self.is_learned else cache

    def next_cache(self, state, cache: dict | None) -> dict[str, Array] | None:
        """The cache with the state after the last token at hand."""
        if cache is None:
            return None
        return {"state": state} | (
            {"begun": jnp.ones_like(cache["begun"])} if self.is_learned else {}
        )


class Fade(NamedTuple):
    """How much of the learned start is left, in documents after the first of a row; else 0."""

    tokens: Array  # [B,T,D]
    last: Array  # [B,D]  after the last token


def fade(g_BTD: Float[Array, "B T D"], ctx: Context) -> Fade:
    """c_t from log decays, by the recurrence c_t = exp(g_t) c_(t-1) with c = 1 before a document."""
    opening = jnp.where(later_starts(ctx)[..., None], jnp.exp(g_BTD), 0)
    return Fade(*vector_recurrence.vector_recurrence(opening, g_BTD, segment_ids=ctx.segment_ids))


def later_starts(ctx: Context) -> Bool[Array, "B T"]:
    """The first token of every document but the first of its row."""
    index = documents.document_index(ctx.segment_ids)
    return jnp.pad(index[:, 1:] != index[:, :-1], ((0, 0), (1, 0)))
