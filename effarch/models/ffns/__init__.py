"""Feed-forwards by name. To add one: a file here and a line below.

An ffn is `Ffn(width, *, options..., rngs)` with `(x, ctx) -> (y, aux)`; if it does more than its
linear layers, `forward_flops(seq_len)` per token.
"""

from effarch.models.ffns.blockffn import BlockFfn
from effarch.models.ffns.glu import Glu
from effarch.models.ffns.latent_moe import LatentMoe
from effarch.models.ffns.moe import Moe
from effarch.models.ffns.mole import Mole

KINDS = {
    "glu": Glu,
    "moe": Moe,
    "mole": Mole,
    "latent_moe": LatentMoe,
    "blockffn": BlockFfn,
}
