"""What a mixture of experts costs on this machine: python experiments/expert_cost/run.py

Forward and backward of one layer, in turns in one process: a gated feed-forward, mixtures of the same
active width with 8, 32 and 128 experts, and the mixtures' parts on their own. Two minutes on one core,
most of it compilation. Writes results/times.json and the tables of README.md.
"""

import argparse
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from effarch import experiment_record
from effarch.models.context import Context
from effarch.models.ffns.experts import dispatch, gated, routers
from effarch.models.ffns.glu import Glu
from effarch.models.ffns.moe import Moe
from effarch.training import freed_memory

HERE = pathlib.Path(__file__).resolve().parent
BATCH, LENGTH, WIDTH, HIDDEN, TOP_K = 16, 256, 256, 256, 2
EXPERTS = (8, 32, 128)
BARS = {"bfloat16": 1.6, "float32": 2.2}
"""At most so many times the dense layer with 32 experts."""
GROWTH = 1.5
"""At most, from 8 experts to 128."""
PARTS = {
    "router": "router",
    "plan": "sorting choices by expert",
    "rows": "rows to the experts and back",
    "forward": "feed-forwards, forward",
    "both": "feed-forwards, forward and backward",
}


def main() -> None:
    freed_memory.keep()  # as effarch.train does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="calls of each, in turn")
    rounds = parser.parse_args().rounds
    milliseconds, parts = {}, {}
    for dtype in BARS:
        calls = {"dense": _dense(dtype)} | {str(num): _mixture(dtype, num) for num in EXPERTS}
        layers = list(calls)
        for num in EXPERTS:
            calls |= {f"{num} {name}": call for name, call in _pieces(dtype, num).items()}
        medians = _medians(calls, rounds)
        milliseconds[dtype] = {name: medians.pop(name) for name in layers}
        parts[dtype] = medians
    results = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    results |= {"rounds": rounds, "milliseconds": milliseconds, "parts": parts}
    experiment_record.write_json(HERE / "results/times.json", results)
    _write(milliseconds, parts)


def _dense(dtype: str):
    return _layer(lambda rngs: Glu(WIDTH, hidden=TOP_K * HIDDEN, dtype=dtype, rngs=rngs), dtype)


def _mixture(dtype: str, num_experts: int):
    options = dict(num_experts=num_experts, top_k=TOP_K, hidden=HIDDEN, dtype=dtype)
    return _layer(lambda rngs: Moe(WIDTH, **options, rngs=rngs), dtype)


def _layer(make, dtype: str):
    """Gradients of a layer's inputs and parameters, as a compiled call."""
    graphdef, params, rest = _state(make)
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH), dtype)

    def total(x, params):
        y, _ = nnx.merge(graphdef, params, rest)(x, Context())
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return _compiled(jax.grad(total, argnums=(0, 1)), x, params)


def _state(make):
    """The static part, random parameters and the rest of a module."""
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    params = jax.tree.map(lambda x: 0.05 * jax.random.normal(next(keys), x.shape), params)
    return graphdef, params, rest


def _pieces(dtype: str, num_experts: int) -> dict:
    """Each part of a mixture as a compiled call, on what the parts before it give."""
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH), dtype)
    graphdef, params, rest = _state(
        lambda rngs: routers.Router(WIDTH, num_experts, top_k=TOP_K, rngs=rngs)
    )

    def route(params, x):
        routing = nnx.merge(graphdef, params, rest)(x, Context())
        return jnp.sum(routing.weights_BTK[..., 0]), routing

    routing = jax.jit(route)(params, x)[1]
    ids_NK, weights_NK = (a.reshape(-1, TOP_K) for a in (routing.ids_BTK, routing.weights_BTK))
    x_ND = x.reshape(-1, WIDTH)

    def moved(x_ND, weights_NK, ids_NK):
        plan = dispatch.dropless(ids_NK, num_experts)
        y_ND = dispatch.collect(dispatch.send(x_ND, plan), weights_NK, plan)
        return jnp.sum(y_ND.astype(jnp.float32) ** 2)

    def make(rngs):
        return gated.Experts(WIDTH, HIDDEN, num_experts, top_k=TOP_K, dtype=dtype, rngs=rngs)

    experts, weights, _ = _state(make)
    plan = jax.jit(dispatch.dropless, static_argnums=1)(ids_NK, num_experts)
    plan = plan._replace(aligned=int(plan.aligned))
    x_MD = dispatch.send(x_ND, plan)

    def apply(x_MD, weights):
        layer = nnx.merge(experts, weights)
        return layer.feed_forward(x_MD, layer.weights(), layer.activation, plan)

    def total(x_MD, weights):
        return jnp.sum(apply(x_MD, weights).astype(jnp.float32) ** 2)

    return {
        "router": _compiled(jax.grad(route, argnums=(0, 1), has_aux=True), params, x),
        "plan": _compiled(lambda ids: dispatch.dropless(ids, num_experts).choices_M, ids_NK),
        "rows": _compiled(jax.grad(moved, argnums=(0, 1)), x_ND, weights_NK, ids_NK),
        "forward": _compiled(apply, x_MD, weights),
        "both": _compiled(jax.grad(total, argnums=(0, 1)), x_MD, weights),
    }


def _compiled(function, *args):
    run = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(run(*args))
    return lambda: run(*args)


def _medians(calls: dict, rounds: int) -> dict[str, float]:
    """Milliseconds of each call, taken in turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _write(milliseconds: dict, parts: dict) -> None:
    rows, verdict = [], []
    for dtype, found in milliseconds.items():
        ratios = {name: value / found["dense"] for name, value in found.items()}
        growth = found[str(EXPERTS[-1])] / found[str(EXPERTS[0])]
        cells = [f"{value:.1f} ms, {ratios[name]:.2f}x" for name, value in found.items()]
        rows.append([dtype, *cells, f"{growth:.2f}x"])
        middle = ratios[str(EXPERTS[1])]
        verdict.append(f"{dtype} {middle:.2f}x ({_judged(middle, BARS[dtype])})")
        verdict.append(f"growth {growth:.2f}x ({_judged(growth, GROWTH)})")
    header = ["numbers", "dense", *(f"{n} experts" for n in EXPERTS), "growth"]
    experiment_record.write_table(HERE / "README.md", "layers", header, rows)
    rows = [
        [text, *(f"{parts[dtype][f'{n} {name}']:.1f}" for dtype in parts for n in EXPERTS)]
        for name, text in PARTS.items()
    ]
    header = ["part, ms", *(f"{dtype}, {n}" for dtype in parts for n in EXPERTS)]
    experiment_record.write_table(HERE / "README.md", "parts", header, rows)
    text = f"**Verdict** ({platform.machine()}, jax {jax.__version__}). {'; '.join(verdict)}."
    experiment_record.write_text(HERE / "README.md", "verdict", text)


def _judged(value: float, bar: float) -> str:
    return f"asked for: at most {bar}, {'met' if value <= bar else 'missed'}"


if __name__ == "__main__":
    main()
