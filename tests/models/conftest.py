"""Every kind of mixer at a tiny size, as a fixture for the tests of the contract that they share."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models import mixers, parameters
from effarch.models.context import Context

WIDTH = 32
LEARNED = dict(learnable_initial_state=True, chunk_size=16)
PLAIN = {
    "attention_grouped": dict(num_heads=4, num_kv_heads=2, qk_norm=True, use_gate=True),
    "delta_net": dict(head_dim=8, use_gate=True, allow_neg_eigval=True, **LEARNED),
    "gated_delta_net": dict(num_heads=2, num_v_heads=4, head_dim=8, expand_v=1.0, **LEARNED),
    "gla": dict(num_heads=2, **LEARNED),
    "hgrn": dict(lower_bound=0.3, learnable_initial_state=True),
    "hgrn2": dict(head_dim=8, lower_bound=0.3, **LEARNED),
    "kda": dict(num_heads=2, num_v_heads=4, head_dim=8, gate_lower_bound=-4.0, **LEARNED),
    "latent_attention": dict(
        num_heads=2, latent_dim=12, nope_dim=8, rope_dim=8, v_dim=6, rope_yarn=(8, 4, 1, 64, 1)
    ),
    "linear_attention": dict(num_heads=2, feature_map="hedgehog", normalize=True, chunk_size=16),
    "mamba2": dict(head_dim=16, state_dim=8, **LEARNED),
    "retnet": dict(num_heads=2, **LEARNED),
    "spark_attention": dict(num_heads=4, num_kv_heads=2, predictor_dim=4, num_keys=12),
}
"""One variant of each kind, the one with most options."""

MORE = {
    "attention": dict(num_heads=4),
    "attention_window": dict(num_heads=2, window=5, rope_fraction=0.5),
    "attention_no_rope": dict(num_heads=2, rope=False, softcap=5.0),
    "delta_net_plain": dict(
        num_heads=2, head_dim=8, conv_size=0, qk_activation="elu", qk_norm="sum"
    ),
    "delta_net_relu": dict(num_heads=2, head_dim=8, qk_activation="relu"),
    "gated_delta_net_default": dict(num_heads=2, head_dim=8),
    "gated_delta_net_plain": dict(
        num_heads=2, head_dim=8, conv_size=0, use_gate=False, allow_neg_eigval=True
    ),
    "hgrn_plain": dict(),
    "hgrn2_plain": dict(num_heads=2, head_dim=8),
    "kda_unbounded": dict(head_dim=16, expand_v=0.5),
    "latent_attention_no_rope": dict(
        num_heads=2, latent_dim=12, nope_dim=8, rope_dim=3, v_dim=8, rope=False
    ),
    "spark_attention_window": dict(num_heads=2, num_keys=5, window=8),
    "linear_attention_sum": dict(num_heads=2, sum_features=True),
    "linear_attention_taylor": dict(num_heads=4, feature_map="taylor", expand_v=2.0, **LEARNED),
}

CENTERS = {"scale": 1.0, "skip": 1.0, "rate_log": 1.0, "step_bias": -2.0}
"""Around what a parameter is drawn; all others around 0."""


class MixerUnderTest:
    """A mixer with random parameters, none of them at zero or one, and its compiled functions."""

    def __init__(self, name: str, options: dict):
        self.name, self.options = name, options
        self.kind = max((k for k in mixers.KINDS if name.startswith(k)), key=len)
        self.abstract = nnx.eval_shape(lambda: self.new(jnp.float32))
        self.graphdef, variables = nnx.split(self.abstract)
        rng = np.random.default_rng(zlib.crc32(name.encode()))

        def draw(key_path, variable):
            leaf = parameters.path_of(key_path).rsplit("/")[-1]
            noise = 0.3 * rng.standard_normal(variable.shape, np.float32)
            return noise + np.float32(CENTERS.get(leaf, 0.0))

        self.state = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(variables))

    def new(self, dtype):
        kind = mixers.KINDS[self.kind]
        return kind(WIDTH, **self.options, dtype=dtype, rngs=nnx.Rngs(0))

    def forward(self, x, ctx=None, cache=None):
        """y and the cache, in the dtype of x."""
        graphdef = self.graphdef if x.dtype == jnp.float32 else self._narrow()
        return _forward(graphdef, self.state, x, ctx or Context(), cache)

    def init_cache(self, batch, length):
        return nnx.merge(self.graphdef, self.state).init_cache(batch, length)

    def _narrow(self):
        return nnx.split(nnx.eval_shape(lambda: self.new(jnp.bfloat16)))[0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, x, ctx, cache):
    y, cache, _ = nnx.merge(graphdef, state)(x, ctx, cache)
    return y, cache


@functools.cache
def _make(name: str) -> MixerUnderTest:
    return MixerUnderTest(name, (PLAIN | MORE)[name])


IN_EVERY_RUN = ("attention_grouped", "gated_delta_net", "hgrn")
"""Softmax, a matrix as state, a vector as state."""
IN_CI = ("gla", "kda", "latent_attention", "mamba2", "spark_attention")
"""Some of the other kinds; the rest is left to `-m slow`."""


def _param(name: str):
    marks = [pytest.mark.slow] if name not in IN_EVERY_RUN else []
    return pytest.param(name, marks=[*marks, pytest.mark.ci] if name in IN_CI else marks)


@pytest.fixture(params=[_param(name) for name in (*PLAIN, *MORE)])
def mixer(request) -> MixerUnderTest:
    return _make(request.param)


@pytest.fixture(scope="session")
def make_mixer():
    """A mixer of the tables above by name."""
    return _make


@pytest.fixture(scope="session")
def tested_kinds() -> set[str]:
    """The kinds of mixers that these tables hold."""
    return {_make(name).kind for name in PLAIN}
