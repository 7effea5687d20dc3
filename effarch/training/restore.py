"""A finished or running run, opened for reading: its newest good checkpoint and what made it."""

import pathlib

import jax
import numpy as np
from flax import nnx

from effarch import names
from effarch.models.layers import quantizer
from effarch.quantization import recipes
from effarch.training import run_folder, setup
from effarch.training.state import TrainState


def open_run(
    folder: pathlib.Path, *, step: int | None = None, recipe: str | None = None
) -> tuple[setup.Setup, TrainState]:
    """The run's setup and the state of its newest good checkpoint (or of `step`).

    recipe: of `quantization.recipes`, for all linear layers in place of what the run was trained with.
    Raises ValueError if the folder holds no run or no checkpoint, or the recipe needs what it has not.
    """
    config = run_folder.read_config(folder)
    plan = setup.prepare(config)
    used = plan if recipe is None else _with_recipe(plan, recipe)
    with setup.open_checkpoints(plan, folder) as saved:
        restored = saved.restore(plan.target(), step=step)
    if restored is None:
        raise ValueError(
            f"{folder} holds no checkpoint yet; wait for the first one, or train with a smaller "
            "checkpoint.every_steps."
        )
    return used, restored[1]


def _with_recipe(plan: setup.Setup, recipe: str) -> setup.Setup:
    """The setup with one recipe for all linear layers, without those of training."""
    names.lookup(recipes.KINDS, recipe, "--recipe")
    config = plan.config.as_configdict()
    config.quantization.recipe, config.quantization.rules = recipe, ()
    changed = setup.prepare(config)
    if _shapes(plan) != _shapes(changed):
        raise ValueError(
            f"--recipe={recipe}: it keeps statistics or step sizes in training, or the run's own recipe "
            "does, and one has not what the other needs; choose a recipe without, such as mxfp8 or int8."
        )
    return changed


def _shapes(plan: setup.Setup) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(plan.abstract)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def model_of(plan: setup.Setup, state: TrainState):
    """The NNX model with the state's parameters, without recipes if it was last trained so."""
    probes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), plan.plan.probes)
    model = nnx.merge(plan.plan.graphdef, state.params, probes, state.model_state)
    if not plan.is_model_quantized(int(state.step)):
        quantizer.detach(model)
    return model
