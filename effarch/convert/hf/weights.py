"""The arrays of a model by public path, from and to the tensors of a folder."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from effarch.convert import hf
from effarch.convert.hf import common, family, folder, mapping
from effarch.models import language_model, parameters
from effarch.training import state as state_lib


def load(path: pathlib.Path | str) -> language_model.LanguageModel:
    """The model in a folder, for a notebook; statistics of routers start at zero."""
    path = pathlib.Path(path)
    content = folder.read_config(path)
    m = family.read_config(hf.of_config(content), content)
    plan = state_lib.blueprint(m, vocab_size=m.vocab_size)
    params, model_state = read(path, m, plan, _zeros(plan.params), _zeros(plan.model_state))
    probes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), plan.probes)
    return nnx.merge(plan.graphdef, params, probes, model_state)


def read(path: pathlib.Path, model, plan: state_lib.Blueprint, params: Any, model_state: Any):
    """The two trees with every array that the folder gives, in the type of the old one.

    Low-rank adapters, and state that published files do not hold, are left as they are. Raises
    ValueError for tensors that are missing, unexpected or of another shape.
    """
    chosen = hf.of_config(folder.read_config(path))
    rules = chosen.tensors(family.canonical(model))
    tensors = folder.Tensors(path)
    named = {public for rule in rules for public in rule.ours}
    trees = {"params": params, "model_state": model_state}
    places = _places({"params": plan.params, "model_state": plan.model_state})
    wanted = {
        public: place.shape
        for public, place in places.items()
        if public in named or (place.tree == "params" and "/adapter/" not in public)
    }
    new: dict[tuple[str, str], np.ndarray] = {}
    given = mapping.read(
        rules,
        wanted,
        tensors.shapes,
        tensors.read,
        ignored=common.ignored(model, chosen.ignored),
    )
    for public, array in given:
        place = places[public]
        key = (place.tree, place.path)
        if key not in new:
            new[key] = np.empty(place.whole, place.dtype_in(trees))
        new[key][place.index] = array
    return tuple(_replaced(tree, name, new) for name, tree in trees.items())


def write(
    path: pathlib.Path,
    content: dict,
    model,
    plan: state_lib.Blueprint,
    state: state_lib.TrainState,
    *,
    dtype: str = "float32",
    max_shard: int = folder.MAX_SHARD,
) -> None:
    """Writes config.json `content` and the arrays of a state, as `dtype`; adapters are left out."""
    places = _places({"params": plan.params, "model_state": plan.model_state})
    trees = {"params": state.params, "model_state": state.model_state}
    rules = hf.of_config(content).tensors(family.canonical(model))
    shapes = {
        public: place.shape
        for public, place in places.items()
        if place.tree == "params" and "/adapter/" not in public
    }

    def get(public: str) -> np.ndarray:
        place = places[public]
        return np.asarray(_leaf(trees[place.tree], place.path))[place.index].astype(np.float32)

    tensors = (
        (name, array.astype(np.dtype(dtype))) for name, array in mapping.write(rules, shapes, get)
    )
    folder.write(path, content | {"dtype": dtype}, tensors, max_shard=max_shard)


class _Place:
    """Where the array of a public path lies: tree, path of the stacked array, index in it."""

    def __init__(self, tree: str, info: parameters.ParamInfo, layer: int):
        stacked = bool(info.logical) and info.logical[0] == "layers"
        self.tree, self.path, self.whole = tree, info.path, info.shape
        self.index = (layer,) if stacked else ()
        self.shape = info.shape[1:] if stacked else info.shape

    def dtype_in(self, trees: Mapping[str, Any]):
        return _leaf(trees[self.tree], self.path).dtype


def _places(infos: Mapping[str, Any]) -> dict[str, _Place]:
    return {
        public: _Place(tree, info, layer)
        for tree, described in infos.items()
        for info in jax.tree.leaves(described)
        for layer, public in enumerate(info.public_paths)
    }


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _zeros(infos: Any) -> Any:
    return jax.tree.map(lambda info: np.zeros(info.shape, np.float32), infos)


def _replaced(tree: Any, name: str, new: Mapping[tuple[str, str], np.ndarray]) -> Any:
    """The tree with new arrays where its old ones lay."""

    def one(key_path, old):
        array = new.get((name, parameters.path_of(key_path)))
        if array is None:
            return old
        return jax.device_put(array, old.sharding) if isinstance(old, jax.Array) else array

    return jax.tree_util.tree_map_with_path(one, tree)
