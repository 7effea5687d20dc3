"""How the chunked forms compare with the recurrences, and what a token costs in long rows.

    python experiments/recurrence_speed/run.py

Value and gradient of every recurrence on this machine, all in one process, in turns: `reference` (token
by token) and `xla` (chunked) in one row of 2,048 tokens, and `xla` on 16,384 tokens cut into rows of
1,024 to 16,384. About six minutes on one core, half of it compilation. Writes results/times.json and the
tables of README.md.
"""

import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from effarch import experiment_record
from effarch.kernels.delta_rule import api as delta_rule
from effarch.kernels.linear_attention import api as linear_attention
from effarch.kernels.vector_recurrence import api as vector_recurrence
from effarch.training import freed_memory

HERE = pathlib.Path(__file__).resolve().parent
HEADS, K, V, CHANNELS = 2, 128, 128, 256
AT = 2048
LENGTHS = (1024, 2048, 4096, 8192, 16384)
TOKENS = 16384
"""Of a batch, as in training: sixteen rows of 1,024 or one of 16,384."""
ROUNDS = 5
FACTOR, FLAT = 5.0, 0.15
"""What is asked for: this much faster at AT tokens, cost of a token within this over the lengths."""

MIXERS = {
    "linear attention": ("linear", None),
    "RetNet": ("linear", "constant"),
    "Mamba-2": ("linear", "head"),
    "GLA, HGRN2": ("linear", "channel"),
    "DeltaNet": ("delta", None),
    "gated DeltaNet": ("delta", "head"),
    "KDA": ("delta", "channel"),
    "HGRN": ("vector", "channel"),
}
"""Mixers -> the kernel that they run and the shape of its decay."""


def main() -> None:
    freed_memory.keep()  # as effarch.train does
    comparison, scaling = {}, {}
    for name in MIXERS:
        calls = {backend: _call(name, 1, AT, backend) for backend in ("reference", "xla")}
        comparison[name] = _seconds(calls)
        calls = {length: _call(name, TOKENS // length, length, "xla") for length in LENGTHS}
        seconds = _seconds(calls)
        scaling[name] = {length: 1e6 * s / TOKENS for length, s in seconds.items()}
        jax.clear_caches()
    results = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    results |= {"at": AT, "seconds": comparison, "microseconds_per_token": scaling}
    experiment_record.write_json(HERE / "results/times.json", results)
    _write(comparison, scaling)


def _call(name: str, rows: int, length: int, backend: str):
    """A function of nothing that computes value and gradient once, compiled and warm."""
    op, decay = MIXERS[name]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((rows, length, *shape)), jnp.float32)

    unit = np.sqrt(K)
    decays = {
        None: None,
        "constant": jnp.array([-0.03, -0.015]),
        "head": -jnp.abs(normal(HEADS)) * 0.1,
        "channel": -jnp.abs(normal(HEADS, K)) * 0.1,
    }
    arrays = {"q": normal(HEADS, K), "k": normal(HEADS, K) / unit, "v": normal(HEADS, V)}
    arrays["g"] = decays[decay]
    if op == "delta":
        arrays["beta"] = jax.nn.sigmoid(normal(HEADS))
        function = delta_rule.gated_delta_rule
    elif op == "vector":
        arrays = {"x": normal(CHANNELS), "g": -jnp.abs(normal(CHANNELS)) * 0.1}
        function = vector_recurrence.vector_recurrence
    else:
        function = linear_attention.linear_attention
    given = {key: x for key, x in arrays.items() if x is not None}
    weights = jnp.asarray(rng.standard_normal((rows, length, HEADS, V)), jnp.float32)

    def total(arrays):
        out = function(**arrays, backend=backend)[0]
        return jnp.sum(out * weights.reshape(out.shape))

    run = jax.jit(jax.value_and_grad(total)).lower(given).compile()
    jax.block_until_ready(run(given))
    return lambda: run(given)


def _seconds(calls: dict) -> dict:
    """Median seconds of each call, taken in turns."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _write(comparison: dict, scaling: dict) -> None:
    rows = [
        [
            name,
            f"{1e3 * seconds['reference']:.1f}",
            f"{1e3 * seconds['xla']:.1f}",
            f"{seconds['reference'] / seconds['xla']:.1f}",
        ]
        for name, seconds in comparison.items()
    ]
    header = ["mixer", "token by token, ms", "chunked, ms", "ratio"]
    experiment_record.write_table(HERE / "README.md", "comparison", header, rows)
    changes = {name: costs[LENGTHS[-1]] / costs[LENGTHS[0]] - 1 for name, costs in scaling.items()}
    rows = [
        [name, *(f"{costs[length]:.2f}" for length in LENGTHS), f"{100 * changes[name]:+.0f}%"]
        for name, costs in scaling.items()
    ]
    header = ["mixer", *(f"{length:,}" for length in LENGTHS), "last against first"]
    experiment_record.write_table(HERE / "README.md", "scaling", header, rows)
    slow = [n for n, s in comparison.items() if s["reference"] < FACTOR * s["xla"]]
    steep = [name for name, change in changes.items() if change > FLAT]
    verdict = (
        f"**Verdict.** Chunked is at least {FACTOR:g} times as fast at {AT:,} tokens for "
        f"{_all_but(slow)}; the cost of a token grows by at most {FLAT:.0%} from {LENGTHS[0]:,} to "
        f"{LENGTHS[-1]:,} tokens for {_all_but(steep)}."
    )
    experiment_record.write_text(HERE / "README.md", "verdict", verdict)


def _all_but(names: list[str]) -> str:
    return f"all but {', '.join(names)}" if names else "all"


if __name__ == "__main__":
    main()
