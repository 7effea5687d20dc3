"""Every mixer against its published formulas, written as NumPy loops over tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context

WIDTH, LENGTH = 32, 37


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x, p):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def low_rank(x, p):
    return linear(linear(x, p["down"]), p["up"])


def taps(x, kernel):
    """y_t = sum of the last inputs times the kernel's rows, zeros before the first."""
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return np.stack([np.sum(kernel * padded[t : t + len(kernel)], axis=0) for t in range(len(x))])


def conv(x, p, name):
    return silu(taps(x, p[name]) + p.get(f"{name}_bias", 0.0))


def split(x, num_heads):
    return x.reshape(len(x), num_heads, -1)


def join(x):
    return x.reshape(len(x), -1)


def rotate(x, part=1.0, slower=1.0):
    """Channel i and i + half of each head turn by position * 10000 ** (-2 i / K), K `part` of them.

    `slower` multiplies the angle of each pair.
    """
    if part < 1:
        turned, still = np.split(x, [int(part * x.shape[-1])], axis=-1)
        return np.concatenate([rotate(turned), still], axis=-1)
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half) * slower
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def memory(q, k, v, a, beta=None, start=None, scale=None):
    """S = a S, then a write of v (or with beta of its difference from what S holds), then o = S^T q."""
    length, num_v_heads, v_dim = v.shape
    k_dim, group = k.shape[2], num_v_heads // k.shape[1]
    state = np.zeros((num_v_heads, k_dim, v_dim)) if start is None else start.copy()
    o = np.zeros_like(v)
    for t in range(length):
        for head in range(num_v_heads):
            key, query = k[t, head // group], q[t, head // group]
            faded = np.reshape(a[t, head], (-1, 1)) * state[head]
            new = v[t, head]
            if beta is not None:
                new = beta[t, head] * (new - faded.T @ key)
            state[head] = faded + np.outer(key, new)
            o[t, head] = state[head].T @ query * (k_dim**-0.5 if scale is None else scale)
    return o


def start_of(p):
    return p["memory"]["start"]["value"]


def softmax_attention(q, k, v, *, window=10**6, softcap=None):
    """Token i sees token j if 0 <= i - j < window; query head h reads key head h // group."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(y, group, axis=1) for y in (k, v))
    scores = np.einsum("ihk,jhk->hij", q, k) / q.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    distance = np.subtract.outer(np.arange(len(q)), np.arange(len(q)))
    weights = softmax(np.where((distance >= 0) & (distance < window), scores, -np.inf))
    return join(np.einsum("hij,jhv->ihv", weights, v))


def attention_grouped(p, x):
    """Two query heads a key head, normed queries and keys, a gate."""
    q, k, v = (split(linear(x, p[name]), heads) for name, heads in zip("qkv", (4, 2, 2)))
    q, k = rotate(rms_norm(q, p["q_norm"])), rotate(rms_norm(k, p["k_norm"]))
    return softmax_attention(q, k, v) * sigmoid(linear(x, p["gate"]))


def attention_window(p, x):
    q, k, v = (split(linear(x, p[name]), 2) for name in "qkv")
    return softmax_attention(rotate(q, 0.5), rotate(k, 0.5), v, window=5)


def attention_no_rope(p, x):
    return softmax_attention(*(split(linear(x, p[name]), 2) for name in "qkv"), softcap=5.0)


def gated_delta_net(p, x):
    q, k, v = (conv(linear(x, p[name]), p["conv"], name) for name in "qkv")
    rate, bias = p["rate"]["rate_log"], p["rate"]["step_bias"]
    a = np.exp(-np.exp(rate) * softplus(linear(x, p["decay"]) + bias))
    beta = sigmoid(linear(x, p["beta"]))
    o = memory(unit(split(q, 2)), unit(split(k, 2)), split(v, 4), a, beta, start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


def gated_delta_net_plain(p, x):
    """SiLU without convolutions, b from 0 to 2, no gate."""
    q, k, v = (split(silu(linear(x, p[name])), 2) for name in "qkv")
    rate, bias = p["rate"]["rate_log"], p["rate"]["step_bias"]
    a = np.exp(-np.exp(rate) * softplus(linear(x, p["decay"]) + bias))
    o = memory(unit(q), unit(k), v, a, 2 * sigmoid(linear(x, p["beta"])))
    return join(rms_norm(o, p["out_norm"]))


def delta_net(p, x):
    q, k, v = (split(conv(linear(x, p[name]), p["conv"], name), 4) for name in "qkv")
    beta = 2 * sigmoid(linear(x, p["beta"]))
    o = memory(unit(q), unit(k), v, np.ones_like(beta), beta, start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


def delta_net_plain(p, x):
    """No convolutions; q and k positive and with a sum of 1."""
    q, k, v = (split(linear(x, p[name]), 2) for name in "qkv")
    q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (q, k))
    q, k = (y / (y.sum(axis=-1, keepdims=True) + 1e-4) for y in (q, k))
    beta = sigmoid(linear(x, p["beta"]))
    return join(rms_norm(memory(q, k, silu(v), np.ones_like(beta), beta), p["out_norm"]))


def delta_net_relu(p, x):
    """SiLU for the values alone."""
    q, k, v = (linear(x, p[name]) for name in "qkv")
    q, k = (np.maximum(taps(y, p["conv"][name]), 0) for y, name in ((q, "q"), (k, "k")))
    q, k, v = (split(y, 2) for y in (q, k, conv(v, p["conv"], "v")))
    beta = sigmoid(linear(x, p["beta"]))
    return join(rms_norm(memory(unit(q), unit(k), v, np.ones_like(beta), beta), p["out_norm"]))


def kda(p, x):
    q, k, v = (conv(linear(x, p[name]), p["conv"], name) for name in "qkv")
    rate = np.exp(p["rate"]["rate_log"])[:, None]
    f = split(low_rank(x, p["decay"]), 4) + p["rate"]["step_bias"]
    a = np.exp(-4.0 * sigmoid(rate * f))
    beta = sigmoid(linear(x, p["beta"]))
    o = memory(unit(split(q, 2)), unit(split(k, 2)), split(v, 4), a, beta, start_of(p))
    return join(rms_norm(o, p["out_norm"])) * sigmoid(low_rank(x, p["gate"]))


def kda_unbounded(p, x):
    q, k, v = (split(conv(linear(x, p[name]), p["conv"], name), 2) for name in "qkv")
    rate = np.exp(p["rate"]["rate_log"])[:, None]
    a = np.exp(-rate * softplus(split(low_rank(x, p["decay"]), 2) + p["rate"]["step_bias"]))
    o = memory(unit(q), unit(k), v, a, sigmoid(linear(x, p["beta"])))
    return join(rms_norm(o, p["out_norm"])) * sigmoid(low_rank(x, p["gate"]))


def linear_attention(p, x):
    """Hedgehog features, normalised: a weighted mean of the values so far."""

    def features(x, p):
        y = np.einsum("thk,hkj->thj", split(x, 2), p["kernel"][0]) + p["bias"][0]
        return softmax(np.concatenate([y, -y], axis=-1))

    q, k = features(linear(x, p["q"]), p["q_map"]), features(linear(x, p["k"]), p["k_map"])
    weights = np.tril(np.einsum("ihf,jhf->hij", q, k))
    weights /= weights.sum(axis=-1, keepdims=True)
    o = np.einsum("hij,jhv->ihv", weights, split(linear(x, p["v"]), 2))
    return join(rms_norm(o, p["out_norm"]))


def linear_attention_sum(p, x):
    """Features elu + 1 with a sum of 1."""

    def features(x):
        y = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
        return y / (y.sum(axis=-1, keepdims=True) + 1e-4)

    q, k, v = (split(linear(x, p[name]), 2) for name in "qkv")
    o = memory(features(q), features(k), v, np.ones((len(x), 2)))
    return join(rms_norm(o, p["out_norm"]))


def linear_attention_taylor(p, x):
    """Weights 1 + z + z^2 / 2 of z = q k / sqrt(K), without features; the start in their order."""
    q, k, v = (split(linear(x, p[name]), 4) for name in "qkv")
    z = np.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5
    weights = np.tril(1 + z + z**2 / 2)
    rows, columns = np.triu_indices(q.shape[-1])
    pairs = q[..., rows] * q[..., columns] * np.where(rows == columns, 0.5**0.5, 1)
    scaled = [np.ones_like(q[..., :1]), q * q.shape[-1] ** -0.25, pairs * q.shape[-1] ** -0.5]
    features = np.concatenate(scaled, axis=-1)
    o = np.einsum("hij,jhv->ihv", weights, v)
    o += np.einsum("thf,hfv->thv", features, start_of(p))
    return join(rms_norm(o * features.shape[-1] ** -0.5, p["out_norm"]))


def retnet(p, x):
    q, k, v = (split(linear(x, p[name]), 2) for name in "qkv")
    a = np.broadcast_to([1 - 2.0**-5, 1 - 2.0**-6], (len(x), 2))
    o = memory(rotate(q), rotate(k), v, a, start=start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


def gla(p, x):
    q, k, v = (split(linear(x, p[name]), 2) for name in "qkv")
    a = split(sigmoid(low_rank(x, p["decay"])) ** (1 / 16), 2)
    o = memory(q, k, v, a, start=start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


def hgrn(p, x):
    bound = sigmoid(p["forget_gate"]["bound"])
    a = bound + (1 - bound) * sigmoid(linear(x, p["forget"]))
    new = (1 - a) * silu(linear(x, p["input"]))
    h, states = p["start"]["value"], []
    for t in range(len(x)):
        h = a[t] * h + new[t]
        states.append(h)
    return rms_norm(np.stack(states), p["out_norm"]) * silu(linear(x, p["gate"]))


def hgrn2(p, x):
    bound = sigmoid(p["forget_gate"]["bound"])
    a = bound + (1 - bound) * sigmoid(linear(x, p["forget"]))
    q, v = silu(linear(x, p["q"])), linear(x, p["input"])
    o = memory(*(split(y, 4) for y in (q, 1 - a, v, a)), start=start_of(p))
    return rms_norm(join(o), p["out_norm"])


def mamba2(p, x):
    inner, b, c = (conv(linear(x, p[name]), p["conv"], name) for name in "xbc")
    dt = softplus(linear(x, p["step"]) + p["rate"]["step_bias"])
    a = np.exp(-np.exp(p["rate"]["rate_log"]) * dt)
    inner = split(inner, 4)
    v = dt[..., None] * inner
    o = memory(split(c, 1), split(b, 1), v, a, start=start_of(p), scale=1.0)
    o += p["skip"][:, None] * inner
    return rms_norm(join(o) * silu(linear(x, p["z"])), p["out_norm"])


def latent_attention(p, x):
    """YaRN for 8 times 64 tokens: pairs that turn 10.2, 1.02, 0.1 and 0.01 times over 64 tokens, between
    4 times (number 0.4, so 0) and once (number 1.01, so 2)."""
    slower = np.array([1, (1 + 1 / 8) / 2, 1 / 8, 1 / 8])
    q = split(linear(x, p["q"]), 2)
    latent, k_rope = np.split(linear(x, p["down"]), [12], axis=-1)
    up = split(linear(rms_norm(latent, p["latent_norm"]), p["up"]), 2)
    k_nope, v = np.split(up, [8], axis=-1)
    k_rope = np.broadcast_to(rotate(k_rope[:, None], slower=slower), (len(x), 2, 8))
    q = np.concatenate([q[..., :8], rotate(q[..., 8:], slower=slower)], axis=-1)
    scores = np.einsum("ihk,jhk->hij", q, np.concatenate([k_nope, k_rope], axis=-1)) / 16**0.5
    scores *= (0.1 * np.log(8) + 1) ** 2
    seen = np.tril(np.ones((len(x), len(x)), bool))
    return join(np.einsum("hij,jhv->ihv", softmax(np.where(seen, scores, -np.inf)), v))


FORMULAS = [
    *(attention_grouped, delta_net, delta_net_plain, gated_delta_net, gated_delta_net_plain, gla),
    *(hgrn, hgrn2, kda, kda_unbounded, latent_attention, linear_attention),
    *(linear_attention_taylor, mamba2, retnet),
]
MORE = [attention_no_rope, attention_window, delta_net_relu, linear_attention_sum]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "formula",
    [*FORMULAS, *(pytest.param(formula, marks=SLOW) for formula in MORE)],
    ids=lambda formula: formula.__name__,
)
def test_outputs_follow_the_published_formulas(formula, make_mixer):
    mixer = make_mixer(formula.__name__)
    x = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH), np.float32)
    got = np.asarray(mixer.forward(x)[0], np.float64)
    for row in range(2):
        want = formula(mixer.state, np.float64(x[row])) @ mixer.state["out"]["kernel"]
        error = np.sqrt(np.mean((got[row] - want) ** 2) / np.mean(want**2))
        assert error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "formula", [gated_delta_net, kda, kda_unbounded, mamba2], ids=lambda formula: formula.__name__
)
def test_gradients_follow_the_published_formulas(formula, make_mixer):
    """Of every parameter along a random direction: differences of the formula in float64."""
    mixer = make_mixer(formula.__name__)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, LENGTH, WIDTH), np.float32)
    weight = rng.standard_normal((LENGTH, WIDTH), np.float32)

    @jax.jit
    def gradient(state):
        def loss(state):
            return jnp.sum(weight * nnx.merge(mixer.graphdef, state)(x, Context())[0][0])

        return jax.grad(loss)(state)

    def total(leaves):
        state = tree.unflatten(leaves)
        return np.sum(weight * (formula(state, np.float64(x[0])) @ state["out"]["kernel"]))

    gradients = jax.tree_util.tree_leaves_with_path(gradient(mixer.state))
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, mixer.state))
    names = [jax.tree_util.keystr(path) for path, _ in gradients]
    assert {"['rate']['rate_log']", "['rate']['step_bias']"} <= set(names)
    for index, (name, (_, found)) in enumerate(zip(names, gradients)):
        direction = rng.standard_normal(found.shape)
        moved = []
        for step in (1e-5, -1e-5):
            moved.append(list(leaves))
            moved[-1][index] = leaves[index] + step * direction
        slope = (total(moved[0]) - total(moved[1])) / 2e-5
        error = abs(np.sum(found * direction) - slope)
        assert error < 1e-4 * np.linalg.norm(found), name
