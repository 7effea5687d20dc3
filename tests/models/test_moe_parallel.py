"""Experts spread over devices give what one device gives: outputs, drops and gradients."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from flax import nnx

from effarch.models.ffns import moe, mole
from effarch.models.ffns.experts import ragged, traffic

SCRIPT = """
import jax
import numpy as np
from flax import nnx

from effarch.models.context import Context
from effarch.models.ffns.latent_moe import LatentMoe
from effarch.models.ffns.moe import Moe
from effarch.models.ffns.mole import Mole
from effarch.parallel import mesh, sharding

B, T, D = 8, 12, 8
rng = np.random.default_rng(0)
x = rng.standard_normal((B, T, D)).astype(np.float32)
g = rng.standard_normal((B, T, D)).astype(np.float32)
segments = np.ones((B, T), np.int32)
segments[3, 7:] = 0


def results(kind, options, axes):
    layout = None
    if axes:
        shape = dict.fromkeys(mesh.AXES, 1) | axes
        size = int(np.prod(list(shape.values())))
        layout = sharding.Layout(mesh.make(shape, jax.devices()[:size]))
    make = lambda: kind(D, num_experts=8, hidden=6, rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(nnx.eval_shape(make))
    random = np.random.default_rng(1)
    arrays = {True: {}, False: {}}
    params = jax.tree.map(
        lambda s: random.standard_normal(s.shape).astype(np.float32),
        nnx.to_pure_dict(nnx.filter_state(state, nnx.Param)),
    )
    rest = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype),
        nnx.to_pure_dict(nnx.filter_state(state, nnx.Not(nnx.Param))),
    )

    @jax.jit
    def run(x, params):
        def loss(x, params):
            y, aux = nnx.merge(graphdef, params, rest)(
                x, Context(segment_ids=segments, layout=layout)
            )
            return (y * g).sum() + aux["loss/router_balance"], (y, aux)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)

    return run(x, params)


def compare(kind, options, *meshes):
    want = results(kind, options, None)
    for axes in meshes:
        got = results(kind, options, axes)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
            error = np.abs(np.asarray(a) - b).max() / (np.abs(b).max() + 1e-6)
            assert error < 2e-5, (kind, axes, path, error)
"""

EMULATED = """
import jax.numpy as jnp
from effarch.models.ffns.experts import ragged


def emulated(operand, output, first, sizes, lands, arrives, *, axis_name):
    # As jax.lax.ragged_all_to_all is documented, a sender at a time: CPUs have no such collective.
    own = jax.lax.axis_index(axis_name)
    every = [jax.lax.all_gather(a, axis_name) for a in (operand, first, sizes, lands)]
    index = jnp.arange(output.shape[0])
    for x, begin, size, land in zip(*every):
        inside = (index >= land[own]) & (index < land[own] + size[own])
        taken = x[jnp.clip(index - land[own] + begin[own], 0, x.shape[0] - 1)]
        output = jnp.where(inside.reshape(-1, *(1,) * (x.ndim - 1)), taken, output)
    return output


ragged._exchange = emulated
"""
COUNT = """
from effarch.aot import collectives, hlo
from effarch.models.ffns.experts import traffic
from effarch.parallel import topologies

D, E, K, S, L = 16, 8, 2, 4, 4
KINDS = ("all-to-all", "all-gather", "reduce-scatter")
target = topologies.Target(topologies.DEVICES["v5p"], (1, 1, S))
layout = sharding.Layout(
    mesh.make(dict.fromkeys(mesh.AXES, 1) | {"expert": S}, jax.devices()[:S])
)


def count(kind, way="all_to_all", capacity=None, **options):
    options |= dict(exchange=way, capacity_factor=capacity, balance_coef=0.0)
    make = lambda: kind(D, num_experts=E, hidden=L, top_k=K, rngs=nnx.Rngs(0), **options)
    model = nnx.eval_shape(make)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda x, state: nnx.merge(graphdef, state)(x, Context(layout=layout))[0])
    whole, rows = layout.sharding(()), layout.sharding(("batch", "time", None))
    state = jax.tree.map(
        lambda a: jax.device_put(np.zeros(a.shape, a.dtype), whole), nnx.to_pure_dict(state)
    )
    x = jax.device_put(np.zeros((B, T, D), np.float32), rows)
    program = hlo.parse(run.lower(x, state).compile().as_text())
    measured = dict.fromkeys(KINDS, 0)
    for one in collectives.read(program, target):
        if one.kind in KINDS:
            measured[one.kind] += one.executions * one.num_bytes
    tokens = B * T // S
    wanted = traffic.bytes_arriving(
        model.experts.row_widths, way=way, num_tokens=tokens, top_k=K, num_experts=E, num_shards=S,
        capacity_factor=capacity, itemsize=4,
    )
    if way == "ring":
        # XLA gathers the router's logits for top-k on CPUs, whatever the way.
        measured["all-gather"] -= (S - 1) * tokens * E * 4
        assert sum(measured.values()) == wanted and not measured["all-to-all"], (measured, wanted)
    else:
        assert measured["all-to-all"] == wanted, (kind, options, measured, wanted)
    return wanted - (S - 1) * 4 * tokens * K  # without the experts' numbers


standard = count(Moe)
shares = {
    (2 * L + D) / (2 * D): count(Mole, group_size=2, latent=L),
    (L + D) / (2 * D): count(Mole, group_size=2, latent=L, tie_in=True),
    3 * L / (2 * D): count(Mole, group_size=2, latent=L, factor="all"),
    L / D: count(Mole, group_size=2, latent=L, factor="all", tie_in=True),
}
for share, measured in shares.items():
    assert measured == share * standard, (share, measured, standard)
