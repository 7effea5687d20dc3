"""Bytes that a transformer layer keeps for its backward pass: Reducing Activation Recomputation in Large
Transformer Models, arXiv 2205.05198, table 2.

16-bit activations, GELU feed-forward of 4 h, dropout masks of one byte, attention that keeps its scores;
s tokens a sequence, b sequences, h the width, a heads, t devices of tensor parallelism.
"""

from collections.abc import Callable

TECHNIQUES: dict[str, Callable[..., float]] = {
    "none": lambda s, b, h, a, t: s * b * h * (34 + 5 * a * s / h),
    "tensor": lambda s, b, h, a, t: s * b * h * (10 + 24 / t + 5 * a * s / (h * t)),
    "tensor, sequence": lambda s, b, h, a, t: s * b * h / t * (34 + 5 * a * s / h),
    "tensor, selective": lambda s, b, h, a, t: s * b * h * (10 + 24 / t),
    "tensor, sequence, selective": lambda s, b, h, a, t: 34 * s * b * h / t,
    "full": lambda s, b, h, a, t: 2 * s * b * h,
}


def published(technique: str, *, s: int, b: int, h: int, a: int, t: int) -> float:
    """Bytes a layer and device by the published formula of a technique."""
    return TECHNIQUES[technique](s, b, h, a, t)


_SELECTIVE = ("q", "k", "v", "mixer_out", "ffn_up")
"""Results of linear layers; that of the feed-forward's last one is only added, and nobody needs it."""


def kept(remat: str, *, s: int, b: int, h: int, f: int, t: int, pieces: int) -> float:
    """Bytes a layer and device that `model.remat` keeps, the period's input included; not of offload.

    Our block (feed-forward of width f without gate, as many key heads as heads, no dropout): two bytes
    for every number; what has heads or hidden channels is split t ways, the stream `pieces` ways.
    """
    if remat == "none":
        # x and its quotient in float32, and what linear layers read
        norms = 2 * (2 * 4 * h / pieces + 2 * h)
        # q, k, v, what is read out, and that as rows for the last product
        attention = 5 * 2 * h / t
        # GELU: its input, its result and three arrays on the way
        feed_forward = 5 * 2 * f / t
        return s * b * (norms + attention + feed_forward)
    sizes = {"mixer_in": h, "mixer_out": h / pieces, "ffn_in": h, "ffn_out": h / pieces}
    sizes |= dict.fromkeys(("q", "k", "v", "mixer_hidden"), h / t)
    sizes |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_hidden"), f / t)
    named = tuple(remat.removeprefix("names:").split(","))
    chosen = {"full": (), "selective": _SELECTIVE}.get(remat, named)
    return 2 * s * b * (h / pieces + sum(sizes[name] for name in chosen))
