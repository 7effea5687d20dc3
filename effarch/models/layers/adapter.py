"""LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.

y = x W + (alpha / R) x A B,   A ~ N(0, 1 / I), B = 0: at first nothing changes
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.layers import linear


class Adapter(nnx.Module):
    """What is added to a linear layer.  R*(I + O) parameters, 2*R*(I + O) FLOPs per token."""

    def __init__(
        self, layer: linear.Linear, *, rank: int, alpha: float, param_dtype, rngs: nnx.Rngs
    ):
        inputs, outputs = layer.sizes
        axes = layer.axes
        shared = dict(
            head_dim=max(layer.units), dtype=layer.dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.down = linear.Linear(
            inputs, rank, axes=(axes[0], "rank"), init_std=inputs**-0.5, **shared
        )
        self.up = linear.Linear(rank, outputs, axes=("rank", axes[1]), init_std=0.0, **shared)
        self.scale = alpha / rank

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.scale * self.up(self.down(x))

    def matrix(self) -> Float[Array, "... I O"]:
        """(alpha / R) A B, of every layer that is stacked."""
        return self.scale * jnp.matmul(self.down.kernel[...], self.up.kernel[...])


def attach(
    block: nnx.Module, paths: tuple[str, ...], *, rank: int, alpha: float, param_dtype, rngs
) -> None:
    """Gives the linear layers at these paths of a block an adapter each."""
    layers = linear_layers(block)
    for path in paths:
        options = dict(rank=rank, alpha=alpha, param_dtype=param_dtype, rngs=rngs)
        layers[path].adapter = Adapter(layers[path], **options)


def merge(model: nnx.Module) -> None:
    """Adds every adapter to the matrix beside it and takes it away."""
    for layer in linear_layers(model).values():
        if layer.adapter is not None:
            change = layer.adapter.matrix()
            change = jnp.matrix_transpose(change) if layer.by_outputs else change
            layer.kernel[...] = layer.kernel[...] + change.astype(layer.kernel[...].dtype)
            del layer.adapter


def linear_layers(block: nnx.Module) -> dict[str, linear.Linear]:
    """The linear layers of a block by path: `ffn/up`; not those of adapters."""
    found = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(block)
        if isinstance(node, linear.Linear)
    }
    return {path: layer for path, layer in found.items() if "/adapter/" not in path}
