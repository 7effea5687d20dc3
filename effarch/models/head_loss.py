"""The loss of the output head on a mesh: every device takes its share of tokens and all of the words.

The head is gathered once and its gradient summed once a step, not once for every chunk of logits; the
stream is read where it lies.
"""

import itertools

import jax
from jaxtyping import Array, Float, Int

from effarch.kernels.cross_entropy import api as cross_entropy
from effarch.parallel import sharding

TOKENS = ("batch", "stream")


def head_loss(
    x: Float[Array, "B T D"],
    head: Float[Array, "D W"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    layout: sharding.Layout | None,
    **options,
):
    """`kernels.linear_cross_entropy` of the whole batch, wherever its tokens lie."""
    if layout is None or layout.mesh.size == 1:
        return cross_entropy.linear_cross_entropy(x, head, targets, weights, **options)
    axes = tuple(itertools.chain.from_iterable(layout.mesh_axes(TOKENS)))

    def on_pieces(*pieces):
        total, token = cross_entropy.linear_cross_entropy(*pieces, **options)
        return jax.lax.psum(total, axes), token

    tokens, whole = layout.spec(TOKENS), jax.sharding.PartitionSpec()
    inputs, outputs = (tokens, whole, tokens, tokens), (whole, tokens)
    return jax.shard_map(on_pieces, mesh=layout.mesh, in_specs=inputs, out_specs=outputs)(
        x, head, targets, weights
    )
