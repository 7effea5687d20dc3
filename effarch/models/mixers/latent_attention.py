"""Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434; without positions in Kimi Linear.

    c_t = RMSNorm(x_t W_c),   k = [c W_k, rope(x W_r)],   v = c W_v,   q = [x W_q, rope(x W_qr)]
    o = softmax(q k^T / sqrt(K) + mask) v W_o

W_r gives one rotary part for all heads. The cache holds only c and that part: L + R numbers a token.
With a cache, W_k and W_v move over to the queries and outputs, so that all heads attend to c itself.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.attention import api as attention
from effarch.models.context import Context
from effarch.models.layers import attend, executed, heads, kv_cache, linear, norm, rotary


class LatentAttention(nnx.Module):
    """D H (N + R) + D (L + R) + L + L H (N + V) + H V D parameters.

    N = nope_dim, R = rope_dim, K = N + R, L = latent_dim, V = v_dim.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 16,
        latent_dim: int = 512,
        q_latent_dim: int | None = None,
        nope_dim: int = 128,
        rope_dim: int = 64,
        v_dim: int = 128,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_yarn: tuple = (),
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """rope False leaves the `rope_dim` channels unrotated (Kimi Linear). `q_latent_dim` gives
        queries a normed latent of their own (DeepSeek-V3): q = RMSNorm(x W_cq) W_q. `rope_yarn`: the
        four numbers of `rotary.yarn_stretched` from `factor` on, and `scale` of `rotary.yarn_sharpness`
        (DeepSeek-V3: 40, 32, 1, 4096, 1)."""
        if rope and rope_dim % 2:
            raise ValueError(f"latent_attention: rope_dim={rope_dim} must be even, or rope False.")
        if rope_yarn and len(rope_yarn) != 5:
            raise ValueError(
                f"latent_attention: rope_yarn={rope_yarn} must be (factor, fast, slow, length, scale) "
                "or ()."
            )
        self.num_heads, self.latent_dim, self.v_dim = num_heads, latent_dim, v_dim
        self.nope_dim, self.rope_dim = nope_dim, rope_dim
        self.rope, self.rope_theta, self.rope_yarn = rope, rope_theta, tuple(rope_yarn)
        self.scale = (nope_dim + rope_dim) ** -0.5
        if rope_yarn:
            self.scale *= rotary.yarn_sharpness(rope_yarn[0], rope_yarn[4])
        self.backend, self.dtype = backend, dtype
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        columns = ("embed", "heads")
        k_dim = nope_dim + rope_dim
        self.q_latent_dim = q_latent_dim
        if q_latent_dim:
            self.q_down = linear.Linear(width, q_latent_dim, axes=("embed", "latent"), **shared)
            self.q_norm = norm.RMSNorm(q_latent_dim, eps=norm_eps, param_dtype=param_dtype)
            self.q = linear.Linear(
                q_latent_dim, num_heads * k_dim, axes=("latent", "heads"), head_dim=k_dim, **shared
            )
        else:
            self.q = linear.Linear(width, num_heads * k_dim, axes=columns, head_dim=k_dim, **shared)
        self.down = linear.Linear(width, latent_dim + rope_dim, axes=("embed", "latent"), **shared)
        self.latent_norm = norm.RMSNorm(latent_dim, eps=norm_eps, param_dtype=param_dtype)
        up_dim = nope_dim + v_dim
        self.up = linear.Linear(
            latent_dim, num_heads * up_dim, axes=("latent", "heads"), head_dim=up_dim, **shared
        )
        rows = dict(axes=("heads", "embed"), head_dim=v_dim)
        self.out = linear.Linear(num_heads * v_dim, width, **rows, **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        positions = ctx.token_positions(x_BTD)
        q_input = self.q_norm(self.q_down(x_BTD)) if self.q_latent_dim else x_BTD
        q = heads.split(self.q(q_input), self.num_heads, ctx)
        q_nope, q_rope = jnp.split(q, [self.nope_dim], axis=-1)
        latent_BTL, k_rope = jnp.split(self.down(x_BTD), [self.latent_dim], axis=-1)
        latent_BTL, k_rope = self.latent_norm(latent_BTL), k_rope[:, :, None]
        if self.rope:
            turn = dict(theta=self.rope_theta, yarn=self.rope_yarn[:4])
            q_rope = rotary.rotate(q_rope, positions, **turn)
            k_rope = rotary.rotate(k_rope, positions, **turn)
        if cache is None:
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            o = self._attend(q, latent_BTL, k_rope, ctx)
        else:
            positions = kv_cache.new_positions(positions, ctx.segment_ids)
            new = {"latent": latent_BTL, "k_rope": k_rope, "positions": positions}
            o = self._attend_cached(q_nope, q_rope, new, cache)
            cache = kv_cache.append(cache, new)
        return self.out(heads.join(o, ctx)), cache, {}

    def _attend(self, q, latent_BTL, k_rope, ctx: Context) -> Float[Array, "B T H V"]:
        k_nope, v = jnp.split(
            heads.split(self.up(latent_BTL), self.num_heads, ctx), [self.nope_dim], axis=-1
        )
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], self.rope_dim))
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        return attend.attend(q, k, v, ctx, scale=self.scale, backend=self.backend)

    def _attend_cached(self, q_nope, q_rope, new, cache) -> Float[Array, "B T H V"]:
        """One key head for all queries: [c, rotary part]; its value is c."""
        up = self.up.matrix().reshape(self.latent_dim, self.num_heads, -1).astype(self.dtype)
        k_up, v_up = jnp.split(up, [self.nope_dim], axis=-1)
        seen = kv_cache.joined(cache, new)
        latent = seen["latent"][:, :, None]
        o = attention.attention(
            jnp.concatenate([jnp.einsum("bthn,lhn->bthl", q_nope, k_up), q_rope], axis=-1),
            jnp.concatenate([latent, seen["k_rope"]], axis=-1),
            latent,
            q_positions=new["positions"],
            kv_positions=seen["positions"],
            scale=self.scale,
            backend=self.backend,
        )
        return jnp.einsum("bthl,lhv->bthv", o, v_up)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for sequences of up to `length` tokens."""
        shapes = {"latent": (self.latent_dim,), "k_rope": (1, self.rope_dim)}
        return kv_cache.init(batch, length, shapes, self.dtype)

    def forward_flops(self, seq_len: int) -> float:
        """Scores and values per token, causal average over the sequence; projections not included."""
        return seq_len * self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """Whole blocks of scores and values, the scores again backward."""
        k_dim = self.nope_dim + self.rope_dim
        return executed.attention(seq_len, self.num_heads, k_dim, self.v_dim, None)
