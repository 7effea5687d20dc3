"""Forward roundings with a gradient of their own, applied to x and w before their product.

A rule says how an array is rounded along the contraction and where its gradient passes:

    y = Q(x H),   dx = (M * dy) H        H: block-diagonal Hadamard, its own inverse; M: the mask

The result stays rotated: both operands of a product are, and the rotations cancel. Rules are frozen
dataclasses with `rotate` and `(h, axis) -> (values, mask or None)`; stochastic ones take two random
words as well. Scales but `Largest`'s are moments, not maxima, so an infinity does not saturate: it stays
one, or NaN, and so may its block or row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from effarch.kernels.hadamard import api as hadamard
from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize import rounding, scales
from effarch.kernels.quantize.formats import ELEMENTS, FORMATS

E2M1_UNIT = 0.48707948
"""The step of the E2M1 grid with the least squared error for N(0, 1)."""
QUEST_ALPHA = {
    1: 0.7978846,
    2: 1.4935346,
    3: 2.0510681,
    4: 2.5139306,
    5: 2.9160939,
    6: 3.2765973,
    7: 3.6010497,
    8: 3.8849387,
}
"""The clipping point of a grid of 2^bits levels with the least squared error for N(0, 1)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def estimate(
    x: Float[Array, "..."],
    rule,
    axis: int | tuple[int, ...],
    cut: NamedSharding | None = None,
    seed: Array | None = None,
) -> Float[Array, "..."]:
    """Q(x H) of a rule along `axis`, float32, with the rule's gradient. Several dimensions: `Stats`.

    `cut`: as in `kernels.hadamard`. `seed`: two uint32 words for a stochastic rule.
    """
    return _estimate_forward(x, rule, axis, cut, seed)[0]


def _estimate_forward(x, rule, axis, cut, seed):
    h = x.astype(jnp.float32)
    if rule.rotate:
        h = hadamard.hadamard(h, block_size=rule.rotate, axis=axis, cut=cut)
    values, mask = rule(h, axis) if seed is None else rule(h, axis, seed)
    return values, (mask, jnp.zeros((), x.dtype))


def _estimate_backward(rule, axis, cut, saved, dy):
    mask, like = saved
    dh = dy if mask is None else jnp.where(mask, dy, 0)
    if rule.rotate:
        dh = hadamard.hadamard(dh, block_size=rule.rotate, axis=axis, cut=cut)
    return dh.astype(like.dtype), None


estimate.defvjp(_estimate_forward, _estimate_backward)


@dataclasses.dataclass(frozen=True)
class Quartet:
    """MXFP4 with a scale from the block's deviation: "Quartet", arXiv 2505.14669, section 4.

    s = 2^round(log2(0.487 std)); values beyond 6 s saturate and pass no gradient. The published code
    floors the exponent (squared error 0.0224 of a Gaussian's variance); "nearest" has 0.0134.
    """

    rotate: int = 32
    scale_rounding: str = "nearest"

    def __call__(self, h, axis):
        fmt = FORMATS["mxfp4"]
        axes = quantize.blocked_axes(h.shape, fmt, axis)
        blocks, within = quantize.split(h, axes)
        unit = E2M1_UNIT * jnp.std(blocks, axis=within, keepdims=True) + 1e-8
        if self.scale_rounding != "none":
            unit = scales.power_of_two(scales.exponent(unit, self.scale_rounding))
        scaled = blocks / unit
        values = rounding.nearest(scaled, fmt.element) * unit
        mask = jnp.abs(scaled) < fmt.element.max
        return values.reshape(h.shape), mask.reshape(h.shape)


@dataclasses.dataclass(frozen=True)
class Largest:
    """MXFP4 with a scale from the block's largest value, and 3/4 of headroom so that nothing clips.

    The forward roundings that arXiv 2505.14669 compares Quartet's with: "stochastic", unbiased, and
    "nearest". The gradient passes everywhere.
    """

    rounding: str
    rotate: int = 32

    def __call__(self, h, axis, seed=None):
        fmt = FORMATS["mxfp4"]
        axes = quantize.blocked_axes(h.shape, fmt, axis)
        values, block, tensor = quantize.scaled(
            h, fmt, axes, rounding=self.rounding, seed=seed, headroom=True
        )
        return quantize.rescale(values, block, axes) * tensor, None


