"""The short convolutions that recurrent mixers put behind their projections (H3, arXiv 2212.14052)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from effarch.kernels.short_conv import api as short_conv
from effarch.models.context import Context


class ShortConvs(nnx.Module):
    """A causal depthwise convolution and SiLU for each named projection; with 0 taps SiLU alone.

    `conv_size` taps (+ 1 with bias) per channel, kernels ~ N(0, init_std), biases 0.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        conv_size: int,
        *,
        use_bias: bool = False,
        linear: tuple[str, ...] = (),
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`sizes` gives the channels of each projection; those named in `linear` have no SiLU."""
        self.sizes, self.conv_size, self.linear = tuple(sizes.items()), conv_size, linear
        self.use_bias, self.dtype = use_bias, dtype
        if conv_size == 0:
            return
        for name, size in sizes.items():
            kernel = init_std * jax.random.normal(rngs.params(), (conv_size, size), param_dtype)
            setattr(self, name, nnx.Param(kernel, logical=("conv", "heads")))
            if use_bias:
                bias = nnx.Param(jnp.zeros((size,), param_dtype), logical=("heads",))
                setattr(self, f"{name}_bias", bias)

    def __call__(self, projected: dict[str, Array], ctx: Context, cache: dict | None):
        """The convolved projections [B,T,F] and the last inputs of each, for the decode cache."""
        if self.conv_size == 0:
            activated = {
                name: x if name in self.linear else jax.nn.silu(x) for name, x in projected.items()
            }
            return activated, {}
        convolved, tails = {}, {}
        for name, x_BTF in projected.items():
            initial = None if cache is None else cache[name]
            convolved[name], tails[name] = self._convolve(name, x_BTF, initial, ctx)
        return convolved, tails

    def _convolve(self, name: str, x_BTF: Array, initial: Array | None, ctx: Context):
        """Each device has its rows and channels; where time is cut, what lies before must be fetched."""

        def on_pieces(x, kernel, bias, initial, segment_ids):
            activation = None if name in self.linear else "silu"
            options = dict(activation=activation, initial=initial, segment_ids=segment_ids)
            return short_conv.short_conv(x, kernel, bias=bias, **options)

        kernel = getattr(self, name)[...].astype(x_BTF.dtype)
        bias = None
        if self.use_bias:
            bias = getattr(self, f"{name}_bias")[...].astype(x_BTF.dtype)
        arrays = (x_BTF, kernel, bias, initial, ctx.segment_ids)
        if ctx.layout is not None and ctx.layout.parts("time") > 1:
            return on_pieces(*arrays)
        channels = ("batch", None, "heads")
        inputs = (channels, (None, "heads"), ("heads",), channels, ("batch", None))
        return ctx.local(on_pieces, arrays, inputs, (channels, channels))

    def init_cache(self, batch: int) -> dict[str, Array]:
        """The inputs before the first token: zeros [B,W-1,F] by name."""
        if self.conv_size == 0:
            return {}
        tail = self.conv_size - 1
        return {name: jnp.zeros((batch, tail, size), self.dtype) for name, size in self.sizes}

    def forward_flops(self, seq_len: int) -> float:
        """Per token; the sequence length does not matter."""
        return 2.0 * self.conv_size * sum(size for _, size in self.sizes)
