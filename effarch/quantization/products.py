"""The three products of a linear layer, each operand rounded to its own format.

    y = Q(x) Q(w)       dx = Q(e) Q(w)^T       dw = Q(x)^T Q(e)       e = dL/dy

x [T,I], w [I,O], e [T,O]: the products contract I, O and T, and blocks lie along what is contracted.
The gradient is straight-through: rounding counts as the identity. "Fake" products round values and
multiply them in `dtype`; "native" ones multiply the small numbers themselves: float8 or int8 where
every scale can wait until after the product, and then both give the same bits (int8: while sums stay
below 2^24); blocks with their scales where hardware does (see `native`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from effarch.kernels import platform
from effarch.kernels.hadamard import api as hadamard
from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize import rounding as rounding_lib
from effarch.kernels.quantize import scales
from effarch.kernels.quantize.formats import Format
from effarch.quantization import native


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one product is rounded."""

    format: Format
    spread: str = "block"
    """Who shares a scale: `block`, along the contraction; `tile`, squares of both dimensions, so that
    w and its transpose are rounded alike; `tensor`, everything."""
    rounding: str = "nearest"
    headroom: bool | None = None
    """See `kernels.quantize`."""
    rotate: int = 0
    """Block of a Hadamard transform along the contraction; both operands have the same."""
    signs: bool = True
    """Whether random signs come before that transform."""
    gain: float = 1.0
    """What the rounded values are multiplied by."""
    rule: Callable | None = None
    """A rule of `estimators` that rounds, with scales of its own and its mask ignored."""

    @property
    def scale_waits(self) -> bool:
        """Whether the scale is one along the contraction, and so can be applied to the result."""
        whole = self.spread == "tensor" or self.format.block_size is None
        return self.format.scale == "float32" and whole

    @property
    def is_random(self) -> bool:
        return self.rounding == "stochastic" or (self.rotate > 0 and self.signs)

    @property
    def in_blocks(self) -> bool:
        """Whether hardware multiplies such blocks."""
        return self.spread != "tensor" and native.has_blocks(self.format)

    def block_sizes(self) -> tuple[int, int]:
        """What must divide (the contraction, the other dimension)."""
        if self.spread == "tensor":
            return 1, 1
        block = self.format.block_size or 1
        return max(block, self.rotate), block if self.spread == "tile" else 1

    def rotation(self, axis: int, signs: dict | None) -> quantize.Rotation | None:
        """That of an array contracted along `axis`; `signs` are `draws`'s."""
        if not self.rotate:
            return None
        return quantize.Rotation(axis, self.rotate, signs[self.rotate] if self.signs else None)


@dataclasses.dataclass(frozen=True)
class Products:
    """The six operands; None is not rounded."""

    y_x: Operand | None = None
    y_w: Operand | None = None
    dx_e: Operand | None = None
    dx_w: Operand | None = None
    dw_x: Operand | None = None
    dw_e: Operand | None = None
    native: bool = False

    def operands(self) -> dict[str, Operand]:
        """Those that are rounded."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Operand)}

    @property
    def is_random(self) -> bool:
        return any(operand.is_random for operand in self.operands().values())

    @property
    def native_blocks(self) -> bool:
        """Whether a native product of these needs block-scaled instructions."""
        return self.native and any(self.is_in_blocks(name) for name in ("y_x", "dx_e", "dw_x"))

    def is_in_blocks(self, name: str) -> bool:
        """Whether the operand and its partner are blocks of one format that hardware multiplies."""
        pair = [getattr(self, one) for one in next(pair for pair in PAIRS if name in pair)]
        both = all(operand is not None and operand.in_blocks for operand in pair)
        return both and pair[0].format.element == pair[1].format.element


PAIRS = (("y_x", "y_w"), ("dx_e", "dx_w"), ("dw_x", "dw_e"))
"""The operands of each product."""
FORWARD_WORDS = 7
"""Where the words of forward rules start: `draws` takes at most one pair an operand and one more."""
PLAIN = Products()
"""No rounding."""


class Cuts(NamedTuple):
    """How a mesh cuts the arrays of a product, so that kernels can run on each device's pieces."""

    x: NamedSharding | None = None
    w: NamedSharding | None = None
    e: NamedSharding | None = None


