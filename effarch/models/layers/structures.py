"""Linear layers with fewer parameters: StructuredFFN, arXiv 2406.16450; SLTrain, arXiv 2406.02214.

    low_rank       y = x A B                               A [I,R], B [R,O]
    block_dense    y = x diag(A_1 .. A_b) B                A [b, I/b, R/b], B [R,O]
    block_shuffle  y = x diag(A_1 .. A_b) P diag(B_1 .. B_b) Q, Monarch: A [b, I/b, M/b], B [b, M/b, O/b]
    sltrain        y = x (scale / R A B + S)               S: `density` * I * O entries at fixed places

M = min(I, O). P reads the features [M/b, b] and transposes them, so that every block of B sees every
block of A; Q does the same with the outputs. First values: low_rank the truncated singular vectors of a
dense draw, each with the root of its singular value; blocks, and B of block_dense, orthogonal; sltrain
A and S uniform within 1 / sqrt(I), B 0. Where we differ: sltrain has no backward pass of its own, its
matrix is made again in the backward pass by `jax.checkpoint`, which saves the same.

Legend: N = blocks, P = inputs of a block, Q = outputs of a block.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.models.layers import linear
from effarch.models.state import ModelState
from effarch.quantization import matmul


class Structure(nnx.Module):
    """(x [..., I], dtype) -> y [..., O] in `dtype`."""

    in_features: int
    flops: float
    """Forward, per token."""

    def matrix(self) -> Float[Array, "I O"]:
        """What x is multiplied by, float32."""
        return self(jnp.eye(self.in_features, dtype=jnp.float32), jnp.float32)

    def factors(self, layer: linear.Linear, down: nnx.Param, up: nnx.Param) -> None:
        """Keeps the two factors; each parameter is a multiply-add per token."""
        self.down, self.up = down, up
        self.in_features, self.flops = layer.sizes[0], 2.0 * (down.size + up.size)


class LowRank(Structure):
    """R*(I + O) parameters, 2*R*(I + O) FLOPs per token."""

    def __init__(self, layer: linear.Linear, options, rngs: nnx.Rngs):
        _check_rank(layer, options.rank)
        kernel = layer.kernel[...]
        left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(values[: options.rank])
        down, up = left[:, : options.rank] * root, root[:, None] * right[: options.rank]
        self.factors(layer, *_pair(layer, down.astype(kernel.dtype), up.astype(kernel.dtype)))

    def __call__(self, x: Float[Array, "... I"], dtype) -> Float[Array, "... O"]:
        z = matmul.matmul(x, self.down[...], dtype=dtype)
        return matmul.matmul(z, self.up[...], dtype=dtype)


class BlockDense(Structure):
    """R*(I/b + O) parameters, twice as many FLOPs per token."""

    def __init__(self, layer: linear.Linear, options, rngs: nnx.Rngs):
        (inputs, outputs), axes, num = layer.sizes, layer.axes, options.blocks
        _check_rank(layer, options.rank)
        _check_blocks(num, inputs=inputs, rank=options.rank)
        dtype = layer.kernel.dtype
        sizes = (num, inputs // num, options.rank // num)
        up = jax.nn.initializers.orthogonal()(rngs.params(), (options.rank, outputs), dtype)
        up = nnx.Param(up, logical=("rank", axes[1]), units=(1, layer.units[1]))
        self.factors(layer, _blocks(rngs, sizes, (axes[0], "rank"), dtype), up)

    def __call__(self, x: Float[Array, "... I"], dtype) -> Float[Array, "... O"]:
        z = _by_blocks(x, self.down[...], dtype)
        return matmul.matmul(z.reshape(*z.shape[:-2], -1), self.up[...], dtype=dtype)


class BlockShuffle(Structure):
    """min(I, O) * (I + O) / b parameters, twice as many FLOPs per token."""

    def __init__(self, layer: linear.Linear, options, rngs: nnx.Rngs):
        (inputs, outputs), axes, num = layer.sizes, layer.axes, options.blocks
        _check_blocks(num, inputs=inputs, outputs=outputs)
        middle, dtype = min(inputs, outputs) // num, layer.kernel.dtype
        down = _blocks(rngs, (num, inputs // num, middle), (axes[0], "rank"), dtype)
        up = _blocks(rngs, (num, middle, outputs // num), ("rank", axes[1]), dtype)
        self.factors(layer, down, up)

    def __call__(self, x: Float[Array, "... I"], dtype) -> Float[Array, "... O"]:
        num = self.down.shape[0]
        z = _by_blocks(x, self.down[...], dtype)
        z = jnp.swapaxes(z.reshape(*x.shape[:-1], -1, num), -1, -2)
        y = _by_blocks(z.reshape(*x.shape[:-1], -1), self.up[...], dtype)
        return jnp.swapaxes(y, -1, -2).reshape(*x.shape[:-1], -1)


class SlTrain(Structure):
    """R*(I + O) + floor(density*I*O) parameters; the FLOPs of the dense layer per token, and 2*R*I*O a
    step to make its matrix, which are not counted."""

    def __init__(self, layer: linear.Linear, options, rngs: nnx.Rngs):
        _check_rank(layer, options.rank)
        if not 0 < options.density < 1:
            raise ValueError(f"structured: density={options.density} must be between 0 and 1.")
        (inputs, outputs), dtype = layer.sizes, layer.kernel.dtype

        def uniform(*shape):
            bound = inputs**-0.5
            return jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)

        zeros = jnp.zeros((options.rank, outputs), dtype)
        self.factors(layer, *_pair(layer, uniform(inputs, options.rank), zeros))
        count = math.floor(options.density * inputs * outputs)
        self.sparse = nnx.Param(uniform(count), logical=("sparse",), decay=True)
        places = jax.random.permutation(rngs.params(), inputs * outputs)[:count]
        self.places = ModelState(jnp.sort(places).astype(jnp.int32), logical=(None,))
        self.scale, self.flops = options.scale / options.rank, 2.0 * inputs * outputs

    def __call__(self, x: Float[Array, "... I"], dtype) -> Float[Array, "... O"]:
        @jax.checkpoint
        def product(x, down_IR, up_RO, sparse, places):
            """Entry i, o of the matrix lies at place i * O + o."""
            dense = matmul.matmul(down_IR, up_RO, dtype=dtype).astype(jnp.float32) * self.scale
            flat = dense.reshape(-1).at[places].add(sparse.astype(jnp.float32))
            return matmul.matmul(x, flat.reshape(dense.shape), dtype=dtype)

        return product(x, *(part[...] for part in (self.down, self.up, self.sparse, self.places)))


FORMS = {
    "low_rank": LowRank,
    "block_dense": BlockDense,
    "block_shuffle": BlockShuffle,
    "sltrain": SlTrain,
}


def make(layer: linear.Linear, options, rngs: nnx.Rngs) -> Structure:
    """The factors of a layer by `options` (form, rank, blocks, density, scale)."""
    return names.lookup(FORMS, options.form, "structured.form")(layer, options, rngs)


def _pair(layer: linear.Linear, down, up) -> tuple[nnx.Param, nnx.Param]:
    axes, units = layer.axes, layer.units
    down = nnx.Param(down, logical=(axes[0], "rank"), units=(units[0], 1))
    return down, nnx.Param(up, logical=("rank", axes[1]), units=(1, units[1]))


def _blocks(rngs: nnx.Rngs, shape, axes, dtype) -> nnx.Param:
    draw = lambda key: jax.nn.initializers.orthogonal()(key, shape[1:], dtype)  # noqa: E731
    kernels = jax.vmap(draw)(jax.random.split(rngs.params(), shape[0]))
    return nnx.Param(kernels, logical=("blocks", *axes))


def _by_blocks(x: Float[Array, "... I"], kernel_NPQ, dtype) -> Float[Array, "... N Q"]:
    """Each block of neighbouring features times its own matrix, [..., N, Q] in `dtype`."""
    num, inputs, _ = kernel_NPQ.shape
    x = x.reshape(*x.shape[:-1], num, inputs).astype(dtype)
    options = dict(preferred_element_type=jnp.float32)
    y = jnp.einsum("...np,npq->...nq", x, kernel_NPQ.astype(dtype), **options)
    return y.astype(dtype)


def _check_rank(layer: linear.Linear, rank: int) -> None:
    if not 1 <= rank <= min(layer.sizes):
        raise ValueError(
            f"structured: rank={rank} must be from 1 to {min(layer.sizes)}, the smaller side of a "
            f"{layer.sizes[0]} x {layer.sizes[1]} layer; change structured.rank."
        )


def _check_blocks(num: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if num < 1 or size % num:
            raise ValueError(
                f"structured: blocks={num} does not divide the layer's {name} ({size}); use a divisor."
            )
