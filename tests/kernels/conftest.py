"""What tests of recurrences share: chunked forms and interpreted kernels against the recurrence."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule, linear_attention

DATA = Path(__file__).parents[1] / "data"
KINDS = (
    "random",
    "identical keys",
    "similar keys",
    "similar keys, beta 1.9",
    "strong decay",
    "mixed decay",
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def relative_rms():
    return _relative_rms


@pytest.fixture(scope="session")
def five_tokens():
    """q, k, v and beta of one head as they went into sums by hand, and g by gate."""
    t = np.arange(5.0)
    rows = [(np.sin(t + 1), np.cos(t + 1)), (np.cos(2 * t + 1), np.sin(2 * t + 1))]
    q, k, v = (np.stack(x, -1)[None, :, None] for x in [*rows, (t + 1, (-1) ** t)])
    g = np.stack([-0.1 * (t + 1), -0.05 * (t + 2)], -1)[None, :, None]
    return (q, k, v, (1 / (t + 2))[None, :, None]), dict(none=None, head=g[..., 0], channel=g)


@pytest.fixture(scope="session")
def delta_rule():
    return _chunked("delta_rule")


@pytest.fixture(scope="session")
def linear():
    return _chunked("linear_attention")


@pytest.fixture(params=["delta_rule", "linear_attention"])
def chunked(request):
    """Of what both recurrences must do."""
    return _chunked(request.param)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Of the inputs of `DeltaRuleTrial`."""
    return request.param


