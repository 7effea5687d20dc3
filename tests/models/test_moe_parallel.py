"""Experts spread over devices give what one device gives: outputs, drops and gradients."""

import os
import subprocess
import sys
import textwrap

import pytest

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

CASES = {
    "standard": "compare(Moe, dict(top_k=3), {'expert': 4}, {'data': 2, 'expert': 2, 'tensor': 2})",
    "standard fsdp": "compare(Moe, dict(top_k=3), {'fsdp': 2, 'context': 2, 'expert': 2})",
    "mole": "compare(Mole, dict(top_k=3, group_size=2, factor='all'), {'expert': 4, 'tensor': 2})",
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.ci if case == "mole" else ()) for case in CASES]
)
def test_many_devices_equal_one(case):
    run_on_eight_devices(CASES[case])
