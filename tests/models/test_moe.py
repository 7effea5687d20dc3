"""Mixture-of-experts layers against dense loops over experts: outputs, gradients, drops, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context
from effarch.models.ffns.experts import dispatch
from effarch.models.ffns.latent_moe import LatentMoe
from effarch.models.ffns.moe import Moe
from effarch.models.ffns.mole import Mole

B, T, D, E, F = 2, 24, 12, 8, 10


def make(kind, **options):
    """A module's static part and random arrays; state stays as it starts."""
    options = dict(num_experts=E, hidden=F, balance_coef=0.0) | options
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(D, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.5,
        nnx.to_pure_dict(nnx.filter_state(state, nnx.Param)),
    )
    router = nnx.to_pure_dict(nnx.filter_state(state, nnx.Not(nnx.Param)))["router"]
    router = {name: np.zeros(x.shape, x.dtype) for name, x in router.items()}
    return graphdef, params, {"router": router}


def run(module, x):
    """y, aux and the gradients of sum(y * cos(index)) with respect to x and all parameters."""
    graphdef, params, state = module
    g = np.cos(np.arange(x.size) ** 1.1).reshape(x.shape).astype(np.float32)

    @jax.jit
    def outputs(x, params):
        def loss(x, params):
            y, aux = nnx.merge(graphdef, params, state)(x, Context())
            return jnp.sum(y * g), (y, aux)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)

    return outputs(x, params)


def forward(module, x, segment_ids=None):
    """y and aux."""
    graphdef, params, state = module
    layer = jax.jit(lambda x, ctx: nnx.merge(graphdef, params, state)(x, ctx))
    return layer(x, Context(segment_ids=segment_ids))


def chosen_weights(params, x, top_k):
    """Softmax scores of the best `top_k` experts, made to sum to 1; zeros elsewhere."""
    s = jax.nn.softmax(x @ params["router"]["kernel"])
    hot = jnp.sum(jax.nn.one_hot(jnp.argsort(-s, axis=-1)[..., :top_k], E), axis=-2)
    return s * hot / jnp.sum(s * hot, axis=-1, keepdims=True)


def dense(params, x, *, top_k, keep=1.0, act=jax.nn.silu):
    """Every expert on every token, weighted by what the router chose."""
    e, w = params["experts"], chosen_weights(params, x, top_k) * keep
    up = jnp.einsum("btd,edf->btef", x, e["up"])
    h = act(jnp.einsum("btd,edf->btef", x, e["gate"])) * up if "gate" in e else act(up)
    return jnp.einsum("bte,btef,efd->btd", w, h, e["down"])


def inputs(rows=B):
    return np.random.default_rng(1).standard_normal((rows, T, D)).astype(np.float32)


def oracle_gradients(function, params, x):
    g = np.cos(np.arange(x.size) ** 1.1).reshape(x.shape).astype(np.float32)

    @jax.jit
    def both(x, params):
        def loss(x, params):
            y = function(params, x)
            return jnp.sum(y * g), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)

    return both(x, params)


def assert_equal(got, want, tolerance=2e-5):
    for path, b in jax.tree_util.tree_leaves_with_path(want):
        a = functools.reduce(
            lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", 0))], path, got
        )
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-7, path


def test_the_standard_layer_equals_a_dense_loop():
    """Shared experts included; with E = 8 of 48 tokens some experts have few rows."""
    module = make(Moe, top_k=2, num_shared=2)
    x = inputs()

    def oracle(params, x):
        s = params["shared"]
        h = jax.nn.silu(x @ s["gate"]["kernel"]) * (x @ s["up"]["kernel"])
        return dense(params, x, top_k=2) + h @ s["down"]["kernel"]

    grads, (y, aux) = run(module, x)
    want_grads, want_y = oracle_gradients(oracle, module[1], x)
    assert_equal((y, grads), (want_y, want_grads))
    assert aux["metric/dropped"] == 0
    assert aux["count/expert_tokens"].sum() == B * T * 2


def test_one_expert_for_all_and_none_for_the_others():
    """Empty experts get exactly no gradient."""
    module = make(Moe, top_k=1, router="softmax_topk")
    module[1]["router"]["kernel"][:] = 0
    module[1]["router"]["kernel"][:, 3] = 5.0
    x = np.abs(inputs())
    grads, (y, aux) = run(module, x)
    e = jax.tree.map(lambda w: w[3], module[1]["experts"])
    p = jax.nn.softmax(x @ module[1]["router"]["kernel"])[..., 3, None]
    want = p * ((jax.nn.silu(x @ e["gate"]) * (x @ e["up"])) @ e["down"])
    np.testing.assert_allclose(y, want, atol=2e-5)
    for grad in jax.tree.leaves(grads[1]["experts"]):
        assert np.all(np.delete(grad, 3, axis=0) == 0)
        assert np.abs(grad[3]).max() > 0
    np.testing.assert_allclose(aux["metric/max_vio"], E - 1, rtol=1e-6)
    np.testing.assert_allclose(aux["metric/load_entropy"], 0, atol=1e-6)


