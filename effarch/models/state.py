"""Variables of a model that the optimizer does not see, and how they advance.

A module that holds them has a method `next_state(state, aux, probes) -> state`, called once a step on
its own plain dicts of arrays, stacked along the layers that share them: `aux` is what the module's block
returned, summed up over micro-batches; `probes` are the cotangents of its Probes.
"""

from flax import nnx


class ModelState(nnx.Variable):
    """Read in the forward pass, written once a step: a router's bias, a quantizer's history."""


class CountedState(ModelState):
    """State that published parameter totals include: a router's selection bias."""


class Probe(nnx.Variable):
    """Zeros that an operation takes as an input to hand out a statistic of its backward pass.

    The statistic is returned as the Probe's cotangent; micro-batches are combined by their maximum.
    """
