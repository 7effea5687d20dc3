"""Everything a run needs before its first array: data, model plan, mesh, optimizer, shardings.

Whatever is wrong with config, data or mesh is found here, before anything is compiled.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import optax

from effarch import config as config_lib
from effarch import config_check
from effarch.data import batches
from effarch.models import accounting, build, layer_adapters
from effarch.models.layers import quantizer
from effarch.parallel import feeding, multihost, partitioner, sharding
from effarch.parallel import mesh as mesh_lib
from effarch.quantization import rules
from effarch.training import (
    checkpoints,
    formatting,
    guard,
    optimizers,
    rounding_metrics,
    run_folder,
    schedules,
)
from effarch.training import state as state_lib
from effarch.training import step as step_lib
from effarch.training.optimizers import annealing


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it; nothing large is allocated."""

    config: object
    dataset: batches.Source | None
    """None where the step is only compiled."""
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
        hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        length = formatting.count(config.train.num_steps * self.tokens_per_step)
        whole = self.left_whole()
        return {
            "model": f"{config.model.depth} layers of width {config.model.width}: "
            f"{config.model.layers}",
            "parameters": f"{formatting.count(counts.params_total)}, "
            f"{formatting.count(counts.params_active)} of them in matrix products; "
            f"{formatting.count(counts.flops_per_token)} FLOPs a token, "
            f"{formatting.count(counts.flops_hardware)} on the hardware",
            "data": self.dataset.description,
            "batch": self._batch_arithmetic(),
            "length": f"{config.train.num_steps:,} steps = {length} tokens",
            "optimizer": f"{config.optimizer.kind}, {config.optimizer.schedule.kind}, "
            f"peak {config.optimizer.learning_rate:g}",
            "devices": " ".join([f"{len(devices)} x {devices[0].device_kind}{hosts}", *mesh]),
            **({"not split": whole} if whole else {}),
        }

    def left_whole(self) -> str:
        """The large arrays that a mesh with pieces of parameters leaves whole; "" if there are none."""
        shape = self.layout.mesh.shape
        if all(shape[axis] == 1 for axis in ("fsdp", "expert", "tensor")):
            return ""
        found = partitioner.left_whole(self.abstract, self.shardings)
        if not found:
            return ""
        largest = ", ".join(sorted(found, key=found.get, reverse=True)[:3])
        return (
            f"{len(found)} large array(s), {formatting.count(sum(found.values()))}B on every device "
            f"({largest}); mesh.rules could split them"
        )

    def _batch_arithmetic(self) -> str:
        """`128 rows x 4,096 tokens = 524,288 tokens a step = 64 devices x 2 rows x 1 micro-batch`."""
        data, accumulate = self.config.data, self.config.train.accumulate
        parts = math.prod(self.layout.mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
        rows = data.batch_size // parts // accumulate
        return (
            f"{data.batch_size:,} rows x {data.seq_len:,} tokens = {self.tokens_per_step:,} tokens a "
            f"step = {parts} part(s) x {rows} row(s) x {accumulate} micro-batch(es)"
        )

    def init(self) -> state_lib.TrainState:
        """Fresh parameters and optimizer state, made where they belong."""
        # Runs once: on CPUs half of the compile time would go into making it fast.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make = jax.jit(self._initial, out_shardings=self.shardings, compiler_options=options)
        return make(jax.random.key(self.config.seed))

    def _initial(self, key):
        return state_lib.initial(
            self.config.model,
            vocab_size=self.vocab_size,
            seed=key,
            tx=self.tx,
            quantization=self.config.quantization,
        )

    def target(self) -> state_lib.TrainState:
        """Shape, type and place of every array: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.abstract,
            self.shardings,
        )

    @functools.cached_property
    def feeder(self) -> feeding.Feeder:
        """Puts batches on the devices; a process loads the rows of its own devices."""
        data = self.config.data
        place = self.layout.sharding(step_lib.BATCH_AXES)
        return feeding.Feeder(place, data.batch_size, data.seq_len)

    def with_seq_len(self, seq_len: int) -> "Setup":
        """The same model on rows of another length."""
        config = config_lib.from_json(config_lib.to_json(self.config))
        config.data.seq_len = seq_len
        config = config_lib.freeze(config)
        dataset = self.dataset
        if config.data.task.name != "none":
            dataset = batches.open_source(config.data)
        return dataclasses.replace(self, config=config, dataset=dataset)

    def is_quantized(self, step: int) -> bool:
        """Whether step `step`, counted from 0, rounds as the recipes say; else it trains plainly."""
        options = self.config.quantization
        return options.start_step <= step < self.config.train.num_steps - options.tail_steps

    def is_model_quantized(self, num_steps: int) -> bool:
        """Whether a model after `num_steps` steps is used as the recipes say: as it was last trained."""
        return self.is_quantized(max(num_steps - 1, 0))

    def train_step(self, *, quantized: bool = True):
        """The train step as it runs: jitted, with its shardings, the state donated."""
        step = step_lib.train_step(
            self.plan,
            self.tx,
            self.schedule,
            accumulate=self.config.train.accumulate,
            layout=self.layout,
            quantized=quantized,
            frozen=self._frozen(),
        )
        return jax.jit(
            step,
            in_shardings=(self.shardings, self.layout.sharding(step_lib.BATCH_AXES), None),
            out_shardings=(self.shardings, self.layout.sharding(())),
            donate_argnums=0,
            compiler_options=partitioner.options(self.layout.mesh),
        )

    def _frozen(self):
        """Which parameter arrays never change as a whole, in the shape of the parameters."""
        groups = optimizers.groups.assign(self.plan.params, _rules(self.config))
        return jax.tree.map(lambda group: group.is_frozen, groups)

    def rounding_metrics(self):
        """The compiled-on-use look at what rounding does to each layer."""
        step = rounding_metrics.measure(self.config, vocab_size=self.vocab_size, layout=self.layout)
        return jax.jit(step, out_shardings=self.layout.sharding(()))

    def eval_step(self, *, quantized: bool = True):
        """The compiled-on-use evaluation step."""
        step = step_lib.eval_step(self.plan, layout=self.layout, quantized=quantized)
        return jax.jit(step, out_shardings=self.layout.sharding(()))


def prepare(config) -> Setup:
    """Checks the config against data and devices and plans the model. Raises ValueError."""
    config = config_check.finish(config, num_devices=jax.device_count())
    # The model is planned once for its own errors before minutes may go into preparing data.
    if config.model.vocab_size:
        build.abstract(
            config.model, vocab_size=config.model.vocab_size, quantization=config.quantization
        )
    dataset = batches.open_source(config.data)
    multihost.check_same("config", config_lib.fingerprint(config))
    multihost.check_same("data", dataset.fingerprint)
    vocab_size = _vocab_size(config.model.vocab_size, dataset)
    mesh = mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count()))
    return on_mesh(config, mesh, vocab_size=vocab_size, dataset=dataset)


def on_mesh(config, mesh: jax.sharding.Mesh, *, vocab_size: int, dataset=None) -> Setup:
    """The plan of a checked config for these devices, which need not be here. Raises ValueError."""
    layout = sharding.Layout(mesh, sharding.rules(config.mesh.rules))
    rows = (config.data.batch_size // config.train.accumulate, config.data.seq_len)
    layout.check("a micro-batch of data.batch_size x data.seq_len", rows, ("batch", "stream"))
    rules.check_device(config.quantization, mesh)
    sizes = dict(vocab_size=vocab_size, quantization=config.quantization)
    plan = state_lib.blueprint(config.model, **sizes)
    model = build.abstract(config.model, **sizes)
    counts = accounting.count(model, config.data.seq_len)
    schedule, tx = _optimizer(config, plan, quantizer.statistical(model))
    make = functools.partial(state_lib.initial, config.model, tx=tx, **sizes)
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
        fingerprint=run_folder.read_fingerprint(folder),
        keep=options.keep,
        keep_period=options.keep_period,
    )


def _vocab_size(wanted: int, dataset) -> int:
    if not wanted:
        return dataset.vocab_size
    if wanted < dataset.num_words:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the data's {dataset.num_words} words; set "
            "model.vocab_size=0 to take as many as it has, or use its tokenizer."
        )
    return wanted


def _rules(config) -> tuple[str, ...]:
    """The optimizer's rules; with adapters those come first that train nothing else."""
    return (*(layer_adapters.TRAINED if config.model.lora.rank else ()), *config.optimizer.rules)


def _optimizer(config, plan: state_lib.Blueprint, statistical: dict[str, tuple[int, int]]):
    """(schedule, optimizer); `statistical` are the matrices that StatsQ rounds."""
    o, q = config.optimizer, config.quantization
    options = {name: o.schedule[name] for name in schedules.options(o.schedule.kind)}
    schedule = schedules.build(o.schedule.kind, o.learning_rate, config.train.num_steps, **options)
    inner = optimizers.build(
        o.kind,
        schedule=schedule,
        clip_norm=o.clip_norm,
        infos=plan.params,
        rules=_rules(config),
        **dict(o[o.kind]),
    )
    if q.anneal_steps:
        if not statistical:
            raise ValueError(
                f"quantization.anneal_steps={q.anneal_steps} needs layers that StatsQ rounds; use the "
                "recipe ofq, or 0."
            )
        start = config.train.num_steps - q.anneal_steps
        inner = annealing.confine(inner, statistical, start=start, reach=q.anneal_reach)
    return schedule, guard.guard(inner, spike_factor=config.train.spike_factor)
