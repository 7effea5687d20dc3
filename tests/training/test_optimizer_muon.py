"""Muon's own part: the orthogonalisation, its scale, and where it computes."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch.models import parameters
from effarch.training import optimizers
from effarch.training.optimizers import muon


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in [(3, 2, 24, 64), (64, 24), (2, 48, 48)]:
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1e-4
        y = np.asarray(muon.orthogonalize(jnp.asarray(x)))
        singular = np.linalg.svd(y, compute_uv=False)
        # A square random matrix has singular values too near 0 to be lifted in five iterations.
        low = 0.6 if shape[-1] != shape[-2] else 0.0
        assert low < singular.min() and singular.max() < 1.3
        # The singular vectors are those of x: y x^T is symmetric and positive.
        product = y @ np.swapaxes(x, -1, -2) * 1e4
        np.testing.assert_allclose(product, np.swapaxes(product, -1, -2), atol=1e-3)
        assert np.linalg.eigvalsh(product).min() > -1e-3
    assert not np.asarray(muon.orthogonalize(jnp.zeros((4, 6)))).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_singular_values_of_gaussian_matrices(dtype):
    """Four to one: 0.6 to 1.2 in both types; of a square one the largest alone."""
    for shape, low in (((256, 64), 0.6), ((64, 64), 0.0)):
        x = np.random.default_rng(1).normal(size=shape)
        y = muon.orthogonalize(jnp.asarray(x, dtype))
        assert y.dtype == dtype
        singular = np.linalg.svd(np.asarray(y, np.float32), compute_uv=False)
        assert low < singular.min() and singular.max() < 1.2


def test_muon_directions_equal_those_of_optax():
    """Without nesterov (optax corrects its bias) and with in >= out (where versions agree)."""
    dims = optax.contrib.MuonDimensionNumbers()
    theirs = optax.contrib.scale_by_muon(beta=0.95, nesterov=False, weight_dimension_numbers=dims)
    ours = optax.trace(0.95)
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(24, 16)), jnp.float32) for _ in range(3)]
    theirs_state, ours_state = theirs.init(grads[0]), ours.init(grads[0])
    for grad in grads:
        theirs_out, theirs_state = theirs.update(grad, theirs_state)
        trace, ours_state = ours.update(grad, ours_state)
        np.testing.assert_allclose(muon.orthogonalize(trace), theirs_out, atol=1e-5)


def test_muon_updates_have_the_rms_of_adam():
    shape = (64, 8, 24)  # more experts than rows: their number must not enter the scale
    info = parameters.ParamInfo("w", ("w",), ("experts", "embed", "ffn"), shape, True)
    optimizer = optimizers.build("muon", schedule=1.0, clip_norm=0, infos={"w": info})
    params = {"w": jnp.zeros(shape)}
    grads = {"w": jax.random.normal(jax.random.key(0), shape)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert float(jnp.sqrt(jnp.mean(updates["w"] ** 2))) == pytest.approx(0.2, rel=0.2)


def test_muon_keeps_experts_where_they_are():
    """Sharded over eight devices, the compiled update moves no expert's matrix."""
    script = """
import re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from effarch.models.parameters import ParamInfo
from effarch.training import optimizers
axes, shape = ("layers", "experts", "embed", "ffn"), (3, 8, 16, 24)
info = ParamInfo("layers/0+1x3/up", tuple(f"layers/{i}/up" for i in range(3)), axes, shape, True)
tx = optimizers.build("muon", schedule=1e-2, clip_norm=0.0,
                      infos={"layers": {"0+1x3": {"up": info}}})
place = NamedSharding(Mesh(np.array(jax.devices()), ("expert",)), P(None, "expert"))
leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
params = {"layers": {"0+1x3": {"up": leaf}}}
here = NamedSharding(place.mesh, P())
state = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place if s.ndim else here),
    jax.eval_shape(tx.init, params))
text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
assert "dot(" in text
found = re.findall(r"(?:all-gather|all-to-all|collective-permute|all-reduce)[-(]", text)
print("collectives", len(found))
"""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "collectives 0", done.stderr
