"""Measures of a small model with a layer that does nothing, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.analysis import depth, layers, massive, sinks, sparsity
from effarch.models import build
from effarch.models.context import Context

D, DEPTH, IDLE, WORDS = 16, 3, 1, 11
ROUNDING = 1e-5
"""Two programs of one formula may differ by so much."""
PADDED = 2
"""Tokens at the end of the second row that are padding."""


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, WORDS, (2, 11)).astype(np.int32)
    segments = np.ones((2, 10), np.int32)
    segments[1, -PADDED:] = 0
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    weights = (segments != 0).astype(np.float32)
    shared = dict(segment_ids=segments, positions=positions, loss_weights=weights)
    return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], **shared)


def new_model(key):
    m = config.default().model
    m.width, m.depth, m.layers, m.init_std = D, DEPTH, "attention/mlp", 0.3
    m.blocks.attention.update(num_heads=2, rope=False)
    m.blocks.mlp.update(hidden=24, activation="relu")
    model = build.model(m, vocab_size=WORDS, rngs=nnx.Rngs(key))
    (stack,) = model.layers.values()
    for layer in (stack.mixer.out, stack.ffn.down):
        layer.kernel[...] = layer.kernel[...].at[IDLE].set(0)
    return model


@pytest.fixture(scope="module")
def found():
    """Everything in one program."""

    @jax.jit
    def run(key, batch):
        model = new_model(key)
        passes, first_BT = layers.passes(model, batch), sinks.first_tokens(batch)
        hs, ws = sparsity.hidden(model, batch)
        pairs = jnp.asarray([(0, 10), (IDLE, 10), (2, 10), (0, 5), (IDLE, 5), (0, 1)])
        return {
            "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            "passes": [(p.before, p.between, p.after) for p in passes],
            "added": depth.contributions(passes, batch),
            "lens": depth.logit_lens(model, passes, batch),
            "skips": jax.lax.map(
                lambda pair: depth.skip_effects(model, passes, batch, pair[0], pair[1]), pairs
            ),
            "sinks": sinks.measure(model, passes, batch),
            "first": first_BT,
            "ratios": massive.ratios(passes),
            "loss": model.loss(batch, Context(train=False))[0] / jnp.sum(batch["loss_weights"]),
            "hidden": (hs, ws),
            "cett": jax.lax.map(
                lambda target: sparsity.at_cett(model, batch, hs, ws, target),
                jnp.asarray([-1.0, 0.0, 0.1, 0.2, 0.4, 0.8]),
            ),
        }

    return jax.device_get(run(jax.random.key(0), batch()))


REAL = batch()["segment_ids"] != 0


def norm(x):
    return np.linalg.norm(x, axis=-1)


def test_the_pieces_make_the_model(found):
    """Taken apart and with nothing pruned, it has the loss of the whole."""
    assert found["cett"][0][0] == pytest.approx(found["loss"], rel=1e-5)


def test_contributions(found):
    """Of the idle layer exactly 0; the others as NumPy has them."""
    added = found["added"]
    assert added["layer"][IDLE] == added["mixer"][IDLE] == added["ffn"][IDLE] == 0
    for number, (before, between, after) in enumerate(found["passes"]):
        for name, change, onto in (
            ("mixer", between - before, before),
            ("ffn", after - between, between),
            ("layer", after - before, before),
        ):
            want = (norm(change) / norm(onto))[REAL].mean()
            assert added[name][number] == pytest.approx(want, rel=1e-5, abs=1e-7)
            if number != IDLE:
                cosine = (change * onto).sum(-1)[REAL] / (norm(change) * norm(onto))[REAL]
                assert added[f"{name}_cosine"][number] == pytest.approx(cosine.mean(), abs=1e-5)


def test_effective_depth():
    assert depth.effective_depth(jnp.asarray([5.0, 3.0, 1.0, 1.0])) == 2
    assert depth.effective_depth(jnp.asarray([1.0, 1.0, 1.0, 1.0])) == 4
    assert depth.effective_depth(jnp.asarray([0.0, 0.0, 1.0])) == 3


def test_skipping(found):
    """The idle layer is not missed; a skipped layer changes later layers, none before it."""
    skips = found["skips"]
    for row in (1, 4):
        for name in ("all", "future"):
            assert (skips[name][row] < ROUNDING).all()
            assert skips[f"{name}_output"][row] < ROUNDING
    assert skips["all"][0, 0] == 0 and skips["all"][0, 2] > 1e-3
    assert (skips["all"][2] == 0).all() and skips["all_output"][2] > 1e-3
    assert 0 < skips["future_output"][3] <= skips["all_output"][3]
    assert (skips["future"][0] == 0).all() and skips["future_output"][0] == 0  # no later one
    assert skips["all_output"][5] < ROUNDING  # position 0 is never skipped


def test_logit_lens(found):
    lens, params = found["lens"], found["params"]
    assert lens["kl"][-1] == 0 and lens["top5"][-1] == 1
    assert lens["kl"][IDLE] == lens["kl"][IDLE - 1] > 0

    def log_p(x):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        scores = x @ params["embed"]["table"].T
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    p, out = log_p(found["passes"][0][2]), log_p(found["passes"][-1][2])
    kl = (np.exp(p) * (p - out)).sum(-1)[REAL].mean()
    assert lens["kl"][0] == pytest.approx(kl, rel=1e-3)
    best = [np.argsort(-x[REAL], axis=-1)[:, :5] for x in (p, out)]
    common = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*best)])
    assert lens["top5"][0] == pytest.approx(common, abs=1e-6)


def test_massive_ratios(found):
    for number, passed in enumerate(found["passes"]):
        size = np.abs(passed[2]).reshape(2, -1)
        want = size.max(1).mean() / np.median(size, axis=1).mean()
        assert found["ratios"][number] == pytest.approx(want, rel=1e-5)


def test_attention_to_first_tokens(found):
    """Softmax by hand, and sinks by their definition: a channel of 1.25 rms or more at width 16."""
    assert found["first"].sum() == 2 and found["first"][:, 0].all()
    (stack,) = found["params"]["layers"].values()
    stream = x = found["passes"][2][0]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    q, k = (
        (x @ stack["mixer"][name]["kernel"][2]).reshape(2, 10, 2, 8).transpose(0, 2, 1, 3)
        for name in ("q", "k")
    )
    scores = np.where(np.tri(10, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(8), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    asks = REAL & ~found["first"]
    want = weights[..., 0].transpose(0, 2, 1)[asks].mean(0)
    np.testing.assert_allclose(found["sinks"][2]["first_share"], want, atol=1e-5)
    large = np.abs(stream) > 1.25 * np.sqrt((stream**2).mean(-1, keepdims=True))
    channels = large[:, 0].sum(0) >= 1  # half of two first tokens
    marked = (large & channels).any(-1)
    assert found["sinks"][2]["sink_channels"] == channels.sum() > 0
    want = np.einsum("bhqk,bk->bqh", weights, marked)[asks].mean(0)
    np.testing.assert_allclose(found["sinks"][2]["sink_share"], want, atol=1e-5)
    assert found["sinks"][2]["sink_tokens"] == pytest.approx((marked & REAL).mean())


@pytest.mark.parametrize("width", [256, 4096])
def test_a_sink_is_a_channel_with_a_quarter_of_the_energy(width):
    """|x_d| is then half of sqrt(D) rms; the other tokens, and other channels, are none."""
    x = np.ones((1, 6, width), np.float32)
    x[0, 0, 7] = np.sqrt((width - 1) / 3)
    x[0, 4, 7] = -1.2 * x[0, 0, 7]
    x[0, 5, 9] = 2 * x[0, 0, 7]  # large, but not what makes first tokens sinks
    first = np.arange(6)[None] == 0
    marked, channels = jax.device_get(jax.jit(sinks.sinks)(x, first))
    np.testing.assert_array_equal(marked[0], [1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(np.flatnonzero(channels), [7])


def test_cett(found):
    """eps by hand for one layer; the loss and the active share fall as the target rises."""
    losses, ratios = found["cett"]
    hs, ws = found["hidden"]
    real = REAL.reshape(-1)
    for layer in (0, 2):
        nonzero = (hs[layer] != 0)[real].mean()
        assert ratios[0, layer] == pytest.approx(nonzero, abs=1e-6)
        assert ratios[1, layer] <= nonzero + 1e-6  # p -> 0
        assert (np.diff(ratios[:, layer]) <= 1e-6).all()
    h, w = hs[2][real].astype(np.float64), ws[2].astype(np.float64)
    sizes = np.abs(h) * np.linalg.norm(w, axis=1)
    y = np.linalg.norm(h @ w, axis=1)
    error = lambda eps: (np.linalg.norm((h * (sizes < eps)) @ w, axis=1) / y).mean()  # noqa: E731
    grid = np.linspace(0, np.quantile(np.abs(hs[2]) * np.linalg.norm(ws[2], axis=1), 0.99), 65536)
    for target, ratio in ((0.2, ratios[3, 2]), (0.4, ratios[4, 2])):
        over = next(index for index in range(0, 65536, 64) if error(grid[index]) > target)
        low, high = sizes >= grid[over], sizes >= grid[over - 64]
        assert low.mean() - 1e-6 <= ratio <= high.mean() + 1e-6
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3)


def test_ppl_search():
    """Finds the CETT at which the perplexity is 1 % higher, of a loss that grows with it."""

    def measure(target):
        c = max(target, 0.0)
        return np.float32(2 + 0.3 * c**2), np.array([0.5 - 0.4 * c, 0.3 - 0.2 * c])

    got = sparsity.search(measure, 1.0)
    assert got["ppl_ratio"] == pytest.approx(1.01, abs=1e-3)
    assert got["cett"] == pytest.approx(np.sqrt(np.log(1.01) / 0.3), abs=1e-4)
    assert got["nonzero_ratio"] == pytest.approx([0.5, 0.3])
    assert got["active_ratio"] == pytest.approx([0.5 - 0.4 * got["cett"], 0.3 - 0.2 * got["cett"]])


def test_models_without_what_is_measured_say_so():
    m = config.default().model
    m.width, m.depth, m.layers = D, 1, "hgrn/moe"
    m.blocks.moe.update(num_experts=2, top_k=2, hidden=8)
    model = build.abstract(m, vocab_size=WORDS)
    with pytest.raises(ValueError, match="no layer of this model has softmax attention"):
        jax.eval_shape(lambda: sinks.measure(_zeros(model), [], batch()))
    with pytest.raises(ValueError, match="no feed-forward of this model ends in one product"):
        jax.eval_shape(lambda: sparsity.hidden(_zeros(model), batch()))


def _zeros(model):
    graphdef, state = nnx.split(model)
    arrays = nnx.to_pure_dict(state)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arrays))
