"""Decays inside chunks where every key channel has its own, as TPU kernels use them.

With G_i the sums of log2 decays through token i, a vector over the channels, and beta_j a factor of
columns (1 if None): read, write and carry as in `tpu_head_gates`, and the pairs

    L_ij = beta_j sum_d k_id k_jd 2^(G_id - G_jd), i > j     P_ij = the same with q_i, i >= j.

As in `chunked.channel_pairs` the chunk is halved again and again: token i of a right half and token j of
the left half beside it meet at the border between them, where G = G_m. With e = 2^-|G - G_m| the pair
is (k_i e_i) (k_j e_j), no exponent is positive, and each level is a product of masked matrices.
Legend: HB heads of a grid step, C tokens of a chunk, K width of a head.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import tpu_head_gates, tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot, dot_transposed, lanes_of

TILE = 8
"""Rows that a register holds."""


class ChannelGates:
    """Made once a grid step from beta [HB,C] or None and the chunk's marks [8,C]."""

    def __init__(self, beta: jax.Array | None, marks: jax.Array, plan: tpu_rows.Plan):
        chunk = plan.chunk
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
        self.distance = jnp.where(row > column, row ^ column, 0)
        self._meets = {}
        self.is_diagonal = row == column
        self._plan, self._columns, self._beta = plan, marks.T, beta
        self._beta_columns = None if beta is None else beta.T
        document = marks[tpu_rows.DOCUMENT : tpu_rows.DOCUMENT + 1]
        self._sees = jnp.where(self._mark(tpu_rows.DOCUMENT, chunk) == document, 1.0, 0.0)
        self._read_log = self._mark(tpu_rows.READ_LOG, plan.key)
        self._write_log = self._mark(tpu_rows.WRITE_LOG, plan.key)
        self._carry_log = self._mark(tpu_rows.CARRY_LOG, plan.key)[:1]

    def _mark(self, row, lanes):
        return jnp.broadcast_to(self._columns[:, row : row + 1], (self._columns.shape[0], lanes))

    def weights(self, head: int) -> jax.Array:
        """[C,C]: beta of the writer, 0 in another document."""
        if self._beta is None:
            return self._sees
        return self._sees * self._beta[head : head + 1]

    def read(self, sums: Sequence[jax.Array]) -> jax.Array:
        """[C,K]; `sums` are the parts [C,K] of G, of this head."""
        return jnp.exp2(_total(sums) + self._read_log)

    def write(self, sums: Sequence[jax.Array], head: int) -> jax.Array:
        """[C,K]."""
        to_end = _total([part[-1:] - part for part in sums])
        write = jnp.exp2(to_end + self._write_log)
        if self._beta is None:
            return write
        return write * jnp.broadcast_to(self._beta_columns[:, head : head + 1], write.shape)

    def carry(self, sums: Sequence[jax.Array]) -> jax.Array:
        """[1,K]."""
        return jnp.exp2(_total([part[-1:] for part in sums]) + self._carry_log)

    def carry_column(self, sums: Sequence[jax.Array]) -> jax.Array:
        """[K,V], all lanes equal."""
        return jnp.broadcast_to(self.carry(sums), (self._plan.value, self._plan.key)).T

    def parts(self, q, k, head: int, sums: Sequence[jax.Array], corrects: bool):
        """What `HeadGates.parts` gives; carry is [K,V]."""
        dtype, weights = q.dtype, self.weights(head)
        attend, *lower = yield from self._pairs((q, k) if corrects else (q,), k, sums)
        attend = tpu_heads.narrow(attend * weights, dtype, self._plan.precise)
        yield
        read = self.read(sums)
        q_read = (q * read).astype(dtype)
        solving = (lower[0] * weights, (k * read).astype(dtype)) if corrects else ()
        yield
        k_written = tpu_heads.split(k * self.write(sums, head), dtype)
        k_written = k_written[: 2 if self._plan.precise else 1]
        k_written = jnp.concatenate([part.T for part in k_written], 1)
        yield
        return attend, q_read, k_written, self.carry_column(sums), *solving

    def _pairs(self, readers, k, sums):
        """[C,C] for each reader (q is the first) and k: all pairs i > j, and for q those of i = j."""
        chunk, dtype = k.shape[0], k.dtype
        tiles = range(0, chunk, TILE)
        alone = jnp.where(self.is_diagonal, dot_transposed(readers[0], k), 0)
        found = [[jnp.zeros((TILE, chunk), jnp.float32) for _ in tiles] for _ in readers]
        found[0] = [alone[tile : tile + TILE] for tile in tiles]
        yield
        for half in halves(chunk):
            decay = to_border(sums, half).astype(dtype)
            rights, _ = _right_and_left(chunk, half)
            rows = jnp.concatenate([(x * decay)[span] for x in readers for span in rights])
            products = dot_transposed(rows, k * decay)
            yield
            right_tiles = [
                tile for span in rights for tile in tiles[span.start // TILE : span.stop // TILE]
            ]
            for i, tile in enumerate(right_tiles):
                # Pairs that meet at a longer distance are overwritten later.
                meets = self.distance[tile : tile + TILE] >= half
                for kind, first in zip(found, range(0, products.shape[0], len(right_tiles) * TILE)):
                    new = products[first + i * TILE : first + (i + 1) * TILE]
                    kind[tile // TILE] = jnp.where(meets, new, kind[tile // TILE])
        return [jnp.concatenate(kind) for kind in found]

    def pull_back_pairs(self, readers, k, d_products, d_readers, sums):
        """The gradients of the readers, added to `d_readers`, and of k as writer, [C,K] float32 each.

        d_products [C,C], in the dtype of k, belong to the products of each reader with k; only those of
        i > j count.
        """
        chunk, dtype, count = k.shape[0], k.dtype, len(readers)
        transposed = [d.T for d in d_products]
        d_readers, d_writer = list(d_readers), jnp.zeros(k.shape, jnp.float32)
        yield
        for half in halves(chunk):
            decay = to_border(sums, half)
            k_met, *met = (x * decay.astype(dtype) for x in (k, *readers))
            rights, lefts = _right_and_left(chunk, half)
            below, above = self._meets[half]
            rows = [d[span] * below[span] for d in d_products for span in rights]
            reads = dot(jnp.concatenate(rows), k_met)
            rows = [d[span] * above[span] for d in transposed for span in lefts]
            rows = [rows[i :: len(lefts)] for i in range(len(lefts))]
            rows = jnp.concatenate([jnp.concatenate(row, 1) for row in rows])
            writes = dot(rows, jnp.concatenate(met))
            yield
            size = reads.shape[0] // count
            for i in range(count):
                read = reads[i * size : (i + 1) * size]
                d_readers[i] = _add_rows(d_readers[i], rights, decay, read)
            d_writer = _add_rows(d_writer, lefts, decay, writes)
            yield
        return d_readers, d_writer

    def prepare_to_pull_back(self, dtype) -> None:
        """Masks [C,C] of the pairs that meet at each level, and their transposes."""
        row, column = (jax.lax.broadcasted_iota(jnp.int32, self.distance.shape, x) for x in (0, 1))
        above = jnp.where(column > row, row ^ column, 0)
        for half in halves(self._plan.chunk):
            is_met = ((x >= half) & (x < 2 * half) for x in (self.distance, above))
            self._meets[half] = [jnp.where(x, 1.0, 0.0).astype(dtype) for x in is_met]


def gates(sums_ref, beta: jax.Array | None, marks: jax.Array, plan: tpu_rows.Plan):
    """The gates of the kind that the plan names."""
    if plan.per_channel:
        return ChannelGates(beta, marks, plan)
    return tpu_head_gates.HeadGates(sums_ref[...], beta, marks, plan)


def halves(chunk: int) -> list[int]:
    """1, 2, 4 ... C/2."""
    return [2**level for level in range(chunk.bit_length() - 1)]


def _right_and_left(chunk: int, half: int) -> tuple[list[slice], list[slice]]:
    """The rows of right and left halves if they are whole registers of bfloat16, else all rows."""
    if half < 2 * TILE:
        return [slice(0, chunk)], [slice(0, chunk)]
    pairs = range(0, chunk, 2 * half)
    return [slice(x + half, x + 2 * half) for x in pairs], [slice(x, x + half) for x in pairs]


def _add_rows(x, spans, factor, addition):
    """x with factor * addition added in the rows of `spans`, whose rows `addition` holds in order."""
    parts, done, used = [], 0, 0
    for span in spans:
        size = span.stop - span.start
        parts += [x[done : span.start]] * (span.start > done)
        parts.append(x[span] + factor[span] * addition[used : used + size])
        done, used = span.stop, used + size
    parts += [x[done:]] * (done < x.shape[0])
    return jnp.concatenate(parts)


def to_border(sums: Sequence[jax.Array], half: int) -> jax.Array:
    """e [C,K]: the decay between each token and the border of the halves of `half` tokens beside it."""
    return jnp.exp2(_total([_gap_to_border(part, half) for part in sums]))


def summed(g: jax.Array, dtype, plan: tpu_rows.Plan) -> jax.Array:
    """The log decays as the gates want them: `tpu_head_gates.summed`, or for [B,T,HV*K] the like.

    Per channel the one or two parts of the sums are [parts,B,T,HV*K].
    """
    if not plan.per_channel:
        return tpu_head_gates.summed(g, dtype)
    in_chunks = g.reshape(g.shape[0], -1, plan.chunk, g.shape[2])
    parts = tpu_head_gates.sum_parts(in_chunks, dtype, axis=2)
    return jnp.stack(parts).reshape(-1, *g.shape)


def sum_gates(up_to: jax.Array, after: jax.Array, dtype) -> jax.Array:
    """sum_(i >= t) up_to_i + sum_(j < t) after_j, [C,K], by the matrix unit."""
    chunk = up_to.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
    ones, factors = [], []
    for is_in, x in ((column >= row, up_to), (column < row, after)):
        parts = tpu_heads.split(x, dtype)
        ones += [jnp.where(is_in, 1.0, 0.0).astype(dtype)] * len(parts)
        factors += parts
    return dot(jnp.concatenate(ones, 1), jnp.concatenate(factors))


def sums_of(sums_ref, head: int, plan: tpu_rows.Plan) -> list[jax.Array] | None:
    """The parts of G [C,K] of a head; None for decays per head."""
    if not plan.per_channel:
        return None
    own = lanes_of(head, plan.key)
    return [sums_ref[part, :, own] for part in range(sums_ref.shape[0])]


def _gap_to_border(part, half):
    """-|G - G_m|, from the sign that it has on each side."""
    if half >= TILE:
        groups = part.reshape(-1, 2 * half, part.shape[1])
        border = groups[:, half - 1 : half]
        sides = [border - groups[:, :half], groups[:, half:] - border]
        return jnp.concatenate(sides, 1).reshape(part.shape)
    groups = part.reshape(-1, TILE, part.shape[1])
    row = jax.lax.broadcasted_iota(jnp.int32, (1, TILE, part.shape[1]), 1)
    border = groups[:, half - 1 : half]
    for start in range(2 * half, TILE, 2 * half):
        last = start + half - 1
        border = jnp.where(row >= start, groups[:, last : last + 1], border)
    sign = jnp.where(row // half % 2 == 1, 1.0, -1.0)
    return ((groups - border) * sign).reshape(part.shape)


def _total(parts):
    return functools.reduce(jnp.add, parts)
