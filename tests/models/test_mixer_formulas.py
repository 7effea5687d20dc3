"""Every mixer against its published formulas, written as NumPy loops over tokens, in float64."""

import numpy as np
import pytest

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


def conv(x, p, name):
    """y_t = silu(sum of the last taps inputs, zeros before the first)."""
    kernel = p[name]
    taps = len(kernel)
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    y = np.stack([np.sum(kernel * padded[t : t + taps], axis=0) for t in range(len(x))])
    return silu(y + p.get(f"{name}_bias", 0.0))


def split(x, num_heads):
    return x.reshape(len(x), num_heads, -1)


def join(x):
    return x.reshape(len(x), -1)


def rotate(x):
    """Channel i and i + half of each head turn by position * 10000 ** (-2 i / K)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
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


def gated_delta_net(p, x):
    q, k, v = (conv(linear(x, p[name]), p["conv"], name) for name in "qkv")
    rate, bias = p["rate"]["rate_log"], p["rate"]["step_bias"]
    a = np.exp(-np.exp(rate) * softplus(linear(x, p["decay"]) + bias))
    beta = sigmoid(linear(x, p["beta"]))
    o = memory(unit(split(q, 2)), unit(split(k, 2)), split(v, 4), a, beta, start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


def delta_net(p, x):
    q, k, v = (split(conv(linear(x, p[name]), p["conv"], name), 4) for name in "qkv")
    beta = 2 * sigmoid(linear(x, p["beta"]))
    o = memory(unit(q), unit(k), v, np.ones_like(beta), beta, start_of(p))
    return join(rms_norm(o, p["out_norm"])) * silu(linear(x, p["gate"]))


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
    q = split(linear(x, p["q"]), 2)
    latent, k_rope = np.split(linear(x, p["down"]), [12], axis=-1)
    up = split(linear(rms_norm(latent, p["latent_norm"]), p["up"]), 2)
    k_nope, v = np.split(up, [8], axis=-1)
    k_rope = np.broadcast_to(rotate(k_rope[:, None]), (len(x), 2, 4))
    q = np.concatenate([q[..., :8], rotate(q[..., 8:])], axis=-1)
    scores = np.einsum("ihk,jhk->hij", q, np.concatenate([k_nope, k_rope], axis=-1)) / 12**0.5
    seen = np.tril(np.ones((len(x), len(x)), bool))
    return join(np.einsum("hij,jhv->ihv", softmax(np.where(seen, scores, -np.inf)), v))


FORMULAS = [
    *(delta_net, gated_delta_net, gla, hgrn, hgrn2, kda, kda_unbounded, latent_attention),
    *(linear_attention, linear_attention_taylor, mamba2, retnet),
]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_outputs_follow_the_published_formulas(formula, make_mixer):
    mixer = make_mixer(formula.__name__)
    x = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH), np.float32)
    got = np.asarray(mixer.forward(x)[0], np.float64)
    for row in range(2):
        want = formula(mixer.state, np.float64(x[row])) @ mixer.state["out"]["kernel"]
        error = np.sqrt(np.mean((got[row] - want) ** 2) / np.mean(want**2))
        assert error < 1e-5
