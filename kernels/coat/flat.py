"""COAT's operands as kernels take them: rows of groups, codes as integers, shared numbers apart."""

import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.coat import api
from effarch.kernels.quantize import e4m3_bits


def operands(g, m, v, count: int) -> list:
    """[g, codes of m, codes of v] as [rows, D], and hi and k of m and of v as [rows, groups]."""
    shape = (g.size // g.shape[-1], g.shape[-1])
    wide = [g.reshape(shape), *(e4m3_bits.to_int8(x.codes).reshape(shape) for x in (m, v))]
    shared = [x.shared[..., i].reshape(shape[0], count) for x in (m, v) for i in (0, 1)]
    return wide + shared


def outputs(inputs: list) -> list:
    """What a kernel writes: d, the codes and the shared numbers, each like its input."""
    return [varying.shape_like(x.shape, x.dtype, inputs[0]) for x in inputs]


def results(found: list, shape: tuple[int, ...]) -> tuple:
    """(d, m, v) of what it wrote."""
    d, m_codes, v_codes, *numbers = found
    moments = [
        api.Moment(
            e4m3_bits.from_int8(codes).reshape(shape),
            jnp.stack(pair, axis=-1).reshape(*shape[:-1], -1, 2),
        )
        for codes, pair in ((m_codes, numbers[:2]), (v_codes, numbers[2:]))
    ]
    return d.reshape(shape), *moments
