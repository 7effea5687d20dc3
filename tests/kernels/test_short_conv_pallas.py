"""The short convolution's TPU and GPU kernels, interpreted, against explicit windows in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, short_conv
from effarch.kernels.short_conv import pallas_gpu, pallas_tpu

B, T, D, W = 2, 200, 128, 4

# Padding in front (as long as two taps), between and behind; documents of 1 and 2 tokens; a boundary
# where a new group of rows (64) and a new block (128) begins.
SEGMENTS = np.array(
    [
        [0] * 2 + [3] * 60 + [8] + [3] + [5] * 64 + [6] * 2 + [0] * 3 + [5] * 40 + [0] * 27,
        [1] * 190 + [2] * 10,
    ],
    np.int32,
)


def make_inputs(width=W, channels=D):
    rng = np.random.default_rng(0)
    shapes = dict(
        x=(B, T, channels),
        kernel=(width, channels),
        bias=(channels,),
        initial=(B, width - 1, channels),
    )
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def judge(x, kernel, bias, initial, segments, silu, d_y):
    """y and all gradients by a loop over tokens, float64; a gradient goes to the token it came from."""
    x, kernel, bias, initial, d_y = (np.float64(a) for a in (x, kernel, bias, initial, d_y))
    width = kernel.shape[0]
    y, d_x, d_kernel = np.zeros(x.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    d_bias, d_initial = np.zeros(bias.shape), np.zeros(initial.shape)
    for row in range(x.shape[0]):
        past = [(d_initial, row, j) for j in range(width - 1)]
        values = list(initial[row])
        document = None
        for t, segment in enumerate(segments[row]):
            if segment == 0:
                continue
            if document is not None and segment != document:
                past, values = [], []
            document = segment
            past.append((d_x, row, t))
            values.append(x[row, t])
            count = min(width, len(values))
            z = bias + sum(kernel[width - 1 - s] * values[-1 - s] for s in range(count))
            gate = 1 / (1 + np.exp(-z))
            y[row, t] = z * gate if silu else z
            d_z = d_y[row, t] * (gate * (1 + z * (1 - gate)) if silu else 1)
            d_bias += d_z
            for s in range(count):
                d_kernel[width - 1 - s] += d_z * values[-1 - s]
                array, *place = past[-1 - s]
                array[tuple(place)] += d_z * kernel[width - 1 - s]
    return dict(y=y, x=d_x, kernel=d_kernel, bias=d_bias, initial=d_initial)


@pytest.fixture(params=[pallas_tpu, pallas_gpu], ids=["tpu", "gpu"])
def backend(request):
    return request.param


def run(backend, inputs, segments, activation, d_y):
    def rule(inputs):
        options = dict(segment_ids=segments, activation=activation)
        return backend.short_conv(**inputs, **options, interpret=True)

    @jax.jit
    def both(inputs, d_y):
        (y, tail), pull = jax.vjp(rule, inputs)
        return dict(y=y, tail=tail, **pull((d_y.astype(y.dtype), jnp.zeros_like(tail)))[0])

    return both(inputs, d_y)


@pytest.mark.parametrize(
    ("segments", "activation", "width", "channels"),
    [
        pytest.param(SEGMENTS, "silu", 4, 128, marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param(None, "silu", 4, 256, marks=pytest.mark.slow),
        pytest.param(SEGMENTS, None, 7, 384, marks=pytest.mark.slow),
        pytest.param(SEGMENTS, "silu", 1, 128, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_explicit_windows(
    backend, segments, activation, width, channels
):
    """A length of a block and a half, filled up; the rows before the first one given."""
    inputs = make_inputs(width, channels)
    d_y = np.random.default_rng(1).standard_normal((B, T, channels)).astype(np.float32)
    known = np.ones((B, T), int) if segments is None else segments
    actual = run(backend, inputs, segments, activation, d_y)
    expected = judge(**inputs, segments=known, silu=activation == "silu", d_y=d_y)
    for name, value in expected.items():
        scale = max(1.0, np.sqrt(np.mean(value**2))) if value.size else 1.0
        np.testing.assert_allclose(actual[name], value, atol=2e-5 * scale, err_msg=name)
    again = run(backend, inputs, segments, activation, d_y)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    tail = short_conv(**inputs, segment_ids=segments, activation=activation, backend="xla")[1]
    np.testing.assert_array_equal(actual["tail"], tail)


@pytest.mark.slow
def test_bfloat16_without_a_start_and_what_stands_in_padding(backend):
    inputs = {name: x.astype(jnp.bfloat16) for name, x in make_inputs().items()}
    inputs.pop("initial")
    d_y = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
    first = run(backend, inputs, SEGMENTS, "silu", d_y)
    zeros = dict(bias=inputs["bias"], initial=np.zeros((B, W - 1, D)))
    wide = {name: np.float32(x) for name, x in inputs.items()} | zeros
    d_y = np.float32(jnp.asarray(d_y, jnp.bfloat16))
    expected = judge(**wide, segments=SEGMENTS, silu=True, d_y=d_y)
    for name in ("y", "x", "kernel", "bias"):
        # One rounding of the result to 8 bits; the GPU's dz is rounded before it is summed to dx.
        scale = np.sqrt(np.mean(expected[name] ** 2))
        terms = W if (backend, name) == (pallas_gpu, "x") else 0
        np.testing.assert_allclose(
            *(np.float32(first[name]), expected[name]),
            **dict(rtol=2**-8, atol=(1e-3 + terms * 2**-8) * scale, err_msg=name),
        )
    spoilt = inputs | {"x": jnp.where((SEGMENTS == 0)[..., None], -99, inputs["x"])}
    jax.tree.map(np.testing.assert_array_equal, run(backend, spoilt, SEGMENTS, "silu", d_y), first)


def test_what_the_kernels_do_not_treat_is_refused():
    inputs = make_inputs()
    for module, kind in ((pallas_tpu, "TPU"), (pallas_gpu, "GPU")):
        rule = functools.partial(module.short_conv, **inputs)
        with pytest.raises(dispatch.Unsupported, match=rf"runs on {kind}s.* for cpu"):
            rule()
    with pytest.raises(dispatch.Unsupported, match="float32 with 100 channels"):
        rule(x=inputs["x"][..., :100], interpret=True)
    rule = functools.partial(pallas_tpu.short_conv, **inputs)
    with pytest.raises(dispatch.Unsupported, match="4 taps on 100 channels"):
        rule(x=inputs["x"][..., :100], interpret=True)
