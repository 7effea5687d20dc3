"""The train step and the evaluation step: pure functions, jitted with explicit shardings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from effarch.models.context import Context
from effarch.parallel import sharding
from effarch.training import aux as aux_lib
from effarch.training.state import Blueprint, TrainState

BATCH_AXES = ("batch", "time")


def train_step(
    plan: Blueprint,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    accumulate: int,
    layout: sharding.Layout | None = None,
    quantized: bool = True,
    frozen: Any = None,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """(state, batch, key) -> (state, metrics); `key` is the run's, the step is folded in.

    The gradient is that of the mean loss over all tokens with weight, whatever `accumulate`.
    Metrics are float32 scalars on the device. `quantized` False leaves the recipes out. `frozen` says
    in the shape of the parameters which arrays cost no backward pass and do not count in grad_norm.
    """

    def loss_fn(params, probes, model_state, batch, key, num_tokens):
        if frozen is not None:
            params = jax.tree.map(_hold, params, frozen)
        model = nnx.merge(plan.graphdef, params, probes, model_state)
        ctx = Context(key=key, layout=layout, quantized=quantized)
        total, token, aux = model.loss(batch, ctx)
        ce = jnp.sum(token["ce"] * batch["loss_weights"]) / num_tokens
        loss = total / num_tokens + aux_lib.total_loss(aux) / accumulate
        return loss, (ce, aux)

    def step(state: TrainState, batch: dict, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        num_tokens = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
        probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), plan.probes)

        def gradient(batch, key):
            value_and_grads = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
            return value_and_grads(state.params, probes, state.model_state, batch, key, num_tokens)

        if accumulate == 1:
            (loss, (ce, aux)), (grads, probes) = gradient(batch, key)
        else:
            loss, ce, aux, grads, probes = _accumulated(gradient, batch, key, accumulate)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, loss=loss, grad_norm=grad_norm
        )
        metrics = {
            "loss": loss,
            "ce": ce,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(opt_state.good - 1), jnp.float32),
            "skipped": opt_state.skipped,
            "skipped_in_a_row": opt_state.skipped_in_a_row,
            **aux_lib.reduce_layers(aux),
        }
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=aux_lib.next_model_state(plan.graphdef, state, aux, probes),
            opt_state=opt_state,
        )
        return new_state, metrics

    return step


def _hold(param: jax.Array, is_frozen: bool) -> jax.Array:
    return jax.lax.stop_gradient(param) if is_frozen else param


def _accumulated(gradient, batch, key, accumulate: int):
    """Runs micro-batches in turn; losses and gradients add up, aux and probes by their reductions."""

    def split(x):
        # Micro-batch m takes rows m, m + accumulate, ...: every device keeps the rows that it has.
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def one(carry, micro):
        batch, index = micro
        (loss, (ce, aux)), (grads, probes) = gradient(batch, jax.random.fold_in(key, index))
        loss_sum, ce_sum, grads_sum, probes_max = carry
        carry = (
            loss_sum + loss,
            ce_sum + ce,
            jax.tree.map(jnp.add, grads_sum, grads),
            jax.tree.map(jnp.maximum, probes_max, probes),
        )
        return carry, aux

    micro_batches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], micro_batches), key)
    (_, _), (grads, probes) = shapes
    start = (
        jnp.zeros(()),
        jnp.zeros(()),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads),
        jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), probes),
    )
    carry, auxes = jax.lax.scan(one, start, (micro_batches, jnp.arange(accumulate)))
    loss, ce, grads, probes = carry
    return loss, ce, aux_lib.reduce_leading(auxes), grads, probes


def eval_step(plan: Blueprint, *, layout: sharding.Layout | None = None, quantized: bool = True):
    """(params, model_state, batch) -> {"loss", "hits", "exact"} of each row, [B] float32.

    loss: summed cross-entropy (nats); hits: scored tokens whose best word is the target; exact: 1 if
    some are scored and all are hits.
    """

    def step(params, model_state, batch):
        probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), plan.probes)
        model = nnx.merge(plan.graphdef, params, probes, model_state)
        ctx = Context(layout=layout, train=False, quantized=quantized)
        _, token, _ = model.loss(batch, ctx)
        weights_BT = batch["loss_weights"]
        is_scored_BT = weights_BT > 0
        hits_B = jnp.sum(token["hit"] * is_scored_BT, axis=1)
        scored_B = jnp.sum(is_scored_BT, axis=1)
        return {
            "loss": jnp.sum(token["ce"] * weights_BT, axis=1),
            "hits": hits_B,
            "exact": ((hits_B == scored_B) & (scored_B > 0)).astype(jnp.float32),
        }

    return step