def test_capacity_drops_the_last_tokens_and_says_how_many():
    factor, top_k = 0.75, 2
    module = make(Moe, top_k=top_k, capacity_factor=factor)
    x = inputs()
    grads, (y, aux) = run(module, x)
    z = (x @ module[1]["router"]["kernel"]).reshape(-1, E)
    order = np.argsort(-z, axis=-1, kind="stable")[:, :top_k]
    capacity, taken = int(np.ceil(factor * B * T * top_k / E)), np.zeros(E, int)
    keep = np.zeros((B * T, E), np.float32)
    for n in range(B * T):
        for e in order[n]:
            keep[n, e] = taken[e] < capacity
            taken[e] += 1
    dropped = np.maximum(taken - capacity, 0).sum()
    assert dropped > 0
    np.testing.assert_allclose(aux["metric/dropped"], dropped / (B * T * top_k), rtol=1e-6)
    kept = keep.reshape(B, T, E)
    oracle = functools.partial(dense, top_k=top_k, keep=kept)
    want_grads, want_y = oracle_gradients(oracle, module[1], x)
    assert_equal((y, grads), (want_y, want_grads))


def test_a_capacity_of_all_choices_drops_nothing():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, (32, 1)))
    plan = dispatch.fixed(ids, 4, dispatch.capacity(ids, 4, factor=4.0))
    assert plan.is_sent.all()


def test_plans_are_inverse_and_sorted():
    rng = np.random.default_rng(0)
    for ids in (rng.integers(0, 9, (40, 3)), np.full((40, 3), 8), np.zeros((40, 3), int)):
        plan = jax.tree.map(np.asarray, dispatch.dropless(jnp.asarray(ids), 8))
        rows = np.full(len(plan.choices_M), -1)
        for choice, slot in enumerate(plan.slots_NK.ravel()):
            if ids.ravel()[choice] == 8:
                assert slot == len(rows)
            else:
                assert plan.choices_M[slot] == choice
                rows[slot] = ids.ravel()[choice]
        assert np.all((plan.choices_M == ids.size) == (rows == -1))
        ends = np.cumsum(plan.group_sizes_E)
        for row in np.flatnonzero(rows >= 0):
            assert ends[rows[row]] - plan.group_sizes_E[rows[row]] <= row < ends[rows[row]]


def test_padding_goes_to_no_expert():
    module = make(Moe, top_k=2)
    x = inputs()
    segments = np.ones((B, T), np.int32)
    segments[0, 15:], segments[1, :3] = 0, 0
    y, aux = forward(module, x, segments)
    want = dense(module[1], x, top_k=2)
    np.testing.assert_allclose(y[segments > 0], want[segments > 0], atol=2e-5)
    assert np.all(np.asarray(y)[segments == 0] == 0)
    assert aux["count/expert_tokens"].sum() == 2 * segments.sum()


def test_latent_moe_runs_its_experts_in_the_latent():
    module = make(LatentMoe, top_k=3, latent=6, is_gated=False, activation="relu2")
    x = inputs()

    def oracle(params, x):
        z = x @ params["project_in"]["kernel"]
        h = jnp.maximum(jnp.einsum("btd,edf->btef", z, params["experts"]["up"]), 0) ** 2
        w = chosen_weights(params, x, 3)
        y = jnp.einsum("bte,btef,efd->btd", w, h, params["experts"]["down"])
        return y @ params["project_out"]["kernel"]

    grads, (y, _) = run(module, x)
    want_grads, want_y = oracle_gradients(oracle, module[1], x)
    assert_equal((y, grads), (want_y, want_grads))


