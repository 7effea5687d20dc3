"""DCT-AdamW, Trion and GaLore against loops in numpy; what they store; where it lies."""

import jax
import numpy as np
import optax
import pytest
import scipy.fft

from effarch.models import parameters
from effarch.training import optimizers
from effarch.training.optimizers import dct, state_paths

SHAPES = {"tall": (2, 12, 8), "wide": (8, 12)}
LOGICAL = {3: ("layers", "embed", "ffn"), 2: ("embed", "ffn")}
STEPS, LR, DECAY = 4, 1e-2, 0.1


def infos():
    return {
        name: parameters.ParamInfo(name, (name,), LOGICAL[len(shape)], shape, True)
        for name, shape in SHAPES.items()
    }


def arrays(seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


GRADS = [arrays(1 + step) for step in range(STEPS)]


def run(kind, **options):
    """(parameters after STEPS updates, state)."""
    tx = optimizers.build(kind, schedule=LR, clip_norm=0, infos=infos(), **options)

    @jax.jit
    def steps(params, grads):
        def one(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), grads)[0]

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *GRADS)
    return steps(arrays(0), stacked)


def expected(make):
    """Each single matrix, its shorter side last, moved along the directions of `make()`."""
    result = {}
    for name, shape in SHAPES.items():
        is_tall = shape[-2] >= shape[-1]
        param = arrays(0)[name].astype(np.float64)
        for index in np.ndindex(shape[:-2]):
            step, p = make(), param[index] if is_tall else param[index].T
            for grads in GRADS:
                grad = grads[name][index].astype(np.float64)
                p = p - LR * (step(grad if is_tall else grad.T) + DECAY * p)
            param[index] = p if is_tall else p.T
        result[name] = param
    return result


def selected(matrix, rank, norm=1):
    """(G C^T, the numbers of its largest columns)."""
    turned = scipy.fft.dct(matrix, norm="ortho", axis=-1)
    return turned, np.sort(np.argsort((np.abs(turned) ** norm).sum(0))[-rank:])


def basis(index, n):
    return scipy.fft.dct(np.eye(n), norm="ortho", axis=0)[index]


class DctAdamw:
    def __init__(self, rank, gap=1, error_feedback=False):
        self.rank, self.gap, self.feedback = rank, gap, error_feedback
        self.t, self.m, self.v, self.error, self.index = 0, {}, {}, 0.0, None

    def __call__(self, grad):
        turned, index = selected(grad + self.error, self.rank)
        if self.t % self.gap == 0:
            self.index = index
        g = turned[:, self.index]
        if self.feedback:
            self.error = grad + self.error - g @ basis(self.index, grad.shape[1])
        self.t += 1
        moments = {}
        for column, values in zip(self.index, g.T):  # moments by the number of their column
            m, v = self.m.get(column, 0 * values), self.v.get(column, 0 * values)
            moments[column] = 0.9 * m + 0.1 * values, 0.95 * v + 0.05 * values**2
        self.m, self.v = ({c: pair[i] for c, pair in moments.items()} for i in (0, 1))
        directions = [
            m / (1 - 0.9**self.t) / (np.sqrt(v / (1 - 0.95**self.t)) + 1e-8)
            for m, v in moments.values()
        ]
        return np.stack(directions, 1) @ basis(self.index, grad.shape[1])


def newton_schulz(matrix):
    x = matrix.T / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T


class Trion:
    def __init__(self, rank):
        self.rank, self.trace = rank, 0.0

    def __call__(self, grad):
        self.trace = self.trace + grad
        turned, index = selected(self.trace, self.rank)
        low, rows = turned[:, index], basis(index, grad.shape[1])
        self.trace = self.trace - 0.05 * low @ rows
        return 0.2 * np.sqrt(len(grad)) * newton_schulz(low) @ rows


class Galore:
    """optax's side: the left vectors of a tall matrix, found once."""

    def __init__(self, rank):
        self.rank, self.t, self.basis, self.m, self.v = rank, 0, None, 0.0, 0.0

    def __call__(self, grad):
        if self.basis is None:
            self.basis = np.linalg.svd(grad, full_matrices=False)[0][:, : self.rank]
        low = self.basis.T @ grad
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * low, 0.95 * self.v + 0.05 * low**2
        size = np.sqrt(self.v / (1 - 0.95**self.t)) + 1e-8
        return 0.25 * self.basis @ (self.m / (1 - 0.9**self.t) / size)


