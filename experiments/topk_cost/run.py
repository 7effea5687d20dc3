"""What choosing neurons costs in a training step on this machine: python experiments/topk_cost/run.py

Times the train step of one small transformer with four gated feed-forwards in turn, in one process:
nothing chosen, the statistical threshold, sorting by jax.lax.top_k, and Spark. Writes results/steps.json
and the table of README.md. Four minutes on one core.
"""

import argparse
import pathlib
import statistics
import time

import jax

from effarch import config, config_check, experiment_record, experiment_runs
from effarch.parallel import mesh as mesh_lib
from effarch.training import setup

HERE = pathlib.Path(__file__).resolve().parent
LAYERS = {  # name: (kind, options)
    "nothing is chosen": ("sparse_glu", dict(selection="none")),
    "statistical top-k": ("sparse_glu", dict(selection="statistical")),
    "jax.lax.top_k": ("sparse_glu", dict(selection="exact")),
    "Spark": ("spark_ffn", dict()),
}
WIDTH, DEPTH, HIDDEN, WORDS = 256, 4, 1024, 4096
MOST = 0.10
"""How much the statistical top-k may add to a step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each, in turn")
    rounds = parser.parse_args().rounds
    runs = {name: _Run(kind, options) for name, (kind, options) in LAYERS.items()}
    seconds = {name: [] for name in LAYERS}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = run.step()
            if number >= 2:  # compiled, and once more
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    experiment_record.write_json(HERE / "results/steps.json", {"median_seconds": medians})
    _write(medians, rounds)


class _Run:
    """A train step and its state, on random tokens."""

    def __init__(self, kind: str, options: dict):
        c = config.default()
        c.model.width, c.model.depth, c.model.layers = WIDTH, DEPTH, f"attention/{kind}"
        c.model.blocks.attention.num_heads = 4
        c.model.vocab_size = WORDS
        hidden = HIDDEN * 3 // 2 if kind == "spark_ffn" else HIDDEN
        c.model.blocks[kind].update(options | dict(hidden=hidden))
        c.data.seq_len, c.data.batch_size = 256, 8
        checked = config_check.finish(c, num_devices=jax.device_count())
        mesh = mesh_lib.make(mesh_lib.resolve(checked.mesh, jax.device_count()))
        plan = setup.on_mesh(checked, mesh, vocab_size=WORDS)
        self.state, self._step = plan.init(), plan.train_step()
        self.batch = experiment_runs.random_batch(8, 256, WORDS)
        self.key = jax.random.key(0)

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self._step(self.state, self.batch, self.key)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def _write(medians: dict, rounds: int) -> None:
    base = medians["nothing is chosen"]
    rows = [
        [name, f"{1e3 * value:.0f} ms", f"{value / base - 1:+.1%}"]
        for name, value in medians.items()
    ]
    header = ["feed-forward", f"step, median of {rounds}", "against nothing chosen"]
    experiment_record.write_table(HERE / "README.md", "steps", header, rows)
    added = medians["statistical top-k"] / base - 1
    verdict = "holds" if added < MOST else "fails"
    text = f"*The statistical top-k adds less than {MOST:.0%}* {verdict} ({added:+.1%})."
    experiment_record.write_text(HERE / "README.md", "verdict", text)


if __name__ == "__main__":
    main()
