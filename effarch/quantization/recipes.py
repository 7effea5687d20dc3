"""Recipes by name: which operand of which product is rounded to what, and with which gradient.

To add one: a function below with keyword-only options, which become its config section, and a line in
KINDS. A recipe knows no layer; `rules` gives recipes to layers.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from effarch import names
from effarch.kernels.quantize import formats
from effarch.quantization import estimators
from effarch.quantization.products import FORWARD_WORDS, PLAIN, Operand, Products, words


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one linear layer does instead of its plain product."""

    products: Products = PLAIN
    x: Callable | None = None
    """A rule of `estimators` for the activations, applied before the products."""
    w: Callable | None = None
    """The same for the weights."""
    history: int = 0
    """Steps whose largest magnitudes set the scales (delayed scaling); 0: the array's own."""
    step_bits: tuple[int, int] = (0, 0)
    """Bits of the learned step sizes of x and w (LSQ); 0: none."""

    @property
    def is_random(self) -> bool:
        """Whether a training step needs random numbers."""
        return self._draws_forward or self.products.is_random

    @property
    def _draws_forward(self) -> bool:
        return any(getattr(rule, "rounding", None) == "stochastic" for rule in (self.x, self.w))

    def forward_words(self, seed: Array | None) -> tuple[Array | None, Array | None]:
        """Two random words for the rule of x and two for that of w, if they draw.

        Without a seed, as in evaluation, they are always the same.
        """
        if not self._draws_forward:
            return None, None
        seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
        return tuple(words(seed, 2, start=FORWARD_WORDS))

    @property
    def has_state(self) -> bool:
        """Whether it needs statistics or parameters beside the weights."""
        return self.history > 0 or any(self.step_bits)

    def block_sizes(self) -> tuple[int, int, int]:
        """What must divide a layer's inputs, its outputs and the tokens of a micro-batch."""
        sizes = [1, 1, 1]
        for name, operand in self.products.operands().items():
            for dim, size in zip(_DIMS[name], operand.block_sizes()):
                sizes[dim] = math.lcm(sizes[dim], size)
        for rule in (self.x, self.w):
            sizes[0] = math.lcm(sizes[0], rule.rotate or 1 if rule else 1)
        return tuple(sizes)


_DIMS = {
    "y_x": (0, 2),
    "y_w": (0, 1),
    "dx_e": (1, 2),
    "dx_w": (1, 0),
    "dw_x": (2, 0),
    "dw_e": (2, 1),
}
"""(contracted, other) dimension of each operand: 0 inputs, 1 outputs, 2 tokens."""


def none() -> None:
    """No quantization: the product in the model's dtype."""
    return None


def fp8_current() -> Recipe:
    """E4M3 forward and E5M2 gradients, a scale a tensor from its own largest value (2209.05433)."""
    return Recipe(_hybrid_fp8())


def fp8_delayed(*, history: int = 1024) -> Recipe:
    """The same with scales from the largest values of the last `history` steps.

    As NVIDIA's Transformer Engine scales (margin 0): the scale stays if that largest value is 0 or not
    finite, and is 1 before the first step.
    """
    _require(history >= 1, "fp8_delayed.history", history, "must be at least 1")
    return Recipe(_hybrid_fp8(), history=history)


def fp8_block(*, block_size: int = 128) -> Recipe:
    """DeepSeek-V3's (2412.19437): E4M3 everywhere, activations and gradients in 1 x 128 blocks along
    the contraction, weights in 128 x 128 tiles, float32 scales."""
    fmt = dataclasses.replace(formats.find("deepseek"), block_size=block_size)
    return Recipe(_everywhere(Operand(fmt), weights=Operand(fmt, "tile")))


def mxfp8(*, scale_rounding: str = "ceil") -> Recipe:
    """MX blocks of 32, E4M3 in both directions; each operand is rounded from the original (the OCP
    specification rounds scales by "floor"; "ceil" never clips)."""
    return Recipe(_everywhere(_mx("mxfp8", scale_rounding)))


def mxfp6(*, scale_rounding: str = "ceil") -> Recipe:
    """MX blocks of 32, E2M3 in both directions."""
    return Recipe(_everywhere(_mx("mxfp6", scale_rounding)))


def mxfp4(*, scale_rounding: str = "floor") -> Recipe:
    """Plain round-to-nearest MXFP4 of all six operands: the baseline that FP4 recipes must beat."""
    return Recipe(_everywhere(_mx("mxfp4", scale_rounding)))


def nvfp4(*, stochastic: bool = True, rotate: int = 16) -> Recipe:
    """NVFP4 pretraining, arXiv 2509.25149: weights in 16 x 16 tiles, the rest in 1 x 16 blocks,
    stochastic gradients, a random Hadamard transform of the weight gradient's operands."""
    fmt = formats.find("nvfp4")
    gradient = Operand(fmt, rounding="stochastic" if stochastic else "nearest")
    plain, weights = Operand(fmt), Operand(fmt, "tile")
    return Recipe(
        Products(
            y_x=plain,
            y_w=weights,
            dx_e=gradient,
            dx_w=weights,
            dw_x=dataclasses.replace(plain, rotate=rotate),
            dw_e=dataclasses.replace(gradient, rotate=rotate),
        )
    )


_PMA_GAIN = 1.009276
"""1 / the mean share of a Gaussian that nearest MXFP4 with 3/4 of headroom keeps."""


