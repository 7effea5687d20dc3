"""Running equal periods of blocks: their parameters stacked, the periods scanned or unrolled.

Both ways give the same bits and use the same parameter arrays (leading `layers` axis).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from effarch.models import remat as remat_lib
from effarch.models.context import Context
from effarch.models.layers import guide, quantizer


def stacked(make: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array) -> nnx.Module:
    """Independent copies of a module in one, a copy a key, arrays with a leading `layers` axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    for variable in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        variable.set_metadata("logical", ("layers", *variable.get_metadata("logical")))
    return nnx.merge(graphdef, state)


def apply(
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    ctx: Context,
    caches: Sequence[dict] | None,
    *,
    first_layer: int,
    unroll: bool,
    remat: str,
) -> tuple[jax.Array, list, list[dict]]:
    """Runs one run of periods; `blocks` holds the stacked block of each position.

    Returns x, the caches and the aux of each position, stacked along the repeats.
    """
    split = [nnx.split(block) for block in blocks]
    graphdefs = [graphdef for graphdef, _ in split]
    states = [nnx.to_pure_dict(state) for _, state in split]
    repeats = jax.tree.leaves(states)[0].shape[0]

    def period(x, layer):
        states, caches, index = layer
        new_caches, auxes = [], []
        for position, (graphdef, state) in enumerate(zip(graphdefs, states)):
            number = first_layer + index * len(graphdefs) + position
            cache = None if caches is None else caches[position]
            block, own_ctx = nnx.merge(graphdef, state), _for_layer(ctx, number)
            quantizer.prepare(block, own_ctx)
            guide.prepare(block, own_ctx)
            x, cache, aux = block(x, own_ctx, cache)
            new_caches.append(cache)
            auxes.append(aux)
        return x, (new_caches, auxes)

    policy = remat_lib.policy(remat) if caches is None else None
    if policy is not None:
        period = jax.checkpoint(period, policy=policy, prevent_cse=unroll)
    layers = (states, caches, jnp.arange(repeats))
    x, (new_caches, auxes) = jax.lax.scan(period, x, layers, unroll=repeats if unroll else 1)
    return x, new_caches, auxes


def _for_layer(ctx: Context, number) -> Context:
    """The context with a random key of this layer's own."""
    if ctx.key is None:
        return ctx
    return dataclasses.replace(ctx, key=jax.random.fold_in(ctx.key, number))
