"""Attention's TPU and GPU kernels, run by the interpreter, against the definition in float64."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from effarch.kernels import dispatch, platform
from effarch.kernels.attention import api, pallas_gpu, pallas_tpu
from effarch.kernels.delta_rule import api as delta_rule

ROOT = pathlib.Path(__file__).resolve().parents[2]
B, T, H, G, K = 2, 150, 4, 2, 16
OPTIONS = dict(
    causal=True, window=None, softcap=None, q_positions=None, kv_positions=None, scale=0.3
)
NAMES = ("o", "q", "k", "v")

# Padding in front, between and behind; a document of one token; a document over two blocks.
SEGMENTS = np.array(
    [[0] * 3 + [7] * 90 + [2] + [0] * 6 + [7] * 40 + [0] * 10, [1] * 110 + [3] * 40], np.int32
)


def inputs(length=T, kv_length=T):
    rng = np.random.default_rng(0)
    shapes = ((length, H), (kv_length, G), (kv_length, G))
    return [rng.standard_normal((B, *shape, K)).astype(np.float32) for shape in shapes]


def values_and_gradients(rule, q, k, v):
    o, pull = jax.vjp(rule, q, k, v)
    wave = np.cos(1.7 * np.arange(o.size) ** 1.1).reshape(o.shape).astype(np.float32)
    return dict(zip(NAMES, (o, *pull(wave.astype(o.dtype)))))


def run(backend, arrays, segments=None, kv_segments=None, **options):
    kv_segments = segments if kv_segments is None else kv_segments
    rows = dict(segment_ids=segments, kv_segment_ids=kv_segments)
    rule = functools.partial(backend.attention, interpret=True, **rows, **OPTIONS | options)
    return jax.jit(functools.partial(values_and_gradients, rule))(*arrays)


def judge(arrays, segments=None, kv_segments=None, **options):
    rows = dict(segment_ids=segments, kv_segment_ids=kv_segments, **OPTIONS | options)
    rule = functools.partial(api.attention, backend="reference", **rows)
    with jax.enable_x64(True):
        arrays = [np.float64(x) for x in arrays]
        return jax.jit(functools.partial(values_and_gradients, rule))(*arrays)


def assert_close(actual, expected, bound=1e-5):
    for name in NAMES:
        x, y = (np.asarray(values[name], np.float64) for values in (actual, expected))
        error = np.sqrt(np.mean((x - y) ** 2)) / np.sqrt(np.mean(y**2))
        assert error <= bound, f"{name}: {error:.1e} > {bound}"


def test_splash_packed_rows_with_a_softcap():
    """Documents, padding, grouped heads, a length that is no multiple of a block."""
    arrays = inputs()
    options = dict(segments=SEGMENTS, softcap=1.5)
    actual = run(pallas_tpu, arrays, **options)
    assert_close(actual, judge(arrays, **options))
    assert np.all(np.asarray(actual["o"])[SEGMENTS == 0] == 0)
    assert all(np.all(np.asarray(actual[name])[SEGMENTS == 0] == 0) for name in "qkv")


MASKS = pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((T, T), dict(window=20)),
        ((T, T), dict(causal=False)),
        ((T, T), dict(segments=SEGMENTS, window=130)),
        ((T, 130), dict(causal=False, segments=SEGMENTS, kv_segments=SEGMENTS[:, :130])),
    ],
)


@pytest.mark.slow
@MASKS
def test_splash_masks(lengths, options):
    arrays = inputs(*lengths)
    assert_close(run(pallas_tpu, arrays, **options), judge(arrays, **options))


@pytest.mark.slow
@pytest.mark.ci
def test_gpu_kernels_on_packed_rows_with_a_softcap():
    arrays = inputs()
    options = dict(segments=SEGMENTS, softcap=1.5)
    actual = run(pallas_gpu, arrays, **options)
    assert_close(actual, judge(arrays, **options))
    assert all(np.all(np.asarray(actual[name])[SEGMENTS == 0] == 0) for name in NAMES)
    again = run(pallas_gpu, arrays, **options)
    jax.tree.map(np.testing.assert_array_equal, actual, again)


@pytest.mark.slow
@MASKS
def test_gpu_kernels_masks(lengths, options):
    arrays = inputs(*lengths)
    assert_close(run(pallas_gpu, arrays, **options), judge(arrays, **options))


@pytest.mark.slow
def test_gpu_kernels_inside_a_checked_mesh_with_odd_widths():
    """Rows split by `jax.shard_map`, values wider than keys, neither a power of two."""
    q, k, v = inputs()
    arrays = [q[..., :12], k[..., :12], np.concatenate([v, v[..., :4]], axis=3)]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def rule(q, k, v, segments):
        ids = dict(segment_ids=segments, kv_segment_ids=segments)
        return pallas_gpu.attention(q, k, v, interpret=True, **ids, **OPTIONS)

    sharded = jax.shard_map(rule, mesh=mesh, in_specs=rows, out_specs=rows)
    run_sharded = functools.partial(values_and_gradients, lambda *x: sharded(*x, SEGMENTS))
    assert_close(jax.jit(run_sharded)(*arrays), judge(arrays, segments=SEGMENTS))


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_each_platform_tries_its_own_kernels_first(name):
    with platform.tracing_for(name):
        for backends in (api.BACKENDS, delta_rule.BACKENDS, delta_rule.STEP_BACKENDS):
            assert dispatch.preferred(backends) == (f"pallas_{name}", "xla")


def test_what_the_kernels_do_not_treat_is_refused():
    q, k, v = inputs()
    rows = dict(segment_ids=None, kv_segment_ids=None)
    positions = np.zeros((B, T), np.int32)
    wide = np.tile(v, 10)
    for backend, change, match in [
        (pallas_tpu, {}, "runs on TPUs, and this program is for cpu"),
        (pallas_gpu, {}, "runs on GPUs, and this program is for cpu"),
        (pallas_tpu, dict(interpret=True, q_positions=positions), "positions"),
        (pallas_gpu, dict(interpret=True, v=wide), "heads of 16 and 160 are wider than 128"),
    ]:
        with pytest.raises(dispatch.Unsupported, match=match):
            backend.attention(**dict(q=q, k=k, v=v) | rows | OPTIONS | change)


def test_splash_refuses_a_checked_mesh_in_words():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    rule = functools.partial(
        pallas_tpu.attention, interpret=True, segment_ids=None, kv_segment_ids=None, **OPTIONS
    )
    arrays = inputs()
    sharded = functools.partial(jax.shard_map, rule, mesh=mesh, in_specs=rows, out_specs=rows)
    with pytest.raises(dispatch.Unsupported, match="unless check_vma=False"):
        jax.eval_shape(sharded(), *arrays)
    assert jax.eval_shape(sharded(check_vma=False), *arrays).shape == (B, T, H, K)


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from effarch.kernels import attention, platform
from effarch.parallel import topologies

target, backend, width, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
target = topologies.parse(target)
mesh = jax.sharding.Mesh(topologies.devices(target)[:1], ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
B, T, H, G = 1, 2048, 8, 2

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def loss(q, k, v, segments):
    return jnp.sum(attention(q, k, v, segment_ids=segments, backend=backend, **options)
                   .astype(jnp.float32))

with platform.tracing_for(target.device.platform), jax.sharding.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    keys = array(B, T, G, width)
    compiled = step.lower(array(B, T, H, width), keys, keys,
                          array(B, T, dtype=jnp.int32)).compile().as_text()
print(compiled.count("tpu_custom_call") + compiled.count('"__gpu$xla.gpu.triton"'), "kernels")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "backend", "width", "options"),
    [
        ("v6e:2x2", "pallas_tpu", 128, {}),
        ("v6e:2x2", "pallas_tpu", 64, dict(window=512, softcap=30.0)),
        ("h100", "pallas_gpu", 128, {}),
        ("a100", "pallas_gpu", 64, dict(window=512, softcap=30.0)),
    ],
)
def test_value_and_gradient_compile(compile_for, target, backend, width, options):
    done = compile_for(SCRIPT, target, backend, str(width), str(options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 3  # forward, and backward by keys and by queries
