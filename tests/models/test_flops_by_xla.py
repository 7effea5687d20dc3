"""Mixers beside their matrices, and experts, against XLA's own count of an unfused program.

`tests/test_compile.py` compares whole models, where matrices are nearly all. Here widths are small
and heads wide: recurrences and scores are 30 to 60 % of the count, so that a wrong one shows.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from effarch.models import ffns, mixers
from effarch.models.context import Context

WIDTH, LENGTH = 96, 128
HEADS = dict(num_heads=2, head_dim=128)
RECURRENT = {
    "delta_net": HEADS,
    "gated_delta_net": HEADS,
    "gla": dict(num_heads=2, expand_k=4.0, expand_v=4.0),
    "hgrn2": dict(head_dim=WIDTH),
    "kda": HEADS,
    "linear_attention": dict(num_heads=2, expand_k=4.0, expand_v=4.0),
    "mamba2": dict(head_dim=64, state_dim=256),
    "retnet": dict(num_heads=2, expand_k=4.0, expand_v=4.0),
}
"""All with a matrix for a state; that of HGRN is a vector, whose work is below 1 % at any size."""
SOFTMAX = {  # options, and what XLA may count beside the products
    "attention": (HEADS, 0.02),
    "latent_attention": (
        dict(num_heads=2, latent_dim=64, nope_dim=64, rope_dim=64, v_dim=128),
        0.02,
    ),
    "spark_attention": (HEADS, 0.05),  # thresholds and gates, a few FLOPs a score
}


def make(kind: str, options: dict):
    return nnx.eval_shape(lambda: mixers.KINDS[kind](WIDTH, **options, rngs=nnx.Rngs(0)))


def formula(mixer, length: int) -> float:
    """Forward FLOPs of a token: matrices, convolutions and the mixer's own part."""
    parts = [node for _, node in nnx.iter_graph(mixer) if hasattr(node, "forward_flops")]
    return sum(part.forward_flops(length) for part in parts)


def counted(mixer, length: int, *cache) -> float:
    """XLA's count for one row; lowered only."""
    graphdef, state = nnx.split(mixer)

    def call(state, x, *cache):
        return nnx.merge(graphdef, state)(x, Context(train=False), *cache)[:2]

    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    return jax.jit(call).lower(state, x, *cache).cost_analysis()["flops"]


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_token_of_a_recurrent_mixer(kind):
    """Decoding is the recurrence itself; XLA counts norms and gates besides, below 2 %."""
    mixer = make(kind, RECURRENT[kind])
    cache = jax.eval_shape(lambda: mixer.init_cache(1, 8))
    assert 0.3 * formula(mixer, 1) < mixer.forward_flops(1)
    assert counted(mixer, 1, cache) == pytest.approx(formula(mixer, 1), rel=0.02)


@pytest.mark.parametrize("kind", SOFTMAX)
def test_a_row_of_softmax_attention(kind):
    """XLA counts every score of the square, the formula its causal half."""
    options, rest = SOFTMAX[kind]
    mixer = make(kind, options)
    masked = LENGTH * mixer.forward_flops(LENGTH)
    whole = LENGTH * formula(mixer, LENGTH) + masked
    assert 0.3 * whole < 2 * masked
    assert counted(mixer, LENGTH) == pytest.approx(whole, rel=rest)


EXPERTS, GROUP, TOP_K, WIDE = 8, 4, 2, 512
LATENT = WIDE // 4
PRODUCTS = {  # FLOPs of a token in its experts, and of those in what experts of a group share
    "moe": (6 * WIDE * WIDE * TOP_K, 0),
    "mole": ((4 * LATENT * WIDE + 2 * WIDE * WIDE) * TOP_K, 4 * WIDE * LATENT * 2),
    "latent_moe": (6 * LATENT * WIDE * TOP_K, 0),
}


def counted_with_gradients(ffn, batch: int, length: int) -> float:
    """XLA's count for an ffn's output and the gradients of its parameters and inputs."""
    graphdef, params, rest = nnx.split(ffn, nnx.Param, ...)

    def loss(params, x, rest):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x, Context(train=False))[0])

    x = jax.ShapeDtypeStruct((batch, length, WIDE), jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return both.lower(params, x, rest).cost_analysis()["flops"]


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_token_of_a_mixture_of_experts(kind):
    """The reference multiplies each row by all matrices, those of E experts or of the groups.

    XLA counts a loop over rows once, so the other backends cannot be compared.
    """
    options = dict(num_experts=EXPERTS, top_k=TOP_K, num_shared=1, backend="reference")
    options |= dict(group_size=GROUP, latent=LATENT) if kind == "mole" else {}
    ffn = nnx.eval_shape(
        lambda: ffns.KINDS[kind](WIDE, **options, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    of_experts, of_groups = PRODUCTS[kind]
    more = (EXPERTS - 1) * of_experts + (EXPERTS // GROUP - 1) * of_groups
    want = 3 * 4 * 128 * (formula(ffn, 128) + more)
    assert counted_with_gradients(ffn, 4, 128) == pytest.approx(want, rel=0.02)
