"""The matrix state of a recurrent mixer: how it starts, is cached and passes through the kernels.

Every document starts from S_0, zeros or learned (`learned_start`). The kernels start the first
document of a row from `initial_state` and later ones from zero. For those, with c_t the product of the
decays of the document through t, S_t = S'_t + diag(c_t) S_0, where S' starts from zero and obeys the
same recurrence with other values:

    delta rule         v'_t = v_t - S_0^T (c_t k_t)           o_t = o'_t + S_0^T (c_t scale q_t)
    linear attention   v'_t = v_t                             o_t = o'_t + S_0^T (c_t scale q_t)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.delta_rule import api as delta_rule
from effarch.kernels.linear_attention import api as linear_attention
from effarch.models.context import Context
from effarch.models.layers import executed, learned_start, time_pieces


class Memory(nnx.Module):
    """The matrix state [HV,K,V] of each row, float32.  HV*K*V parameters if its start is learned."""

    def __init__(
        self,
        num_heads: int,
        k_dim: int,
        v_dim: int,
        *,
        learned: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
    ):
        self.start = learned_start.Start((num_heads, k_dim, v_dim), learned=learned)
        self.chunk_size, self.backend = chunk_size, backend

    def delta_rule(self, q, k, v, beta, g, ctx: Context, cache: dict | None):
        """`kernels.gated_delta_rule` and the next cache (None without a cache)."""
        fade = self._fade(g, v, ctx)
        new_v = v if fade is None else v - self._recall(k, fade.tokens).astype(v.dtype)

        def rows(q, k, v, g, beta, **options):
            return delta_rule.gated_delta_rule(q, k, v, beta, g, **options)

        def token(state, q, k, v, g, beta, **options):
            return delta_rule.gated_delta_rule_step(state, q, k, v, beta, g, **options)

        return self._run(rows, token, (q, k, new_v, g, beta), fade, None, ctx, cache)

    def linear_attention(self, q, k, v, g, ctx: Context, cache: dict | None, scale=None):
        """`kernels.linear_attention` and the next cache (None without a cache)."""
        fade = self._fade(g, v, ctx)
        rows, token = linear_attention.linear_attention, linear_attention.linear_attention_step
        return self._run(rows, token, (q, k, v, g), fade, scale, ctx, cache)

    def _run(self, rows, token, arrays, fade, scale, ctx: Context, cache: dict | None):
        """Every device has its rows and heads, and where time is cut a piece of it.

        `rows` is the kernel of whole rows, `token` that of one token when decoding.
        """
        q, _, _, g, *per_token = arrays
        scale = q.shape[-1] ** -0.5 if scale is None else scale

        options = dict(scale=scale, backend=self.backend)
        kernel = functools.partial(rows, chunk_size=self.chunk_size, **options)

        is_cut = ctx.layout is not None and ctx.layout.parts("time") > 1
        is_token = cache is not None and q.shape[1] == 1 and ctx.segment_ids is None

        def on_pieces(initial_state, segment_ids, *arrays):
            if is_token and self.backend in (None, "xla"):
                one = (x if x is None or x.ndim == 1 else x[:, 0] for x in arrays)
                o, state = token(initial_state, *one, **options)
                return o[:, None], state
            if is_cut:
                (axes,) = ctx.layout.mesh_axes(("time",))
                return time_pieces.run(kernel, arrays, initial_state, segment_ids, axes)
            return kernel(*arrays, initial_state=initial_state, segment_ids=segment_ids)

        time = "time" if is_cut else None
        tokens = ("batch", time, "heads", None)
        keys = tokens if q.shape[2] > 1 else ("batch", time, None, None)
        decay = (
            ("heads",) if g is not None and g.ndim == 1 else tokens[: 4 if g is None else g.ndim]
        )
        state = ("batch", "heads", None, None)
        o, state = ctx.local(
            on_pieces,
            (self.start.initial_state(q.shape[0], cache), ctx.segment_ids, *arrays),
            (state, ("batch", time), keys, keys, tokens, decay, *(tokens[:3] for _ in per_token)),
            (tokens, state),
        )
        if fade is not None:
            o += (scale * self._recall(q, fade.tokens)).astype(o.dtype)
            state += fade.last.reshape(*state.shape[:2], -1, 1) * self.start.value[...]
        return o, self.start.next_cache(state, cache)

    def _fade(self, g, v, ctx: Context):
        """c of the documents that the kernel does not start from S_0, [B,T,HV] or [B,T,HV,K]."""
        if not self.start.is_learned or ctx.segment_ids is None:
            return None
        g = jnp.zeros(v.shape[:3]) if g is None else g
        g = jnp.broadcast_to(g, v.shape[:3]) if g.ndim == 1 else g
        tokens, last = learned_start.fade(g.reshape(*g.shape[:2], -1), ctx)
        return learned_start.Fade(tokens.reshape(g.shape), last)

    def _recall(self, x_BTHK, fade) -> Float[Array, "B T HV V"]:
        """S_0^T (c x) for queries or keys x, in float32."""
        batch, length, heads = x_BTHK.shape[:3]
        start = self.start.value[...]
        fade = fade.reshape(batch, length, heads, start.shape[0] // heads, -1)
        faded = x_BTHK.astype(jnp.float32)[:, :, :, None] * fade
        start = start.reshape(heads, -1, *start.shape[1:])
        highest = jax.lax.Precision.HIGHEST
        o = jnp.einsum("bthrk,hrkv->bthrv", faded, start, precision=highest)
        return o.reshape(batch, length, -1, start.shape[-1])

    def init_cache(self, batch: int) -> dict[str, Array]:
        return self.start.init_cache(batch)

    def chunked_flops(
        self,
        rule: Callable[..., executed.Flops],
        seq_len: int,
        *,
        num_k_heads: int | None = None,
        per_channel: bool = False,
    ) -> executed.Flops:
        """What a kernel does, `executed.delta_rule` or `executed.linear_attention`.

        `num_k_heads` None: as many as there are of values; `per_channel`: so is the decay.
        """
        return rule(
            seq_len,
            *self.start.shape,
            num_k_heads=num_k_heads or self.start.shape[0],
            chunk_size=self.chunk_size,
            per_channel=per_channel,
        )
