"""The linear layer."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import remat
from effarch.quantization import matmul


class Linear(nnx.Module):
    """y = x W + b.  2*I*O FLOPs per token, I*O (+O) parameters; W ~ N(0, init_std)."""

    quantizer = None
    """What takes the place of the plain product; given by the builder."""
    adapter = None
    """What is added to it; given by the builder."""
    structure = None
    """The factors that stand for the kernel; given by the builder."""
    guide = None
    """What trains beside the factors; given by the builder."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        head_dim: int = 1,
        by_outputs: bool = False,
        use_bias: bool = False,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`head_dim`: what a mesh must not cut of the `heads` axis. `by_outputs`: the kernel is kept as
        [O, I], a contiguous row an output, for layers that read few of their outputs at a time."""
        shape, step = (in_features, out_features), -1 if by_outputs else 1
        units = tuple(head_dim if axis == "heads" else 1 for axis in axes)
        kernel = init_std * jax.random.normal(rngs.params(), shape[::step], param_dtype)
        self.kernel = nnx.Param(kernel, logical=axes[::step], units=units[::step])
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), logical=(axes[1],))
        self.use_bias = use_bias
        self.sizes, self.by_outputs = shape, by_outputs
        self.axes, self.units = axes, units
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = self._product(x) if self.structure is None else self._structured(x)
        y = remat.tag(y, "product")
        y = y if self.adapter is None else y + self.adapter(x)
        return y + self.bias[...].astype(y.dtype) if self.use_bias else y

    def _product(self, x):
        product = matmul.matmul if self.quantizer is None else self.quantizer
        kernel = self.kernel[...].T if self.by_outputs else self.kernel[...]
        return product(x, kernel, dtype=self.dtype)

    def _structured(self, x):
        structure = functools.partial(self.structure, dtype=self.dtype)
        return structure(x) if self.guide is None else self.guide(x, structure)

    def matrix(self) -> Float[Array, "I O"]:
        """W as it is applied, its adapter included, for layers that take it apart."""
        if self.structure is None:
            kernel = self.kernel[...].T if self.by_outputs else self.kernel[...]
        else:
            kernel = self.structure.matrix()
            kernel = kernel if self.guide is None else self.guide.matrix(kernel)
        return kernel if self.adapter is None else kernel + self.adapter.matrix()

    @property
    def product_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each product."""
        return (self.sizes,)

    def forward_flops(self, seq_len: int) -> float:
        """Per token, without a guide's; the sequence length does not matter."""
        if self.structure is not None:
            return self.structure.flops
        return 2.0 * self.sizes[0] * self.sizes[1]
