"""One token on a TPU and on a GPU, by the interpreter, against the recurrence in NumPy."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, gated_delta_rule_step, linear_attention_step
from effarch.kernels.delta_rule import pallas_gpu as delta_gpu
from effarch.kernels.delta_rule import pallas_tpu as delta_tpu
from effarch.kernels.linear_attention import pallas_gpu as linear_gpu
from effarch.kernels.linear_attention import pallas_tpu as linear_tpu

ROOT = pathlib.Path(__file__).resolve().parents[2]
B, H, HV, K, V = 2, 2, 6, 16, 64
SCALE = 0.3


def make_inputs():
    """state, q, k, v, beta, and g per channel."""
    rng = np.random.default_rng(0)
    shapes = ((B, HV, K, V), (B, H, K), (B, H, K), (B, HV, V), (B, HV), (B, HV, K))
    state, q, k, v, beta, g = (rng.standard_normal(x).astype(np.float32) for x in shapes)
    return state, q, k, v, beta, -np.exp(g)


def by_heads(state, q, k, v, beta, g):
    """One head at a time, float64; beta None: linear attention."""
    state, after, o = np.float64(state), np.zeros(state.shape), np.zeros(v.shape)
    for b, h in np.ndindex(B, HV):
        key, query = (np.float64(x[b, h // (HV // H)]) for x in (k, q))
        s = state[b, h] if g is None else np.exp(np.float64(g[b, h])).reshape(-1, 1) * state[b, h]
        written = v[b, h] if beta is None else beta[b, h] * (v[b, h] - s.T @ key)
        after[b, h] = s + np.outer(key, written)
        o[b, h] = SCALE * after[b, h].T @ query
    return o, after


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_every_rule_and_gate_equals_the_recurrence(kind):
    state, q, k, v, beta, channels = make_inputs()
    delta = {"tpu": delta_tpu, "gpu": delta_gpu}[kind].gated_delta_rule_step
    linear = {"tpu": linear_tpu, "gpu": linear_gpu}[kind].linear_attention_step
    gates = (None, channels[..., 0], channels)

    @jax.jit
    def run(state, q, k, v, beta):
        options = dict(scale=SCALE, interpret=True)
        deltas = [delta(state, q, k, v, beta, g, **options) for g in gates]
        return deltas, [linear(state, q, k, v, g, **options) for g in gates]

    found = run(state, q, k, v, beta)
    for results, strength in zip(found, (beta, None)):
        for g, actual in zip(gates, results):
            for x, y in zip(actual, by_heads(state, q, k, v, strength, g)):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_treat_is_refused():
    state, q, k, v, beta, _ = make_inputs()
    refused = functools.partial(pytest.raises, dispatch.Unsupported)
    for backend, name in (("pallas_tpu", "TPUs"), ("pallas_gpu", "GPUs")):
        with refused(match=f"runs on {name}, and this program is for cpu"):
            gated_delta_rule_step(state, q, k, v, beta, backend=backend)
        with refused(match=f"runs on {name}, and this program is for cpu"):
            linear_attention_step(state, q, k, v, backend=backend)
    step = functools.partial(delta_tpu.gated_delta_rule_step, g=None, scale=1.0, interpret=True)
    with refused(match="the state is bfloat16"):
        step(jnp.asarray(state, jnp.bfloat16), q, k, v, beta)
    with refused(match="a state of 15 x 64"):
        step(state[:, :, :15], q[..., :15], k[..., :15], v, beta)
    with pytest.raises(ValueError, match="'reference' does not exist"):
        gated_delta_rule_step(state, q, k, v, beta, backend="reference")


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from effarch.kernels import gated_delta_rule_step, linear_attention_step, platform
from effarch.parallel import topologies

target = topologies.parse(sys.argv[1])
mesh = jax.sharding.Mesh(topologies.devices(target)[:1], ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
B, H, K = 8, 16, 128

def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def token(state, q, k, v, beta, g):
    backend = "pallas_" + target.device.platform
    o, state = gated_delta_rule_step(state, q, k, v, beta, g, backend=backend)
    out, state = linear_attention_step(state, q, k, o, g[..., 0], backend=backend)
    return out, state

with platform.tracing_for(target.device.platform), jax.sharding.set_mesh(mesh):
    x = array(B, H, K, dtype=jnp.bfloat16)
    arguments = array(B, H, K, K), x, x, x, array(B, H), array(B, H, K)
    compiled = jax.jit(token, donate_argnums=0).lower(*arguments).compile()
memory = compiled.memory_analysis()
copies = [line for line in compiled.as_text().splitlines() if f"f32[{B},{H},{K},{K}]" in line]
copies = [line for line in copies if " copy(" in line]
print(compiled.as_text().count("custom_call_target="), len(copies), memory.temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v6e:2x2", "h100"])
def test_the_state_is_written_in_place(compile_for, target):
    """Two steps compile for the chip, no copy of a state among them."""
    done = compile_for(SCRIPT, target)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, copies, temporary_bytes = map(int, done.stdout.split())
    assert kernels >= 2 and copies == 0
    assert temporary_bytes < 2**20  # one state has 8 MB
