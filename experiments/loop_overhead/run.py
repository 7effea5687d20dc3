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
ROUNDS, STEPS, SKIPPED = 5, 200, 20
LOOP_BAR, PIPELINE_BAR = 1.03, 20.0


class TimedLoop(loop_lib.Loop):
    """A loop that notes when it dispatches each step."""

    def __init__(self, *arguments, step, **options):
        super().__init__(*arguments, **options)
        self.step, self.times = step, []

    def _compile(self, batch, quantized):
        del batch, quantized

        def step(*inputs):
            self.times.append(time.perf_counter())
            return self.step(*inputs)

        return step


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    freed_memory.keep()
    plan, quick = setup.prepare(_config()), setup.prepare(quickstart.get_config())
    step, compared = _compiled(plan), {"bare": [], "loop": []}
    for _ in range(ROUNDS):
        compared["bare"].append(_bare(plan, step))
        compared["loop"].append(_looped(plan, step))
    ratios = [loop / bare for bare, loop in zip(*compared.values())]
    eaten, made = quick.tokens_per_step / _bare(quick, _compiled(quick)), _pipeline(quick)
    results = {
        "bare_step_seconds": compared["bare"],
        "loop_step_seconds": compared["loop"],
        "loop_over_bare": statistics.median(ratios),
        "loop_over_bare_per_round": ratios,
        "pipeline_tokens_per_second": made,
        "quickstart_tokens_per_second": eaten,
        "pipeline_over_quickstart": made / eaten,
    }
    experiment_record.write_json(HERE / "results/runs.json", results)
    _write(results)


def _config():
    """A step of about 100 ms that is logged every tenth step, as runs are."""
    c = config.default()
    c.name = "loop-overhead"
    c.data.tokenizer, c.data.seq_len, c.data.batch_size = "bytes", 256, 8
    c.model.width, c.model.depth = 128, 4
    c.model.blocks.attention.num_heads = 2
    c.train.num_steps, c.optimizer.schedule.warmup_steps = STEPS, STEPS // 2
    c.eval.every_steps, c.eval.max_batches, c.checkpoint.every_steps = 0, 1, 0
    return c


def _inputs(plan) -> tuple:
    """A batch and a key."""
    source = batches_lib.training(plan.dataset, plan.config.data, seed=0)
    return plan.feeder(lambda start, stop: source.rows(0, start, stop)), jax.random.key(0)


def _compiled(plan):
    return plan.train_step().lower(plan.init(), *_inputs(plan)).compile()


def _bare(plan, step) -> float:
    """Seconds of a step: the same compiled step, read one step late, nothing else."""
    state, waiting, times = plan.init(), None, []
    batch, key = _inputs(plan)
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


def _pipeline(plan) -> float:
    """Tokens a second that one thread makes of a run's data."""
    source = batches_lib.training(plan.dataset, plan.config.data, seed=0)
    count, rows = 200, plan.config.data.batch_size
    source.rows(0, 0, rows)
    start = time.perf_counter()
    for index in range(1, count + 1):
        source.rows(index, 0, rows)
    return count * plan.tokens_per_step / (time.perf_counter() - start)


def _write(results: dict) -> None:
    bare, looped = (statistics.median(results[f"{name}_step_seconds"]) for name in ("bare", "loop"))
    ratio, ratios = results["loop_over_bare"], results["loop_over_bare_per_round"]
    rows = [
        ["bare jitted step", f"{1e3 * bare:.1f} ms"],
        ["step in the training loop", f"{1e3 * looped:.1f} ms"],
        ["loop / bare", f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}; bar {LOOP_BAR})"],
        ["quickstart", f"{results['quickstart_tokens_per_second']:.3g} tokens/s"],
        ["data pipeline, one thread", f"{results['pipeline_tokens_per_second']:.3g} tokens/s"],
        [
            "pipeline / quickstart",
            f"{results['pipeline_over_quickstart']:.0f} (bar {PIPELINE_BAR:.0f})",
        ],
    ]
    experiment_record.write_table(HERE / "README.md", "costs", ["what", "figure"], rows)


if __name__ == "__main__":
    main()
