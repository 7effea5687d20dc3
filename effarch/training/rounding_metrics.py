"""How each rounded layer of a run fares on a batch: an evaluation beside the train step.

Plain steps pay nothing: this is a program of its own, two backward passes of the whole batch, run every
`quantization.metrics_every` steps. Beside `diagnostics.NAMES` it gives `cosine`, that between the
gradients of a layer's matrix with the recipes everywhere and nowhere. Experts are not looked at.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from effarch.models import build, parameters
from effarch.models import state as state_lib
from effarch.models.context import Context
from effarch.models.layers import quantizer
from effarch.parallel import sharding
from effarch.quantization import diagnostics

COSINE = "cosine"
NAMES = (*diagnostics.NAMES, COSINE)


def measure(
    config, *, vocab_size: int, layout: sharding.Layout | None = None
) -> Callable[[dict, dict, dict, jax.Array], dict[str, jax.Array]]:
    """(params, model_state, batch, key) -> {"layers/3/ffn/up/x_error": scalar, ...}."""
    model = build.abstract(config.model, vocab_size=vocab_size, quantization=config.quantization)
    watched = quantizer.watch(model)
    graphdef, _, probes, _ = nnx.split(model, nnx.Param, state_lib.Probe, ...)
    probes = nnx.to_pure_dict(probes)

    def loss(probes, params, model_state, batch, key, quantized):
        model = nnx.merge(graphdef, params, probes, model_state)
        total, _, _ = model.loss(batch, Context(key=key, layout=layout, quantized=quantized))
        return total / jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)

    def gradients(params, model_state, batch, key, *, quantized):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), probes)
        inputs = (zeros, params, model_state, batch, key, quantized)
        return jax.grad(loss, argnums=(0, 1))(*inputs)

    def step(params, model_state, batch, key):
        seen, rounded = gradients(params, model_state, batch, key, quantized=True)
        _, exact = gradients(params, model_state, batch, key, quantized=False)
        found = {}
        for path in watched:
            values = _at(seen, path)["quantizer"]["observed"]
            kernels = [_at(tree, path)["kernel"] for tree in (rounded, exact)]
            cosines = jax.vmap(_cosine)(*kernels)
            for index, public in enumerate(parameters.public_paths(path)):
                row = dict(zip(diagnostics.NAMES, values[index])) | {COSINE: cosines[index]}
                found |= {f"{public}/{name}": value for name, value in row.items()}
        return found

    return step


def _at(tree: dict, path: str):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.vdot(a, b) / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)
