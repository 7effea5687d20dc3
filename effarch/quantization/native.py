"""Block-scaled products of the small numbers themselves, where a device multiplies them.

    y = sum over blocks k of s_a[k] s_b[k] (q_a[k] . q_b[k])

E4M3 in blocks of 32 with E8M0 scales (MXFP8) and E2M1 in blocks of 16 with E4M3 scales (NVFP4): one
instruction on NVIDIA's Blackwell, by `jax.nn.scaled_matmul`. Elsewhere the blocks are taken apart, which
costs more than rounded values do: `check` refuses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels import platform
from effarch.kernels.quantize.formats import Format

_SCALES = {("e4m3", 32, "e8m0"): "float8_e8m0fnu", ("e2m1", 16, "e4m3"): "float8_e4m3fn"}
"""(element, block size, scale) that hardware multiplies -> the type of the scales."""
_BLACKWELL = ("B200", "B300", "GB200", "GB300", "Blackwell", "RTX 50")


def has_blocks(fmt: Format) -> bool:
    """Whether there is an instruction for products of two arrays in this format."""
    return _layout(fmt) in _SCALES


def block_product(
    a: Float[Array, "M K"],
    scales_a: Float[Array, "M N"],
    b: Float[Array, "O K"],
    scales_b: Float[Array, "O N"],
    fmt: Format,
) -> Float[Array, "M O"]:
    """a b^T in float32 from values on the format's grid and their block scales, K / N values each."""
    small, scale = fmt.element.dtype, _SCALES[_layout(fmt)]
    operands = (a.astype(small), b.astype(small), scales_a.astype(scale), scales_b.astype(scale))
    if platform.current() == "gpu":
        batch = [operand[None] for operand in operands]
        return jax.nn.scaled_matmul(*batch, preferred_element_type=jnp.float32)[0]
    a, b, scales_a, scales_b = (operand.astype(jnp.float32) for operand in operands)
    a, b = a * jnp.repeat(scales_a, fmt.block_size, 1), b * jnp.repeat(scales_b, fmt.block_size, 1)
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def check(name: str, device: jax.Device) -> None:
    """Raises ValueError if the recipe `name` needs block-scaled products and the device has none."""
    kind = device.device_kind
    if not any(word in kind for word in _BLACKWELL):
        raise ValueError(
            f"quantization.native=True: the recipe {name!r} needs block-scaled matrix products, which "
            f"{kind!r} does not have (NVIDIA's Blackwell does: b200); use native=False, which rounds "
            "alike."
        )


def _layout(fmt: Format) -> tuple[str, int | None, str]:
    return fmt.element.name, fmt.block_size, fmt.scale
