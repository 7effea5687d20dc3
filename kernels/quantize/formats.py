"""Number formats: what values exist, and how blocks of them share a scale.

Elements: "FP8 Formats for Deep Learning", arXiv 2209.05433, and the OCP Microscaling (MX)
specification 1.0 with its smaller floats; blocks: MX; NVFP4 of arXiv 2509.25149; the tiles of
DeepSeek-V3, arXiv 2412.19437.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Float:
    """Sign, `exponent_bits`, `mantissa_bits`; subnormals are values, infinities and NaN are not."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    dtype: str | None = None
    """JAX's type that holds the values; None: codes are kept as uint8 bit patterns."""

    @property
    def emax(self) -> int:
        """Exponent of the largest binade: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value, and of the subnormal ones."""
        return 1 - self.bias

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def magnitudes(self) -> np.ndarray:
        """All values >= 0 in order of their codes, float32."""
        codes = np.arange(2 ** (self.bits - 1))
        exponent, mantissa = np.divmod(codes, 2**self.mantissa_bits)
        fraction = mantissa / 2**self.mantissa_bits + (exponent > 0)
        values = np.ldexp(fraction, np.maximum(exponent, 1) - self.bias)
        return values[values <= self.max].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Integer:
    """The whole numbers from -max to max, max = 2^(bits - 1) - 1, times `step`."""

    bits: int
    step: float = 1.0
    dtype: str = "int8"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def max(self) -> float:
        return self.step * (2 ** (self.bits - 1) - 1)

    @property
    def emax(self) -> int:
        return math.frexp(self.max)[1] - 1

    def magnitudes(self) -> np.ndarray:
        """All values >= 0 in order, float32."""
        return (self.step * np.arange(2 ** (self.bits - 1))).astype(np.float32)


Element = Float | Integer

ELEMENTS: dict[str, Element] = {
    "e4m3": Float("e4m3", 4, 3, 7, 448.0, "float8_e4m3fn"),
    "e5m2": Float("e5m2", 5, 2, 15, 57344.0, "float8_e5m2"),
    "e2m3": Float("e2m3", 2, 3, 1, 7.5),
    "e3m2": Float("e3m2", 3, 2, 3, 28.0),
    "e2m1": Float("e2m1", 2, 1, 1, 6.0, "float4_e2m1fn"),
    **{f"int{bits}": Integer(bits) for bits in range(2, 9)},
}

SCALES = ("float32", "e8m0", "e4m3")
SCALE_ROUNDINGS = ("floor", "ceil", "nearest")


@dataclasses.dataclass(frozen=True)
class Format:
    """Elements that share a scale: x is about element * scale (/ tensor scale).

    scale "float32": amax / max. "e8m0": a power of two. "e4m3": an E4M3 value times a float32 of the
    whole tensor (NVFP4). `scale_rounding` is that of e8m0: "floor" is the MX rule, 2^(floor(log2 amax)
    - emax), which clips values above `max`; "ceil" and "nearest" round the exponent of amax / max.
    """

    element: Element
    block_size: int | None = None
    """Elements of a block along each blocked dimension; None: all of them."""
    scale: str = "float32"
    scale_rounding: str = "floor"

    def __post_init__(self):
        for field, known in (("scale", SCALES), ("scale_rounding", SCALE_ROUNDINGS)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field}={value!r} is not known; use one of {', '.join(known)}.")

    @property
    def headroom(self) -> float:
        """By how much x is shrunk in its block so that no value clips, whatever the scale's rounding.

        3/4 for E2M1 with floored power-of-two scales, whose blocks reach up to 8 times the scale
        (arXiv 2505.14669); 16/17 for E4M3 scales, which nearest rounding lowers by up to 1/17.
        """
        if self.scale == "e8m0":
            room = {"floor": 2.0 ** (self.element.emax + 1), "ceil": self.element.max}
            return self.element.max / room.get(self.scale_rounding, 2**0.5 * self.element.max)
        return 16 / 17 if self.scale == "e4m3" else 1.0


FORMATS: dict[str, Format] = {
    **{name: Format(element) for name, element in ELEMENTS.items()},
    "mxfp8": Format(ELEMENTS["e4m3"], 32, "e8m0"),
    "mxfp8_e5m2": Format(ELEMENTS["e5m2"], 32, "e8m0"),
    "mxfp6": Format(ELEMENTS["e2m3"], 32, "e8m0"),
    "mxfp6_e3m2": Format(ELEMENTS["e3m2"], 32, "e8m0"),
    "mxfp4": Format(ELEMENTS["e2m1"], 32, "e8m0"),
    "mxint8": Format(Integer(8, step=2.0**-6), 32, "e8m0"),
    "nvfp4": Format(ELEMENTS["e2m1"], 16, "e4m3"),
    "deepseek": Format(ELEMENTS["e4m3"], 128, "float32"),
}
"""Named formats; the elements alone share one float32 scale over the blocked dimensions."""


def find(name: "str | Format") -> Format:
    """The format of a name; a Format is itself."""
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known. Known: {', '.join(sorted(FORMATS))}.")
    return FORMATS[name]


def encode(values, element: Element):
    """Values of the element's grid (float32) as its storage type, or as uint8 bit patterns."""
    if isinstance(element, Integer):
        return jnp.round(values / element.step).astype(element.dtype)
    if element.dtype is not None:
        return values.astype(element.dtype)
    codes = jnp.searchsorted(jnp.asarray(element.magnitudes()), jnp.abs(values))
    sign = jnp.signbit(values).astype(jnp.uint8) << (element.bits - 1)
    return codes.astype(jnp.uint8) | sign


def decode(codes, element: Element):
    """The float32 values of what `encode` gave."""
    if isinstance(element, Integer):
        return codes.astype(jnp.float32) * element.step
    if element.dtype is not None:
        return codes.astype(jnp.float32)
    magnitude = jnp.asarray(element.magnitudes())[codes & (2 ** (element.bits - 1) - 1)]
    return jnp.where(codes >> (element.bits - 1) == 1, -magnitude, magnitude)
