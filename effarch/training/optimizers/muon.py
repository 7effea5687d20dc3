"""Muon: momentum, orthogonalised, for matrices; Adam for the rest.

Jordan et al., https://kellerjordan.github.io/posts/muon; the scale of the update: Liu et al.,
"Muon is Scalable for LLM Training", arXiv 2502.16982. For every matrix [in, out] of every layer and
expert:

    t <- momentum * t + g
    d = update_rms * sqrt(max(in, out)) * orthogonal(g + momentum * t)      (nesterov; else of t)

orthogonal(U S V^T) is about U V^T, whose entries have an rms of 1 / sqrt(max(in, out)). So d has an
rms of about `update_rms`, which at 0.2 is that of Adam's updates: matrices and the rest share one
learning rate and one weight decay, and those tuned for AdamW serve.

Where we differ from optax.contrib.muon: the momentum is optax's (`optax.trace`, as in Jordan's
code, without bias correction), the Newton-Schulz iteration is ours. optax merges all stacked axes
into one, and a merged axis cannot stay sharded: for experts [4, 16, 64, 96] on 8 devices its
compiled form gathers every expert on every device and takes 7.8 times the FLOPs (6.8e8 a device,
not 0.87e8, by XLA's count). It also hands `nesterov` to Adam, cannot mask the weight decay of
Adam's part, and changed the scale of `scale_by_muon` between 0.2.6 and 0.2.8.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effarch.models import parameters
from effarch.training.optimizers import updates

# A quintic as steep at 0 as its convergence allows: after five iterations singular values lie in
# about 0.7 to 1.2 rather than at 1, which does no harm (Jordan's post).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    update_rms: float = 0.2,
    weight_decay: float = 0.1,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    groups: Any,
) -> optax.GradientTransformation:
    """Muon for the groups of kind `matrix` that no rule gave to adamw, Adam for all others.

    State: one float32 a matrix parameter, two for the others. An update costs
    ns_steps * (4 * small^2 * large + 2 * small^3) FLOPs a matrix [small, large] or its transpose.
    """
    updates.check_range("muon.momentum", momentum, 0, 1)
    updates.check_range("muon.ns_steps", ns_steps, 1)
    updates.check_range("muon.adam_b1", adam_b1, 0, 1)
    updates.check_range("muon.adam_b2", adam_b2, 0, 1)
    updates.check_range("muon.weight_decay", weight_decay, 0)
    matrices = optax.chain(
        optax.trace(momentum, nesterov=nesterov),
        _orthogonalize_all(groups, ns_steps, update_rms),
    )
    return updates.finish(
        {"muon": matrices, "adam": optax.scale_by_adam(adam_b1, adam_b2, adam_eps)},
        updates.matrices_to("muon"),
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


@functools.partial(jax.jit, static_argnames="steps")
def orthogonalize(x: jax.Array, steps: int = 5) -> jax.Array:
    """Newton-Schulz towards U V^T of every matrix x[..., m, n] = U S V^T.

    X <- a X + (b A + c A A) X with A = X X^T, from X = x / |x|, on the side where A is smaller.
    A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = jnp.matrix_transpose(x) if is_tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12)

    def iterate(_, x):
        gram = x @ jnp.matrix_transpose(x)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    x = jax.lax.fori_loop(0, steps, iterate, x)  # unrolled: as fast, 3.5 times the compile time
    return jnp.matrix_transpose(x) if is_tall else x


def _orthogonalize_all(groups: Any, steps: int, update_rms: float) -> optax.GradientTransformation:
    """Orthogonalises and scales every array it is given, by the matrix axes of its group.

    Groups are looked up by path, because a partition masks the parameters of the others.
    """
    dims_of = {group.path: group.matrix_dims for group in jax.tree.leaves(groups)}

    def one(key_path, momentum):
        dims = dims_of[parameters.path_of(key_path)]
        scale = update_rms * max(momentum.shape[dim] for dim in dims) ** 0.5
        matrices = jnp.moveaxis(momentum, dims, (-2, -1))
        return scale * jnp.moveaxis(orthogonalize(matrices, steps), (-2, -1), dims)

    return optax.stateless(
        lambda updates, params=None: jax.tree_util.tree_map_with_path(one, updates)
    )
