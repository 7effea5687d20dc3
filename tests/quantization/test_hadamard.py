"""The Hadamard transform against its definition by bit counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import hadamard


def matrix(size):
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_transform_is_the_product_with_a_symmetric_orthogonal_matrix(size, backend):
    h = matrix(size)
    np.testing.assert_array_equal(h, h.T)
    x = np.random.default_rng(0).standard_normal((3, 2 * size)).astype(np.float32)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size).astype(np.float32)
    blocks = x.reshape(3, 2, size).astype(np.float64)

    @jax.jit
    def run(x, signs):
        along = hadamard(x, block_size=size, backend=backend)
        across = hadamard(x.T, block_size=size, axis=0, backend=backend)
        back = hadamard(along, block_size=size, backend=backend)
        mixed = hadamard(x, block_size=size, signs=signs, backend=backend)
        return along, across, back, mixed

    along, across, back, mixed = run(x, signs)
    np.testing.assert_allclose(along, (blocks @ h).reshape(3, -1), atol=1e-5)
    np.testing.assert_allclose(across, (blocks @ h).reshape(3, -1).T, atol=1e-5)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(mixed, ((blocks * signs) @ h).reshape(3, -1), atol=1e-5)


def test_signs_before_the_transform_change_the_magnitudes_and_after_it_do_not():
    """The difference between a rotation that is drawn anew and one that only looks so."""
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (2, 32)).astype(np.float32)

    @jax.jit
    def run(x, r):
        return hadamard(x, block_size=32, signs=r), hadamard(x, block_size=32) * r

    first, second = run(x, signs[0]), run(x, signs[1])
    largest = [np.abs(np.asarray(y)).max(-1) for y in (first[0], second[0], first[1], second[1])]
    assert not np.allclose(largest[0], largest[1])
    np.testing.assert_array_equal(largest[2], largest[3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(block_size=24), "must be a power of two"),
        (dict(block_size=32), "does not divide dimension -1"),
        (dict(block_size=16, axis=3), "axis=3 is not a dimension"),
        (dict(block_size=16, signs=jnp.ones(8)), "signs have shape (8,)"),
    ],
)
def test_bad_arguments_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match="hadamard") as error:
        hadamard(jnp.ones((2, 48)), **options)
    assert words in str(error.value)
