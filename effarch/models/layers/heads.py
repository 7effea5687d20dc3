"""Between channels [B,T,F] and heads [B,T,H,F/H], with the head axis sharded either way."""

from jaxtyping import Array, Float

from effarch.models.context import Context


def split(y_BTF: Float[Array, "B T F"], num_heads: int, ctx: Context) -> Float[Array, "B T H K"]:
    """Cuts the channels into `num_heads` neighbouring parts."""
    y = y_BTF.reshape(*y_BTF.shape[:2], num_heads, -1)
    return ctx.shard(y, "batch", "time", "heads", None)


def join(o_BTHV: Float[Array, "B T H V"], ctx: Context) -> Float[Array, "B T F"]:
    """Puts the heads side by side again."""
    return ctx.shard(o_BTHV.reshape(*o_BTHV.shape[:2], -1), "batch", "time", "heads")


def count(kind: str, width: int, num_heads: int | None, head_dim: int) -> int:
    """`num_heads`, or as many heads of `head_dim` as make up the width."""
    if num_heads is None and width % head_dim:
        raise ValueError(
            f"{kind}: width {width} is not a multiple of head_dim={head_dim}; change head_dim or give "
            "num_heads."
        )
    return num_heads or width // head_dim


def width_of(kind: str, channels: float, num_heads: int) -> int:
    """Channels of each head where `channels` are split evenly."""
    if channels != int(channels) or int(channels) % num_heads:
        raise ValueError(
            f"{kind}: {channels:g} channels cannot be split into num_heads={num_heads} heads; change "
            "num_heads or the expansion."
        )
    return int(channels) // num_heads
