"""Feed-forwards with inactive neurons against NumPy in float64, and against Gemma 3n's own numbers."""

import functools
import math
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from effarch.kernels import gaussian_top_k
from effarch.models import ffns
from effarch.models.context import Context
from effarch.models.ffns import active, q_sparse
from effarch.models.layers import activations

B, T, D, F = 2, 9, 16, 96
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "data/gaussian_topk.npz"
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[1, 6:] = 0


class Ffn:
    """A feed-forward with random parameters: its arrays, and its compiled functions."""

    def __init__(self, kind, width=D, arrays=None, **options):
        make = lambda: ffns.KINDS[kind](width, rngs=nnx.Rngs(0), **options)  # noqa: E731
        self.graphdef, state = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(1)
        self.arrays = arrays or jax.tree.map(
            lambda x: (rng.standard_normal(x.shape) * x.shape[0] ** -0.5).astype(np.float32),
            nnx.to_pure_dict(state),
        )

    def weights(self, *names):
        return [self.arrays[name]["kernel"].astype(np.float64) for name in names]

    def __call__(self, x, arrays=None):
        """(y, aux of training, y of the tokens one by one as in decoding)."""
        return jax.device_get(_run(self.graphdef, arrays or self.arrays, x))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, arrays, x):
    ffn = nnx.merge(graphdef, arrays)
    y, aux = ffn(x, Context(segment_ids=jnp.asarray(SEGMENTS)[: len(x), : x.shape[1]]))
    one = lambda x: ffn(x[:, None], Context(train=False))[0][:, 0]  # noqa: E731
    return y, aux, jax.vmap(one, in_axes=1, out_axes=1)(x[:, :3]) if x.ndim == 3 else None


def inputs():
    return np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def soft_top_k(s, k):
    """Of the rows of s."""
    quantile = statistics.NormalDist().inv_cdf(1 - k / s.shape[-1]) if k < s.shape[-1] else None
    if quantile is None:
        return s
    theta = s.mean(-1, keepdims=True) + s.std(-1, keepdims=True) * quantile
    return np.maximum(s - theta, 0)


def close(got, want, tolerance=1e-5):
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


def spark_by_hand(ffn, x, split, k):
    predictor, up, down = ffn.weights("predictor", "up", "down")
    x = x.astype(np.float64)
    gate = gelu(soft_top_k(x[..., :split] @ predictor, k))
    return (gate * (x[..., split:] @ up.T)) @ down, gate


def test_spark_ffn():
    """The formula, tokens one by one, permuted neurons, and no threshold for k = F."""
    ffn, x = Ffn("spark_ffn", hidden=F, predictor_width=10, active_fraction=0.1), inputs()
    want, gate = spark_by_hand(ffn, x, 10, 10)
    y, aux, decoded = ffn(x)
    close(y, want)
    close(decoded, want[:, :3])
    share = (gate != 0)[SEGMENTS != 0].mean()
    assert 0 < share < 0.2
    assert aux["metric/active_fraction"] == pytest.approx(share, rel=1e-5)

    order = np.random.default_rng(2).permutation(F)
    permuted = {
        "predictor": {"kernel": ffn.arrays["predictor"]["kernel"][:, order]},
        "up": {"kernel": ffn.arrays["up"]["kernel"][order]},
        "down": {"kernel": ffn.arrays["down"]["kernel"][order]},
    }
    close(ffn(x, permuted)[0], want)


def test_gemma_3n():
    """Gate before and after the threshold, and the layer's output."""
    golden = dict(np.load(GOLDEN))
    sparsity = float(golden.pop("sparsity"))
    kernels = {
        "gate": {"kernel": golden["gate_w"].T},
        "up": {"kernel": golden["up_w"]},  # by outputs
        "down": {"kernel": golden["down_w"].T},
    }
    options = dict(hidden=256, active_fraction=1 - sparsity)
    y = jax.jit(lambda arrays, x: nnx.merge(graphdef, arrays)(x, Context(train=False))[0])
    graphdef = Ffn("sparse_glu", width=32, arrays=kernels, **options).graphdef
    np.testing.assert_allclose(y(kernels, golden["x"]), golden["o"], atol=1e-5)
    sparse = jax.jit(lambda gate: gaussian_top_k(gate, sparsity))(golden["gate"])
    np.testing.assert_allclose(sparse, golden["sparse_gate"], atol=2e-6)
    np.testing.assert_array_equal(sparse > 0, golden["sparse_gate"] > 0)


