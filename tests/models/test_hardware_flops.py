"""What a step computes, against the products in the traced program and XLA's own count of it.

The traced program shows every product once, with the lengths of its loops; XLA counts softmax, decays
and the optimizer besides, and the body of a loop once, so the models that it counts have no loops.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from effarch import config as config_lib
from effarch import config_check
from effarch.aot import plan as plan_lib
from effarch.models import accounting, build, hardware_flops, mixers
from effarch.models.context import Context
from effarch.parallel import mesh as mesh_lib
from effarch.training import setup as setup_lib

WIDTH = 96
HEADS = dict(num_heads=2, head_dim=64)
GROUPED = dict(num_heads=1, num_v_heads=2, head_dim=64)
MIXERS = [  # kind, tokens, options
    ("attention", 192, HEADS),  # a whole block and half of one
    ("attention", 768, dict(HEADS, window=100)),
    ("latent_attention", 256, dict(num_heads=2, latent_dim=64, nope_dim=64, rope_dim=32, v_dim=48)),
    ("spark_attention", 256, HEADS),
    ("delta_net", 160, dict(HEADS, conv_size=0)),  # two chunks and half of one
    ("delta_net", 64, dict(HEADS, conv_size=0, chunk_size=16)),
    ("gated_delta_net", 128, dict(GROUPED, conv_size=0)),
    ("kda", 64, dict(GROUPED, conv_size=0)),
    ("gla", 64, dict(num_heads=2)),
    ("hgrn2", 64, dict(head_dim=32)),
    ("linear_attention", 128, dict(num_heads=2)),
    ("mamba2", 128, dict(head_dim=64, state_dim=32)),
    ("retnet", 128, dict(num_heads=2)),
]


def products(jaxpr) -> float:
    """FLOPs of all matrix products, those in loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, (result,) = equation.invars[0].aval.shape, equation.outvars
            total += 2.0 * result.aval.size * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name != "while"  # of unknown length
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * products(inner)
    return total


def gradient_of(mixer, length: int):
    """The traced gradient of a mixer's parameters and inputs for one row."""
    graphdef, state = nnx.split(mixer)

    def loss(state, x):
        return jnp.sum(nnx.merge(graphdef, state)(x, Context(train=False), None)[0])

    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(state, x)


def of_mixer(mixer, length: int) -> float:
    nodes = [node for _, node in nnx.iter_graph(mixer) if hasattr(node, "forward_flops")]
    return length * sum(sum(hardware_flops.of_module(node, length)) for node in nodes)


def make(kind: str, options: dict):
    return nnx.eval_shape(lambda: mixers.KINDS[kind](WIDTH, **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind, length, options", MIXERS)
def test_the_products_of_a_mixer_and_its_gradient(kind, length, options):
    mixer = make(kind, options)
    traced = products(gradient_of(mixer, length).jaxpr.jaxpr)
    assert of_mixer(mixer, length) == pytest.approx(traced, rel=0.01)
    flops = mixer.hardware_flops(length)
    assert sum(flops) > 3.05 * mixer.forward_flops(length)


def test_xla_counts_a_chunk_of_the_delta_rule():
    """Heads of 128 in one chunk of 64; the rest are masks and substitutions in blocks of 16."""
    mixer = make("delta_net", dict(num_heads=1, head_dim=128, conv_size=0))
    counted = gradient_of(mixer, 64).lower().cost_analysis()["flops"]
    formula = of_mixer(mixer, 64)
    assert formula == pytest.approx(counted, rel=0.06)
    sizes = 128**2, 64 * 128
    by_hand = 6 * sizes[0] + 10 * sizes[1] + 2 / 3 * (64**2 - 16**2)
    assert mixer.hardware_flops(64).forward == pytest.approx(by_hand)
    extra = 64 * (sum(mixer.hardware_flops(64)) - 3 * mixer.forward_flops(64))
    assert extra > 0.2 * formula  # so that leaving it out would show


def test_remat_by_hand():
    """Heads of 64 in one block of 128 tokens: what a layer keeps, it does not do again."""
    c = config_lib.default().model
    c.update(width=128, depth=3, layers="attention/glu")
    c.blocks.attention.num_heads, c.blocks.glu.hidden = 2, 256
    product, wide = 2 * 128 * 128, 2 * 128 * 256
    scores = 2 * 2 * 128 * 64  # q k^T of both heads, for a token
    forward = 4 * product + 3 * wide + 2 * scores
    once = 3 * (4 * product + 3 * wide) + (2 + 5) * scores
    again = {
        "none": 0,
        "selective": 2 * scores,
        "full": forward - wide,  # the last product is only added to the stream
        "names:q,v,ffn_up": forward - 2 * wide - 2 * product,
        "names:product": 2 * scores,
    }
    for c.remat, more in again.items():
        model = build.abstract(c, vocab_size=512)
        counted = accounting.count(model, 128).flops_hardware
        assert counted == 3 * (once + more) + 6 * 128 * 512, c.remat


@functools.cache
def step(remat: str, layers: str = "gated_delta_net/glu + attention/glu"):
    """The plan of a model of two layers and its traced train step; 4 rows of 64 tokens, no loops."""
    c = config_lib.default()
    c.data.seq_len, c.data.batch_size = 64, 4
    c.model.update(width=128, depth=2, layers=layers, scan="never", remat=remat)
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.gated_delta_net.update(GROUPED)
    c = config_check.finish(c, num_devices=1)
    plan = setup_lib.on_mesh(c, mesh_lib.make(mesh_lib.resolve(c.mesh, 1)), vocab_size=256)
    batch = {name: jax.ShapeDtypeStruct((4, 64), dtype) for name, dtype in plan_lib.BATCH.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return plan, plan.train_step().trace(plan.target(), batch, key)


@pytest.mark.slow
@pytest.mark.ci
def test_the_step_with_and_without_remat_by_xla():
    found = {}
    for remat in ("none", "full"):
        plan, traced = step(remat)
        formula = 4 * 64 * plan.counts.flops_hardware
        assert formula == pytest.approx(products(traced.jaxpr.jaxpr), rel=0.01)
        counted = traced.lower().cost_analysis()["flops"]
        assert formula == pytest.approx(counted, rel=0.05)
        found[remat] = formula, counted
    ratios = [again / once for once, again in zip(*found.values())]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)
    assert 1.2 < ratios[0] < 4 / 3  # the head and the last product are not repeated


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "remat",
    ["selective", "dots", "names:product", "names:q,k,v,ffn_gate", "names:mixer_out,ffn_up"],
)
def test_other_policies(remat):
    plan, traced = step(remat)
    formula = 4 * 64 * plan.counts.flops_hardware
    assert formula == pytest.approx(products(traced.jaxpr.jaxpr), rel=0.01)