@pytest.mark.parametrize(
    ("factor", "tie_in"),
    [
        ("up_gate", False),
        ("all", True),
        pytest.param("up_gate", True, marks=(pytest.mark.slow, pytest.mark.ci)),
        pytest.param("all", False, marks=(pytest.mark.slow, pytest.mark.ci)),
    ],
)
def test_mole_equals_a_standard_layer_of_its_products(factor, tie_in):
    """W_i = B_(i // size) A_i for the way in, and in version 2 A_i B_(i // size) for the way out."""
    size = 2
    options = dict(top_k=3, latent=5, group_size=size, factor=factor, tie_in=tie_in)
    module = make(Mole, **options)
    x = inputs()

    def oracle(params, x):
        e = params["experts"]
        group = np.arange(E) // size
        b_gate = e["latent_in"] if tie_in else e["latent_gate"]
        b_up = e["latent_in"] if tie_in else e["latent_up"]
        products = {
            "gate": jnp.einsum("edl,elf->edf", b_gate[group], e["gate"]),
            "up": jnp.einsum("edl,elf->edf", b_up[group], e["up"]),
            "down": e["down"],
        }
        if factor == "all":
            products["down"] = jnp.einsum("efl,eld->efd", e["down"], e["latent_out"][group])
        return dense({"router": params["router"], "experts": products}, x, top_k=3)

    grads, (y, aux) = run(module, x)
    want_grads, want_y = oracle_gradients(oracle, module[1], x)
    assert_equal((y, grads), (want_y, want_grads), tolerance=1e-4)
    z = (x @ module[1]["router"]["kernel"]).reshape(-1, E)
    chosen = np.argsort(-z, axis=-1)[:, :3] // size
    distinct = np.mean([len(set(row)) for row in chosen])
    np.testing.assert_allclose(aux["metric/latent_groups"], distinct, rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    x = inputs()
    want = dense(make(Moe, top_k=2)[1], x, top_k=2)
    got, _ = forward(make(Moe, top_k=2, dtype=jnp.bfloat16), x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    close = np.abs(got.astype(np.float32) - want).max(-1) < 2e-2 * np.abs(want).max()
    assert close.mean() > 0.95  # rounded inputs change a few choices


BAD = [
    (Moe, dict(top_k=9), r"moe.top_k=9 must be from 1 to num_experts=8"),
    (Moe, dict(top_k=1), r"router='softmax_topk_renorm' with top_k=1"),
    (Moe, dict(bias_rate=1e-3), r"moe.bias_rate=0.001 needs a router with a bias"),
    (Moe, dict(router="sigmod_bias"), r"Did you mean 'sigmoid_bias'"),
    (Moe, dict(num_groups=3), r"moe.num_groups=3 does not divide num_experts=8"),
    (Moe, dict(top_k=3, num_groups=4), r"moe.top_groups=1 of 4 groups .* use from 2 to 4"),
    (Moe, dict(balance_scope="row"), r"moe.balance_scope='row' is not known"),
    (Moe, dict(balance_scaling="hff"), r"Did you mean 'hf'"),
    (Moe, dict(capacity_factor=0.0), r"moe.capacity_factor=0.0 must be above 0"),
    (Moe, dict(top_k_schedule=((9, 2), (5, 1))), r"moe.top_k_schedule=.*increasing"),
    (Moe, dict(activation="swish"), r"moe.activation='swish' is not known"),
    (Mole, dict(group_size=3), r"mole.group_size=3 does not divide num_experts=8"),
    (Mole, dict(latent=13), r"mole.latent=13 must be from 1 to 12"),
    (Mole, dict(factor="both"), r"mole.factor='both' is not known"),
    (LatentMoe, dict(latent=13), r"latent_moe.latent=13 must be from 1 to model.width=12"),
    (LatentMoe, dict(latent=0), r"latent_moe.latent=0 must be from 1"),
    (Moe, dict(hidden=0), r"moe.hidden=0 must be at least 1"),
    (Moe, dict(num_shared=-1), r"moe.num_shared=-1 must be 0"),
    (Moe, dict(shared_gate=True), r"moe.shared_gate=True .* num_shared=0; use"),
    (Moe, dict(num_groups=0), r"moe.num_groups=0 does not divide"),
    (Moe, dict(bias_rate=-1e-3, router="sigmoid_bias"), r"moe.bias_rate=-0.001 and .* 0 or above"),
    (Moe, dict(z_coef=-1.0), r"moe.z_coef=-1.0 must be above 0, or 0"),
    (Moe, dict(top1_temperature=0.0), r"moe.top1_temperature=0.0 must be above 0"),
    (Moe, dict(backend="cuda"), r"moe.backend='cuda' is not known"),
    (Moe, dict(top_k_schedule=((5, 1),)), r"moe.top_k_schedule=.* a phase of one expert"),
    (Moe, dict(top_k_schedule=((5, 4),), num_groups=4), r"top_k_schedule=.* groups hold 2; use at"),
    (Moe, dict(exchange="rings"), r"moe.exchange='rings' .* Did you mean 'ring'"),
    (Mole, dict(exchange="ring"), r"mole.exchange='ring' would send"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_bad_options_are_one_sentence(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)