def exact(g, k):
    kept = np.argsort(np.argsort(-g, axis=-1), axis=-1) < k
    return np.where(kept, g, 0)


def identity(x):
    return x


def relu(x):
    return np.maximum(x, 0)


GLUS = {
    "statistical": (dict(active_fraction=0.08), lambda g: gelu(soft_top_k(g, 0.08 * F)), identity),
    "exact": (
        dict(selection="exact", active_fraction=0.1, density_coef=0.5),
        lambda g: gelu(exact(g, 10)),
        identity,
    ),
    "relu2": (
        dict(selection="none", activation="relu2"),
        lambda g: relu(g) ** 2,
        identity,
    ),
    "drelu": (
        dict(selection="none", activation="relu", up_activation="relu", density_coef=0.1),
        relu,
        relu,
    ),
}


@pytest.mark.parametrize("name", GLUS)
def test_sparse_glu(name):
    options, gate_of, up_of = GLUS[name]
    ffn, x = Ffn("sparse_glu", hidden=F, **options), inputs()
    gate, up, down = ffn.weights("gate", "up", "down")
    x64 = x.astype(np.float64)
    h = gate_of(x64 @ gate) * up_of(x64 @ up.T)
    y, aux, decoded = ffn(x)
    close(y, h @ down)
    close(decoded, (h @ down)[:, :3])
    real = h[SEGMENTS != 0]
    assert aux["metric/active_fraction"] == pytest.approx((real != 0).mean(), rel=1e-5)
    if name == "drelu":
        assert (real != 0).mean() == pytest.approx(0.25, abs=0.05)
    if name == "exact":
        assert (real != 0).mean() == pytest.approx(10 / F)
    coef = options.get("density_coef", 0)
    assert ("loss/density" in aux) == (coef > 0)
    if coef:
        assert aux["loss/density"] == pytest.approx(
            coef * (real**2 / (real**2 + 1e-7)).mean(), rel=1e-4
        )


def test_density_and_straight_through_gradients():
    """DEFT: 2 h eps / (h^2 + eps)^2, 0 at 0 and largest at sqrt(eps / 3). Q-Sparse: the identity."""
    h = np.array([0.0, 1.8257e-4, -3e-3, 0.03, 0.5], np.float32)
    x = inputs()

    @jax.jit
    def run(h, x):
        density = lambda h: 5 * active.density(h[None, None], Context())  # noqa: E731
        z, pull = jax.vjp(lambda x: q_sparse.masked(x, 0.4), x)
        return *jax.value_and_grad(density)(h), z, pull(2 * x)[0]

    value, gradient, z, dx = jax.device_get(run(h, x))
    h64 = h.astype(np.float64)
    assert value == pytest.approx((h64**2 / (h64**2 + 1e-7)).sum(), rel=1e-6)
    np.testing.assert_allclose(gradient, 2 * h64 * 1e-7 / (h64**2 + 1e-7) ** 2, rtol=1e-5)
    assert gradient[0] == 0 and gradient[1] == pytest.approx(2054, rel=1e-3)
    np.testing.assert_array_equal(z, np.sign(x) * exact(np.abs(x), 6))
    assert (np.count_nonzero(z, axis=-1) == 6).all()
    np.testing.assert_array_equal(dx, 2 * x)


