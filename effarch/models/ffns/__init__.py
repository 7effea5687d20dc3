"""Feed-forwards by name. To add one: a file here and a line below.

An ffn is `Ffn(width, *, options..., rngs)` with `(x, ctx) -> (y, aux)`; if it does more than its
linear layers, `forward_flops(seq_len)` per token.
"""

from effarch.models.ffns.glu import Glu

KINDS = {
    "glu": Glu,
}
