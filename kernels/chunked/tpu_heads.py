"""Many heads in one Pallas TPU kernel, interleaved.

The TPU's compiler keeps close to the order of the program. One head is a long chain of small products
that leaves every unit idle most of the time; sixteen heads written one after the other are no faster,
sixteen whose stages alternate are. So a head is a generator that yields after every stage, and the
driver below takes a stage of every head in turn, while the kernel is traced.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import tpu_rows


def interleave(heads: Iterable[tuple[int, Iterator[None]]]) -> None:
    """Runs all generators a stage at a time; each joins at the round given with it."""
    waiting, turn = list(heads), 0
    done = object()
    while waiting:
        waiting = [
            (start, head) for start, head in waiting if turn < start or next(head, done) is not done
        ]
        turn += 1


def lanes_of(head: int, width: int) -> slice:
    """Where a head lies on the lanes."""
    return slice(head * width, (head + 1) * width)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in float32: one pass for bfloat16 operands, all digits for float32."""
    return _product(a, b, 0)


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T, as `dot`."""
    return _product(a, b, 1)


def sum_lanes(terms: Iterable[tuple[int, jax.Array]], dtype) -> jax.Array:
    """[C,128] float32: for every (lane, x [C,...]) the sums over the lanes of x, added up in that lane.

    By the matrix unit, which is less busy than the one that moves lanes. Between operands of bfloat16 a
    float32 term goes in as two of them.
    """
    factors, selectors = [], []
    for lane, x in terms:
        is_lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1], 128), 1) == lane
        parts = split(x, dtype)
        factors += parts
        selectors += [jnp.where(is_lane, 1.0, 0.0).astype(dtype)] * len(parts)
    return dot(jnp.concatenate(factors, 1), jnp.concatenate(selectors))


def split(x: jax.Array, dtype) -> list[jax.Array]:
    """x as a sum of one or, for float32 among bfloat16 operands, two arrays of `dtype`."""
    parts = [x.astype(dtype)]
    if x.dtype != dtype:
        parts.append((x - parts[0].astype(x.dtype)).astype(dtype))
    return parts


def narrow(x: jax.Array, dtype, precise: bool) -> jax.Array:
    """float32 x [rows,lanes] for products: in `dtype`, or precise as [high | low] along the lanes."""
    return jnp.concatenate(split(x, dtype)[: 2 if precise else 1], 1)


def dot_narrow(a: jax.Array, b: jax.Array) -> jax.Array:
    """`dot` of a from `narrow`: its low part, if there is one, meets b as well."""
    return dot(a, jnp.concatenate([b] * (a.shape[1] // b.shape[0])))


class SharedKeys:
    """Writes the gradients of q and k when all value heads that read a key head have given theirs."""

    def __init__(self, plan: tpu_rows.Plan, d_q_ref, d_k_ref):
        self._plan, self._refs = plan, (d_q_ref, d_k_ref)
        self._given = [[] for _ in range(plan.heads // plan.group)]

    def add(self, head: int, d_q: jax.Array, d_k: jax.Array) -> None:
        key_head = head // self._plan.group
        given = self._given[key_head]
        given.append((d_q, d_k))
        if len(given) == self._plan.group:
            own = lanes_of(key_head, self._plan.key)
            for ref, parts in zip(self._refs, zip(*given)):
                ref[:, own] = functools.reduce(jnp.add, parts).astype(ref.dtype)


def _product(a, b, contracted_of_b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((1,), (contracted_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