def test_q_sparse():
    ffn, x = Ffn("q_sparse", hidden=F, active_fraction=0.4), inputs()
    gate, up, down = ffn.weights("gate", "up", "down")

    def largest(x, k):
        z = np.sign(x) * exact(np.abs(x), k)
        return z / np.sqrt((z**2).mean(-1, keepdims=True)), z

    z = largest(x.astype(np.float64), 6)[0]
    h, masked = largest((z @ up) * relu(z @ gate) ** 2, 38)
    y, aux, _ = ffn(x)
    close(y, h @ down)
    assert aux["metric/active_fraction"] == pytest.approx(
        (masked != 0)[SEGMENTS != 0].mean(), rel=1e-5
    )


def test_polynomials():
    """a3 first; PolyNorm does not change with the scale; four parameters that do not decay."""
    x = 3 * inputs()[0].astype(np.float64)
    a = np.array([0.7, -0.4, 0.9, 0.2])

    @jax.jit
    def run(x, coefficients):
        found = {}
        for name in ("poly_relu", "poly_norm"):
            module = activations.make(name, "test")
            module.coefficients[...] = coefficients
            apply = lambda x, module=module: module(x)  # noqa: E731
            found[name] = (*jax.vjp(apply, x)[:1], jax.grad(lambda x, f=apply: f(x).sum())(x))
            found[name] += (apply(5.0 * x),)
        return found

    found = jax.device_get(run(x.astype(np.float32), a.astype(np.float32)))

    def poly_relu(x):
        p = relu(x)
        return a[0] * p**3 + a[1] * p**2 + a[2] * p + a[3]

    def poly_norm(x):
        powers = [v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) for v in (x**3, x**2, x)]
        return sum(c * v for c, v in zip(a, powers)) + a[3]

    for name, function in (("poly_relu", poly_relu), ("poly_norm", poly_norm)):
        y, dx, scaled = found[name]
        close(y, function(x))
        close(scaled, function(5 * x))
        i, step = 4, 1e-6
        bump = np.zeros_like(x)
        bump[:, i] = step
        want = (function(x + bump) - function(x - bump)).sum(-1) / (2 * step)
        np.testing.assert_allclose(dx[:, i], want, rtol=1e-3, atol=1e-4)
    close(found["poly_norm"][2], found["poly_norm"][0], 1e-4)

    ffn = Ffn("mlp", hidden=F, activation="poly_norm")
    up, down = ffn.weights("up", "down")
    arrays = ffn.arrays | {"activation": {"coefficients": a.astype(np.float32)}}
    z = inputs()
    close(ffn(z, arrays)[0], poly_norm(z.astype(np.float64) @ up) @ down)
    parameter = nnx.state(nnx.merge(ffn.graphdef, arrays))["activation"]["coefficients"]
    assert parameter.shape == (4,) and not parameter.get_metadata("decay", False)


def test_glu_takes_every_activation():
    x = inputs()
    for name, function in (("gelu", lambda g: g * scipy.special.ndtr(g)), ("silu", None)):
        ffn = Ffn("glu", hidden=F, activation=name)
        gate, up, down = ffn.weights("gate", "up", "down")
        g = x.astype(np.float64) @ gate
        want = function(g) if function else g * scipy.special.expit(g)
        close(ffn(x)[0], (want * (x @ up)) @ down)
    assert Ffn("glu", hidden=F, activation="poly_relu").arrays["activation"]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("spark_ffn", dict(predictor_width=D), "predictor_width=16 must leave a part of"),
        ("spark_ffn", dict(active_fraction=0.0), "spark_ffn.active_fraction=0.0 must be above 0"),
        ("sparse_glu", dict(active_fraction=1.5), "sparse_glu.active_fraction=1.5 must be above"),
        ("sparse_glu", dict(selection="statistic"), "Did you mean 'statistical'?"),
        ("sparse_glu", dict(up_activation="rleu"), "Did you mean 'relu'?"),
        ("q_sparse", dict(active_fraction=-1), "q_sparse.active_fraction=-1 must be above 0"),
        ("mlp", dict(activation="polynorm"), "Did you mean 'poly_norm'?"),
    ],
)
def test_impossible_options_are_refused_in_words(kind, options, words):
    with pytest.raises(ValueError) as error:
        ffns.KINDS[kind](D, **options, rngs=nnx.Rngs(0))
    assert words in str(error.value)
