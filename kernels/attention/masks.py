"""Which keys a query may see, for a block of queries and a block of keys in index order."""

import dataclasses

import jax
import jax.numpy as jnp

_NOBODY = jnp.iinfo(jnp.int32).min  # a segment that no query has


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of an attention call; `block` is the number of queries or keys a block."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    block: int


def key_range(opts: Options, start: int, stop: int, S: int) -> tuple[int, int]:
    """The smallest range of keys that holds all that the queries [start, stop) may see."""
    low = 0 if opts.window is None else max(0, start - opts.window + 1)
    return low, min(stop, S) if opts.causal else S


def query_range(opts: Options, start: int, stop: int, T: int) -> tuple[int, int]:
    """The smallest range of queries that holds all that may see the keys [start, stop)."""
    high = T if opts.window is None else min(T, stop - 1 + opts.window)
    return (start if opts.causal else 0), high


def in_order(opts: Options, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
    """Whether causality and the window let q_index see kv_index (arrays that broadcast)."""
    age = q_index - kv_index
    seen = age >= 0 if opts.causal else jnp.ones(age.shape, bool)
    return seen if opts.window is None else seen & (age < opts.window)


def every_pair_in_order(opts: Options, q_range: tuple[int, int], kv_range: tuple[int, int]) -> bool:
    """Whether `in_order` holds for every pair of the two ranges, so that it need not be asked."""
    youngest = q_range[0] - (kv_range[1] - 1)
    oldest = (q_range[1] - 1) - kv_range[0]
    return (not opts.causal or youngest >= 0) and (opts.window is None or oldest < opts.window)


def hide_padding(kv_segment_ids: jax.Array) -> jax.Array:
    """Segment ids of keys, padding replaced by an id that equals no query's."""
    return jnp.where(kv_segment_ids == 0, _NOBODY, kv_segment_ids)
