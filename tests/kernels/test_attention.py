"""Softmax attention: every backend and form against a dense float64 computation in NumPy."""

import functools
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels.attention import xla
from effarch.kernels.attention.api import attention

B, T, H, G, K, V = 2, 37, 4, 2, 16, 24  # 37 queries: no multiple of any block below

# Half the compile time, the same sums.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CASES = {
    "grouped": {},
    "one head a key": {"sizes": (T, T, 3, 3)},
    "one key head": {"sizes": (T, T, 3, 1), "scale": 0.4},
    "window 1": {"window": 1},
    "window 20": {"window": 20},
    "window T": {"window": T},
    "window beyond T": {"window": 100},
    "softcap": {"softcap": 1.5},
    "segments": {"segmented": True},
    "segments, window, softcap": {"segmented": True, "window": 7, "softcap": 1.5},
    "more keys than queries": {"causal": False, "sizes": (21, T, H, G)},
    "fewer keys, segments": {"causal": False, "sizes": (T, 20, H, G), "segmented": True},
}


def inputs(sizes=(T, T, H, G), segmented=False, seed=0):
    """q, k, v, the cotangent of o, and segment ids: documents cut anywhere, padding at the end."""
    length, kv_length, heads, kv_heads = sizes
    rng = np.random.default_rng(seed)
    shapes = (
        (B, length, heads, K),
        (B, kv_length, kv_heads, K),
        (B, kv_length, kv_heads, V),
        (B, length, heads, V),
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if not segmented:
        return arrays, None, None
    ids = np.array([[1] * 5 + [2] * 12 + [3] * 18 + [0] * 2, [4] * 16 + [7] * 1 + [5] * 20])
    return arrays, ids[:, :length], ids[:, :kv_length]


def visible(length, kv_length, causal=True, window=None, ids=None, kv_ids=None):
    """The rule of the docstring, one pair after the other."""
    seen = np.zeros((B, length, kv_length), bool)
    for b, i, j in np.ndindex(*seen.shape):
        ok = (not causal or j <= i) and (window is None or i - j < window)
        if ids is not None:
            ok = ok and ids[b, i] == kv_ids[b, j] != 0
        seen[b, i, j] = ok
    return seen


def dense(q, k, v, do, seen, scale=None, softcap=None):
    """o, dq, dk, dv in float64 by the textbook formulas, one head after the other."""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = q.shape[2] // k.shape[2]
    o, dq, dk, dv = np.zeros(do.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // share
        s = scale * q[b, :, h] @ k[b, :, g].T
        slope = np.ones(s.shape)
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
            slope = 1 - (s / softcap) ** 2
        p = np.where(seen[b], np.exp(s - s.max()), 0)
        p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
        o[b, :, h] = p @ v[b, :, g]
        dp = do[b, :, h] @ v[b, :, g].T
        ds = scale * slope * p * (dp - (p * dp).sum(-1, keepdims=True))
        dv[b, :, g] += p.T @ do[b, :, h]
        dq[b, :, h] = ds @ k[b, :, g]
        dk[b, :, g] += ds.T @ q[b, :, h]
    return o, dq, dk, dv


def values_and_gradients(q, k, v, do, function=attention, jit=quick_jit, **options):
    """o, dq, dk, dv of an attention function, jitted."""

    @jit
    def run(q, k, v, do):
        o, pullback = jax.vjp(lambda *qkv: function(*qkv, **options), q, k, v)
        return o, *pullback(do.astype(o.dtype))

    return run(q, k, v, do)


def distance(x, y):
    """RMS of the difference relative to that of y, at least 0.2 (the inputs have 1)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.sqrt(np.mean((x - y) ** 2)) / max(np.sqrt(np.mean(y**2)), 0.2)


def check_case(case, tolerance, dtype=jnp.float32, backend="xla", jit=quick_jit):
    options = dict(CASES[case])
    sizes, segmented = options.pop("sizes", (T, T, H, G)), options.pop("segmented", False)
    arrays, ids, kv_ids = inputs(sizes, segmented)
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    rule = {name: options[name] for name in ("causal", "window") if name in options}
    seen = visible(*sizes[:2], ids=ids, kv_ids=kv_ids, **rule)
    rest = {name: x for name, x in options.items() if name not in rule}
    expected = dense(*(np.asarray(x, np.float32) for x in arrays), seen, **rest)
    if segmented:
        options |= {"segment_ids": jnp.asarray(ids), "kv_segment_ids": jnp.asarray(kv_ids)}
    results = values_and_gradients(*arrays, backend=backend, jit=jit, **options)
    for name, x, y in zip(("o", "dq", "dk", "dv"), results, expected):
        assert x.dtype == dtype and x.shape == y.shape
        assert distance(x, y) < tolerance, f"{name} of {case}"
    empty = ~seen.any(-1)
    assert np.all(np.asarray(results[0], np.float32)[empty] == 0)
    assert np.all(np.asarray(results[1], np.float32)[empty] == 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that 37 steps are three of them; returns what picks the form."""
    monkeypatch.setattr(xla, "block_size", lambda longest: 16)
    return lambda form: monkeypatch.setattr(xla, "_UNROLL", 16 if form == "blocks" else 0)


QUICK = [
    ("blocks", "grouped"),
    ("blocks", "window 20"),
    ("blocks", "segments, window, softcap"),
    ("blocks", "more keys than queries"),
    ("loops", "segments, window, softcap"),
    ("loops", "fewer keys, segments"),
]


@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(form, case, marks=[] if (form, case) in QUICK else pytest.mark.slow)
        for form in ("blocks", "loops")
        for case in CASES
    ],
)
def test_xla_is_dense_attention(form, case, small_blocks):
    small_blocks(form)
    check_case(case, 2e-6)  # float32 sums of up to 37 terms


