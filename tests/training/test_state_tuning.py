"""State tuning: two rules of the optimizer leave only the states before the first token to train."""

import math

import jax
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, parameters
from effarch.training.optimizers import groups

pytestmark = pytest.mark.smoke

RULES = ("** frozen=1", "layers/*/mixer/**/start/* frozen=0")
#        numbers in the state at width 32, heads as below
STATES = {
    "delta_net": 2 * 16 * 16,
    "gated_delta_net": 2 * 16 * 32,
    "gla": 4 * 4 * 8,
    "hgrn": 32,
    "hgrn2": 2 * 16 * 16,
    "kda": 2 * 16 * 16,
    "linear_attention": 8 * 4 * 4,
    "mamba2": 4 * 8 * 16,
    "retnet": 8 * 4 * 8,
}


def test_only_the_learned_starts_train():
    c = config.default().model
    c.width, c.depth = 32, len(STATES)
    c.layers = " + ".join(f"{kind}/glu" for kind in STATES)
    for kind in STATES:
        c.blocks[kind].learnable_initial_state = True
    for kind in ("delta_net", "hgrn2", "kda"):
        c.blocks[kind].head_dim = 16
    c.blocks.gated_delta_net.update(num_heads=2, head_dim=16)
    c.blocks.mamba2.update(head_dim=16, state_dim=8)
    infos = parameters.describe(nnx.state(build.abstract(c, vocab_size=8), nnx.Param))
    assigned = groups.assign(infos, RULES)
    pairs = zip(jax.tree.leaves(infos), jax.tree.leaves(assigned), strict=True)
    trained = {info: group for info, group in pairs if not group.is_frozen}
    sizes = {int(info.path.split("/")[1]): info.shape for info in trained}
    assert len(sizes) == len(trained) == len(STATES)
    for layer, kind in enumerate(STATES):
        assert math.prod(sizes[layer]) == STATES[kind], kind
    assert not any(group.decay for group in trained.values())
