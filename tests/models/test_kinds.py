"""What every registered mixer and feed-forward must be, whatever it computes."""

import pytest
from flax import nnx

from effarch.models import ffns, mixers

KINDS = {**mixers.KINDS, **ffns.KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_static_part_can_be_hashed(kind):
    """Generation hands it to jit as a static argument."""
    abstract = nnx.eval_shape(lambda: KINDS[kind](1024, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract)
    again, _ = nnx.split(nnx.eval_shape(lambda: KINDS[kind](1024, rngs=nnx.Rngs(0))))
    assert hash(graphdef) == hash(again)
    assert graphdef == again