@pytest.mark.parametrize(
    "case", [pytest.param("one key head", marks=pytest.mark.slow), "segments, window, softcap"]
)
def test_reference_is_dense_attention(case):
    check_case(case, 2e-6, backend="reference")  # float32 sums of up to 37 terms


@pytest.mark.parametrize("form", ["blocks", "loops"])
def test_bfloat16_runs_and_is_near(form, small_blocks):
    """Fully optimized, since XLA:CPU can fail on bfloat16 products when they run."""
    small_blocks(form)
    # p and ds are rounded to 8 bits before their products: 2**-9 each, and the result once more.
    check_case("segments, window, softcap", 8e-3, jnp.bfloat16, jit=jax.jit)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
@pytest.mark.parametrize("heads", [pytest.param((4, 4), marks=pytest.mark.slow), (4, 2)])
def test_bfloat16_products_are_not_widened(heads, monkeypatch):
    """XLA:CPU silently runs a bfloat16 product of unfit layout in float32, many times slower."""
    monkeypatch.setattr(xla, "block_size", lambda longest: 64)
    q, k, v, do = (
        jax.ShapeDtypeStruct((2, 128, h, 64), jnp.bfloat16) for h in (heads[0], *heads[1:] * 2, 4)
    )

    def run(q, k, v, do):
        o, pullback = jax.vjp(attention, q, k, v)
        return o, *pullback(do)

    operands = dot_operands(quick_jit(run).lower(q, k, v, do).compile().as_text())
    assert len(operands) >= 14  # two blocks of two products forward and five backward
    assert set(operands) == {("bf16", "bf16")}


def dot_operands(hlo: str) -> list[tuple[str, str]]:
    """The element types of both operands of every dot of an optimized program."""
    found = []
    for computation in hlo.split("\n\n"):
        types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", computation))
        found += [
            (types[x], types[y])
            for x, y in re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", computation)
        ]
    return found


@pytest.mark.parametrize("window", [None, 9])
def test_equals_jax_nn(window):
    (q, k, v, do), _, _ = inputs()
    v, do = v[..., :K], do[..., :K]  # jax.nn wants one width

    def theirs(q, k, v):
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)

    expected = values_and_gradients(q, k, v, do, theirs)
    for x, y in zip(values_and_gradients(q, k, v, do, window=window), expected):
        assert distance(x, y) < 2e-6  # both float32


def test_packed_documents_equal_separate_ones():
    (q, k, v, do), _, _ = inputs()
    cuts = (0, 1, 18, T)
    ids = np.repeat(np.arange(1, len(cuts)), np.diff(cuts))
    ids = jnp.asarray(np.tile(ids, (B, 1)))
    packed = values_and_gradients(q, k, v, do, segment_ids=ids, window=11)
    for start, stop in itertools.pairwise(cuts):
        part = (x[:, start:stop] for x in (q, k, v, do))
        for x, y in zip(packed, values_and_gradients(*part, window=11)):
            assert distance(x[:, start:stop], y) < 2e-6  # both float32


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_cache_in_any_order_gives_the_rows_of_full_attention(backend, monkeypatch):
    """A ring: slots permuted, some empty and full of old values, queries in two uneven calls."""
    monkeypatch.setattr(xla, "_CACHE_BLOCK", 8)
    (q, k, v, do), _, _ = inputs()
    options = {"window": 6, "softcap": 2.0}
    full = dense(q, k, v, do, visible(T, T, window=6), softcap=2.0)[0]
    rng = np.random.default_rng(1)
    slots = rng.permutation(T + 5)[:T]
    positions = np.full((B, T + 5), -1)
    positions[:, slots] = np.arange(T)
    cache_k, cache_v = (
        rng.standard_normal((B, T + 5, *x.shape[2:])).astype(np.float32) for x in (k, v)
    )
    cache_k[:, slots], cache_v[:, slots] = k, v

    @quick_jit
    def decode(q, at):
        return attention(
            q,
            jnp.asarray(cache_k),
            jnp.asarray(cache_v),
            q_positions=at,
            kv_positions=jnp.asarray(positions),
            backend=backend,
            **options,
        )

    for start, stop in ((0, 27), (27, 28)):
        o = decode(q[:, start:stop], np.tile(np.arange(start, stop), (B, 1)))
        assert distance(o, full[:, start:stop]) < 2e-6  # float32 sums of up to 42 terms


