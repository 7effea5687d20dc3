"""What rounding costs a train step on this CPU, one thread: python experiments/rounding_cost/run.py

Steps of all recipes in turns, medians. Writes results/times.json and the table of README.md. Five
minutes.
"""

import argparse
import os
import pathlib
import statistics
import time

import jax

from effarch import experiment_record, experiment_runs
from effarch.configs import transformer
from effarch.training import setup

HERE = pathlib.Path(__file__).resolve().parent
BARS = {"fp8_current": 1.6, "quartet": 2.5}
RECIPES = ("none", "fp8_current", "mxfp8", "nvfp4", "quest", "quartet")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = flags.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # JAX counts cores at its first use
    steps = {recipe: _step(recipe, options.dtype) for recipe in options.recipes}
    seconds = {recipe: [] for recipe in steps}
    for _ in range(options.rounds):
        for recipe, step in steps.items():
            seconds[recipe].append(step())
    medians = {recipe: statistics.median(times) for recipe, times in seconds.items()}
    results = {"dtype": options.dtype, "seconds": seconds, "median_seconds": medians}
    experiment_record.write_json(HERE / "results/times.json", results)
    rows = [
        [
            recipe,
            f"{1e3 * median:.0f} ms",
            f"{median / medians['none']:.2f}",
            f"{BARS[recipe]}" if recipe in BARS else "",
        ]
        for recipe, median in medians.items()
    ]
    header = ["recipe", f"step, {options.dtype}", "over none", "bar"]
    experiment_record.write_table(HERE / "README.md", "times", header, rows)


def _step(recipe: str, dtype: str):
    """A function that runs one compiled step and returns its seconds."""
    config = transformer.get_config("size=tiny")
    config.model.dtype, config.model.depth, config.data.tokenizer = dtype, 2, "bytes"
    config.quantization.recipe = recipe
    plan = setup.prepare(config)
    batch = experiment_runs.random_batch(config.data.batch_size, config.data.seq_len, 256)
    key, state = jax.random.key(0), plan.init()
    compiled = plan.train_step().lower(state, batch, key).compile()
    state, _ = compiled(state, batch, key)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
