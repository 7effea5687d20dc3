"""The TPU kernels of the recurrences pass the TPU's own compiler; no TPU is needed, only its wheel."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import jax, jax.numpy as jnp
from effarch.kernels import gated_delta_rule, linear_attention, platform
from effarch.parallel import topologies

target, op, gate = sys.argv[1:]
mesh = jax.sharding.Mesh(topologies.devices(topologies.parse(target))[:1], ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
B, T, H, K = 1, 1024, 16, 128

def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

x = array(B, T, H, K, dtype=jnp.bfloat16)
g = {"head": array(B, T, H), "channel": array(B, T, H, K)}[gate]
beta, state = array(B, T, H), array(B, H, K, K)
segments = array(B, T, dtype=jnp.int32)

def loss(q, k, v, g, beta, state, segments):
    options = dict(initial_state=state, segment_ids=segments, backend="pallas_tpu")
    if op == "delta_rule":
        o, final = gated_delta_rule(q, k, v, beta, g, **options)
    else:
        o, final = linear_attention(q, k, v, g, **options)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(final)

with platform.tracing_for("tpu"), jax.sharding.set_mesh(mesh):
    step = jax.jit(jax.grad(loss, argnums=tuple(range(6))))
    compiled = step.lower(x, x, x, g, beta, state, segments).compile()
print(compiled.as_text().count("tpu_custom_call"), "kernels", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "gate"),
    [("delta_rule", "head"), ("delta_rule", "channel"), ("linear_attention", "head")],
)
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_forward_and_backward_compile(compile_for, target, op, gate):
    done = compile_for(SCRIPT, target, op, gate)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 2  # a forward and a backward kernel
