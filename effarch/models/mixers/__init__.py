"""Sequence mixers by name. To add one: a file here and a line below.

A mixer is `Mixer(width, *, options..., rngs)` with `(x, ctx, cache) -> (y, cache, aux)`,
`init_cache(batch, length)` and `forward_flops(seq_len)` (per token, without its linear layers). A
recurrence counts as written, two for a multiply-add and one for a product: a state [K, V] costs 4 K V a
token, 6 K V with a delta rule, and K V more with a decay, whatever form runs. `hardware_flops(seq_len)`
is what does run, if that differs: `layers.executed`.
"""

from effarch.models.mixers.attention import Attention
from effarch.models.mixers.delta_net import DeltaNet
from effarch.models.mixers.gated_delta_net import GatedDeltaNet
from effarch.models.mixers.gla import GatedLinearAttention
from effarch.models.mixers.hgrn import HGRN
from effarch.models.mixers.hgrn2 import HGRN2
from effarch.models.mixers.kda import KimiDeltaAttention
from effarch.models.mixers.latent_attention import LatentAttention
from effarch.models.mixers.linear_attention import LinearAttention
from effarch.models.mixers.mamba2 import Mamba2
from effarch.models.mixers.retnet import RetNet
from effarch.models.mixers.spark_attention import SparkAttention

KINDS = {
    "attention": Attention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "kda": KimiDeltaAttention,
    "latent_attention": LatentAttention,
    "linear_attention": LinearAttention,
    "mamba2": Mamba2,
    "retnet": RetNet,
    "spark_attention": SparkAttention,
}