def agree(kind, make, atol=2e-5, **options):
    params, state = run(kind, **options)
    for name, value in expected(make).items():
        np.testing.assert_allclose(params[name], value, atol=atol, err_msg=name)
    return state


def test_the_basis_is_the_orthonormal_cosine_transform():
    for n in (8, 48):
        c = np.asarray(dct.matrix(n))
        np.testing.assert_allclose(c, scipy.fft.dct(np.eye(n), norm="ortho", axis=0), atol=1e-6)
        np.testing.assert_allclose(c @ c.T, np.eye(n), atol=2e-6)


@pytest.mark.parametrize("norm", [1, 2])
def test_what_is_left_out_is_bounded(norm):
    """|G - g C[idx]|^2 <= (1 - r/n) |G|^2."""
    g = np.random.default_rng(0).standard_t(3, size=(4, 24, 16)).astype(np.float32)

    @jax.jit
    def rest(g):
        turned, index = dct.select(g, 6, norm)
        return g - dct.back(dct.columns(turned, index), index, 16), index

    left, index = rest(g)
    for one, matrix, found in zip(left, g, index):
        np.testing.assert_array_equal(found, selected(matrix, 6, norm)[1])
        assert np.sum(np.square(one)) <= (1 - 6 / 16) * np.sum(matrix**2)


def test_dct_adamw_by_a_loop():
    agree("dct_adamw", lambda: DctAdamw(3), rank=3)


@pytest.mark.slow
def test_dct_adamw_with_error_feedback_and_a_gap():
    options = dict(rank=3, error_feedback=True, update_gap=2)
    state = agree("dct_adamw", lambda: DctAdamw(3, 2, True), **options)
    left = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == SHAPES["wide"]]
    assert len(left) == 1 and np.abs(left[0]).max() > 0.1
    agree("dct_adamw", lambda: DctAdamw(8), rank=100)  # Adam in a turned space


def test_trion_by_a_loop():
    agree("trion", lambda: Trion(3), rank=3)


def test_trion_of_full_rank_is_muon_without_nesterov():
    one, _ = run("trion", rank=8)
    other, _ = run("muon", nesterov=False)
    for name in SHAPES:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_galore_by_a_loop():
    # Adam's first steps are signs where gradients are small: float32 SVDs move some of them.
    agree("galore", lambda: Galore(3), rank=3, atol=2e-4)


STORED = {
    "adamw": 2 * (192 + 96),
    # Moments [12, 3] and three indices for each of three matrices.
    "dct_adamw": 3 * (2 * 12 * 3 + 3),
    "trion": 192 + 96,
    # Bases [12, 3] of the two tall matrices, moments [3, 8]; [12, 3] and [8, 3] of the wide one.
    "galore": 2 * (12 * 3 + 2 * 3 * 8) + (12 * 3 + 2 * 8 * 3),
}


@pytest.mark.parametrize("kind", STORED)
def test_state_is_as_small_as_predicted(kind):
    options = {} if kind == "adamw" else {"rank": 3}
    tx = optimizers.build(kind, schedule=LR, clip_norm=0, infos=infos(), **options)
    state = jax.eval_shape(tx.init, arrays(0))
    counters = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    held = sum(leaf.size for leaf in jax.tree.leaves(state)) - len(counters)
    assert held == STORED[kind] and len(counters) <= 3


def test_moments_of_low_rank_lie_where_their_parameter_does():
    tx = optimizers.build("dct_adamw", schedule=LR, clip_norm=0, infos=infos(), rank=3)
    by_path, found = state_paths.by_path(infos()), {}
    state = jax.eval_shape(tx.init, arrays(0))
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = parameters.path_of(key_path)
        found[path] = state_paths.logical_axes(path, leaf.shape, by_path)

    def of(ending):
        return {axes for path, axes in found.items() if path.endswith(ending)}

    assert of("/m/tall") == of("/v/tall") == {("layers", "embed", None)}
    assert of("/m/wide") == {(None, "ffn")}
    assert of("index/tall") == of("count") == {None}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("dct_adamw", {"rank": 0}, "optimizer.dct_adamw.rank is 0; it must be at least 1"),
        ("trion", {"norm": 3}, "optimizer.trion.norm"),
        ("galore", {"update_gap": 0}, "optimizer.galore.update_gap is 0"),
    ],
)
def test_wrong_options_are_one_sentence(kind, options, words):
    with pytest.raises(ValueError, match=words):
        optimizers.build(kind, schedule=LR, clip_norm=0, infos=infos(), **options)
