"""Quantization of arrays: blocks that share a scale, elements rounded to a small format.

    x is about element * block scale * tensor scale

See `formats` for the formats and their scales, `rounding` for ties and stochastic rounding.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from effarch.kernels import dispatch
from effarch.kernels.hadamard import api as hadamard
from effarch.kernels.quantize import formats
from effarch.kernels.quantize import rounding as rounding_lib
from effarch.kernels.quantize.formats import Format

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
ROUNDINGS = ("nearest", "stochastic")
_SCALE_DTYPES = {"float32": "float32", "e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn"}


class Rotation(NamedTuple):
    """A transform before rounding, in one pass with it where there is a kernel; see `hadamard`."""

    axis: int
    block_size: int
    signs: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "tensor_scale"],
    meta_fields=["format", "axes"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as codes and scales."""

    codes: jax.Array
    """Of x's shape; the element's own type where JAX has one, else uint8 bit patterns."""
    scales: jax.Array
    """x's shape with each blocked dimension replaced by its number of blocks; the scale's own type."""
    tensor_scale: jax.Array
    """Float32 scalar."""
    format: Format
    axes: tuple[tuple[int, int], ...]
    """(dimension, block size) of every blocked dimension."""

    def dequantize(self) -> jax.Array:
        """The float32 values."""
        values = formats.decode(self.codes, self.format.element)
        return rescale(values, self.scales.astype(jnp.float32), self.axes) * self.tensor_scale


def quantize(
    x: jax.Array,
    format: str | Format,
    *,
    axis: int | tuple[int, ...] | None = -1,
    block_size: int | None = None,
    rounding: str = "nearest",
    ties: str = "even",
    key: jax.Array | None = None,
    headroom: bool | None = None,
    rotate: int = 0,
    signs: jax.Array | None = None,
    backend: str | None = None,
) -> QuantizedArray:
    """Rounds x to a format, by name ("mxfp4") or as a Format; any floating dtype, float32 inside.

    axis: the dimension along which blocks lie; several make tiles (128 x 128), None is all of them
      in one block: a scale for the tensor.
    block_size: elements of a block along each axis; None takes the format's own size, and the whole
      dimension where it has none (int8 along -1: a scale for each row). Must divide the dimension.
    rounding: "nearest" (`ties`: "even", "zero", "away") or "stochastic", which needs a key and is
      unbiased.
    headroom: shrink x in its blocks so that nothing clips (see Format.headroom); None: only for
      stochastic rounding.
    rotate: block size of a Hadamard transform of x along `axis`, which must then be one dimension; 0
      is none. `signs` [rotate] multiply x first (`kernels.hadamard`).
    Infinities saturate; a NaN makes its block NaN, or all where a scale is the tensor's (NVFP4).
    """
    fmt = formats.find(format)
    axes = blocked_axes(x.shape, fmt, axis, block_size)
    _check(rounding, ties, key)
    rotation = _rotation(x, axis, rotate, signs)
    seed = jax.random.bits(key, (2,), jnp.uint32) if rounding == "stochastic" else None
    values, scales, tensor_scale = scaled(
        x,
        fmt,
        axes,
        rounding=rounding,
        ties=ties,
        seed=seed,
        headroom=headroom,
        rotation=rotation,
        backend=backend,
    )
    return QuantizedArray(
        formats.encode(values, fmt.element),
        scales.astype(_SCALE_DTYPES[fmt.scale]),
        tensor_scale,
        fmt,
        axes,
    )


def scaled(
    x: jax.Array,
    fmt: Format,
    axes: tuple[tuple[int, int], ...],
    *,
    rounding: str = "nearest",
    ties: str = "even",
    seed: jax.Array | None = None,
    headroom: bool | None = None,
    rotation: Rotation | None = None,
    cut: NamedSharding | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values on the element's grid, block scales, tensor scale), all float32: `quantize` uncoded.

    `seed`: two uint32 words for stochastic rounding; the same noise on every backend. `cut`: how a mesh
    cuts x [rows, columns], so that kernels can run on each device's piece.
    """
    seed = seed if rounding == "stochastic" else None
    shrink = fmt.headroom if headroom or (headroom is None and seed is not None) else 1.0
    if rotation is not None:
        hadamard.check(x, rotation.axis, rotation.block_size, rotation.signs)
        rotation = rotation._replace(axis=rotation.axis % x.ndim)
    return dispatch.call(
        "quantize", "quantize", BACKENDS, backend, x, fmt, axes, shrink, ties, seed, rotation, cut
    )


def rescale(values: jax.Array, scales: jax.Array, axes: tuple[tuple[int, int], ...]) -> jax.Array:
    """values * scales, each block by its own."""
    blocks, within = split(values, axes)
    return (blocks * jnp.expand_dims(scales, within)).reshape(values.shape)


def split(x: jax.Array, axes: tuple[tuple[int, int], ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """x with each blocked dimension as (number, size), and the dimensions of the sizes."""
    sizes, shape, within = dict(axes), [], []
    for dim, length in enumerate(x.shape):
        if dim in sizes:
            shape += [length // sizes[dim], sizes[dim]]
            within.append(len(shape) - 1)
        else:
            shape.append(length)
    return x.reshape(shape), tuple(within)


def blocked_axes(
    shape: tuple[int, ...],
    fmt: Format,
    axis: int | tuple[int, ...] | None,
    block_size: int | None = None,
) -> tuple[tuple[int, int], ...]:
    """((dimension, block size), ...) in order. Raises ValueError where a block does not divide."""
    rank = len(shape)
    if axis is None:
        return tuple((dim, shape[dim]) for dim in range(rank))
    chosen = axis if isinstance(axis, tuple) else (axis,)
    for dim in chosen:
        if not -rank <= dim < rank:
            raise ValueError(f"quantize: axis={dim} is not a dimension of an array {shape}.")
    found = []
    for dim in sorted({dim % rank for dim in chosen}):
        size = block_size or fmt.block_size or shape[dim]
        if size < 1 or shape[dim] % size:
            raise ValueError(
                f"quantize: blocks of {size} do not divide dimension {dim} of an array {shape}; use "
                "another block_size, or a multiple of it for that size."
            )
        found.append((dim, size))
    return tuple(found)


def _rotation(x, axis, block_size: int, signs) -> Rotation | None:
    if not block_size:
        return None
    if not isinstance(axis, int):
        raise ValueError(
            f"quantize: rotate={block_size} needs one dimension to transform; axis={axis} is not one."
        )
    return Rotation(axis, block_size, signs)


def _check(rounding: str, ties: str, key) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"quantize: rounding={rounding!r} is not known; use nearest or stochastic."
        )
    if ties not in rounding_lib.TIES:
        known = ", ".join(rounding_lib.TIES)
        raise ValueError(f"quantize: ties={ties!r} is not known; use one of {known}.")
    if rounding == "stochastic" and key is None:
        raise ValueError("quantize: rounding='stochastic' needs a random key; pass key=.")
