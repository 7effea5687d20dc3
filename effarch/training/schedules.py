"""Learning-rate schedules: cosine, warmup-stable-decay (wsd), constant; each with a linear warmup.

Update number s counts from 0 and uses schedule(s). The edges are the same for every kind:

    s = 0                  peak / warmup_steps (the peak itself without a warmup)
    s = warmup_steps - 1   the peak, exactly
    s = total_steps - 1    the last update: one decay step above final_fraction * peak
    s >= total_steps       final_fraction * peak (constant: the peak)

So no update is wasted on a rate of zero, not even with final_fraction = 0. Sources: cosine,
Loshchilov and Hutter, arXiv 1608.03983; wsd, Hu et al., arXiv 2404.06395; the 1-sqrt shape,
Hägele et al., arXiv 2405.18392.
"""

import inspect

import jax.numpy as jnp
import optax

from effarch import names


def cosine(
    *, peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1
) -> optax.Schedule:
    """Half a cosine from the peak to final_fraction * peak.

    lr(s) = peak * (f + (1 - f) * (1 + cos(pi * t)) / 2),  t = (s - warmup) / (total - warmup).
    """
    _check(peak, total_steps, warmup_steps, final_fraction)
    decay_steps = total_steps - warmup_steps
    return _warmed(
        optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction), warmup_steps
    )


def wsd(
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    decay_shape: str = "1-sqrt",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Warmup, a constant peak, then a decay over the last decay_fraction of the steps.

    lr(s) = peak * (f + (1 - f) * shape(t)),  t = (s - start) / (total - start) in [0, 1],
    start = `decay_start(total_steps, decay_fraction)`. `decay_shape` is `linear` (1 - t),
    `1-sqrt` (1 - sqrt(t)) or `cosine` ((1 + cos(pi t)) / 2). Up to `start` the values are
    bit for bit those of `constant`, so that a decay can branch off a constant trunk.
    """
    _check(peak, total_steps, warmup_steps, final_fraction)
    if not 0 < decay_fraction <= 1:
        raise ValueError(
            f"optimizer.schedule.decay_fraction is {decay_fraction}; it must be above 0 and at"
            " most 1 (for a run without a decay use the kind 'constant')."
        )
    start = decay_start(total_steps, decay_fraction)
    if warmup_steps > start:
        raise ValueError(
            f"optimizer.schedule.warmup_steps is {warmup_steps} but the decay starts at step"
            f" {start} of {total_steps}; use a shorter warmup or a smaller decay_fraction."
        )
    shape = names.lookup(_DECAYS, decay_shape, "optimizer.schedule.decay_shape")
    decay = shape(peak, total_steps - start, final_fraction)
    stable = optax.constant_schedule(peak)
    return _warmed(optax.join_schedules([stable, decay], [start - warmup_steps]), warmup_steps)


def constant(*, peak: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """The peak from the warmup on: the trunk from which wsd decays branch off."""
    _check(peak, total_steps, warmup_steps, final_fraction=1.0)
    return _warmed(optax.constant_schedule(peak), warmup_steps)


KINDS = {"cosine": cosine, "wsd": wsd, "constant": constant}


def build(kind: str, peak: float, total_steps: int, **given) -> optax.Schedule:
    """The schedule named `kind`: a function of the update number, counted from 0.

    `given` are keyword arguments of the schedule; `options(kind)` lists them with defaults.
    """
    names.refuse_unknown(given, options(kind), "optimizer.schedule")
    return KINDS[kind](peak=peak, total_steps=total_steps, **given)


def options(kind: str) -> dict:
    """The config fields of the schedule named `kind` and their defaults."""
    fields = inspect.signature(names.lookup(KINDS, kind, "optimizer.schedule.kind")).parameters
    return {
        name: field.default for name, field in fields.items() if name not in ("peak", "total_steps")
    }


def decay_start(total_steps: int, decay_fraction: float) -> int:
    """The first update of the decay of `wsd`: where a branch leaves the trunk."""
    return total_steps - max(1, round(decay_fraction * total_steps))


def _warmed(after: optax.Schedule, warmup_steps: int) -> optax.Schedule:
    """A linear ramp of `warmup_steps` updates, then `after`, counted from the ramp's end."""

    def schedule(step):
        ramp = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        return ramp * after(jnp.maximum(step - warmup_steps, 0))

    return schedule


def _linear(peak: float, steps: int, final_fraction: float) -> optax.Schedule:
    return optax.linear_schedule(peak, final_fraction * peak, steps)


def _one_minus_sqrt(peak: float, steps: int, final_fraction: float) -> optax.Schedule:
    """optax has powers of (1 - t), not 1 - t**power."""

    def schedule(step):
        left = 1.0 - jnp.sqrt(jnp.clip(step / steps, 0.0, 1.0))
        return peak * (final_fraction + (1.0 - final_fraction) * left)

    return schedule


def _cosine(peak: float, steps: int, final_fraction: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=final_fraction)


_DECAYS = {"linear": _linear, "1-sqrt": _one_minus_sqrt, "cosine": _cosine}


def _check(peak: float, total_steps: int, warmup_steps: int, final_fraction: float) -> None:
    if not 0 < peak < float("inf"):
        raise ValueError(f"optimizer.learning_rate is {peak}; the peak must be above 0.")
    if total_steps < 1:
        raise ValueError(f"The number of steps is {total_steps}; it must be at least 1.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"optimizer.schedule.warmup_steps is {warmup_steps}; it must be at least 0 and below"
            f" the number of steps, which is {total_steps}."
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(
            f"optimizer.schedule.final_fraction is {final_fraction}; it must be between 0 and 1,"
            " a fraction of the peak."
        )
