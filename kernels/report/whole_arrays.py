"""Cases that are not recurrences over heads: rounding, optimizer states, thresholds.

Rows are the B T tokens, columns the H K channels, so that a figure "per token and head" is that of K
numbers of a row.
"""

import jax
import jax.numpy as jnp

from effarch import kernels
from effarch.kernels.coat import api as coat
from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize import formats


def _quantize(rows, columns, dtype, array, backend):
    """MXFP4 along the rows after a transform of 32, stochastically: a gradient in Quartet."""
    fmt = formats.find("mxfp4")

    def run(x, seed, signs):
        rotation = quantize.Rotation(1, 32, signs)
        axes = quantize.blocked_axes(x.shape, fmt, 1)
        options = dict(rounding="stochastic", rotation=rotation, backend=backend)
        values, scales, tensor = quantize.scaled(x, fmt, axes, seed=seed, **options)
        return values.astype(jnp.bfloat16), scales, tensor

    return run, (array(rows, columns, dtype=dtype), array(2, dtype=jnp.uint32), array(32))


def _hadamard(rows, columns, dtype, array, backend):
    """Blocks of 128 along the rows."""
    return (
        lambda x: kernels.hadamard(x, block_size=128, backend=backend),
        (array(rows, columns, dtype=dtype),),
    )


def _coat_adam(rows, columns, dtype, array, backend):
    """Groups of 128; the gradient is float32."""
    del dtype
    moment = coat.Moment(
        array(rows, columns, dtype=jnp.float8_e4m3fn), array(rows, columns // 128, 2)
    )

    def run(g, m, v, count):
        return kernels.coat_adam(g, m, v, count, b1=0.9, b2=0.95, eps=1e-8, backend=backend)

    return run, (array(rows, columns), moment, moment, array(dtype=jnp.int32))


def _top_k(rows, columns, dtype, array, backend):
    """8 % of a row."""
    return (
        lambda x: kernels.statistical_top_k(x, 0.08 * columns, backend=backend),
        (array(rows, columns, dtype=dtype),),
    )


PROGRAMS = {
    "quantize": (_quantize, "quantize"),
    "hadamard": (_hadamard, "hadamard"),
    "coat_adam": (_coat_adam, "coat"),
    "top_k": (_top_k, "topk"),
}
"""name: (maker of (function, arguments), folder of its sources)."""


def program(case, sharding) -> tuple:
    """(function, its arguments as shapes) of a case; forward only. Raises ValueError for a backward."""
    if case.backward:
        raise ValueError(f"--backward: {case.op} is reported forward only; leave --backward out.")

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    spec = case.spec
    make, _ = PROGRAMS[case.op]
    return make(spec.B * spec.T, spec.value_heads * spec.K, spec.dtype, array, case.backend)