def test_cache_with_segments_gradients_and_empty_rows():
    arrays, ids, _ = inputs(segmented=True)
    q, k, v, do = (jnp.asarray(x) for x in arrays)
    at = np.tile(np.arange(T), (B, 1))
    at[1] = -1  # nothing in the second row's cache
    options = {"segment_ids": jnp.asarray(ids), "kv_positions": jnp.asarray(at)}
    options["q_positions"] = jnp.asarray(np.tile(np.arange(T), (B, 1)))
    results = values_and_gradients(q, k, v, do, **options)
    seen = visible(T, T, ids=ids, kv_ids=ids) & (at >= 0)[:, None, :]
    for x, y in zip(results, dense(*arrays, seen)):
        assert distance(x, y) < 2e-6  # float32 sums of up to 37 terms
        assert np.all(np.asarray(x)[1] == 0)


def test_bfloat16_cache():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs()[0])
    at = jnp.tile(jnp.arange(T), (B, 1))
    cached = jax.jit(lambda *a: attention(*a, q_positions=at, kv_positions=at))(q, k, v)
    full = attention(*(x.astype(jnp.float32) for x in (q, k, v)), backend="reference")
    assert distance(cached, full) < 5e-3  # p and o are rounded to 8 bits


def test_under_vmap_scan_and_checkpoint():
    (q, k, v, do), _, _ = inputs()

    def loss(q, k, v, do):
        return jnp.sum(attention(q, k, v, window=9) * do)

    def scanned(q, k, v, do):
        body = jax.checkpoint(lambda total, row: (total + loss(*(x[None] for x in row)), None))
        return jax.lax.scan(body, 0.0, (q, k, v, do))[0]

    def mapped(q, k, v, do):
        return jnp.sum(jax.vmap(loss)(*(x[:, None] for x in (q, k, v, do))))

    expected = values_and_gradients(q, k, v, do, window=9)[1:]
    for function in (scanned, mapped):
        for x, y in zip(quick_jit(jax.grad(function, (0, 1, 2)))(q, k, v, do), expected):
            assert distance(x, y) < 2e-6  # both float32


def test_saved_by_name_the_forward_is_not_run_again():
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    (q, k, v, _), _, _ = inputs()

    def num_exp(**options):
        body = jax.checkpoint(lambda q: jnp.sum(attention(q, k, v)), **options)
        return str(jax.make_jaxpr(jax.grad(body))(q)).count(" exp ")

    assert (num_exp(), num_exp(policy=policy)) == (3, 2)


def test_long_sequences_agree():
    """Real block sizes: 9000 steps go through the loops."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9000, 1, 8)).astype(np.float32) for _ in range(3))
    o = quick_jit(attention)(q, k, v)
    at = jnp.arange(9000)[None]
    last = slice(8000, 8100)
    expected = attention(
        q[:, last], k, v, q_positions=at[:, last], kv_positions=at, backend="reference"
    )
    assert distance(o[:, last], expected) < 2e-6  # both float32


def test_program_of_a_long_sequence_is_small():
    def program(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.bfloat16)
        grad = jax.grad(lambda *a: jnp.sum(attention(*a).astype(jnp.float32)), (0, 1, 2))
        return quick_jit(grad).lower(x, x, x)

    short, long = program(16384), program(32768)
    assert len(short.as_text().splitlines()) == len(long.as_text().splitlines()) < 1000
    quadratic = 2 * 16384**2 * 4
    assert short.compile().memory_analysis().temp_size_in_bytes < quadratic / 30  # 70 MB


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from effarch.kernels.attention import xla
from effarch.kernels.attention.api import attention

xla.block_size = lambda longest: 16
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
arrays = [rng.standard_normal((8, 40, h, 16)).astype(np.float32) for h in (4, 2, 2, 4)]
arrays.append(np.sort(rng.integers(0, 3, (8, 40))))
heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

for xla._UNROLL in (16, 0):
    def run(q, k, v, do, ids):
        o, pullback = jax.vjp(lambda *qkv: attention(*qkv, segment_ids=ids, window=9), q, k, v)
        return o, *pullback(do)

    expected = jax.jit(run)(*arrays)
    shardings = (heads,) * 4 + (NamedSharding(mesh, PartitionSpec("data")),)
    spread = [jax.device_put(x, s) for x, s in zip(arrays, shardings)]
    program = jax.jit(run, in_shardings=shardings).lower(*spread).compile()
    for x, y in zip(program(*spread), expected):
        np.testing.assert_allclose(x, y, atol=5e-6)  # float32
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word + "(" not in program.as_text(), word
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_batch_and_heads_need_no_communication():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, T, 3, K), "v": (B, T, 3, V)}, "query heads cannot share"),
        ({"v": (B, T - 1, G, V)}, "do not fit"),
        ({"k": (B, 5, G, K), "v": (B, 5, G, V)}, "no common index"),
        ({"window": 0}, "window is 0"),
        ({"window": 4, "causal": False}, "needs causal"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"segment_ids": np.ones((B, T - 1), np.int32)}, "segment_ids"),
        ({"q_positions": np.ones((B, T), np.int32)}, "without kv_positions"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    arrays = {name: jnp.zeros(change.pop(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attention(**arrays, **change)
