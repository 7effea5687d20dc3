"""Mixtral and DeepSeek-V3 blocks against an independent implementation (PyTorch)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context
from effarch.models.ffns.moe import Moe

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


def experts_of(gate_up, down) -> dict:
    """[E, 2 F, D] with the gate first and [E, D, F] -> ours, transposed."""
    gate, up = np.split(gate_up, 2, axis=1)
    return {
        "gate": gate.swapaxes(1, 2),
        "up": up.swapaxes(1, 2),
        "down": down.swapaxes(1, 2),
    }


def empty(make):
    """The static part of a module and arrays of zeros to fill in; nothing is initialized."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))


def put(tree: dict, new: dict) -> None:
    for name, value in new.items():
        if isinstance(value, dict):
            put(tree[name], value)
        else:
            assert tree[name].shape == value.shape, name
            tree[name] = jnp.asarray(value)


def block(data, **options):
    """The Moe with the file's weights, as a jitted function."""
    num_experts, width, hidden = data["param:experts.down_proj"].shape
    graphdef, params = empty(
        lambda: Moe(width, num_experts=num_experts, hidden=hidden, rngs=nnx.Rngs(0), **options)
    )
    router = {"kernel": data["param:gate.weight"].T}
    if "param:gate.e_score_correction_bias" in data:
        router["bias"] = data["param:gate.e_score_correction_bias"]
    new = {"router": router}
    new["experts"] = experts_of(data["param:experts.gate_up_proj"], data["param:experts.down_proj"])
    if "param:shared_experts.up_proj.weight" in data:
        new["shared"] = {
            name: {"kernel": data[f"param:shared_experts.{name}_proj.weight"].T}
            for name in ("gate", "up", "down")
        }
    put(params, new)
    return jax.jit(lambda x: nnx.merge(graphdef, params)(x, Context())[0])


BLOCKS = {
    "mixtral": dict(top_k=2),
    "deepseek_v3": dict(
        top_k=4,
        num_shared=1,
        router="sigmoid_bias",
        num_groups=4,
        top_groups=2,
        routed_scaling=2.5,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_equal_those_of_the_original(name):
    data = np.load(DATA / f"moe_{name}.npz")
    got = block(data, **BLOCKS[name])(data["x"])
    assert np.abs(got - data["o"]).max() < 1e-5 * np.abs(data["o"]).max()
