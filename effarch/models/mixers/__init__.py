"""Sequence mixers by name. To add one: a file here and a line below.

A mixer is `Mixer(width, *, options..., rngs)` with `(x, ctx, cache) -> (y, cache, aux)`,
`init_cache(batch, length)` and `forward_flops(seq_len)` (per token, without its linear layers).
"""

from effarch.models.mixers.attention import Attention
from effarch.models.mixers.gated_delta_net import GatedDeltaNet

KINDS = {
    "attention": Attention,
    "gated_delta_net": GatedDeltaNet,
}