WHOLE = Cuts()
"""Not cut, or nobody knows how: XLA splits what rounds."""


def multiply(
    products: Products,
    x: Float[Array, "T I"],
    w: Float[Array, "I O"],
    *,
    dtype,
    seed: jax.Array | None = None,
    amax: Float[Array, "3"] | None = None,
    probe: Float[Array, "3"] | None = None,
    cuts: Cuts = WHOLE,
) -> Float[Array, "T O"]:
    """y = Q(x) Q(w) in `dtype`, with the gradients of `products`.

    seed: two uint32 words for stochastic rounding and random signs, for the backward pass alone.
    amax: the magnitudes that set the scales of x, w and e instead of their own (delayed scaling).
    probe: zeros, whose cotangent becomes the largest magnitudes of x, w and e.
    """
    return _multiply((products, dtype, cuts), x, w, seed, amax, probe)


class _Rounded(NamedTuple):
    """value * block scale * scale, as far as they are not applied yet."""

    values: Array
    scale: Array | None
    """[1] or [others]: for the result of the product."""
    blocks: Array | None = None
    """Block scales of a native product; its values are on the format's grid."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(static, x, w, seed, amax, probe):
    return _forward(static, x, w, seed, amax, probe)[0]


def _forward(static, x, w, seed, amax, probe):
    products, dtype, cuts = static
    amax_x, amax_w = (None, None) if amax is None else (amax[0], amax[1])
    x_rounded = _rounded(products, "y_x", x, 1, dtype, cuts, amax=amax_x)
    w_rounded = _rounded(products, "y_w", w, 0, dtype, cuts, amax=amax_w)
    y = _product(products, "y_x", x_rounded, 1, w_rounded, 0).astype(dtype)
    seen = None if probe is None else jnp.stack([_largest(x), _largest(w)])
    # What the backward pass would round in the same way is kept rounded.
    x_kept = _kept(x_rounded, products.y_x) if _same(products.y_x, products.dw_x) else x
    w_kept = _kept(w_rounded, products.y_w) if _same(products.y_w, products.dx_w) else w
    like = (jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))
    return y, (x_kept, w_kept, like, seed, amax, seen)


def _backward(static, saved, e):
    products, dtype, cuts = static
    x, w, (like_x, like_w), seed, amax, seen = saved
    _check_tokens(products, e.shape[0])
    seeds, signs = draws(products, seed)
    amax_x, amax_w, amax_e = (None, None, None) if amax is None else amax

    def rounded(name, array, axis, amax):
        if isinstance(array, _Rounded):
            return array._replace(values=array.values.astype(dtype))
        return _rounded(products, name, array, axis, dtype, cuts, seeds.get(name), signs, amax)

    e_rounded, w_rounded = rounded("dx_e", e, 1, amax_e), rounded("dx_w", w, 1, amax_w)
    dx = _product(products, "dx_e", e_rounded, 1, w_rounded, 1).astype(like_x.dtype)
    x_rounded, e_rounded = rounded("dw_x", x, 0, amax_x), rounded("dw_e", e, 0, amax_e)
    dw = _product(products, "dw_x", x_rounded, 0, e_rounded, 0).astype(like_w.dtype)
    d_probe = None if seen is None else jnp.append(seen, _largest(e))
    return dx, dw, None, None, d_probe


_multiply.defvjp(_forward, _backward)


def _rounded(products, name, x, axis, dtype, cuts, seed=None, signs=None, amax=None) -> _Rounded:
    """Values in `dtype`, rounded as the operand `name` says."""
    operand = getattr(products, name)
    if operand is None:
        return _Rounded(x.astype(dtype), None)
    fmt, rotation, cut = operand.format, operand.rotation(axis, signs), getattr(cuts, name[-1])
    if operand.rule is not None:
        return _Rounded(operand.rule(rotated(x, rotation, cut), axis)[0].astype(dtype), None)
    if amax is not None:
        x = rotated(x, rotation, cut)
        scale, _ = scales.of_blocks(amax, fmt, 1.0)
        return _Rounded(
            rounding_lib.nearest(x / scale, fmt.element).astype(dtype), scale.reshape(1)
        )
    dims = {"block": axis, "tile": (0, 1), "tensor": None}[operand.spread]
    axes = quantize.blocked_axes(x.shape, fmt, dims)
    values, block, tensor = quantize.scaled(
        x,
        fmt,
        axes,
        rounding=operand.rounding,
        seed=seed,
        headroom=operand.headroom,
        rotation=rotation,
        cut=cut,
    )
    tensor = tensor * operand.gain
    if operand.scale_waits:
        return _Rounded(values.astype(dtype), (block * tensor).reshape(-1))
    if products.native and products.is_in_blocks(name):
        return _Rounded(values.astype(dtype), tensor.reshape(1), block)
    return _Rounded(quantize.rescale(values, block, axes).astype(dtype), tensor.reshape(1))


def rotated(x: Array, rotation: quantize.Rotation | None, cut: NamedSharding | None = None):
    """x in float32, transformed; `cut` as in `kernels.hadamard`."""
    x = x.astype(jnp.float32)
    return x if rotation is None else hadamard.hadamard(x, **rotation._asdict(), cut=cut)


def _product(products, name, a, axis_a, b, axis_b):
    """a and b, contracted over the named axes, float32, with their scales applied; a is `name`."""
    first, second = [getattr(products, one) for one in next(p for p in PAIRS if name in p)]
    if a.blocks is not None:
        y = native.block_product(
            *_along_rows(first, a, axis_a), *_along_rows(second, b, axis_b), first.format
        )
    else:
        values_a, values_b = a.values, b.values
        if products.native and first and second and first.scale_waits and second.scale_waits:
            values_a = values_a.astype(first.format.element.dtype)
            values_b = values_b.astype(second.format.element.dtype)
        sum_dtype = jnp.int32 if values_a.dtype == jnp.int8 else jnp.float32
        dims = (((axis_a,), (axis_b,)), ((), ()))
        y = jax.lax.dot_general(values_a, values_b, dims, preferred_element_type=sum_dtype)
        y = y.astype(jnp.float32)
    y = y if a.scale is None else y * a.scale[:, None]
    return y if b.scale is None else y * b.scale


def _along_rows(operand, rounded, axis):
    """(values, block scales) with the contraction last; each row of a tile has its scale."""
    values, blocks = rounded.values, rounded.blocks
    if operand.spread == "tile":
        blocks = jnp.repeat(blocks, operand.format.block_size, axis=1 - axis)
    return (values, blocks) if axis == 1 else (values.T, blocks.T)


def _same(first, second) -> bool:
    """Whether two roundings of one array give the same, whatever is contracted."""
    return first is not None and first == second and first.spread != "block" and not first.is_random


def _kept(rounded: _Rounded, operand: Operand) -> _Rounded:
    """As small numbers, which are exact; on CPUs as they are, since casts take long there."""
    if not operand.scale_waits or platform.current() == "cpu":
        return rounded
    return rounded._replace(values=rounded.values.astype(operand.format.element.dtype))


def words(seed: Array, number: int, start: int = 0) -> Array:
    """[number, 2] random words from a layer's two; those from another `start` are others."""
    index = jnp.arange(2 * start, 2 * (start + number), dtype=jnp.uint32)
    return rounding_lib.mix(rounding_lib.mix(index + seed[0]) ^ seed[1]).reshape(-1, 2)


def draws(products: Products, seed) -> tuple[dict, dict]:
    """Two words for each operand, and the signs of each rotation, shared by all operands."""
    if not products.is_random:
        return {}, {}
    if seed is None:
        raise ValueError(
            "quantization: this recipe rounds stochastically or draws rotations in its backward pass "
            "and needs random numbers; give the layer's Context a key."
        )
    operands = products.operands()
    *own, last = words(seed, len(operands) + 1)
    sizes = {operand.rotate for operand in operands.values() if operand.rotate}
    signs = {
        size: jnp.where(rounding_lib.uniform(last, (size,)) < 0.5, -1.0, 1.0) for size in sizes
    }
    return dict(zip(operands, own)), signs


def _check_tokens(products, tokens):
    for name in ("dw_x", "dw_e"):
        operand = getattr(products, name)
        block = operand.block_sizes()[0] if operand else 1
        if tokens % block:
            raise ValueError(
                f"quantization: weight gradients need blocks of {block} tokens, but a micro-batch has "
                f"{tokens}; change data.batch_size, data.seq_len or train.accumulate."
            )


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x)).astype(jnp.float32)
