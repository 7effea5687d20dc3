"""The feed-forward without gate whose two matrices are factored: StructuredFFN, arXiv 2406.16450.

    y = S_down(act(S_up(x)))

S is one of the forms of `layers/structures.py`. With `guided_steps` a dense matrix beside each is faded
out over so many first steps (self-guided training). Any other linear layer takes the same forms by path,
see `config.model.structured`.
"""

import jax.numpy as jnp
from flax import nnx

from effarch.models import layer_structures
from effarch.models.ffns import mlp


class StructuredMlp(mlp.Mlp):
    """low_rank: 2*R*(D + F) parameters; block_dense: R*((D + F)/b + D + F); block_shuffle (F > D):
    2*D*(D + F)/b; twice as many FLOPs per token. sltrain: 2*R*(D + F) and 2*`density`*D*F; 4*D*F."""

    def __init__(
        self,
        width: int,
        *,
        form: str = "low_rank",
        rank: int | None = None,
        blocks: int = 4,
        density: float = 0.03,
        scale: float = 16.0,
        guided_steps: int = 0,
        reduce_flops: bool = True,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        """`rank` None: a quarter of the width. `options` are those of Mlp."""
        super().__init__(width, param_dtype=param_dtype, rngs=rngs, **options)
        rank = width // 4 if rank is None else rank
        chosen = layer_structures.Options(
            form, rank, blocks, density, scale, guided_steps, reduce_flops
        )
        for layer in (self.up, self.down):
            layer_structures.attach(layer, chosen, rngs)
