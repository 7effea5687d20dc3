"""Everything a run needs before its first array: data, model plan, mesh, optimizer, shardings.

Whatever is wrong with config, data or mesh is found here, before anything is compiled.
"""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax

from effarch import config as config_lib
from effarch import config_check
from effarch.data import dataset as dataset_lib
from effarch.models import accounting, build
from effarch.parallel import mesh as mesh_lib
from effarch.parallel import sharding
from effarch.training import checkpoints, formatting, guard, optimizers, run_folder, schedules
from effarch.training import state as state_lib
from effarch.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it; nothing large is allocated."""

    config: object
    dataset: dataset_lib.Dataset
    vocab_size: int
    layout: sharding.Layout
    plan: state_lib.Blueprint
    counts: accounting.Counts
    schedule: optax.Schedule
    tx: optax.GradientTransformationExtraArgs
    abstract: state_lib.TrainState
    shardings: state_lib.TrainState

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def name(self) -> str:
        """The default name of the run's folder."""
        return f"{self.config.name}-{config_lib.fingerprint(self.config)[:8]}"

    def describe(self) -> dict[str, str]:
        """What is about to run, for a person: a line each."""
        config, counts, devices = self.config, self.counts, jax.devices()
        mesh = [f"{axis} {size}" for axis, size in self.layout.mesh.shape.items() if size > 1]
        length = formatting.count(config.train.num_steps * self.tokens_per_step)
        return {
            "model": f"{config.model.depth} layers of width {config.model.width}: "
            f"{config.model.layers}",
            "parameters": f"{formatting.count(counts.params_total)}, "
            f"{formatting.count(counts.params_active)} of them in matrix products; "
            f"{formatting.count(counts.flops_per_token)} FLOPs a token",
            "data": f"{', '.join(self.dataset.sources)}; tokenizer {self.dataset.tokenizer.spec}",
            "batch": f"{config.data.batch_size} rows x {config.data.seq_len} tokens = "
            f"{self.tokens_per_step:,}, in {config.train.accumulate} micro-batch(es)",
            "length": f"{config.train.num_steps:,} steps = {length} tokens",
            "optimizer": f"{config.optimizer.kind}, {config.optimizer.schedule.kind}, "
            f"peak {config.optimizer.learning_rate:g}",
            "devices": " ".join([f"{len(devices)} x {devices[0].device_kind}", *mesh]),
        }

    def init(self) -> state_lib.TrainState:
        """Fresh parameters and optimizer state, made where they belong."""
        # Runs once: on CPUs half of the compile time would go into making it fast.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make = jax.jit(self._initial, out_shardings=self.shardings, compiler_options=options)
        return make(jax.random.key(self.config.seed))

    def _initial(self, key):
        return state_lib.initial(
            self.config.model, vocab_size=self.vocab_size, seed=key, tx=self.tx
        )

    def target(self) -> state_lib.TrainState:
        """Shape, type and place of every array: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.abstract,
            self.shardings,
        )

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch of numpy rows on the devices."""
        return {
            name: jax.device_put(rows, self.layout.sharding(step_lib.BATCH_AXES))
            for name, rows in batch.items()
            if rows.ndim == 2
        }

    def eval_step(self):
        """The compiled-on-use evaluation step."""
        return jax.jit(step_lib.eval_step(self.plan, layout=self.layout))


def prepare(config) -> Setup:
    """Checks the config against data and devices and plans the model. Raises ValueError."""
    config = config_check.finish(config, num_devices=jax.device_count())
    data = config.data
    # The model is planned once for its own errors before minutes may go into preparing data.
    if config.model.vocab_size:
        build.abstract(config.model, vocab_size=config.model.vocab_size)
    dataset = dataset_lib.find_or_prepare(
        data.sources,
        data.tokenizer,
        data.val_permille,
        path=data.path,
        cache_dir=data.cache_dir,
    )
    vocab_size = _vocab_size(config.model.vocab_size, dataset)
    layout = sharding.Layout(mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count())))
    plan = state_lib.blueprint(config.model, vocab_size=vocab_size)
    counts = accounting.count(
        build.abstract(config.model, vocab_size=vocab_size), config.data.seq_len
    )
    schedule, tx = _optimizer(config, plan)
    make = functools.partial(state_lib.initial, config.model, vocab_size=vocab_size, tx=tx)
    abstract = jax.eval_shape(lambda key: make(seed=key), jax.random.key(0))
    return Setup(
        config=config,
        dataset=dataset,
        vocab_size=vocab_size,
        layout=layout,
        plan=plan,
        counts=counts,
        schedule=schedule,
        tx=tx,
        abstract=abstract,
        shardings=state_lib.shardings(abstract, plan, layout),
    )


def open_checkpoints(setup: Setup, folder: pathlib.Path) -> checkpoints.Checkpoints:
    """The checkpoints of the run in `folder`."""
    options = setup.config.checkpoint
    return checkpoints.Checkpoints(
        folder / run_folder.CHECKPOINTS,
        fingerprint=config_lib.fingerprint(setup.config),
        keep=options.keep,
        keep_period=options.keep_period,
    )


def _vocab_size(wanted: int, dataset) -> int:
    if not wanted:
        return dataset.vocab_size
    if wanted < dataset.tokenizer.true_size:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {dataset.tokenizer.true_size} "
            "words; set model.vocab_size=0 to take the tokenizer's size, or use its tokenizer."
        )
    return wanted


def _optimizer(config, plan: state_lib.Blueprint):
    o = config.optimizer
    options = {name: o.schedule[name] for name in schedules.options(o.schedule.kind)}
    schedule = schedules.build(o.schedule.kind, o.learning_rate, config.train.num_steps, **options)
    inner = optimizers.build(
        o.kind,
        schedule=schedule,
        clip_norm=o.clip_norm,
        infos=plan.params,
        rules=o.rules,
        **dict(o[o.kind]),
    )
    return schedule, guard.guard(inner, spike_factor=config.train.spike_factor)
