"""Families without golden files: random tensors under their published names, a forward pass in numpy.

The numpy code follows the published descriptions token by token and knows nothing of effarch.
"""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from effarch.convert.hf import weights
from effarch.models.context import Context

WORDS, WIDTH, LENGTH, HIDDEN = 20, 16, 7, 24


def rms(x, w, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def glu(t, prefix, x, act=silu):
    gate, up, down = (t[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def rope_halves(x, theta=1e4):
    """[T,H,K], channel i turned with channel i + K/2."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def rope_pairs(x, slower, theta=1e4):
    """[T,H,K], channel 2i turned with channel 2i + 1, its angle times `slower`."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half) * slower
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q, k, v, scale, softcap=None, window=None):
    out = np.zeros((len(q), q.shape[1], v.shape[-1]))
    ratio = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(q.shape[1]):
            s = k[first : t + 1, h // ratio] @ q[t, h] * scale
            s = softcap * np.tanh(s / softcap) if softcap else s
            p = np.exp(s - s.max())
            out[t, h] = p / p.sum() @ v[first : t + 1, h // ratio]
    return out.reshape(len(q), -1)


def heads(t, name, x, count):
    return (x @ t[f"{name}.weight"].T).reshape(len(x), count, -1)


def glu_shapes(prefix, hidden=HIDDEN):
    wide, narrow = (hidden, WIDTH), (WIDTH, hidden)
    return {
        f"{prefix}.gate_proj.weight": wide,
        f"{prefix}.up_proj.weight": wide,
        f"{prefix}.down_proj.weight": narrow,
    }


GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": HIDDEN,
    "query_pre_attn_scalar": 12,
    "sliding_window": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "vocab_size": WORDS,
}


def gemma2_shapes(c):
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        for side in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{p}.{side}_layernorm.weight"] = (WIDTH,)
        for name, rows in (("q", 32), ("k", 16), ("v", 16)):
            shapes[f"{p}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        shapes[f"{p}.self_attn.o_proj.weight"] = (WIDTH, 32)
        shapes |= glu_shapes(f"{p}.mlp")
    return shapes


def gemma2(c, t, ids):
    x = t["model.embed_tokens.weight"][ids] * WIDTH**0.5
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"

        def norm(y, side, p=p):
            return rms(y, 1 + t[f"{p}.{side}_layernorm.weight"])

        h = norm(x, "input")
        q, k, v = (
            heads(t, f"{p}.self_attn.{name}_proj", h, count)
            for name, count in (("q", 4), ("k", 2), ("v", 2))
        )
        window = None if layer % 2 else c["sliding_window"]
        o = attend(rope_halves(q), rope_halves(k), v, 12**-0.5, softcap=2.0, window=window)
        x = x + norm(o @ t[f"{p}.self_attn.o_proj.weight"].T, "post_attention")
        y = glu(t, f"{p}.mlp", norm(x, "pre_feedforward"), gelu_tanh)
        x = x + norm(y, "post_feedforward")
    x = rms(x, 1 + t["model.norm.weight"])
    return 3.0 * np.tanh(x @ t["model.embed_tokens.weight"].T / 3.0)


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": HIDDEN,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "vocab_size": WORDS,
}
# Pair 0 turns 652 times over 4096 tokens and stays, pair 1 turns 6.5 times: number 0.65 (so 0) turns 32
# times, number 1.4 (so 2) once, and 1 lies half-way.
SLOWER = np.array([1, (1 + 1 / 40) / 2])


def deepseek_shapes(c):
    shapes = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (WORDS, WIDTH),
    }
    for layer in range(2):
        p = f"model.layers.{layer}"
        shapes |= {
            f"{p}.input_layernorm.weight": (WIDTH,),
            f"{p}.post_attention_layernorm.weight": (WIDTH,),
            f"{p}.self_attn.q_a_proj.weight": (10, WIDTH),
            f"{p}.self_attn.q_a_layernorm.weight": (10,),
            f"{p}.self_attn.q_b_proj.weight": (2 * 10, 10),
            f"{p}.self_attn.kv_a_proj_with_mqa.weight": (12 + 4, WIDTH),
            f"{p}.self_attn.kv_a_layernorm.weight": (12,),
            f"{p}.self_attn.kv_b_proj.weight": (2 * 11, 12),
            f"{p}.self_attn.o_proj.weight": (WIDTH, 10),
        }
    shapes |= glu_shapes("model.layers.0.mlp")
    p = "model.layers.1.mlp"
    shapes |= {f"{p}.gate.weight": (8, WIDTH), f"{p}.gate.e_score_correction_bias": (8,)}
    for expert in range(8):
        shapes |= glu_shapes(f"{p}.experts.{expert}", 8)
    shapes |= glu_shapes(f"{p}.shared_experts", 16)
    shapes["model.layers.2.eh_proj.weight"] = (3, 3)  # predicts further tokens: no part of it
    return shapes


def deepseek_moe(t, p, x):
    y = glu(t, f"{p}.shared_experts", x)
    for token, row in enumerate(x):
        scores = sigmoid(t[f"{p}.gate.weight"] @ row)
        choice = scores + t[f"{p}.gate.e_score_correction_bias"]
        groups = [np.sort(choice[2 * g : 2 * g + 2])[-2:].sum() for g in range(4)]
        allowed = [e for g in np.argsort(groups)[-2:] for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:3]
        for expert in chosen:
            weight = 2.5 * scores[expert] / scores[chosen].sum()
            y[token] += weight * glu(t, f"{p}.experts.{expert}", row[None])[0]
    return y


def deepseek(c, t, ids):
    x = t["model.embed_tokens.weight"][ids]
    for layer in range(2):
        p = f"model.layers.{layer}"
        h = rms(x, t[f"{p}.input_layernorm.weight"])
        a = f"{p}.self_attn"
        low = rms(h @ t[f"{a}.q_a_proj.weight"].T, t[f"{a}.q_a_layernorm.weight"])
        q = heads(t, f"{a}.q_b_proj", low, 2)
        both = h @ t[f"{a}.kv_a_proj_with_mqa.weight"].T
        latent = rms(both[:, :12], t[f"{a}.kv_a_layernorm.weight"])
        kv = heads(t, f"{a}.kv_b_proj", latent, 2)
        shared = np.repeat(rope_pairs(both[:, None, 12:], SLOWER), 2, axis=1)
        q = np.concatenate([q[..., :6], rope_pairs(q[..., 6:], SLOWER)], -1)
        k = np.concatenate([kv[..., :6], shared], -1)
        sharp = 10**-0.5 * (0.1 * np.log(40) + 1) ** 2
        x = x + attend(q, k, kv[..., 6:], sharp) @ t[f"{a}.o_proj.weight"].T
        h = rms(x, t[f"{p}.post_attention_layernorm.weight"])
        x = x + (deepseek_moe(t, f"{p}.mlp", h) if layer else glu(t, f"{p}.mlp", h))
    return rms(x, t["model.norm.weight"]) @ t["lm_head.weight"].T


FLA = {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": WORDS, "norm_eps": 1e-5}
FLA |= {"intermediate_size": HIDDEN, "hidden_act": "swish"}
DELTA_NET = {**FLA, "model_type": "delta_net", "num_heads": 2, "use_gate": True}
GATED = {**FLA, "model_type": "gated_deltanet", "num_heads": 2, "num_v_heads": 4, "head_dim": 4}
GATED |= {"expand_v": 1.5}
GLA = {**FLA, "model_type": "gla", "num_heads": 2, "expand_k": 0.5, "expand_v": 1}


def fla_shapes(keys, values, more):
    p = "model.layers.0"
    shapes = {
        "model.embeddings.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (WORDS, WIDTH),
        f"{p}.attn_norm.weight": (WIDTH,),
        f"{p}.mlp_norm.weight": (WIDTH,),
        f"{p}.attn.q_proj.weight": (keys, WIDTH),
        f"{p}.attn.k_proj.weight": (keys, WIDTH),
        f"{p}.attn.v_proj.weight": (values, WIDTH),
        f"{p}.attn.g_proj.weight": (values, WIDTH),
        f"{p}.attn.o_proj.weight": (WIDTH, values),
    }
    return shapes | glu_shapes(f"{p}.mlp") | {f"{p}.attn.{k}": shape for k, shape in more.items()}


def conv_shapes(keys, values):
    sizes = {"q": keys, "k": keys, "v": values}
    return {f"{name}_conv1d.weight": (size, 1, 4) for name, size in sizes.items()}


def convolved(t, p, name, h):
    """Tap 3 is the current token's."""
    x, w = h @ t[f"{p}.{name}_proj.weight"].T, t[f"{p}.{name}_conv1d.weight"][:, 0]
    padded = np.concatenate([np.zeros((3, x.shape[1])), x])
    return silu(sum(padded[tap : tap + len(x)] * w[:, tap] for tap in range(4)))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def fla_model(t, ids, mixer):
    x = t["model.embeddings.weight"][ids]
    p = "model.layers.0"
    x = x + mixer(t, f"{p}.attn", rms(x, t[f"{p}.attn_norm.weight"], 1e-5))
    x = x + glu(t, f"{p}.mlp", rms(x, t[f"{p}.mlp_norm.weight"], 1e-5))
    return rms(x, t["model.norm.weight"], 1e-5) @ t["lm_head.weight"].T


def read_out(t, p, h, o, norm):
    """The normed and gated output of heads [T,H,V]."""
    gate = silu(h @ t[f"{p}.g_proj.weight"].T)
    return (rms(o, t[f"{p}.{norm}.weight"], 1e-5).reshape(len(h), -1) * gate) @ t[
        f"{p}.o_proj.weight"
    ].T


def delta_mixer(t, p, h, decay, k_heads, v_heads):
    q, k, v = (convolved(t, p, name, h) for name in "qkv")
    q, k = (unit(y.reshape(len(h), k_heads, -1)) for y in (q, k))
    v = v.reshape(len(h), v_heads, -1)
    beta = sigmoid(h @ t[f"{p}.b_proj.weight"].T)
    o = np.zeros_like(v)
    for head in range(v_heads):
        own = head // (v_heads // k_heads)
        state = np.zeros((q.shape[-1], v.shape[-1]))
        for i in range(len(h)):
            state = state * decay[i, head]
            error = v[i, head] - state.T @ k[i, own]
            state = state + beta[i, head] * np.outer(k[i, own], error)
            o[i, head] = state.T @ q[i, own] * q.shape[-1] ** -0.5
    return read_out(t, p, h, o, "o_norm")


def delta_net(c, t, ids):
    def mixer(t, p, h):
        return delta_mixer(t, p, h, np.ones((len(h), 2)), 2, 2)

    return fla_model(t, ids, mixer)


def gated_delta_net(c, t, ids):
    def mixer(t, p, h):
        step = np.log1p(np.exp(h @ t[f"{p}.a_proj.weight"].T + t[f"{p}.dt_bias"]))
        return delta_mixer(t, p, h, np.exp(-np.exp(t[f"{p}.A_log"]) * step), 2, 4)

    return fla_model(t, ids, mixer)


def gla(c, t, ids):
    def mixer(t, p, h):
        q, k, v = (heads(t, f"{p}.{name}_proj", h, 2) for name in "qkv")
        low = h @ t[f"{p}.gk_proj.0.weight"].T @ t[f"{p}.gk_proj.1.weight"].T
        gate = sigmoid(low + t[f"{p}.gk_proj.1.bias"]).reshape(len(h), 2, -1) ** (1 / 16)
        o = np.zeros_like(v)
        for head in range(2):
            state = np.zeros((4, 8))
            for i in range(len(h)):
                state = state * gate[i, head][:, None] + np.outer(k[i, head], v[i, head])
                o[i, head] = state.T @ q[i, head] * 4**-0.5
        return read_out(t, p, h, o, "g_norm_swish_gate")

    return fla_model(t, ids, mixer)


MODELS = {
    "gemma2": (GEMMA2, gemma2_shapes(GEMMA2), gemma2),
    "deepseek_v3": (DEEPSEEK, deepseek_shapes(DEEPSEEK), deepseek),
    "delta_net": (
        DELTA_NET,
        fla_shapes(16, 16, conv_shapes(16, 16) | {"b_proj.weight": (2, 16), "o_norm.weight": (8,)}),
        delta_net,
    ),
    "gated_deltanet": (
        GATED,
        fla_shapes(
            8,
            24,
            conv_shapes(8, 24)
            | {"a_proj.weight": (4, 16), "b_proj.weight": (4, 16), "o_norm.weight": (6,)}
            | {"A_log": (4,), "dt_bias": (4,)},
        ),
        gated_delta_net,
    ),
    "gla": (
        GLA,
        fla_shapes(
            8,
            16,
            {"gk_proj.0.weight": (16, 16), "gk_proj.1.weight": (8, 16), "gk_proj.1.bias": (8,)}
            | {"g_norm_swish_gate.weight": (8,)},
        ),
        gla,
    ),
}
_SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "deepseek_v3",
        "gated_deltanet",
        pytest.param("delta_net", marks=_SLOW),
        pytest.param("gla", marks=_SLOW),
    ],
)
def test_logits_equal_those_of_the_published_form(name, tmp_path):
    content, shapes, forward = MODELS[name]
    rng = np.random.default_rng(0)
    arrays = {key: 0.5 * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(content))
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    ids = rng.integers(0, WORDS, LENGTH)
    graphdef, state = nnx.split(weights.load(tmp_path))

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, Context())[0])

    got = np.asarray(logits(state, ids[None].astype(np.int32)))[0]
    exact = {key: array.astype(np.float64) for key, array in arrays.items()}
    wanted = forward(content, exact, ids)
    # float32 against float64 through a few layers of order-one activations
    np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())
