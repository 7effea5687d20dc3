"""COAT's update as it is published: a geometric centre and a scale for each group, powers, Adam."""

import jax.numpy as jnp

from effarch.kernels.coat import api, groups


def coat_adam(g, m, v, start, rates, group_size, expand):
    """See `xla.coat_adam`."""
    b1, b2, eps = rates
    old_m, old_v = (_restored(x, group_size) for x in (m, v))
    new_m = b1 * old_m + (1 - b1) * g
    new_v = b2 * old_v + (1 - b2) * g**2
    d = (new_m * start[0]) / (jnp.sqrt(new_v * start[1]) + eps)
    return d, *(_stored(x, group_size, expand) for x in (new_m, new_v))


def _restored(moment, group_size):
    hi, k = moment.shared[..., :1], moment.shared[..., 1:]
    q = groups.grouped(moment.codes, group_size).astype(jnp.float32)
    values = jnp.sign(q) * hi * (jnp.abs(q) / 448) ** (1 / k)
    return groups.ungrouped(values, moment.codes.shape)


def _stored(x, group_size, expand):
    size = jnp.abs(groups.grouped(x, group_size))
    hi = jnp.max(size, axis=-1, keepdims=True)
    lo = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-1, keepdims=True)
    k = jnp.floor(16 * jnp.log2(448 * 448 / 2) / jnp.log2(hi / lo)) / 16
    k = jnp.where(hi > lo, jnp.clip(k, 1 / 16, 64), 64.0) if expand else jnp.ones_like(hi)
    k = jnp.where(hi > 0, k, 1.0)
    centre = jnp.where(hi > 0, jnp.sqrt(hi) * jnp.sqrt(jnp.minimum(lo, hi)), 1.0)
    scale = jnp.where(hi > 0, (hi / centre) ** k / 448, 1.0)
    q = jnp.minimum((size / centre) ** k / scale, 448.0)
    codes = groups.ungrouped(q, x.shape) * jnp.where(jnp.signbit(x), -1.0, 1.0)
    return api.Moment(codes.astype(jnp.float8_e4m3fn), jnp.concatenate([hi, k], axis=-1))
