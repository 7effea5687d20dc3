"""Decays inside chunks where all channels of a head share one, as TPU kernels use them.

With G_i the sum of log2 decays through token i of the chunk, beta a factor of columns (1 if None), and
document masks in all of them:

    pairs_ij = beta_j 2^(G_i - G_j), i >= j     read_i = 2^(G_i)
    write_j  = beta_j 2^(G_C - G_j)             carry  = 2^(G_C)

Legend: HB heads of a grid step, C tokens of a chunk; K, V widths of heads.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot_transposed

_LOG2_E = 1.4426950408889634


class HeadGates:
    """Made once a grid step from the sums of `summed`, beta [HB,C] or None, and marks [8,C]."""

    def __init__(
        self, sums: jax.Array, beta: jax.Array | None, marks: jax.Array, plan: tpu_rows.Plan
    ):
        heads, chunk = plan.heads, plan.chunk
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
        mark_columns = marks.T
        document = tpu_rows.DOCUMENT
        sees = mark_columns[:, document : document + 1] == marks[document : document + 1]
        self._pairs_log = jnp.where(sees & (row >= column), 0.0, -jnp.inf)
        read_log = mark_columns[:, tpu_rows.READ_LOG : tpu_rows.READ_LOG + 1]
        self._read_log = jnp.broadcast_to(read_log, (chunk, max(chunk, plan.key)))
        self._plan, self._beta = plan, beta
        self._parts = [sums[x : x + heads] for x in range(0, sums.shape[0], heads)]
        self._columns = [part.T for part in self._parts]
        write_log = marks[tpu_rows.WRITE_LOG : tpu_rows.WRITE_LOG + 1]
        to_end = _total(part[:, chunk - 1 :] - part for part in self._parts)
        self._write = jnp.exp2(to_end + write_log)  # [HB,C]
        if beta is not None:
            self._write = self._write * beta
        self._write_columns = self._write.T
        carry_log = marks[tpu_rows.CARRY_LOG : tpu_rows.CARRY_LOG + 1]
        whole = _total(part[:, chunk - 1 :] for part in self._parts)
        self._carry = jnp.exp2(whole + carry_log)  # [HB,C], equal in all lanes

    def parts(self, q, k, head: int, sums, corrects: bool):
        """What a chunk of one head, q and k [C,K], is to the state, in stages.

        P, read Q, (write K)^T in the dtype of q (P and the last by `tpu_heads.narrow`) and carry, [1,V]
        or [K,V]; with `corrects` also L, in float32, and read K. `sums` is for decays per channel.
        """
        del sums
        dtype, (chunk, width) = q.dtype, q.shape
        products = dot_transposed(jnp.concatenate([q, k]) if corrects else q, k)
        yield
        pairs, read = self.pairs_and_read(head)
        attend = tpu_heads.narrow(products[:chunk] * pairs, dtype, self._plan.precise)
        yield
        q_read = (q * read[:, :width]).astype(dtype)
        solving = ()
        if corrects:
            solving = products[chunk:] * pairs, (k * read[:, :width]).astype(dtype)
        yield
        k_written = k.T * self._write[head : head + 1]
        k_written = tpu_heads.narrow(k_written, dtype, self._plan.precise)
        yield
        return attend, q_read, k_written, self.carry(head), *solving

    def carry(self, head: int) -> jax.Array:
        """[1,V], all lanes equal."""
        row, lanes = self._carry[head : head + 1], self._plan.value
        return row if row.shape[1] == lanes else jnp.broadcast_to(row[:, :1], (1, lanes))

    def pairs_and_read(self, head: int) -> tuple[jax.Array, jax.Array]:
        """[C,C], and [C,lanes] with all lanes equal: one broadcast over the lanes serves both."""
        chunk, mine = self._carry.shape[1], slice(head, head + 1)
        columns = [jnp.broadcast_to(x[:, mine], self._read_log.shape) for x in self._columns]
        gaps = [x[:, :chunk] - part[mine] for x, part in zip(columns, self._parts)]
        pairs = jnp.exp2(_total(gaps) + self._pairs_log)
        if self._beta is not None:
            pairs *= self._beta[mine]
        return pairs, jnp.exp2(_total(columns) + self._read_log)

    def write_column(self, head: int) -> jax.Array:
        """[C,lanes] with all lanes equal."""
        return jnp.broadcast_to(self._write_columns[:, head : head + 1], self._read_log.shape)

    def log_gradients(self, head: int, pairs, read, write, others, state, d_state, dtype):
        """What flows to the logarithms of a head's factors: a row [1,C] and columns in lanes [C,128].

        pairs [C,C], read and write [C,K] are the factors times their gradients; the diagonal of pairs
        has no decay, and is left out to keep tiny gradients of strong decays exact. The row and lane
        `head` go to all gates up to a token, lane HB + head to all gates after it; `others` are further
        terms [C,...], whose sums go to lanes 2*HB + head and so on.
        """
        chunk, carry = self._plan.chunk, self.carry(head)[:, :1]
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
        pairs = jnp.where(row > column, pairs, 0)
        carried = jnp.sum(jnp.sum(state * d_state, axis=0, keepdims=True), axis=1, keepdims=True)
        is_last = column[:1] == chunk - 1
        log_row = jnp.where(is_last, carry * carried, 0) - jnp.sum(pairs, axis=0, keepdims=True)
        yield
        reads = [pairs + read] if pairs.shape == read.shape else [pairs, read]
        kinds = [(0, x) for x in reads] + [
            (i, x.astype(dtype)) for i, x in enumerate((write, *others), 1)
        ]
        columns = [(kind * self._plan.heads + head, x) for kind, x in kinds]
        log_columns = tpu_heads.sum_lanes(columns, dtype)
        yield
        return log_row, log_columns


def gradients(log_rows, log_columns, kinds: int, plan: tpu_rows.Plan) -> list[jax.Array]:
    """Of g and of what the `others` of `log_gradients` were, [B,N,J,HB,C] each.

    log_rows [B,N,J,HB,C], log_columns [B,N,J,128,C] (transposed, summed over the heads).
    """
    up_to, after, *others = (
        log_columns[..., kind * plan.heads : (kind + 1) * plan.heads, :] for kind in range(kinds)
    )
    up_to = jnp.flip(up_to + log_rows, -1)
    before = [(0, 0)] * (after.ndim - 1) + [(1, 0)]
    d_g = jnp.flip(jnp.cumsum(up_to, axis=-1), -1)
    return [d_g + jnp.cumsum(jnp.pad(after[..., :-1], before), axis=-1), *others]


def summed(g: jax.Array, dtype) -> jax.Array:
    """The log decays g [B,N,J,HB,C] as `sum_parts` sums them, [B,N,J,HB or 2*HB,C]."""
    return jnp.concatenate(sum_parts(g, dtype, axis=4), axis=3)


def sum_parts(g: jax.Array, dtype, axis: int) -> list[jax.Array]:
    """The log decays to base 2, summed from the start of the chunk through each token.

    For operands of float32 in two parts: sums of multiples of 1/64, which are exact, and of the rest,
    so that differences stay accurate after a decay of -1000 in the same chunk.
    """
    g = g * _LOG2_E
    if dtype != jnp.float32:
        return [jnp.cumsum(g, axis=axis)]
    coarse = jnp.round(g * 64) / 64
    return [jnp.cumsum(x, axis=axis) for x in (coarse, g - coarse)]


def _total(parts):
    return functools.reduce(jnp.add, parts)