assert count(LatentMoe, latent=L) == L / D * standard
count(Moe, way="ring")
count(Moe, capacity=0.7)
"""
PLACES = "{'expert': 4}, {'expert': 8}, {'data': 2, 'expert': 2, 'tensor': 2}"
CASES = {
    "standard": "compare(Moe, dict(top_k=3), {'expert': 4}, {'data': 2, 'expert': 2, 'tensor': 2})",
    "standard fsdp": "compare(Moe, dict(top_k=3), {'fsdp': 2, 'context': 2, 'expert': 2})",
    "mole": "compare(Mole, dict(top_k=3, group_size=2, factor='all'), {'expert': 4, 'tensor': 2})",
    "ring": f"compare(Moe, dict(top_k=3, exchange='ring'), {PLACES})",
    "ragged": f"{EMULATED}\ncompare(Moe, dict(top_k=3, exchange='ragged'), {PLACES})",
    "ragged mole": EMULATED
    + "compare(Mole, dict(top_k=3, group_size=2, factor='all', exchange='ragged'), {'expert': 4})",
    "latent": "compare(LatentMoe, dict(top_k=3, latent=4, num_shared=1), {'data': 2, 'expert': 4})",
}


def run_on_eight_devices(code: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


IN_CI = ("mole",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.ci if case in IN_CI else ()) for case in CASES]
)
def test_many_devices_equal_one(case):
    run_on_eight_devices(CASES[case])


@pytest.mark.slow
def test_the_bytes_that_travel_are_those_counted():
    """Compiled collectives of four devices against `traffic`, and kinds of experts against 11.5."""
    run_on_eight_devices(COUNT)


COMPILE = """
from effarch.kernels import platform
from effarch.parallel import topologies

target = topologies.parse(sys.argv[1])
shape = dict.fromkeys(mesh.AXES, 1) | {"expert": 4}
layout = sharding.Layout(mesh.make(shape, topologies.devices(target)[:4]))
options = dict(num_experts=8, top_k=2, hidden=256, exchange="ragged")
graphdef, params, rest = nnx.split(
    nnx.eval_shape(lambda: Moe(256, **options, rngs=nnx.Rngs(0))), nnx.Param, ...
)


def array(leaf, logical=()):
    place = layout.sharding(logical)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def loss(params, rest, x):
    return (nnx.merge(graphdef, params, rest)(x, Context(layout=layout))[0] ** 2).sum()


params, rest = (jax.tree.map(array, nnx.to_pure_dict(tree)) for tree in (params, rest))
x = array(jax.ShapeDtypeStruct((8, 512, 256), np.float32), ("batch", "time", None))
with platform.tracing_for(target.device.platform):
    text = jax.jit(jax.grad(loss)).lower(params, rest, x).compile().as_text()
assert text.count("ragged-all-to-all") >= 4, text.count("ragged-all-to-all")
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5p:2x2x1", "h100:1x1x4"])
def test_ragged_exchange_compiles_where_it_runs(compile_for, target):
    done = compile_for("import sys\n" + SCRIPT + COMPILE, target)
    assert done.returncode == 0, done.stderr[-3000:]


def test_where_ragged_rows_land():
    """Slices copied as jax.lax.ragged_all_to_all documents meet end to end, by sender; and return."""
    rng = np.random.default_rng(0)
    S = 4
    sizes = rng.integers(0, 5, (S, S))
    sent = [[[(s, t, n) for n in range(sizes[s, t])] for t in range(S)] for s in range(S)]
    here = [[row for slice in sent[s] for row in slice] for s in range(S)]
    ways = [[[x.tolist() for x in way] for way in ragged.slices(sizes, s)] for s in range(S)]

    def travel(rows, way):
        arrived = [{} for _ in range(S)]
        for s in range(S):
            first, size, lands, _ = ways[s][way]
            for t in range(S):
                for n in range(size[t]):
                    assert lands[t] + n not in arrived[t]
                    arrived[t][int(lands[t]) + n] = rows[s][first[t] + n]
        for t in range(S):
            assert sum(ways[t][way][3]) == len(arrived[t])
        return [[rows[place] for place in range(len(rows))] for rows in arrived]

    there = travel(here, 0)
    assert there == [[row for s in range(S) for row in sent[s][t]] for t in range(S)]
    assert travel(there, 1) == here


def test_what_each_way_moves():
    """2 choices of 8 experts on 4 devices, rows of 16 numbers there and back, 24 tokens."""
    sizes = dict(num_tokens=24, top_k=2, num_experts=8, num_shards=4, itemsize=2)
    assert traffic.bytes_arriving((16, 16), way="all_to_all", **sizes) == 3 * 48 * (64 + 4)
    assert traffic.bytes_arriving((16, 16), way="ring", **sizes) == 3 * 24 * (64 + 16)
    assert traffic.bytes_arriving((16, 16), way="ragged", **sizes) == 3 * (12 * (64 + 4) + 16)


def test_ways_that_cannot_be():
    with pytest.raises(ValueError, match=r"moe.exchange='rng' is not known.*'ring'"):
        nnx.eval_shape(lambda: moe.Moe(8, exchange="rng", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"mole\.exchange='ring' would send"):
        nnx.eval_shape(lambda: mole.Mole(16, hidden=4, exchange="ring", rngs=nnx.Rngs(0)))
