"""A finished or running run, opened for reading: its newest good checkpoint and what made it."""

import pathlib

import jax
import numpy as np
from flax import nnx

from effarch.models.layers import quantizer
from effarch.training import run_folder, setup
from effarch.training.state import TrainState


def open_run(folder: pathlib.Path, *, step: int | None = None) -> tuple[setup.Setup, TrainState]:
    """The run's setup and the state of its newest good checkpoint (or of `step`).

    Raises ValueError if the folder holds no run or no checkpoint.
    """
    config = run_folder.read_config(folder)
    plan = setup.prepare(config)
    with setup.open_checkpoints(plan, folder) as saved:
        restored = saved.restore(plan.target(), step=step)
    if restored is None:
        raise ValueError(
            f"{folder} holds no checkpoint yet; wait for the first one, or train with a smaller "
            "checkpoint.every_steps."
        )
    return plan, restored[1]


def model_of(plan: setup.Setup, state: TrainState):
    """The NNX model with the state's parameters, without recipes if it was last trained so."""
    probes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), plan.plan.probes)
    model = nnx.merge(plan.plan.graphdef, state.params, probes, state.model_state)
    if not plan.is_model_quantized(int(state.step)):
        quantizer.detach(model)
    return model