def quartet(
    *,
    forward: str = "quest",
    scale_rounding: str = "nearest",
    gradient: str = "stochastic",
    backward: str = "full",
    rotate: bool = True,
    signs: bool = True,
) -> Recipe:
    """Quartet, arXiv 2505.14669: MXFP4 in all three products, and the variants that it compares.

    forward: "quest", scales from deviations; or "stochastic" or "nearest", scales from largest values.
    scale_rounding: of QuEST's scales; "floor" is the published code's, "nearest" errs less.
    gradient: "stochastic" or "nearest" rounding of the backward operands, both with 3/4 of headroom;
      "pma": nearest times 1.009276, unbiased for Gaussians; "quest": as forward, biased.
    backward: "full", "gradient" (the activations' and weights' copies stay exact) or "none".
    rotate: Hadamard transforms of the backward operands. signs: random signs before them; without, they
      are always the same, as they are in effect in the published code.
    """
    for field, value, known in (
        ("forward", forward, ("quest", "stochastic", "nearest")),
        ("scale_rounding", scale_rounding, (*formats.SCALE_ROUNDINGS, "none")),
        ("gradient", gradient, ("stochastic", "nearest", "pma", "quest")),
        ("backward", backward, ("full", "gradient", "none")),
    ):
        names.lookup(dict.fromkeys(known), value, f"quantization.quartet.{field}")
    fitted = estimators.Quartet(scale_rounding=scale_rounding)
    rule = fitted if forward == "quest" else estimators.Largest(forward)
    operand = Operand(
        formats.find("mxfp4"),
        rounding="stochastic" if gradient == "stochastic" else "nearest",
        headroom=True,
        rotate=32 if rotate else 0,
        signs=signs,
        gain=_PMA_GAIN if gradient == "pma" else 1.0,
        rule=fitted if gradient == "quest" else None,
    )
    if backward == "none":
        products = Products()
    elif backward == "gradient":
        # Alone, an operand is not rotated: its partner would have to be as well.
        operand = dataclasses.replace(operand, rotate=0)
        products = Products(dx_e=operand, dw_e=operand)
    else:
        products = Products(dx_e=operand, dx_w=operand, dw_x=operand, dw_e=operand)
    return Recipe(products, x=rule, w=rule)


def quest(
    *, bits: int = 4, fp4: bool = False, rotate: int = 128, estimator: str = "trust"
) -> Recipe:
    """QuEST, arXiv 2502.05003: forward in 1 to 8 bits, or E2M1 with `fp4`; backward not rounded."""
    _require(bits in estimators.QUEST_ALPHA, "quest.bits", bits, "must be 1 to 8")
    names.lookup(dict.fromkeys(("trust", "clip")), estimator, "quantization.quest.estimator")
    rule = estimators.Quest(0 if fp4 else bits, rotate, estimator)
    return Recipe(x=rule, w=rule)


def lsq(*, bits: int = 4) -> Recipe:
    """LSQ, arXiv 1902.08153: learned steps for activations and weights; backward not rounded."""
    _require(2 <= bits <= 8, "lsq.bits", bits, "must be 2 to 8")
    return Recipe(step_bits=(bits, bits))


def ofq(*, bits: int = 4) -> Recipe:
    """The quantizers of OFQ, arXiv 2302.02210: StatsQ weights, LSQ activations."""
    _require(2 <= bits <= 8, "ofq.bits", bits, "must be 2 to 8")
    return Recipe(w=estimators.Stats(bits), step_bits=(bits, 0))


def int8() -> Recipe:
    """SwitchBack, arXiv 2304.13013: y and dx in int8 with a scale a row, dw not rounded."""
    row = Operand(formats.find("int8"))
    return Recipe(Products(y_x=row, y_w=row, dx_e=row, dx_w=row))


KINDS: dict[str, Callable[..., Recipe | None]] = {
    "none": none,
    "fp8_current": fp8_current,
    "fp8_delayed": fp8_delayed,
    "fp8_block": fp8_block,
    "mxfp8": mxfp8,
    "mxfp6": mxfp6,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "quartet": quartet,
    "quest": quest,
    "lsq": lsq,
    "ofq": ofq,
    "int8": int8,
}


def options(kind: str) -> dict:
    """The config fields of a recipe and their defaults."""
    fields = inspect.signature(names.lookup(KINDS, kind, "quantization.recipe")).parameters
    return {name: field.default for name, field in fields.items()}


def build(kind: str, *, native: bool = False, **given) -> Recipe | None:
    """The recipe named `kind`. Raises ValueError for unknown options and products without hardware."""
    names.refuse_unknown(given, options(kind), f"quantization.{kind}")
    recipe = KINDS[kind](**given)
    if not native or recipe is None:
        return recipe
    products = dataclasses.replace(recipe.products, native=True)
    waits = any(operand.scale_waits for operand in products.operands().values())
    if not (waits or products.native_blocks):
        raise ValueError(
            f"quantization.native=True: the recipe {kind!r} has no product that runs in a small number "
            "format as it is; use fp8_current, fp8_delayed, int8, mxfp8 or nvfp4, or native=False, "
            "which rounds alike."
        )
    return dataclasses.replace(recipe, products=products)


def _hybrid_fp8() -> Products:
    forward = Operand(formats.find("e4m3"), "tensor")
    gradient = Operand(formats.find("e5m2"), "tensor")
    return dataclasses.replace(_everywhere(forward), dx_e=gradient, dw_e=gradient)


def _everywhere(operand: Operand, weights: Operand | None = None) -> Products:
    weights = weights or operand
    return Products(operand, weights, operand, weights, operand, operand)


def _mx(name: str, scale_rounding: str) -> Operand:
    return Operand(dataclasses.replace(formats.find(name), scale_rounding=scale_rounding))


def _require(holds: bool, field: str, value, remedy: str) -> None:
    if not holds:
        raise ValueError(f"quantization.{field}={value} {remedy}.")
