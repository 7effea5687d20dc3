"""Softmax attention: Attention Is All You Need, arXiv 1706.03762; grouped heads, arXiv 2305.13245.

    q, k, v = split(x W_q), split(x W_k), split(x W_v);  o = softmax(q k^T / sqrt(K) + mask) v W_o

Options: rotary positions or none, RMS-normed queries and keys per head (Qwen3), a sliding window and a
soft-cap on the scores (Gemma-2), a sigmoid gate on the output (Qwen3-Next, arXiv 2505.06708), queries
and keys rounded as one matrix a head (QKR of OFQ, arXiv 2302.02210; see `joint`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effarch.kernels.attention import api as attention
from effarch.models import remat
from effarch.models.context import Context
from effarch.models.layers import attend, executed, kv_cache, linear, norm, rotary
from effarch.quantization import estimators


class Attention(nnx.Module):
    """Causal attention.  D*K*(2 H + 2 G) parameters (+ D*H*K with gate), 2*S*H*K FLOPs over S tokens."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: tuple = (),
        qk_norm: bool = False,
        qk_norm_whole: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        use_gate: bool = False,
        joint_bits: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`window`: tokens each query sees, itself included. `qk_norm_whole`: the norms run over all
        heads together (OLMoE). None means: num_kv_heads = num_heads, head_dim = width / num_heads,
        no window, no soft-cap, scale = 1 / sqrt(K), the fastest backend. `rope_scaling`: the four
        numbers of `rotary.stretched` (Llama 3.1). `joint_bits`: W_q W_k^T of a head is rounded to so
        many bits (0: not rounded), which positions and norms between the two do not allow."""
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or width // num_heads
        _check(width, num_heads, num_kv_heads, head_dim, rope, rope_fraction, window)
        if rope_scaling and len(rope_scaling) != 4:
            raise ValueError(
                f"attention: rope_scaling={rope_scaling} must be (factor, low, high, length) or ()."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope, self.rope_theta, self.rope_fraction = rope, rope_theta, rope_fraction
        self.rope_scaling = rope_scaling
        self.window, self.softcap, self.scale = window, softcap, scale
        self.backend, self.dtype = backend, dtype
        self.qk_norm, self.use_gate = qk_norm, use_gate
        self.qk_norm_whole = qk_norm_whole
        self.joint_bits = joint_bits
        if joint_bits is not None:
            _check_joint(joint_bits, rope, qk_norm)
            self.scale = scale if scale is not None else head_dim**-0.5
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        shared |= dict(head_dim=head_dim)
        columns, rows = ("embed", "heads"), ("heads", "embed")
        self.q = linear.Linear(width, num_heads * head_dim, axes=columns, **shared)
        self.k = linear.Linear(width, num_kv_heads * head_dim, axes=columns, **shared)
        self.v = linear.Linear(width, num_kv_heads * head_dim, axes=columns, **shared)
        self.out = linear.Linear(num_heads * head_dim, width, axes=rows, **shared)
        if use_gate:
            self.gate = linear.Linear(width, num_heads * head_dim, axes=columns, **shared)
        if qk_norm:
            q_width = num_heads * head_dim if qk_norm_whole else head_dim
            k_width = num_kv_heads * head_dim if qk_norm_whole else head_dim
            self.q_norm = norm.RMSNorm(q_width, eps=norm_eps, param_dtype=param_dtype)
            self.k_norm = norm.RMSNorm(k_width, eps=norm_eps, param_dtype=param_dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        positions = ctx.token_positions(x_BTD)
        found = self._project(x_BTD, ctx, positions)
        q, k, v = (remat.tag(x, name) for x, name in zip(found, "qkv"))
        if cache is None:
            o = attend.attend(q, k, v, ctx, **self._options())
        else:
            o, cache = self._attend_cached(q, k, v, ctx, positions, cache, self._options())
        o_BTF = remat.tag(o.reshape(*o.shape[:2], -1), "mixer_hidden")
        if self.use_gate:
            o_BTF = o_BTF * jax.nn.sigmoid(self.gate(x_BTD))
        return self.out(ctx.shard(o_BTF, "batch", "time", "heads")), cache, {}

    def share_of(
        self, marked_BT: Bool[Array, "B T"], x_BTD: Float[Array, "B T D"], ctx: Context
    ) -> Float[Array, "B T H"]:
        """How much of each query's attention goes to the marked tokens, from 0 to 1."""
        q, k, _ = self._project(x_BTD, ctx, ctx.token_positions(x_BTD))
        marks = jnp.broadcast_to(marked_BT[..., None, None], k.shape).astype(k.dtype)
        return attend.attend(q, k, marks, ctx, **self._options())[..., 0]

    def _options(self) -> dict:
        return dict(
            window=self.window, softcap=self.softcap, scale=self.scale, backend=self.backend
        )

    def _project(self, x_BTD, ctx: Context, positions):
        def heads(y_BTF, count):
            y = y_BTF.reshape(*y_BTF.shape[:2], count, self.head_dim)
            return ctx.shard(y, "batch", "time", "heads", None)

        if self.joint_bits is not None:
            q, k = self._joint(x_BTD)
            v = heads(self.v(x_BTD), self.num_kv_heads)
            # One key, the input itself, for all heads; the kernel wants as many as there are values.
            return ctx.shard(q, "batch", "time", "heads", None), k, v
        q, k = self.q(x_BTD), self.k(x_BTD)
        if self.qk_norm and self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = heads(q, self.num_heads), heads(k, self.num_kv_heads)
        v = heads(self.v(x_BTD), self.num_kv_heads)
        if self.qk_norm and not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            turn = dict(theta=self.rope_theta, fraction=self.rope_fraction)
            turn |= dict(scaling=self.rope_scaling)
            q, k = rotary.rotate(q, positions, **turn), rotary.rotate(k, positions, **turn)
        return q, k, v

    def _joint(self, x_BTD: Float[Array, "B T D"]):
        """x A of every head [B,T,H,D] and x [B,T,G,D]: q k^T = x A x^T with A = W_q W_k^T."""
        if self.q.quantizer is not None or self.k.quantizer is not None:
            raise ValueError(
                "attention: joint_bits rounds W_q and W_k together; leave both out of the recipes with "
                "rules such as 'layers/*/mixer/q none'."
            )
        w_q, w_k = (
            layer.matrix().reshape(layer.sizes[0], -1, self.head_dim) for layer in (self.q, self.k)
        )
        w_k = jnp.repeat(w_k, self.num_heads // self.num_kv_heads, axis=1)
        a_HDE = jnp.einsum("dhk,ehk->hde", w_q, w_k)
        if self.joint_bits:
            a_HDE = estimators.estimate(a_HDE, estimators.Stats(self.joint_bits), (0, 2))
        q = jnp.einsum("btd,hde->bthe", x_BTD, a_HDE.astype(x_BTD.dtype))
        shape = (*x_BTD.shape[:2], self.num_kv_heads, x_BTD.shape[2])
        return q, jnp.broadcast_to(x_BTD[:, :, None], shape)

    def _attend_cached(self, q, k, v, ctx: Context, positions, cache, options):
        """Attends to what the cache holds and to the new tokens, then stores the new tokens."""
        positions = kv_cache.new_positions(positions, ctx.segment_ids)
        new = {"k": k, "v": v, "positions": positions}
        seen = kv_cache.joined(cache, new)
        o = attention.attention(
            q,
            seen["k"],
            seen["v"],
            q_positions=positions,
            kv_positions=seen["positions"],
            **options,
        )
        return o, kv_cache.append(cache, new)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for sequences of up to `length` tokens (a ring of `window` if set)."""
        slots = min(length, self.window) if self.window else length
        shape = (self.num_kv_heads, self.head_dim)
        key = shape if self.joint_bits is None else (self.num_kv_heads, self.q.sizes[0])
        return kv_cache.init(batch, slots, {"k": key, "v": shape}, self.dtype)

    def forward_flops(self, seq_len: int) -> float:
        """Scores and values per token, causal average over the sequence; projections not included."""
        window = min(self.window or seq_len, seq_len)
        # The mean number of visible keys of the causal convention: half, not half plus a half.
        visible = seq_len / 2 if window == seq_len else window * (1 - (window - 1) / (2 * seq_len))
        return 4.0 * visible * self.num_heads * self.head_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """Whole blocks of scores and values, the scores again backward."""
        k_dim = self.head_dim if self.joint_bits is None else self.q.sizes[0]
        return executed.attention(seq_len, self.num_heads, k_dim, self.head_dim, self.window)


def _check_joint(joint_bits, rope, qk_norm) -> None:
    if rope or qk_norm:
        raise ValueError(
            f"attention: joint_bits={joint_bits} rounds W_q W_k^T, which rotary positions and norms "
            "between the two do not allow; set rope=False and qk_norm=False."
        )
    if joint_bits and not 2 <= joint_bits <= 8:
        raise ValueError(f"attention: joint_bits={joint_bits} must be 0 (not rounded) or 2 to 8.")


def _check(width, num_heads, num_kv_heads, head_dim, rope, rope_fraction, window) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"attention: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}."
        )
    if head_dim * num_heads != width and head_dim == width // num_heads:
        raise ValueError(
            f"attention: width {width} is not a multiple of num_heads={num_heads}; "
            "change num_heads or give head_dim."
        )
    if rope and int(head_dim * rope_fraction) % 2:
        raise ValueError(
            f"attention: rotary positions need an even number of channels, got head_dim={head_dim} "
            f"x rope_fraction={rope_fraction}."
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window} must be at least 1, or None for no window.")
