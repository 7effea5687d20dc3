"""The training loop: one compiled step, metrics read one step late, checkpoints, evaluation.

With several processes each runs this loop in step with the others: what decides its course (metrics, the
wish to stop) is the same on all of them. Process 0 writes and shows, the others are silent.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import signal

import jax
import numpy as np

from effarch.data import batches, prefetch
from effarch.kernels import dispatch
from effarch.models import accounting
from effarch.parallel import multihost, partitioner
from effarch.training import evaluation, progress, run_folder, setup, watchdog, writers
from effarch.training import trunk as trunk_lib
from effarch.training.state import TrainState

INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of a run that was told to stop, saved, and can be resumed: 128 + signal number."""


class BadSteps(RuntimeError):
    """Too many updates in a row had to be skipped."""


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    state: TrainState
    final: dict[str, float]
    exit_code: int
    """0 if it is finished, 143 or 130 if it was told to stop."""
    seconds: float
    """Wall-clock of all processes that worked on the run, up to the last evaluation."""
    resumes: int
    compile_seconds: float
    rates: dict[str, float]
    backends: dict[str, str]
    """What the kernels' operations ran on in the last step; empty if nothing was compiled."""


class Loop:
    """One run in one folder. `run` trains from wherever the folder's checkpoints are to the end.

    A run that has none yet starts at the last step that it shares with the run in `trunk`, if given.
    """

    def __init__(
        self,
        plan: setup.Setup,
        folder: pathlib.Path,
        *,
        trunk: pathlib.Path | None = None,
        console=None,
    ):
        self.plan, self.config, self.folder, self.trunk = plan, plan.config, folder, trunk
        self.console = console
        self.batches = batches.training(plan.dataset, self.config.data, seed=self.config.seed)
        self.key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        self.metrics = ("loss", *plan.dataset.metrics)
        self.eval_steps = {mode: plan.eval_step(quantized=mode) for mode in (False, True)}
        self.windows = evaluation.batches(plan, max_batches=self.config.eval.max_batches)
        self._resumes, self._seconds_before = 0, 0.0
        self._signal: int | None = None
        self._stop = multihost.AnyProcess(plan.layout.mesh)
        self._bad_steps: list[int] = []
        self._compiled = {}
        """Step functions by whether the step is quantized."""
        self._backends: dict[str, str] = {}

    def run(self) -> Outcome:
        """Trains to `train.num_steps`, or until told to stop by SIGTERM or SIGINT."""
        total = self.config.train.num_steps
        with (
            setup.open_checkpoints(self.plan, self.folder) as saved,
            self._catching_signals(),
            watchdog.Watchdog(self.folder, timeout=self.config.hosts.timeout_seconds) as self.watch,
        ):
            restored = saved.restore(self.plan.target())
            if restored is None:
                saved.check_writable()
                start, state = trunk_lib.restore(self.plan, self.trunk) if self.trunk else (0, None)
            else:
                start, state, record = restored
                self._resumes, self._seconds_before = record["resumes"] + 1, record["seconds"]
            peak = accounting.peak_flops(jax.devices()[0])
            with (
                self._open_writer(start) as writer,
                progress.Progress(
                    total,
                    start_step=start,
                    tokens_per_step=self.plan.tokens_per_step,
                    flops_per_step=self.plan.counts.flops_per_token * self.plan.tokens_per_step,
                    hardware_flops_per_step=self.plan.counts.flops_hardware
                    * self.plan.tokens_per_step,
                    peak_flops=peak and peak * jax.device_count(),
                    console=self.console,
                ) as shown,
            ):
                if start and restored is None:
                    shown.note(f"starts from step {start:,} of {self.trunk}")
                elif start:
                    shown.note(f"resumed from the checkpoint of step {start:,}")
                self.writer, self.shown, self.saved = writer, shown, saved
                state = self._steps(self._init() if state is None else state, start, total)
                final, code = {}, 0
                if self._stop.agreed:
                    code = INTERRUPTED[self._signal or signal.SIGTERM]
                else:
                    final = self._evaluate(state, total, everything=True)
                with shown.pause("checkpoint"):
                    saved.wait()
                return Outcome(
                    state,
                    final,
                    code,
                    seconds=self._seconds(),
                    resumes=self._resumes,
                    compile_seconds=shown.seconds.get(progress.COMPILE, 0.0),
                    rates=shown.rates(),
                    backends=self._backends,
                )

    def _steps(self, state: TrainState, start: int, total: int) -> TrainState:
        """Dispatches every step before reading the metrics of the one before."""
        if start >= total:
            return state
        feed = prefetch.Prefetch(self._batch, start, total)
        try:
            waiting = None
            for step, batch in feed:
                self.watch.beat("training", step)
                mode = self.plan.is_quantized(step)
                if mode not in self._compiled:
                    self.watch.beat(watchdog.COMPILING, step)
                    with self.shown.pause(progress.COMPILE):
                        self._compiled[mode] = self._compile(batch, mode)
                state, metrics = self._compiled[mode](state, batch, self.key)
                if waiting is not None:
                    self._read(*waiting)
                waiting = (step + 1, metrics, self._stop.ask(self._signal is not None))
                if self._due(self.config.eval.every_steps, step + 1) and step + 1 < total:
                    self._read(*waiting)
                    waiting = None
                    self._evaluate(state, step + 1)
                if mode and self._due(self.config.quantization.metrics_every, step + 1):
                    self._look_at_rounding(state, batch, step + 1)
                stop = self._stop.agreed
                if (
                    self._due(self.config.checkpoint.every_steps, step + 1)
                    or stop
                    or step + 1 == total
                ):
                    if waiting is not None:
                        self._read(*waiting)
                        waiting = None
                    self._save(state, step + 1)
                self.watch.beat("waiting for a batch", step + 1)
                if stop:
                    self.shown.note(f"told to stop: saved step {step + 1:,}; run again to resume")
                    break
            return state
        finally:
            feed.close()

    def _batch(self, step: int) -> dict[str, jax.Array]:
        return self.plan.feeder(functools.partial(self.batches.rows, step))

    def _init(self) -> TrainState:
        """Fresh parameters; on one device the first step is compiled meanwhile."""
        if self.plan.layout.mesh.size > 1 or not self.config.train.num_steps:
            return self.plan.init()
        self.watch.beat(watchdog.COMPILING, 0)
        mode = self.plan.is_quantized(0)
        with (
            self.shown.pause(progress.COMPILE),
            concurrent.futures.ThreadPoolExecutor(1, "compile") as threads,
        ):
            compiling = threads.submit(self._compile, self._batch(0), mode)
            state = self.plan.init()
            self._compiled[mode] = compiling.result()
        return state

    def _compile(self, batch: dict, quantized: bool):
        with dispatch.noted() as self._backends:
            lowered = self.plan.train_step(quantized=quantized).lower(
                self.plan.target(), batch, self.key
            )
        if self.plan.layout.mesh.size == 1:
            return lowered.compile()
        with partitioner.heard() as complaints:
            compiled = lowered.compile()
        if complaints:
            self.shown.note(
                f"the partitioner gathers arrays whole in {len(complaints)} place(s), which costs time "
                "and memory: try another mesh or mesh.rules"
            )
        return compiled

    def _open_writer(self, start: int):
        if not multihost.is_first():
            return writers.Silent()
        return writers.MetricsWriter(
            self.folder, start_step=start, tensorboard=self.config.log.tensorboard
        )

    def _read(self, step: int, metrics: dict, stop: jax.Array | None) -> None:
        """Takes a step's metrics to the host: progress, metrics.jsonl, and the watch on bad steps."""
        self._stop.read(stop)
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.shown.update(step, values["loss"])
        self._watch(step, values)
        every = self.config.log.every_steps
        if step % every == 0 or step in (1, self.config.train.num_steps):
            values["tokens"] = step * self.plan.tokens_per_step
            values["flops_model"] = values["tokens"] * self.plan.counts.flops_per_token
            self.writer.write(step, values | self.shown.rates())

    def _watch(self, step: int, values: dict[str, float]) -> None:
        if not values["skipped_in_a_row"]:
            self._bad_steps.clear()
            return
        self._bad_steps.append(step)
        reason = "a gradient spike" if np.isfinite(values["grad_norm"]) else "no finite gradient"
        self.shown.note(f"step {step:,}: update skipped, {reason} (loss {values['loss']:.4g})")
        if values["skipped_in_a_row"] >= self.config.train.max_bad_steps:
            path = self.folder / "bad_batches.json"
            windows = {str(bad): self.batches.window_ids(bad - 1) for bad in self._bad_steps}
            if multihost.is_first():
                run_folder.write_json(path, {"steps": windows, "loss": str(values["loss"])})
            raise BadSteps(
                f"train.max_bad_steps={self.config.train.max_bad_steps}: as many updates in a row were "
                f"skipped, the last at step {step} ({reason}); their batches are listed in {path} and "
                "the last checkpoint is kept: lower optimizer.learning_rate, or look at those batches."
            )

    def _evaluate(
        self, state: TrainState, step: int, *, everything: bool = False
    ) -> dict[str, float]:
        windows = evaluation.batches(self.plan) if everything else self.windows
        if not len(windows):
            return {}
        self.watch.beat("evaluating", step)
        with self.shown.pause("evaluation"):
            eval_step = self.eval_steps[self.plan.is_model_quantized(step)]
            result = evaluation.evaluate(
                self.plan, eval_step, state.params, state.model_state, windows
            )
        self.writer.write(step, result, kind="eval")
        metrics = [f"{name.replace('_', ' ')} {result[name]:.4f}" for name in self.metrics]
        self.shown.note(f"step {step:,}: validation {', '.join(metrics)}")
        return result

    @functools.cached_property
    def measure(self):
        """See `rounding_metrics`; made when it is first due."""
        return self.plan.rounding_metrics()

    def _look_at_rounding(self, state: TrainState, batch: dict, step: int) -> None:
        """Each rounded layer on the batch of this step, at the parameters after it."""
        with self.shown.pause("evaluation"):
            key = jax.random.fold_in(self.key, step)
            found = self.measure(state.params, state.model_state, batch, key)
            if found:
                self.writer.write(step, jax.device_get(found), kind="rounding")

    def _save(self, state: TrainState, step: int) -> None:
        self.watch.beat("saving", step)
        with self.shown.pause("checkpoint"):
            self.writer.sync()
            record = {"resumes": self._resumes, "seconds": self._seconds()}
            self.saved.save(step, state, record)

    def _seconds(self) -> float:
        return self._seconds_before + self.shown.elapsed()

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _catching_signals(self) -> "_Signals":
        return _Signals(self)


class _Signals:
    """While active, SIGTERM and SIGINT ask the loop to save and stop; a second one stops at once."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.before: dict[int, object] = {}

    def __enter__(self) -> None:
        for number in INTERRUPTED:
            self.before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        if self.loop._signal is not None:
            raise SystemExit(INTERRUPTED[number])
        self.loop._signal = number

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
