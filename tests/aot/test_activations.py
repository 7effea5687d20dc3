"""Published bytes of activations at the published size."""

import pytest

from effarch.aot import activations

FACTORS = {
    "none": 114,
    "tensor": 23,
    "tensor, sequence": 14.25,
    "tensor, selective": 13,
    "tensor, sequence, selective": 4.25,
    "full": 2,
}


@pytest.mark.parametrize("technique", activations.TECHNIQUES)
def test_published(technique):
    """s = 2048, b = 1, h = 4096, a = 32, t = 8: so many times s b h."""
    sizes = dict(s=2048, b=1, h=4096, a=32, t=8)
    assert activations.published(technique, **sizes) == FACTORS[technique] * 2048 * 4096


def test_kept():
    """Full keeps the stream; q and a hidden activation add theirs over 8 devices.

    Without any policy it is 70 s b h, as `jax.ad_checkpoint.print_saved_residuals` lists them.
    """
    sizes = dict(s=2048, b=1, h=4096, f=16384, t=8)
    assert activations.kept("full", **sizes, pieces=1) == 2 * 2048 * 4096
    assert activations.kept("full", **sizes, pieces=8) == 2 * 2048 * 512
    found = activations.kept("names:q,ffn_up", **sizes, pieces=8)
    assert found == 2 * 2048 * (512 + 512 + 2048)
    found = activations.kept("selective", **sizes, pieces=8)
    assert found == 2 * 2048 * (512 + 3 * 512 + 512 + 2048)
    assert activations.kept("none", **(sizes | dict(t=1)), pieces=1) == 70 * 2048 * 4096
