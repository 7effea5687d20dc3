"""What a run carries from step to step, and where each array lies on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from effarch.models import build, parameters
from effarch.models import state as state_lib
from effarch.parallel import sharding
from effarch.training.optimizers import state_paths


class TrainState(NamedTuple):
    """Plain nested dicts of arrays; donated whole to every step."""

    step: jax.Array
    """Number of batches consumed."""
    params: Any
    model_state: Any
    """What no optimizer sees: statistics and biases that the model itself updates."""
    opt_state: Any


class Blueprint(NamedTuple):
    """A model without arrays: its static part and what is known of every variable."""

    graphdef: nnx.GraphDef
    params: Any
    """Nested dict of ParamInfo."""
    model_state: Any
    """Nested dict of ParamInfo."""
    probes: Any
    """Nested dict of ShapeDtypeStruct."""


def blueprint(model_config, *, vocab_size: int, quantization=None) -> Blueprint:
    """The model that the config describes, nothing allocated."""
    model = build.abstract(model_config, vocab_size=vocab_size, quantization=quantization)
    graphdef, params, probes, model_state = nnx.split(model, nnx.Param, state_lib.Probe, ...)
    return Blueprint(
        graphdef,
        parameters.describe(params),
        parameters.describe(model_state),
        nnx.to_pure_dict(probes),
    )


def initial(
    model_config,
    *,
    vocab_size: int,
    seed: jax.Array,
    tx: optax.GradientTransformation,
    quantization=None,
):
    """A fresh TrainState from a random key; run under jit with `out_shardings`."""
    model = build.model(
        model_config, vocab_size=vocab_size, rngs=nnx.Rngs(seed), quantization=quantization
    )
    _, params, _, model_state = nnx.split(model, nnx.Param, state_lib.Probe, ...)
    params = nnx.to_pure_dict(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=nnx.to_pure_dict(model_state),
        opt_state=tx.init(params),
    )


def shardings(abstract: TrainState, plan: Blueprint, layout: sharding.Layout) -> TrainState:
    """A NamedSharding for every array; optimizer state lies where its parameter lies.

    Raises ValueError, naming the parameter and the axis, if the mesh cannot split one evenly.
    """
    infos = jax.tree.leaves(plan.params)
    for info in infos:
        layout.check(f"parameter {info.public_paths[0]}", info.shape, info.logical, info.units)
    by_path = {info.path: info for info in infos}
    replicated = NamedSharding(layout.mesh, PartitionSpec())

    def of_optimizer(key_path, leaf):
        path = parameters.path_of(key_path)
        logical = state_paths.logical_axes(path, leaf.shape, by_path)
        return replicated if logical is None else layout.sharding(logical)

    return TrainState(
        step=replicated,
        params=jax.tree.map(lambda info: layout.sharding(info.logical), plan.params),
        model_state=jax.tree.map(lambda info: layout.sharding(info.logical), plan.model_state),
        opt_state=jax.tree_util.tree_map_with_path(of_optimizer, abstract.opt_state),
    )
