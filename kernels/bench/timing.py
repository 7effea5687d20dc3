"""Backends timed in turns: the median seconds of a call and its quartiles."""

import pathlib
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp

from effarch.kernels.report import cases

ROUND_SECONDS = 0.05


def measure(chosen: list[cases.Case], *, rounds: int) -> list[dict]:
    """Seconds a call of every case: the median of the rounds and their quartiles."""
    calls = [_prepared(case) for case in chosen]
    repeats = [_repeats(call) for call in calls]
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, number, found in zip(calls, repeats, seconds):
            found.append(_time(call, number))
    about = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, commit=_commit())
    rows = []
    for case, number, found in zip(chosen, repeats, seconds):
        low, median, high = statistics.quantiles(found, n=4)
        tokens = case.spec.B * case.spec.T / median
        times = dict(low=low, median=median, high=high, tokens_per_second=tokens)
        rows.append({"case": case.to_dict(), **times, "calls_a_round": number, **about})
    return rows


def _prepared(case: cases.Case):
    """A call of the compiled program on random inputs, whose decays are at most 0."""
    function, shapes = cases.program(case, None)

    def fill(key, shape):
        if shape.dtype == jnp.int32:
            return jnp.arange(shape.shape[-1], dtype=jnp.int32) // 512 + jnp.zeros(shape.shape, int)
        x = jax.random.normal(key, shape.shape) * max(1, shape.shape[-1]) ** -0.5
        return jnp.where(len(shape.shape) == 3, jax.nn.sigmoid(x), x).astype(shape.dtype)

    keys = jax.random.split(jax.random.key(0), len(shapes))
    inputs = [fill(key, shape) for key, shape in zip(keys, shapes)]
    gate = cases.gate_index(case)
    if gate is not None:
        inputs[gate] = -jnp.abs(inputs[gate])
    compiled = jax.jit(function).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def _repeats(call) -> int:
    """Calls that fill a round; the first two warm up."""
    _time(call, 2)
    return max(1, round(ROUND_SECONDS / max(_time(call, 1), 1e-6)))


def _time(call, number: int) -> float:
    """Seconds of one of so many calls."""
    start = time.perf_counter()
    for _ in range(number):
        done = call()
    jax.block_until_ready(done)
    return (time.perf_counter() - start) / number


def _commit() -> str | None:
    folder = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
