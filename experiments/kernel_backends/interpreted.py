"""`python -m effarch.train` on a CPU, with the accelerators' kernels of the delta rule run step by step.

cd experiments/kernel_backends && python interpreted.py --config=grid.py:backend=pallas_tpu
"""

import functools

import jax.numpy as jnp

from effarch import command_line, train
from effarch.kernels.chunked import tpu_heads
from effarch.kernels.delta_rule import pallas_gpu, pallas_tpu, pallas_tpu_precise

product = tpu_heads._product


def widened(a, b, contracted_of_b):
    """The same numbers; of bfloat16 operands, XLA multiplies only some shapes on a CPU."""
    return product(a.astype(jnp.float32), b.astype(jnp.float32), contracted_of_b)


tpu_heads._product = widened
for module in (pallas_gpu, pallas_tpu, pallas_tpu_precise):
    module.gated_delta_rule = functools.partial(module.gated_delta_rule, interpret=True)

if __name__ == "__main__":
    command_line.run(train.main, usage=train.__doc__)
