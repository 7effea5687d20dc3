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

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        m, v = _encode_all(zeros, m_codec), _encode_all(zeros, v_codec)
        return State(jnp.zeros((), jnp.int32), *m, *v)

    def update(grads, state, params=None):
        m = _decode_all(state.m_codes, state.m_shared, m_codec)
        v = _decode_all(state.v_codes, state.v_shared, v_codec)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
        count = optax.safe_increment(state.count)
        m_left, v_left = 1 - b1**count, 1 - b2**count
        directions = jax.tree.map(lambda m, v: (m / m_left) / (jnp.sqrt(v / v_left) + eps), m, v)
        return directions, State(count, *_encode_all(m, m_codec), *_encode_all(v, v_codec))

    return optax.GradientTransformation(init, update)


def _encode_all(tree, codec: Codec):
    pairs = jax.tree.map(lambda x: _encode(x, codec), tree)
    return jax.tree.transpose(jax.tree.structure(tree), jax.tree.structure((0, 0)), pairs)


def _decode_all(codes, shared, codec: Codec):
    return jax.tree.map(lambda codes, shared: _decode(codes, shared, codec), codes, shared)


def _encode(x: Array, codec: Codec) -> tuple[Array, Array]:
    codes, shared = codec.encode(_grouped(x, codec.group_size))
    return _ungrouped(codes, x.shape), shared


def _decode(codes: Array, shared: Array, codec: Codec) -> Array:
    return _ungrouped(codec.decode(_grouped(codes, codec.group_size), shared), codes.shape)


def _grouped(x: Array, size: int) -> Array:
    """[..., D] -> [..., groups, size], padded with zeros."""
    x = x.reshape(1) if x.ndim == 0 else x
    size = min(size, x.shape[-1])
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, size)


def _ungrouped(x: Array, shape: tuple[int, ...]) -> Array:
    flat = x.reshape(*x.shape[:-2], -1)
    return flat[..., : shape[-1]] if shape else flat.reshape(shape)
