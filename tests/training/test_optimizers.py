"""Optimizers: groups by logical axes, rules by public path, updates against independent ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from effarch.models import parameters
from effarch.training import optimizers
from effarch.training.optimizers import groups, state_paths

LAYERS, EXPERTS = 3, 2
STACKS = {"scanned": ("0+2x2", "1"), "unscanned": tuple(map(str, range(LAYERS)))}
# One layer's parameters: logical axes, shape, decay.
LAYER = {
    "ffn/up/kernel": (("embed", "ffn"), (8, 12), True),
    "ffn/down/kernel": (("ffn", "embed"), (12, 8), True),
    "ffn/experts/up": (("experts", "embed", "ffn"), (EXPERTS, 8, 12), True),
    "mixer/decay_log": (("heads",), (8,), False),
}
OUTSIDE = {
    "embedding/table": (("vocab", "embed"), (12, 8), True),
    "final_norm/scale": (("embed",), (8,), False),
}
RULES = (
    "layers/*/mixer/decay_log lr=0.1 decay=1",
    "embedding/** lr=2 decay=0",
    "layers/2/** lr=0.5",
    "layers/2/ffn/** decay=0",
    "layers/0/** frozen=1",
    "final_norm/scale frozen=1",
    "**/down/kernel optimizer=adamw",
)


SMALL = ("adam8bit", "coat")  # of small states: test_optimizer_small_states.py
SMALL += ("dct_adamw", "galore", "trion")  # of low rank: test_optimizer_low_rank.py
FLOAT32 = [kind for kind in optimizers.KINDS if kind not in SMALL]
ALL = [*FLOAT32, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SMALL)]


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameters.path_of(key_path): leaf for key_path, leaf in leaves}


def describe(layout):
    infos = {}
    for stack in STACKS[layout]:
        for tail, (logical, shape, decay) in LAYER.items():
            path = f"layers/{stack}/{tail}"
            public = parameters.public_paths(path)
            axes, sizes = ("layers", *logical), (len(public), *shape)
            infos[path] = parameters.ParamInfo(path, public, axes, sizes, decay)
    for path, (logical, shape, decay) in OUTSIDE.items():
        infos[path] = parameters.ParamInfo(path, (path,), logical, shape, decay)
    return traverse_util.unflatten_dict(infos, sep="/")


def random_arrays(layout, seed):
    """Arrays that depend on the public path and the seed, so that both layouts hold the same."""

    def one(path, shape):
        key = [seed, *path.encode()]
        return np.random.default_rng(key).normal(0, 1, shape).astype(np.float32)

    def array(info):
        layers = [one(path, info.shape[1:]) for path in info.public_paths]
        return np.stack(layers) if info.logical[0] == "layers" else one(info.path, info.shape)

    return jax.tree.map(array, describe(layout))


def by_public_path(layout, tree):
    """Each single layer's part, broadcast to the parameter's shape, under its public path."""
    values = flat(tree)
    parts = {}
    for path, info in flat(describe(layout)).items():
        if info.logical[0] == "layers":
            rows = np.broadcast_to(np.asarray(values[path]), info.shape)
            parts.update(zip(info.public_paths, rows, strict=True))
        else:
            parts[path] = np.broadcast_to(np.asarray(values[path]), info.shape)
    return parts


def build(kind, layout="scanned", rules=(), clip_norm=0.0, schedule=1e-2, **options):
    options |= dict(schedule=schedule, clip_norm=clip_norm, rules=rules)
    return optimizers.build(kind, infos=describe(layout), **options)


def run(optimizer, layout, steps=3):
    """The parameters after `steps` updates with fixed random gradients.

    Not compiled as a whole: the small operations compile once for all tests.
    """
    params = random_arrays(layout, seed=0)
    state = optimizer.init(params)
    for index in range(steps):
        grads = random_arrays(layout, seed=1 + index)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


# Groups and rules.


def test_scanned_and_unscanned_models_have_the_same_groups():
    tables = {}
    for layout in STACKS:
        assigned = groups.assign(describe(layout), RULES)
        tables[layout] = {
            name: by_public_path(layout, jax.tree.map(lambda g, n=name: getattr(g, n), assigned))
            for name in ("kind", "lr", "decay", "frozen")
        }
    for name, scanned in tables["scanned"].items():
        unscanned = tables["unscanned"][name]
        assert scanned.keys() == unscanned.keys()
        for path in scanned:
            np.testing.assert_array_equal(scanned[path], unscanned[path], err_msg=f"{name} {path}")


def test_rules_set_what_they_name_and_later_ones_win():
    assigned = flat(groups.assign(describe("scanned"), RULES))
    decay_log = assigned["layers/0+2x2/mixer/decay_log"]
    assert decay_log.lr.shape == decay_log.frozen.shape == (2, 1)
    np.testing.assert_allclose(decay_log.lr.ravel(), [0.1, 0.5])
    np.testing.assert_array_equal(decay_log.frozen.ravel(), [True, False])
    assert decay_log.decay == 1.0
    np.testing.assert_array_equal(assigned["layers/0+2x2/ffn/up/kernel"].decay.ravel(), [1, 0])
    assert (assigned["embedding/table"].lr, assigned["embedding/table"].decay) == (2.0, 0.0)
    assert assigned["layers/1/ffn/down/kernel"].optimizer == "adamw"
    assert assigned["final_norm/scale"].is_frozen
    last = groups.assign(describe("scanned"), (*RULES, "** frozen=0 lr=3"))
    assert all(g.lr == 3 and g.frozen is False for g in flat(last).values())


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layers/*/ffn/*/kernel", 2 * LAYERS),
        ("layers/**/kernel", 2 * LAYERS),
        ("**/decay_log", LAYERS),
        ("**", 4 * LAYERS + 2),
        ("layers/1/ffn/*", 0),
        ("layers/1/ffn/**", 3),
        ("layers/**/ffn/**/kernel", 2 * LAYERS),
        ("embedding/t*e", 1),
        ("embedding", 0),
    ],
)
def test_globs(pattern, count):
    rule = groups.parse_rule(f"{pattern} lr=2")
    public = [path for info in flat(describe("scanned")).values() for path in info.public_paths]
    assert sum(bool(rule.pattern.fullmatch(path)) for path in public) == count


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            "layers/9/mixer/decay_log lr=2",
            r"rules\[0\].*matches no parameter.*'layers/\d/mixer/decay_log'",
        ),
        ("layers/*/mixer lr=2", "matches no parameter"),
        ("embedding/tabel lr=2", "nearest path is 'embedding/table'"),
        ("embedding/**", "must be a path pattern followed by settings"),
        ("", "must be a path pattern followed by settings"),
        ("embedding/** frosen=1", "'frosen=1' is not a setting.*Did you mean 'frozen'"),
        ("embedding/** lr=fast", "lr=fast must be a number"),
        ("embedding/** lr=-1", "lr=-1 must be a number of at least 0"),
        ("embedding/** decay=nan", "decay=nan must be a number"),
        ("embedding/** frozen=yes", "frozen=yes must be frozen=0 or frozen=1"),
        ("embedding/** optimizer=sgd", "optimizer=sgd must be optimizer=adamw"),
        ("layers/2/** optimizer=adamw", r"'layers/0\+2x2/.*leaves out 'layers/0/.*lr="),
    ],
)
def test_a_wrong_rule_is_one_sentence(rule, words):
    with pytest.raises(ValueError, match=words):
        groups.assign(describe("scanned"), (rule,))


# Registry.


def test_options_are_the_keyword_arguments_with_their_defaults():
    assert optimizers.options("adamw") == {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    assert optimizers.options("muon")["update_rms"] == 0.2
    assert "groups" not in optimizers.options("muon")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("adamv", {}, "optimizer.kind='adamv' .*Did you mean 'adamw'"),
        ("muon", {"adam_beta1": 0.9}, "optimizer.muon.adam_beta1 .*Did you mean 'adam_b1'"),
        ("adamw", {"momentum": 0.9}, "optimizer.adamw.momentum is not an option"),
        ("adamw", {"clip_norm": -1.0}, "optimizer.clip_norm is -1.0; .*at least 0"),
        ("adamw", {"weight_decay": -0.1}, "optimizer.adamw.weight_decay is -0.1"),
        ("adamw", {"weight_decay": None}, "optimizer.adamw.weight_decay is None"),
        ("adamw", {"b2": 1.0}, "optimizer.adamw.b2 is 1.0; it must be at least 0 and below 1"),
        ("muon", {"momentum": 95}, "optimizer.muon.momentum is 95"),
        ("muon", {"ns_steps": 0}, "optimizer.muon.ns_steps is 0; it must be at least 1"),
    ],
)
def test_a_wrong_optimizer_is_one_sentence(kind, options, words):
    with pytest.raises(ValueError, match=words):
        build(kind, **options)


# Updates.


@pytest.mark.slow
def test_adamw_equals_optax_with_the_same_mask():
    mask = jax.tree.map(lambda info: info.decay, describe("scanned"))
    schedule = optax.linear_schedule(1e-2, 1e-3, 3)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, 0.95, weight_decay=0.1, mask=mask),
    )
    ours = build("adamw", clip_norm=1.0, schedule=schedule)
    results = [run(optimizer, "scanned", steps=4) for optimizer in (ours, theirs)]
    for path, ours_after in flat(results[0]).items():
        np.testing.assert_allclose(ours_after, flat(results[1])[path], atol=1e-7, err_msg=path)


def test_rules_scale_the_step_and_its_decay_as_the_formula_says():
    """One AdamW step in numpy: the direction of the first step is sign(g) up to eps."""
    before = by_public_path("scanned", random_arrays("scanned", seed=0))
    grads = by_public_path("scanned", random_arrays("scanned", seed=1))
    rules = ("layers/2/** lr=0.5 decay=3", "embedding/** lr=2 decay=0", "layers/1/** lr=0")
    params = run(build("adamw", rules=rules), "scanned", steps=1)
    decayed = {**{f"layers/{n}/{t}": LAYER[t][2] for t in LAYER for n in range(LAYERS)}}
    decayed.update({path: OUTSIDE[path][2] for path in OUTSIDE})
    for path, after in by_public_path("scanned", params).items():
        lr, decay = 1.0, float(decayed[path])
        if path.startswith("layers/2/"):
            lr, decay = 0.5, 3.0
        elif path.startswith("embedding/"):
            lr, decay = 2.0, 0.0
        elif path.startswith("layers/1/"):
            lr = 0.0
        direction = grads[path] / (np.abs(grads[path]) + 1e-8)
        expected = before[path] - 1e-2 * lr * (direction + 0.1 * decay * before[path])
        np.testing.assert_allclose(after, expected, rtol=2e-6, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_scanned_and_unscanned_models_get_the_same_updates(kind):
    after = {
        layout: by_public_path(layout, run(build(kind, layout, RULES, clip_norm=1.0), layout))
        for layout in STACKS
    }
    for path, scanned in after["scanned"].items():
        # float32; the clip and the matrix products sum in another order
        np.testing.assert_allclose(scanned, after["unscanned"][path], atol=2e-6, err_msg=path)


@pytest.mark.parametrize(
    ("kind", "layout"), [("adamw", "scanned"), ("adamw", "unscanned"), ("muon", "scanned")]
)
def test_frozen_parameters_keep_every_bit_and_whole_ones_have_no_moments(kind, layout):
    def with_special_values(leaf):
        leaf = leaf.copy()
        leaf[..., :2] = -0.0, 1e-37
        return leaf

    start = random_arrays(layout, seed=0)
    assigned = groups.assign(describe(layout), RULES)
    params = jax.tree.map(with_special_values, start)
    grads = jax.tree.map(lambda g, leaf: np.where(g.frozen, np.inf, leaf), assigned, start)
    optimizer = build(kind, layout, RULES, clip_norm=1.0)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    after = by_public_path(layout, optax.apply_updates(params, updates))
    frozen = by_public_path(layout, jax.tree.map(lambda g: g.frozen, assigned))
    for path, before in by_public_path(layout, params).items():
        is_frozen = path.startswith("layers/0/") or path == "final_norm/scale"
        assert (frozen[path] == is_frozen).all()
        assert np.isfinite(after[path]).all(), path
        same = before.view(np.int32) == after[path].view(np.int32)
        assert same.all() if is_frozen else not same[..., 2:].any(), path
    kept = [path for path in flat(state) if path.endswith("final_norm/scale")]
    kept += [path for path in flat(state) if "layers/0/" in path]
    assert not kept


def test_frozen_gradients_do_not_count_in_the_clip():
    # eps far above the gradients makes the step proportional to them
    optimizer = build("adamw", rules=RULES, clip_norm=0.1, eps=1.0, weight_decay=0.0)
    params = random_arrays("scanned", seed=0)
    state = optimizer.init(params)
    steps = {}
    for factor in (1.0, 1e6):
        grads = random_arrays("scanned", seed=1)
        grads["final_norm"]["scale"] *= factor
        grads["layers"]["0+2x2"]["mixer"]["decay_log"][0] *= factor
        steps[factor], _ = optimizer.update(grads, state, params)
    for path, step in flat(steps[1.0]).items():
        np.testing.assert_array_equal(step, flat(steps[1e6])[path], err_msg=path)


@pytest.mark.parametrize("kind", FLOAT32)
def test_moments_are_float32_for_bfloat16_parameters(kind):
    optimizer = build(kind)
    half = jax.tree.map(jnp.bfloat16, random_arrays("scanned", seed=0))
    state = jax.eval_shape(optimizer.init, half)
    updates, after = jax.eval_shape(optimizer.update, half, state, half)
    for tree in (state, after):
        for path, leaf in flat(tree).items():
            assert leaf.dtype == (jnp.float32 if leaf.ndim else jnp.int32), path
    applied = jax.eval_shape(optax.apply_updates, half, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves(applied)} == {jnp.dtype(jnp.bfloat16)}


def newton_schulz(matrix):
    x = matrix.astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_stacked_arrays_is_muon_on_each_layer_and_expert(nesterov):
    optimizer = build("muon", rules=("**/down/kernel optimizer=adamw",), nesterov=nesterov)
    params = run(optimizer, "scanned", steps=3)
    after = by_public_path("scanned", params)
    expected = by_public_path("scanned", random_arrays("scanned", seed=0))
    grads = [by_public_path("scanned", random_arrays("scanned", seed=1 + s)) for s in range(3)]
    for layer in range(LAYERS):
        for tail in ("ffn/up/kernel", "ffn/experts/up"):
            path = f"layers/{layer}/{tail}"
            start = expected[path].astype(np.float64)
            for index in np.ndindex(start.shape[:-2]):
                trace = np.zeros(start.shape[-2:])
                for step in range(3):
                    grad = grads[step][path][index]
                    trace = 0.95 * trace + grad
                    d = newton_schulz(grad + 0.95 * trace if nesterov else trace)
                    d *= 0.2 * np.sqrt(max(d.shape))
                    start[index] -= 1e-2 * (d + 0.1 * start[index])
            np.testing.assert_allclose(after[path], start, atol=1e-5, err_msg=path)
    adam = by_public_path("scanned", run(build("adamw"), "scanned", steps=3))
    for path in adam:
        if not path.endswith(("up/kernel", "experts/up")):
            np.testing.assert_allclose(after[path], adam[path], atol=1e-7, err_msg=path)


# State.


@pytest.mark.parametrize("kind", FLOAT32)
@pytest.mark.parametrize("rules", [(), RULES])
def test_every_array_of_the_state_finds_its_parameter(kind, rules):
    infos = state_paths.by_path(describe("scanned"))
    optimizer = build(kind, rules=rules, clip_norm=1.0)
    optimizer = optax.chain(optax.identity(), optax.masked(optimizer, True))
    state = jax.eval_shape(optimizer.init, random_arrays("scanned", seed=0))
    matched = set()
    for path, leaf in flat(state).items():
        axes = state_paths.logical_axes(path, leaf.shape, infos)
        if leaf.ndim == 0:
            assert axes is None and path.endswith("count"), path
        else:
            owner = max((name for name in infos if path.endswith(f"/{name}")), key=len)
            assert axes == infos[owner].logical and leaf.shape == infos[owner].shape, path
            matched.add(owner)
    frozen = {"final_norm/scale"} if rules else set()
    assert matched == infos.keys() - frozen


@pytest.mark.parametrize("kind", ALL)
def test_the_update_runs_donated_and_without_host_transfers(kind):
    optimizer = build(kind, rules=RULES, clip_norm=1.0)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = jax.device_put([random_arrays("scanned", seed) for seed in (0, 1)])
    state = optimizer.init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
    assert "callback" not in lowered.as_text()
    compiled = lowered.compile()
    assert compiled.memory_analysis().alias_size_in_bytes == held
    before = params["embedding"]["table"]
    with jax.transfer_guard("disallow"):
        params, state = compiled(params, state, grads)
        params, state = compiled(params, state, grads)
    assert before.is_deleted()