@dataclasses.dataclass(frozen=True)
class Quest:
    """A grid fitted to a Gaussian by the row's rms, and the trust estimator: "QuEST", 2502.05003.

    bits 1 ... 8: levels +-step/2, +-3 step/2, ..., +-a with a = alpha rms, step = 2 a / (2^bits - 1);
    bits 0: E2M1 times 0.487 rms. "trust" passes gradients up to half a gap (of the outermost levels)
    beyond the grid; "clip" up to its end, as the paper's 1-bit runs do.
    """

    bits: int
    rotate: int = 128
    estimator: str = "trust"

    def __call__(self, h, axis):
        rms = jnp.sqrt(jnp.mean(h * h, axis=axis, keepdims=True))
        if self.bits == 0:
            unit = E2M1_UNIT * rms + 1e-8
            values = rounding.nearest(h / unit, ELEMENTS["e2m1"]) * unit
            end, half_gap = 6 * unit, unit
        else:
            end = QUEST_ALPHA[self.bits] * rms + 1e-8
            step = 2 * end / (2**self.bits - 1)
            values = (jnp.round(jnp.clip(h, -end, end) / step + 0.5) - 0.5) * step
            half_gap = step / 2
        return values, jnp.abs(h) <= (end + half_gap if self.estimator == "trust" else end)


@dataclasses.dataclass(frozen=True)
class Stats:
    """StatsQ of OFQ, arXiv 2302.02210: half-integer levels scaled by 2 mean|w| of each row.

    s = 2 mean|w|, n = 2^(bits - 1), q = s (round(n clip(w/s, -1, 1) - 1/2) + 1/2) / n; the gradient
    passes everywhere.
    """

    bits: int
    rotate: int = 0

    def __call__(self, w, axis):
        scale = 2 * jnp.mean(jnp.abs(w), axis=axis, keepdims=True) + 1e-12
        levels = 2 ** (self.bits - 1)
        inside = jnp.clip(w / scale, -1, 1 - 1e-6)
        return scale * (jnp.round(inside * levels - 0.5) + 0.5) / levels, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def learned_step(x: Array, step: Float[Array, ""], bits: int) -> Array:
    """step * round(clip(x / step, -2^(bits-1), 2^(bits-1) - 1)): "LSQ", arXiv 1902.08153.

    dx passes inside the range; d step = sum of dy * (round(x/step) - x/step inside, the end of the
    range outside), times 1 / sqrt(number of elements * (2^(bits-1) - 1)).
    """
    return _learned_forward(x, step, bits)[0]


def _learned_forward(x, step, bits):
    low, high = _range(bits)
    return step * jnp.round(jnp.clip(x.astype(jnp.float32) / step, low, high)), (x, step)


def _learned_backward(bits, saved, dy):
    x, step = saved
    low, high = _range(bits)
    scaled = x.astype(jnp.float32) / step
    inside = (scaled >= low) & (scaled <= high)
    slope = jnp.where(inside, jnp.round(scaled) - scaled, jnp.clip(scaled, low, high))
    d_step = jnp.sum(dy * slope) / (x.size * high) ** 0.5
    return jnp.where(inside, dy, 0).astype(x.dtype), d_step.astype(step.dtype)


learned_step.defvjp(_learned_forward, _learned_backward)


def initial_step(x: Array, bits: int) -> Array:
    """LSQ's first step: 2 mean|x| / sqrt(2^(bits-1) - 1)."""
    return 2 * jnp.mean(jnp.abs(x.astype(jnp.float32))) / _range(bits)[1] ** 0.5


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@jax.custom_vjp
def report(x: Array, probe: Array, statistic: Array) -> Array:
    """x; the probe's cotangent becomes `statistic`."""
    return x


report.defvjp(
    lambda x, probe, statistic: (x, statistic), lambda statistic, dx: (dx, statistic, None)
)
