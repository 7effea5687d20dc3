"""Decays inside chunks where every key channel has its own, as TPU kernels use them.

With G_i the sums of log2 decays through token i, a vector over the channels, and beta_j a factor of
columns (1 if None): read, write and carry as in `tpu_head_gates`, and the pairs

    L_ij = beta_j sum_d k_id k_jd 2^(G_id - G_jd), i > j     P_ij = the same with q_i, i >= j.

Tokens of the same tile of 8 meet in its middle, where G = G_m: a pair is (k_i 2^(G_i - G_m)) times
(k_j 2^(G_m - G_j)), and as no log2 decay is below -30 (see `tpu_rows.run`), no factor is above 2^105.
Tiles are halves of tiles of 16, and so on, as in `chunked.channel_pairs`: token i of a right half and
token j of the left half beside it meet at the border between them, where G = G_m. With
e = 2^-|G - G_m| the pair is (k_i e_i) (k_j e_j). Each such level is a product of masked matrices.
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

NEAR = 1
"""The level of pairs in one tile; the others are called by the size of a half, 8, 16 ... C/2."""


class ChannelGates:
    """Made once a grid step from beta [HB,C] or None and the chunk's marks [8,C]."""

    def __init__(self, beta: jax.Array | None, marks: jax.Array, plan: tpu_rows.Plan):
        chunk = plan.chunk
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
        self.is_diagonal = row == column
        self._level = jnp.where(row >= column, _level(row ^ column, chunk), chunk)
        self._level_above = jnp.where(row <= column, _level(row ^ column, chunk), chunk)
        self._lane = column[:TILE]
        self._plan, self._columns, self._beta = plan, marks.T, beta
        self._beta_columns = None if beta is None else beta.T
        document = marks[tpu_rows.DOCUMENT : tpu_rows.DOCUMENT + 1]
        sees = (self._mark(tpu_rows.DOCUMENT, chunk) == document) & (row >= column)
        self._sees = jnp.where(sees, 1.0, 0.0)
        self._read_log = self._mark(tpu_rows.READ_LOG, plan.key)
        self._write_log = self._mark(tpu_rows.WRITE_LOG, plan.key)
        self._carry_log = self._mark(tpu_rows.CARRY_LOG, plan.key)[:1]

    def _mark(self, row, lanes):
        return jnp.broadcast_to(self._columns[:, row : row + 1], (self._columns.shape[0], lanes))

    def weights(self, head: int) -> jax.Array:
        """[C,C]: beta of the writer, 0 for i < j and in another document."""
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
        """[C,C] for each reader and k: all pairs i >= j, and any finite numbers above them."""
        chunk, dtype = k.shape[0], k.dtype
        *readers, k = (x.astype(jnp.float32) for x in (*readers, k))
        found = [[jnp.zeros((TILE, chunk), jnp.float32)] * (chunk // TILE) for _ in readers]
        for half in levels(chunk):
            toward, away = decays(sums, half)
            rights, _ = _right_and_left(chunk, half)
            rows = [(x * toward)[span] for x in readers for span in rights]
            products = dot_transposed(jnp.concatenate(rows).astype(dtype), (k * away).astype(dtype))
            yield
            tiles = [x for span in rights for x in range(span.start, span.stop, TILE)]
            for i, tile in enumerate(tiles):
                start = tile // (2 * half) * 2 * half  # before it all have met at a longer distance
                is_new = self._lane >= start
                if half == NEAR:
                    is_new = self._level[tile : tile + TILE] <= NEAR
                for kind, first in zip(found, range(0, products.shape[0], len(tiles) * TILE)):
                    new = products[first + i * TILE : first + (i + 1) * TILE]
                    if half == NEAR or start:
                        new = jnp.where(is_new, new, kind[tile // TILE])
                    kind[tile // TILE] = new
        return [jnp.concatenate(kind) for kind in found]

    def pull_back_pairs(self, readers, k, d_products, d_readers, sums):
        """The gradients of the readers, added to `d_readers`, and of k as writer, [C,K] float32 each.

        d_products [C,C] float32 belong to the products of each reader with k; only those of i > j count.
        """
        chunk, dtype, count = k.shape[0], k.dtype, len(readers)
        *readers, k = (x.astype(jnp.float32) for x in (*readers, k))
        transposed = [d.T for d in d_products]
        d_readers, d_writer = list(d_readers), jnp.zeros(k.shape, jnp.float32)
        yield
        for half in levels(chunk):
            toward, away = decays(sums, half)
            rights, lefts = _right_and_left(chunk, half)
            rows = [
                jnp.where(self._level[span] == half, d[span], 0)
                for d in d_products
                for span in rights
            ]
            reads = dot(jnp.concatenate(rows).astype(dtype), (k * away).astype(dtype))
            rows = [
                [jnp.where(self._level_above[span] == half, d[span], 0) for d in transposed]
                for span in lefts
            ]
            rows = jnp.concatenate([jnp.concatenate(row, 1) for row in rows]).astype(dtype)
            writes = dot(rows, jnp.concatenate([x * toward for x in readers]).astype(dtype))
            yield
            size = reads.shape[0] // count
            for i in range(count):
                read = reads[i * size : (i + 1) * size]
                d_readers[i] = _add_rows(d_readers[i], rights, toward, read)
            d_writer = _add_rows(d_writer, lefts, away, writes)
            yield
        return d_readers, d_writer


def gates(sums_ref, beta: jax.Array | None, marks: jax.Array, plan: tpu_rows.Plan):
    """The gates of the kind that the plan names."""
    if plan.per_channel:
        return ChannelGates(beta, marks, plan)
    return tpu_head_gates.HeadGates(sums_ref[...], beta, marks, plan)


def levels(chunk: int) -> list[int]:
    """C/2 ... 16, 8, NEAR."""
    return [*(chunk >> x for x in range(1, (chunk // TILE).bit_length())), NEAR]


def _level(difference, chunk):
    """The level where tokens meet whose numbers differ in the bits of `difference`; 0 for one token."""
    level = jnp.where(difference > 0, NEAR, 0)
    for half in reversed(levels(chunk)[:-1]):
        level = jnp.where(difference >= half, half, level)
    return level


def _right_and_left(chunk: int, half: int) -> tuple[list[slice], list[slice]]:
    """The rows of right and left halves; all rows where tokens of a tile meet."""
    if half == NEAR:
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


def decays(sums: Sequence[jax.Array], half: int) -> tuple[jax.Array, jax.Array]:
    """[C,K]: of each token as reader and as writer, to where it meets the others of a level."""
    if half != NEAR:
        decay = jnp.exp2(_total([_gap_to_border(part, half) for part in sums]))
        return decay, decay
    gaps = [_gap_to_middle(part) for part in sums]
    # Far from the middle a sum of the parts would round more than the products may.
    toward, away = ([jnp.exp2(x) for x in side] for side in (gaps, [-gap for gap in gaps]))
    return functools.reduce(jnp.multiply, toward), functools.reduce(jnp.multiply, away)


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
    groups = part.reshape(-1, 2 * half, part.shape[1])
    border = groups[:, half - 1 : half]
    sides = [border - groups[:, :half], groups[:, half:] - border]
    return jnp.concatenate(sides, 1).reshape(part.shape)


def _gap_to_middle(part):
    groups = part.reshape(-1, TILE, part.shape[1])
    middle = 0.5 * (groups[:, TILE // 2 - 1 : TILE // 2] + groups[:, TILE // 2 : TILE // 2 + 1])
    return (groups - middle).reshape(part.shape)


def _total(parts):
    return functools.reduce(jnp.add, parts)
