"""What the training loop and the data pipeline cost beside the step itself, on this machine.

python experiments/loop_overhead/run.py                # about four minutes
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax

from effarch import config, experiment_record
from effarch.configs import quickstart
from effarch.data import batches as batches_lib
from effarch.training import freed_memory, run_folder, setup
from effarch.training import loop as loop_lib

HERE = pathlib.Path(__file__).resolve().parent
ROUNDS, STEPS, SKIPPED = 5, 60, 10
LOOP_BAR, PIPELINE_BAR = 1.03, 20.0


class TimedLoop(loop_lib.Loop):
    """A loop that notes when it dispatches each step."""

    def __init__(self, *arguments, step, **options):
        super().__init__(*arguments, **options)
        self.step, self.times = step, []

    def _compile(self, state, batch, quantized):
        del state, batch, quantized

        def step(*inputs):
            self.times.append(time.perf_counter())
            return self.step(*inputs)

        return step


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    freed_memory.keep()
    plan = setup.prepare(_config())
    source = batches_lib.training(plan.dataset, plan.config.data, seed=0)
    batch = plan.feeder(lambda start, stop: source.rows(0, start, stop))
    key = jax.random.key(0)
    step = plan.train_step().lower(plan.init(), batch, key).compile()
    bare, looped = [], []
    for _ in range(ROUNDS):
        bare.append(_bare(plan, step, batch, key))
        looped.append(_looped(plan, step))
    results = {
        "bare_step_seconds": bare,
        "loop_step_seconds": looped,
        "loop_over_bare": statistics.median(looped) / statistics.median(bare),
        "pipeline_tokens_per_second": _pipeline(quickstart.get_config()),
        "quickstart_tokens_per_second": 3300.0,
    }
    eaten = results["quickstart_tokens_per_second"]
    results["pipeline_over_quickstart"] = results["pipeline_tokens_per_second"] / eaten
    experiment_record.write_json(HERE / "results/runs.json", results)
    _write(results)


def _config():
    """A step of about 100 ms that is logged every tenth step, as runs are."""
    c = config.default()
    c.name = "loop-overhead"
    c.data.tokenizer, c.data.seq_len, c.data.batch_size = "bytes", 256, 4
    c.model.width, c.model.depth = 128, 4
    c.model.blocks.attention.num_heads = 2
    c.train.num_steps = STEPS
    c.eval.every_steps = c.checkpoint.every_steps = 0
    return c


def _bare(plan, step, batch, key) -> float:
    """Seconds of a step: the same compiled step, read one step late, nothing else."""
    state, waiting, times = plan.init(), None, []
    for _ in range(STEPS):
        times.append(time.perf_counter())
        state, metrics = step(state, batch, key)
        if waiting is not None:
            jax.block_until_ready(waiting)
        waiting = metrics
    return _per_step(times)


def _looped(plan, step) -> float:
    """Seconds of a step in the loop: data, progress, metrics, TensorBoard and watchdog included."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run"
        run_folder.create(path, plan.config, data=plan.dataset.fingerprint)
        loop = TimedLoop(plan, path, step=step)
        loop.run()
        return _per_step(loop.times)


def _per_step(times: list[float]) -> float:
    return (times[-1] - times[SKIPPED]) / (len(times) - 1 - SKIPPED)


def _pipeline(quick) -> float:
    """Tokens a second that one thread makes of the quickstart's data."""
    plan = setup.prepare(quick)
    source = batches_lib.training(plan.dataset, plan.config.data, seed=0)
    count, rows = 200, plan.config.data.batch_size
    source.rows(0, 0, rows)
    start = time.perf_counter()
    for index in range(1, count + 1):
        source.rows(index, 0, rows)
    return count * plan.tokens_per_step / (time.perf_counter() - start)


def _write(results: dict) -> None:
    bare, looped = (statistics.median(results[f"{name}_step_seconds"]) for name in ("bare", "loop"))
    rows = [
        ["bare jitted step", f"{1e3 * bare:.1f} ms"],
        ["step in the training loop", f"{1e3 * looped:.1f} ms"],
        ["loop / bare", f"{results['loop_over_bare']:.3f} (bar {LOOP_BAR})"],
        ["data pipeline, one thread", f"{results['pipeline_tokens_per_second']:.3g} tokens/s"],
        [
            "pipeline / quickstart",
            f"{results['pipeline_over_quickstart']:.0f} (bar {PIPELINE_BAR:.0f})",
        ],
    ]
    experiment_record.write_table(HERE / "README.md", "costs", ["what", "figure"], rows)


if __name__ == "__main__":
    main()
