"""Parametrizations: the factors by hand, what stays at the base's own size, and coordinate checks."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, ffns, mixers
from effarch.scaling import coordinates, mup
from effarch.training import optimizers
from effarch.training import state as state_lib

HEAD_DIM = 16
MIXERS = {
    "attention": lambda width: dict(head_dim=HEAD_DIM, num_heads=width // HEAD_DIM),
    "delta_net": lambda width: dict(head_dim=HEAD_DIM),
    "gated_delta_net": lambda width: dict(
        head_dim=HEAD_DIM, num_heads=width // HEAD_DIM, expand_v=1.0
    ),
    "gla": lambda width: dict(num_heads=width // HEAD_DIM),
    "hgrn2": lambda width: dict(head_dim=HEAD_DIM),
    "kda": lambda width: dict(head_dim=HEAD_DIM),
    "latent_attention": lambda width: dict(
        num_heads=width // HEAD_DIM, latent_dim=width // 2, nope_dim=8, rope_dim=8, v_dim=16
    ),
    "linear_attention": lambda width: dict(num_heads=width // HEAD_DIM),
    "mamba2": lambda width: dict(head_dim=HEAD_DIM, state_dim=8),
    "retnet": lambda width: dict(num_heads=width // HEAD_DIM),
    "spark_attention": lambda width: dict(head_dim=HEAD_DIM, num_heads=width // HEAD_DIM),
}
"""Heads of one width in ever larger numbers."""
FFNS = {
    "glu": lambda width: dict(hidden=2 * width),
    "moe": lambda width: dict(num_experts=4, top_k=2, hidden=width, num_shared=1),
    "mole": lambda width: dict(num_experts=4, top_k=2, hidden=width, group_size=2),
    "latent_moe": lambda width: dict(num_experts=4, top_k=2, hidden=width, latent=width // 2),
    "blockffn": lambda width: dict(chunk_size=32),
    "spark_ffn": lambda width: dict(hidden=2 * width),
    "sparse_glu": lambda width: dict(hidden=2 * width),
}


def make(width: int, mixer: str = "attention", ffn: str = "glu", depth: int = 1):
    """A small model that learns one batch at a rate that is large for its size."""
    c = config.default()
    c.data.seq_len, c.data.batch_size = 32, 4
    c.model.width, c.model.depth, c.model.layers = width, depth, f"{mixer}/{ffn}"
    c.model.init_std = 0.1
    c.model.blocks[mixer].update(MIXERS.get(mixer, lambda width: {})(width))
    c.model.blocks[ffn].update(FFNS.get(ffn, lambda width: {})(width))
    c.optimizer.learning_rate, c.optimizer.schedule.kind = 1e-2, "constant"
    c.optimizer.schedule.warmup_steps = 0
    return c


def test_factors_of_a_model_four_times_as_wide_and_twice_as_deep():
    base, large = make(32, "gla", depth=2), make(128, "gla", depth=4)
    large.model.blocks.gla.num_heads = 8
    mup.apply(large, base, kind="depth_mup")
    half = 2**-0.5
    assert large.model.residual_scale == pytest.approx(half)
    assert large.model.logit_scale == pytest.approx(0.25)
    assert large.optimizer.adamw.eps == pytest.approx(1e-8 / 4 * half)
    rates, inits = (
        {text.split()[0]: text.split()[1:] for text in rules}
        for rules in (large.optimizer.rules, large.model.init_rules)
    )
    lr, decay = rates["layers/*/mixer/q/kernel"]
    assert float(lr.removeprefix("lr=")) == pytest.approx(0.25 * half)
    assert decay == "decay=4"
    assert inits["layers/*/mixer/q/kernel"] == ["0.5"]
    # 16 inputs at every width: only the depth counts
    assert rates["layers/*/mixer/decay/up/kernel"] == [f"lr={half:.9g}"]
    assert "layers/*/mixer/decay/up/kernel" not in inits
    assert rates["layers/*/ffn_residual/norm_in/scale"] == [f"lr={half:.9g}"]
    assert not any(path.startswith(("embed", "final_norm", "head")) for path in rates)
    plan = state_lib.blueprint(large.model, vocab_size=64)
    groups = optimizers.groups.assign(plan.params, large.optimizer.rules)
    by_path = {group.path.split("/", 2)[-1]: group for group in jax.tree.leaves(groups)}
    assert by_path["ffn/down/kernel"].lr == pytest.approx(0.25 * half)
    assert by_path["ffn/down/kernel"].decay == 4


def test_nothing_changes_at_the_base_and_depth_has_no_factor_in_mup():
    base = make(32, depth=2)
    for kind in mup.KINDS:
        same = make(32, depth=2)
        mup.apply(same, base, kind=kind)
        assert config.to_json(same) == config.to_json(base)
    deep = make(32, depth=8)
    mup.apply(deep, base, kind="mup")
    assert deep.model.residual_scale == 1.0 and deep.optimizer.rules == ()
    mup.apply(deep, base, kind="completep")
    assert deep.model.residual_scale == 0.25 and deep.optimizer.rules == ()
    with pytest.raises(ValueError, match="no layer of the base config has"):
        mup.apply(make(64, "retnet"), base)
    with pytest.raises(ValueError, match="parametrization='mupp' is not known"):
        mup.apply(deep, base, kind="mupp")


def test_what_has_a_start_of_its_own_is_not_scaled_again():
    """The start of a sigmoid router is uniform in +-1/sqrt(D), whatever init_std says."""
    base, large = make(32, ffn="moe"), make(128, ffn="moe")
    for c in (base, large):
        c.model.blocks.moe.router = "sigmoid_bias"
    mup.apply(large, base, kind="mup")
    inits = {text.split()[0].split("/", 2)[2] for text in large.model.init_rules}
    assert "ffn/experts/up" in inits and "ffn/router/kernel" not in inits
    assert any(text.startswith("layers/*/ffn/router/kernel lr=") for text in large.optimizer.rules)


@pytest.mark.parametrize(
    ("form", "start", "parts"),
    [
        # a whole matrix shrinks by a half, each factor by the root of it
        ("low_rank", {"down": 0.5**0.5, "up": 0.5**0.5}, {"down", "up"}),
        ("block_shuffle", {}, {"down", "up"}),  # orthogonal blocks shrink by themselves
        ("sltrain", {}, {"down", "sparse"}),  # the rank divides what `up` gives
    ],
)
def test_factors_of_a_matrix_four_times_as_wide(form, start, parts):
    base, large = (make(width, ffn="structured_mlp") for width in (32, 128))
    for c in (base, large):
        c.model.blocks.structured_mlp.form = form
    mup.apply(large, base, kind="mup")
    rates, inits = (
        {text.split()[0]: text.split()[1] for text in rules}
        for rules in (large.optimizer.rules, large.model.init_rules)
    )
    factor = "layers/*/ffn/up/structure/"
    assert {path.removeprefix(factor) for path in rates if path.startswith(factor)} == parts
    assert {rates[factor + part] for part in parts} == {"lr=0.25"}
    given = {part: float(inits[factor + part]) for part in parts if factor + part in inits}
    assert given == pytest.approx(start)


def test_wider_heads_get_another_scale():
    base, large = make(32), make(128)
    large.model.blocks.attention.update(head_dim=64, num_heads=2)
    mup.apply(large, base)
    assert large.model.blocks.attention.scale == pytest.approx(16**0.5 / 64)


def test_init_rules_multiply_fresh_parameters():
    c = make(16, depth=2).model

    @jax.jit
    def fresh(key):
        plain = build.model(c, vocab_size=8, rngs=nnx.Rngs(key))
        c.init_rules = ("embed/* 3", "layers/*/mixer/q/kernel 0.5", "layers/1/mixer/q/* 0")
        ruled = build.model(c, vocab_size=8, rngs=nnx.Rngs(key))
        c.init_rules = ()
        return [nnx.to_pure_dict(nnx.state(model)) for model in (plain, ruled)]

    plain, ruled = jax.device_get(fresh(jax.random.key(0)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # factors are folded
    close(ruled["embed"]["table"], 3 * plain["embed"]["table"])
    (old,), (new,) = plain["layers"].values(), ruled["layers"].values()
    old_q, new_q = old["mixer"]["q"]["kernel"], new["mixer"]["q"]["kernel"]
    close(new_q, old_q * np.array([0.5, 0])[:, None, None])
    np.testing.assert_array_equal(new["mixer"]["k"]["kernel"], old["mixer"]["k"]["kernel"])
    c.init_rules = ("layers/*/mixer/z 2",)
    with pytest.raises(ValueError, match="matches no parameter"):
        build.abstract(c, vocab_size=8)


def growth(mixer: str, ffn: str, widths, parametrized: bool) -> tuple[float, float]:
    """The largest spread over the widths of what a mixer or ffn adds, and how much logits grow."""
    records = []
    for width in widths:
        c = make(width, mixer, ffn)
        if parametrized:
            mup.apply(c, make(widths[0], mixer, ffn), kind="mup")
        records.append(coordinates.record(c))
    spreads = coordinates.spread(records)
    logits = [records[-1][step]["logits"] / records[0][step]["logits"] for step in records[0]]
    return max(spreads[key] for key in spreads if key[1] != "logits"), max(logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer, ffn",
    [
        ("attention", "glu"),
        *((mixer, "glu") for mixer in mixers.KINDS if mixer != "attention"),
        *(("attention", ffn) for ffn in ffns.KINDS if ffn != "glu"),
    ],
)
def test_coordinates_are_flat_under_mup_and_grow_without(mixer, ffn):
    parts, logits = growth(mixer, ffn, (32, 64, 128, 256), parametrized=True)
    assert parts < 2, parts
    assert logits < 2, logits  # they shrink: the random part of the head's sums does
    parts, _ = growth(mixer, ffn, (32, 256), parametrized=False)
    assert parts > 2, parts


def stream_changes(depth: int, kind: str | None) -> np.ndarray:
    """What each of four steps does to the stream; the base has two layers.

    The table is large beside what layers add and stands still, so that only layers are compared.
    With a table of 0.1 that trains, a step moved 16 layers 2.5 times as much as 2 under depth-muP
    (0.9 under CompleteP, 20 without factors).
    """
    configs = c, base = make(32, depth=depth), make(32, depth=2)
    for one in configs:
        one.model.embed_scale, one.model.scan = 10.0, "always"
        one.optimizer.learning_rate, one.optimizer.rules = 1e-3, ("embed/* lr=0",)
    if kind is not None:
        mup.apply(c, base, kind=kind)
    return np.array(coordinates.changes(c))


@pytest.mark.slow
def test_the_stream_changes_as_much_at_every_depth_and_in_proportion_without_factors():
    shallow = stream_changes(2, None)  # the base has no factors in any parametrization
    for kind in ("completep", "depth_mup"):
        growth = stream_changes(16, kind) / shallow
        assert (growth < 2).all() and (growth > 0.5).all(), (kind, growth)
    growth = stream_changes(16, None) / shallow
    assert (growth > 4).all(), growth  # eight times as many layers add alike
