"""Feed-forwards by name. To add one: a file here and a line below.

An ffn is `Ffn(width, *, options..., rngs)` with `(x, ctx) -> (y, aux)`; if it does more than its
linear layers, `forward_flops(seq_len)` per token.
"""

from effarch.models.ffns.blockffn import BlockFfn
from effarch.models.ffns.glu import Glu
from effarch.models.ffns.latent_moe import LatentMoe
from effarch.models.ffns.mlp import Mlp
from effarch.models.ffns.moe import Moe
from effarch.models.ffns.mole import Mole
from effarch.models.ffns.q_sparse import QSparseFfn
from effarch.models.ffns.spark_ffn import SparkFfn
from effarch.models.ffns.sparse_glu import SparseGlu
from effarch.models.ffns.structured_mlp import StructuredMlp

KINDS = {
    "glu": Glu,
    "mlp": Mlp,
    "moe": Moe,
    "mole": Mole,
    "latent_moe": LatentMoe,
    "blockffn": BlockFfn,
    "spark_ffn": SparkFfn,
    "sparse_glu": SparseGlu,
    "q_sparse": QSparseFfn,
    "structured_mlp": StructuredMlp,
}
