"""Adam whose moments are stored in few bits and used in float32.

Every step decodes both moments, applies Adam's formulas and encodes them again. Codes have their
parameter's shape, and so its sharding; what a group of codes shares lies in arrays [..., groups, n]
with groups along the parameter's last dimension (the last group may be shorter).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from effarch.kernels.coat.groups import grouped, ungrouped


class Codec(NamedTuple):
    """How one moment is stored."""

    encode: Callable[[Array], tuple[Array, Array]]
    """Groups [..., groups, size] in float32 -> (codes of that shape, shared [..., groups, n])."""
    decode: Callable[[Array, Array], Array]
    group_size: int


class State(NamedTuple):
    """Trees in the shape of the parameters; see the module's docstring."""

    count: Array
    m_codes: Any
    m_shared: Any
    v_codes: Any
    v_shared: Any


def scale_by_adam(
    m_codec: Codec, v_codec: Codec, *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """d = m^ / (sqrt(v^) + eps) as `optax.scale_by_adam`, from stored moments."""

    def step(g, m, v, count):
        m, v = _decode(*m, m_codec), _decode(*v, v_codec)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
        return direction, _encode(m, m_codec), _encode(v, v_codec)

    return stored(step, lambda x: _encode(x, m_codec), lambda x: _encode(x, v_codec))


def stored(step: Callable, encode_m: Callable, encode_v: Callable) -> optax.GradientTransformation:
    """The transformation of `step(g, m, v, count) -> (direction, m, v)`, parameter by parameter.

    m and v are pairs (codes, shared), as `encode_m` and `encode_v` make them of an array; `count` is
    the number of the step, from 1.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        m, v = (_unzip(jax.tree.map(encode, zeros), zeros, 2) for encode in (encode_m, encode_v))
        return State(jnp.zeros((), jnp.int32), *m, *v)

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)

        def one(g, m_codes, m_shared, v_codes, v_shared):
            d, m, v = step(g, (m_codes, m_shared), (v_codes, v_shared), count)
            return d, *m, *v

        found = jax.tree.map(one, grads, *state[1:])
        directions, *moments = _unzip(found, grads, 5)
        return directions, State(count, *moments)

    return optax.GradientTransformation(init, update)


def _unzip(tree, like, size: int):
    """A tree of tuples as a tuple of trees in the shape of `like`."""
    return tuple(
        jax.tree.map(lambda _, found, index=index: found[index], like, tree)
        for index in range(size)
    )


def _encode(x: Array, codec: Codec) -> tuple[Array, Array]:
    codes, shared = codec.encode(grouped(x, codec.group_size))
    return ungrouped(codes, x.shape), shared


def _decode(codes: Array, shared: Array, codec: Codec) -> Array:
    return ungrouped(codec.decode(grouped(codes, codec.group_size), shared), codes.shape)
