"""What layers report beside their output: how it adds up, and how model state follows from it.

A name begins with `loss/` (added to the loss), `metric/` or `count/`. Over micro-batches, counts add up,
names that end in `_max` take the maximum, all others the mean. Over layers, losses add up as well.
The nesting is {stack name: {name: [repeats, ...]}}.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from effarch.models import state as state_lib


def total_loss(aux: dict) -> Array:
    """The sum of all `loss/` entries over layers."""
    losses = [
        jnp.sum(value)
        for stack in aux.values()
        for name, value in stack.items()
        if name.startswith("loss/")
    ]
    return sum(losses, jnp.zeros((), jnp.float32))


def reduce_leading(aux: dict) -> dict:
    """Reduces the leading axis, that of micro-batches, by each name's rule."""

    def one(name, value):
        if name.startswith("count/"):
            return jnp.sum(value, axis=0)
        return jnp.max(value, axis=0) if name.endswith("_max") else jnp.mean(value, axis=0)

    return {
        stack: {name: one(name, value) for name, value in entries.items()}
        for stack, entries in aux.items()
    }


def reduce_layers(aux: dict) -> dict[str, Array]:
    """One float32 scalar a name, over all layers."""
    gathered: dict[str, list[Array]] = {}
    for entries in aux.values():
        for name, value in entries.items():
            gathered.setdefault(name, []).append(value.astype(jnp.float32).reshape(-1))
    reduced = {}
    for name, parts in gathered.items():
        values = jnp.concatenate(parts)
        if name.startswith(("count/", "loss/")):
            reduced[name] = jnp.sum(values)
        else:
            reduced[name] = jnp.max(values) if name.endswith("_max") else jnp.mean(values)
    return reduced


def next_model_state(graphdef: nnx.GraphDef, state, aux: dict, probes: dict) -> dict:
    """The model state of the next step; every module with `next_state` advances its own part."""
    if not jax.tree.leaves(state.model_state):
        return state.model_state
    model = nnx.merge(graphdef, state.params, probes, state.model_state)
    for stack_name, block in model.layers.items():
        for _, module in nnx.iter_graph(block):
            if isinstance(module, nnx.Module) and hasattr(module, "next_state"):
                own = nnx.state(module, state_lib.ModelState)
                own_probes = nnx.to_pure_dict(nnx.state(module, state_lib.Probe))
                new = module.next_state(nnx.to_pure_dict(own), aux[stack_name], own_probes)
                nnx.update(module, new)
    _, _, _, model_state = nnx.split(model, nnx.Param, state_lib.Probe, ...)
    return nnx.to_pure_dict(model_state)