@pytest.fixture(params=["head", pytest.param("channel", marks=pytest.mark.slow)])
def gate(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def kernel_trial():
    return KernelTrial


@pytest.fixture(scope="session")
def delta_rule_trial():
    return DeltaRuleTrial


def _relative_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


class ChunkedRecurrence:
    """A recurrence at sizes that repeat on purpose: each new one costs a compilation.

    Machine code is optimised less than usual (the graph is the same). Inputs are those that `names`
    names, and a state.
    """

    B, T, H, HV, K, V, CHUNK = 2, 78, 2, 4, 6, 5, 32
    # Padding in front, between and behind (also a chunk of nothing else), documents of one token (also
    # with an id that came before), a boundary on the edge of chunks, a document over two chunks.
    SEGMENTS = np.array(
        [
            [0] * 2
            + [7] * 5
            + [3]
            + [7]
            + [0] * 3
            + [4] * 20
            + [2] * 20
            + [1]
            + [9] * 5
            + [0] * 20,
            [5] * 64 + [6] * 14,
        ]
    )
    ONE_DOCUMENT = np.ones_like(SEGMENTS)

    def __init__(self, function, names):
        self.function, self.names = function, names
        self.forward = self.compiled(self.rule, static_argnames=("backend", "chunk_size"))
        self.forward_backward = self.compiled(self.with_gradients, static_argnames=("backend",))

    @staticmethod
    def compiled(function, **options):
        options |= dict(compiler_options={"xla_backend_optimization_level": 0})
        return jax.jit(function, **options)

    def inputs(self, gate, dtype=np.float64, length=T):
        """q, k, v, beta in (0, 2), g, and a state; the delta rule's q and k have norm 1."""
        B, H, HV, K, V = self.B, self.H, self.HV, self.K, self.V
        rng = np.random.default_rng(0)
        q, k = rng.standard_normal((2, B, length, H, K))
        v = rng.standard_normal((B, length, HV, V))
        shape = dict(constant=(HV,), head=(B, length, HV), channel=(B, length, HV, K)).get(gate)
        g = None if shape is None else -np.exp(rng.standard_normal(shape) - 1.5)
        arrays = [q, k, v, g, rng.standard_normal((B, HV, K, V))]
        if "beta" in self.names:
            arrays[:2] = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
            arrays.insert(3, 2 / (1 + np.exp(-rng.standard_normal((B, length, HV)))))
        return tuple(None if x is None else x.astype(dtype) for x in arrays)

    def rule(self, *inputs, segments=None, backend="xla", chunk_size=CHUNK):
        arrays, state = inputs[: len(self.names)], [*inputs[len(self.names) :], None][0]
        options = dict(initial_state=state, segment_ids=segments)
        return self.function(*arrays, **options, backend=backend, chunk_size=chunk_size)

    def with_gradients(self, *inputs, segments=None, **options):
        """((o, final state), gradients by name) for fixed cotangents of both outputs."""

        def run(*inputs):
            return self.rule(*inputs, segments=segments, **options)

        outputs, pull = jax.vjp(run, *inputs)
        return outputs, dict(zip((*self.names, "state"), pull(self.cotangents(outputs))))

    @staticmethod
    def cotangents(outputs):
        waves = [np.cos(1.7 * np.arange(x.size) ** 1.1).astype(x.dtype) for x in outputs]
        return tuple(wave.reshape(x.shape) for wave, x in zip(waves, outputs))

    def in_float64(self, inputs):
        """`forward_backward` of the recurrence for the same numbers, one document a row."""
        with jax.enable_x64(True):
            wide = [None if x is None else np.float64(x) for x in inputs]
            options = dict(segments=self.ONE_DOCUMENT, backend="reference")
            return jax.tree.map(np.asarray, self.forward_backward(*wide, **options))

    @staticmethod
    def assert_close(actual, expected, bound):
        actual, expected = (jax.tree_util.tree_leaves_with_path(x) for x in (actual, expected))
        assert [path for path, _ in actual] == [path for path, _ in expected]
        for (path, a), (_, b) in zip(actual, expected):
            assert _relative_rms(a, b) <= bound, jax.tree_util.keystr(path)


@functools.cache
def _chunked(name: str) -> ChunkedRecurrence:
    function, *names = {
        "delta_rule": (gated_delta_rule, "q", "k", "v", "beta", "g"),
        "linear_attention": (linear_attention, "q", "k", "v", "g"),
    }[name]
    return ChunkedRecurrence(function, tuple(names))


class KernelTrial:
    """A kernel run by the interpreter on packed rows, judged by the recurrence in float64.

    `kernel` and `recurrence` take the inputs that `names` names and `segments`.
    """

    def __init__(self, names, kernel, recurrence, segments):
        self.names, self.kernel, self.recurrence = names, kernel, recurrence
        self.segments = segments
        self.packed = self.compiled(functools.partial(kernel, segments=segments))
        self._judge = self.compiled(functools.partial(recurrence, segments=segments))

    def compiled(self, rule):
        """inputs -> o, the final state and all gradients, by name, for fixed cotangents."""

        def forward_backward(*inputs):
            outputs, pull = jax.vjp(rule, *inputs)
            gradients = pull(tuple(_wave(x.shape).astype(x.dtype) for x in outputs))
            return dict(zip(("o", "final_state", *self.names), (*outputs, *gradients)))

        return jax.jit(forward_backward)

    def judge(self, inputs, run=None):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, (run or self._judge)(*(np.float64(x) for x in inputs)))

    def check_bfloat16(self, inputs, bound, kept):
        """The last `kept` inputs stay in float32."""
        rounded = [x.astype(jnp.bfloat16) for x in inputs[:-kept]]
        actual = self.packed(*rounded, *inputs[-kept:])
        assert actual["o"].dtype == jnp.bfloat16 and actual["final_state"].dtype == jnp.float32
        wide = [x.astype(np.float32) for x in rounded]
        self.assert_close(actual, self.judge([*wide, *inputs[-kept:]]), bound)

    @staticmethod
    def assert_close(actual, expected, bound):
        for name in expected:
            error = _relative_rms(actual[name], expected[name])
            assert error <= bound, f"{name}: {error:.1e} > {bound}"


def _wave(shape):
    return jnp.cos(1.7 * jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.1).reshape(shape)


