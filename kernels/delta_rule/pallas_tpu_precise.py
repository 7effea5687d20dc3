"""The delta rule's TPU kernels with the forward's factors in two parts; see `pallas_tpu.forward`."""

import functools

from effarch.kernels.delta_rule import pallas_tpu

gated_delta_rule = functools.partial(pallas_tpu.gated_delta_rule, precise=True)
