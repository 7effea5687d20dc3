"""The sparse feed-forward against a loop over active neurons, at every number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, sparse_ffn
from effarch.kernels.sparse_ffn import api, pallas_gpu, pallas_tpu, xla

B, F, P, D = 3, 200, 24, 40


def inputs(share, part=P, width=D):
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((B, F)) * (rng.random((B, F)) < share)
    shapes = ((B, part), (F, part), (F, width))
    return [a.astype(np.float32) for a in (gate, *(rng.standard_normal(s) for s in shapes))]


def by_neurons(gate, x, up, down):
    y = np.zeros((x.shape[0], down.shape[1]))
    for b, f in np.argwhere(gate):
        y[b] += float(gate[b, f]) * (x[b].astype(float) @ up[f]) * down[f]
    return y


def rel_rms(x, y):
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


@jax.jit
def run(gate, x, up, down):
    """Every way to compute it; bfloat16 activations with float32 weights as well."""
    args = (gate, x, up, down)
    return {
        "reference": sparse_ffn(*args, backend="reference"),
        "xla": sparse_ffn(*args),
        "gathered": xla._gathered(jnp.any(gate != 0, axis=0), *args),
        "narrow": sparse_ffn(gate, x.astype(jnp.bfloat16), up, down).astype(jnp.float32),
    }


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.6, 1.0])
def test_every_way_equals_the_loop(share):
    """From no active neuron over less than a block, several blocks and the change of ways, to all."""
    args = inputs(share)
    want = by_neurons(*args)
    active = int(np.any(args[0] != 0, axis=0).sum())
    assert (active < api.MOST_ACTIVE * F) == (share < 0.5)
    for name, y in run(*args).items():
        if share == 0:
            np.testing.assert_array_equal(y, want, err_msg=name)
        else:
            # bfloat16: eight bits of mantissa in x, weights and the hidden activations.
            assert rel_rms(np.asarray(y), want) < (1e-2 if name == "narrow" else 1e-6), name


def test_rows_of_inactive_neurons_are_not_read():
    """NaN in the weights of neurons that no token uses does not come out."""
    gate, x, up, down = inputs(0.1)
    unused = ~np.any(gate != 0, axis=0)
    unused[0] = False  # fills the last block up
    poisoned = [np.where(unused[:, None], np.nan, w).astype(np.float32) for w in (up, down)]
    y = jax.jit(sparse_ffn)(gate, x, *poisoned)
    np.testing.assert_array_equal(y, jax.jit(sparse_ffn)(gate, x, up, down))


def test_work_of_a_turn_is_that_of_its_rows():
    """XLA counts a loop's body once: 2 (P + D) FLOPs for each row of a block and token."""
    hidden, part, width = 256, 1280, 2304
    shapes = ((hidden,), (1, hidden), (1, part), (hidden, part), (hidden, width))
    args = [jax.ShapeDtypeStruct(s, jnp.float32 if i else bool) for i, s in enumerate(shapes)]
    flops = jax.jit(xla._gathered).lower(*args).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(2 * (part + width) * 64, rel=0.05)


@jax.jit
def kernels(gate, x, up, down):
    folded = [table.reshape(len(table), -1, 128) for table in (up, down)]
    return {
        "tpu": pallas_tpu.sparse_ffn(gate, x, *folded, interpret=True),
        "gpu": pallas_gpu.sparse_ffn(gate, x, up, down, interpret=True),
        "xla, folded": sparse_ffn(gate, x, *folded),
    }


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 1.0])
def test_kernels_read_active_rows_alone(share):
    """NaN in what no token uses does not come out; no neuron, less than a block, some blocks, all."""
    gate, x, up, down = inputs(share, part=128, width=256)
    want = by_neurons(gate, x, up, down)
    unused = ~np.any(gate != 0, axis=0)
    unused[0] = False  # fills the last block up
    up, down = (np.where(unused[:, None], np.nan, w).astype(np.float32) for w in (up, down))
    for name, y in jax.device_get(kernels(gate, x, up, down)).items():
        if share == 0:
            np.testing.assert_array_equal(y, want, err_msg=name)
        else:
            assert rel_rms(y, want) < 1e-6, name


@pytest.mark.slow
@pytest.mark.ci
def test_kernels_in_bfloat16():
    args = inputs(0.2, part=128, width=256)
    want = by_neurons(*args)
    gate, *narrow = (jnp.asarray(a, jnp.bfloat16) for a in args)
    for name, y in kernels(gate, *narrow).items():
        assert rel_rms(np.float32(y), want) < 1e-2, name  # eight bits of mantissa


def test_what_the_kernels_do_not_take_is_said():
    for name, module in (("tpu", pallas_tpu), ("gpu", pallas_gpu)):
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            sparse_ffn(*inputs(0.1), backend=f"pallas_{name}")
        with pytest.raises(dispatch.Unsupported, match="rows of 24 and 40 are not multiples"):
            module.sparse_ffn(*map(jnp.asarray, inputs(0.1)), interpret=True)
    with pytest.raises(dispatch.Unsupported, match="only from tables kept as"):
        pallas_tpu.sparse_ffn(*map(jnp.asarray, inputs(0.1, 128, 256)), interpret=True)


def test_wrong_shapes_are_named():
    gate, x, up, down = inputs(0.1)
    for args in ((gate, x, up.T, down), (gate[0], x, up, down), (gate, x, up, down[:-1])):
        with pytest.raises(ValueError, match=r"sparse_ffn: gate .* do not fit; give gate \[B,F\]"):
            sparse_ffn(*args)