class DeltaRuleTrial(KernelTrial):
    """What every backend of the delta rule must do; `module` is the backend's."""

    SIZES = (2, 77, 1, 2, 24, 40)  # B, T, H, HV, K, V

    def __init__(self, module, segments, chunk_size=None):
        def kernel(q, k, v, beta, g=None, state=None, *, segments=None, **options):
            options = dict(scale=q.shape[-1] ** -0.5, chunk_size=chunk_size) | options
            options |= dict(initial_state=state, segment_ids=segments, interpret=True)
            return module.gated_delta_rule(q, k, v, beta, g, **options)

        def recurrence(q, k, v, beta, g=None, state=None, *, segments=None):
            options = dict(initial_state=state, segment_ids=segments)
            return gated_delta_rule(q, k, v, beta, g, backend="reference", **options)

        names = ("q", "k", "v", "beta", "g", "initial_state")
        super().__init__(names, kernel, recurrence, segments)

    def inputs(self, kind, gate="head", sizes=SIZES):
        """q, k, v, beta, g and an initial state, float32; some beta are 0."""
        batch, length, heads, value_heads, width, value_width = sizes
        rng = np.random.default_rng(0)
        q, k = rng.standard_normal((2, batch, length, heads, width))
        v = rng.standard_normal((batch, length, value_heads, value_width))
        beta = 2 / (1 + np.exp(-rng.standard_normal((batch, length, value_heads))))
        g = -np.exp(rng.standard_normal((batch, length, value_heads, width)) - 1.5)
        if kind == "identical keys":
            k, beta, g = np.broadcast_to(k[:, :1], k.shape), np.full_like(beta, 0.99), 0.01 * g
        if kind.startswith("similar keys"):  # their cosine is about 0.92
            strength = 1.9 if kind.endswith("1.9") else 0.95
            k, beta, g = k[:, :1] + 0.3 * k, np.full_like(beta, strength), 0.02 * g
        if kind == "strong decay":
            g = np.full_like(g, -20.0)
        if kind == "mixed decay":
            g = rng.choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
        beta[:, 5::9] = 0
        g = g if gate == "channel" else g[..., 0]
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        state = rng.standard_normal((batch, value_heads, width, value_width))
        return tuple(x.astype(np.float32) for x in (q, k, v, beta, g, state))

    def check_float32(self, kind, gate):
        """Documents, padding, an entering state, two value heads a key head, a last chunk half full."""
        inputs = self.inputs(kind, gate)
        self.assert_close(self.packed(*inputs), self.judge(inputs), 1e-5)

    def check_repeats_and_padding(self, gate):
        *inputs, state = self.inputs("random", gate)
        padding = self.segments == 0
        mask = [padding.reshape(*padding.shape, *(1,) * (x.ndim - 2)) for x in inputs]
        spoilt = [np.where(where, np.float32(-99), x) for where, x in zip(mask, inputs)]
        first = self.packed(*inputs, state)
        for again in (self.packed(*inputs, state), self.packed(*spoilt, state)):
            jax.tree.map(np.testing.assert_array_equal, again, first)
        for name in ("o", *self.names[:-1]):
            assert np.all(np.asarray(first[name])[padding] == 0), name

    def check_sizes(self, sizes, chunk, gate):
        """Whole documents, no state; without a gate as well."""
        *inputs, g, _ = self.inputs("random", gate, sizes)
        inputs += [] if gate == "none" else [g]
        run = self.compiled(functools.partial(self.kernel, chunk_size=chunk))
        expected = self.judge(inputs, self.compiled(self.recurrence))
        self.assert_close(run(*inputs), expected, 1e-5)

    def check_golden(self, name):
        data = np.load(DATA / f"{name}.npz")
        run = jax.jit(functools.partial(self.kernel, scale=float(data["scale"])))
        inputs = (data[x] for x in ("q", "k", "v", "beta"))
        o, final = run(*inputs, data.get("g"), data.get("initial_state"))
        expected = dict(o=data["o"], final=data["final_state"])
        self.assert_close(dict(o=o, final=final), expected, 1e-5)

    def check_scan_checkpoint_and_splitting(self, gate):
        """Two layers by scan, recomputed in the backward pass; a row cut in two, the state carried."""
        *inputs, state = self.inputs("random", gate)

        def loss(v, rule):
            q, k, _, beta, g = inputs

            def layer(v, _):
                return rule(q, k, v, beta, g)[0], None

            return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), v, length=2)[0]))

        actual, expected = (
            jax.jit(jax.grad(functools.partial(loss, rule=rule)))(inputs[2])
            for rule in (self.kernel, self.recurrence)
        )
        self.assert_close(dict(v=actual), dict(v=expected), 1e-5)
        run = jax.jit(self.kernel)
        o, final = run(*inputs, state)
        o_head, middle = run(*(x[:, :50] for x in inputs), state)
        o_tail, tail = run(*(x[:, 50:] for x in inputs), middle)
        joined = dict(o=np.concatenate([o_head, o_tail], 1), final=tail)
        self.assert_close(joined, dict(o=o, final=final), 2e-6)
