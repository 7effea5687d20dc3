"""The feed-forwards of all groups in one loop over blocks of rows, for CPUs.

    y = act(x W_in) W_out,   or   y = (act(x W_gate) * (x W_up)) W_out,   by each row's group

Between the products nothing leaves the processor's cache. The backward pass computes the inner channels
again: a third more forward work, but rows are the only thing kept and read. Activations are float32.

Legend: R = rows of a block, F = inner channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.grouped_matmul import blocks


def in_one_loop(x_MD, w_in, w_out, sizes_E, activation: Callable, aligned: int) -> jax.Array:
    """See `api.grouped_feed_forward`.

    Matrices keep their type and are rounded to x's block by block; their gradients are sums in float32.
    """
    x_MD, sizes_E, *weights = varying.align([x_MD, sizes_E, *w_in, w_out])
    return _apply(activation, aligned, x_MD, tuple(weights), sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(activation, aligned, x_MD, weights, sizes_E):
    dtype, x_bits, of_group = x_MD.dtype, blocks.bits(x_MD), _matrices(weights, x_MD.dtype)

    def visit(block, y_bits):
        *w_in, w_out = of_group(block.e)

        def product(x_RD):
            h_RF = _hidden(activation, *(blocks.dot(x_RD, w) for w in w_in)).astype(dtype)
            return blocks.dot(h_RF, w_out).astype(dtype), ()

        y_RD, _ = blocks.trimmed(product, block, blocks.read(x_bits, block, dtype))
        return blocks.write(y_bits, y_RD, block)

    start = jnp.zeros((x_MD.shape[0], weights[-1].shape[2]), x_bits.dtype)
    return blocks.values(blocks.over(visit, start, sizes_E, x_MD.shape[0], aligned), dtype)


def _forward(activation, aligned, x_MD, weights, sizes_E):
    return _apply(activation, aligned, x_MD, weights, sizes_E), (x_MD, weights, sizes_E)


def _backward(activation, aligned, saved, g_MD):
    x_MD, weights, sizes_E = saved
    dtype, x_bits, g_bits = x_MD.dtype, blocks.bits(x_MD), blocks.bits(g_MD)
    of_group = _matrices(weights, dtype)

    def visit(block, carry):
        dx_bits, dweights = carry
        *w_in, w_out = of_group(block.e)

        def products(x_RD, g_RD):
            parts = [blocks.dot(x_RD, w) for w in w_in]
            h_RF, pull = jax.vjp(functools.partial(_hidden, activation), *parts)
            dparts = [part.astype(dtype) for part in pull(blocks.dot(g_RD, w_out, axis=1))]
            dx_RD = sum(blocks.dot(part, w, axis=1) for part, w in zip(dparts, w_in))
            found = [*(blocks.over_rows(x_RD, part) for part in dparts)]
            found.append(blocks.over_rows(h_RF.astype(dtype), g_RD))
            return dx_RD.astype(dtype), found

        rows = (blocks.read(bits, block, dtype) for bits in (x_bits, g_bits))
        dx_RD, found = blocks.trimmed(products, block, *rows)
        dweights = tuple(total.at[block.e].add(one) for total, one in zip(dweights, found))
        return blocks.write(dx_bits, dx_RD, block), dweights

    start = (jnp.zeros_like(x_bits), tuple(jnp.zeros(w.shape, jnp.float32) for w in weights))
    dx_bits, dweights = blocks.over(visit, start, sizes_E, x_MD.shape[0], aligned)
    dweights = tuple(dw.astype(w.dtype) for dw, w in zip(dweights, weights))
    return blocks.values(dx_bits, dtype), dweights, None


_apply.defvjp(_forward, _backward)


def _hidden(activation, first_RF, *second_RF):
    """The inner channels; of two parts the first is the gate."""
    h_RF = activation(first_RF)
    return h_RF * second_RF[0] if second_RF else h_RF


def _matrices(weights, dtype):
    """A function: the matrices of a group in `dtype`."""
    stored = [(blocks.bits(w), w.dtype) for w in weights]
    return lambda e: [blocks.values(w_bits[e], given).astype(dtype) for w_bits, given in stored]
