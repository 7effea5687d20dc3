"""The analyses of a run folder, each as values and figures that JSON can hold.

A figure is {title, unit, across, scale, curves: [{label, x, y}]}; the report page draws it.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from effarch.analysis import depth, massive, sinks, sparsing_law, sparsity
from effarch.analysis import layers as layers_lib
from effarch.training import evaluation, restore, run_folder, setup

FOLDER = "analysis"


class Opened:
    """A run whose checkpoints are read one by one, and the held-out rows that are looked at."""

    def __init__(self, folder: pathlib.Path, *, step: int | None = None, rows: int = 8):
        """`step`: this checkpoint alone. Raises ValueError if there is none."""
        self.plan = setup.prepare(run_folder.read_config(folder))
        self.folder = folder
        with setup.open_checkpoints(self.plan, folder) as saved:
            self.steps = saved.steps() if step is None else [step]
        if not self.steps:
            raise ValueError(
                f"{folder} holds no checkpoint yet; wait for the first one, or train with a smaller "
                "checkpoint.every_steps."
            )
        windows = evaluation.batches(self.plan, max_batches=1)
        found = windows.rows(0, 0, min(rows, self.plan.config.data.batch_size))
        self.batch = {name: np.asarray(x) for name, x in found.items() if np.ndim(x) == 2}

    def models(self, *, newest: bool = False) -> Iterator[tuple[int, nnx.Module]]:
        """(step, model) of every checkpoint in order, or of the last one."""
        with setup.open_checkpoints(self.plan, self.folder) as saved:
            for step in self.steps[-1:] if newest else self.steps:
                _, state, _ = saved.restore(self.plan.target(), step=step)
                yield step, restore.model_of(self.plan, state)

    @property
    def layers(self) -> list[int]:
        return list(range(self.plan.config.model.depth))


def of_sparsity(run: Opened, *, percent: float) -> dict:
    """PPL-p% of every checkpoint; the law over tokens where they suffice."""
    steps, found = [], []
    for step, model in run.models():
        steps.append(step)
        found.append(sparsity.measure(model, run.batch, percent=percent))
    numbers = [n for n, down in enumerate(sparsity.down_layers(model)) if down is not None]
    last, name = found[-1], f"PPL-{percent:g} %"
    curves = [(name, numbers, last["active_ratio"]), ("not 0", numbers, last["nonzero_ratio"])]
    figures = [_figure("Active neurons", "share of the neurons", "layer", curves, scale="zero")]
    tokens = [step * run.plan.tokens_per_step for step in steps]
    means = [float(np.mean(one["active_ratio"])) for one in found]
    values = {"layers": numbers, "checkpoints": dict(zip(map(str, steps), found)), "laws": {}}
    if len(steps) > 1:
        curves = [(name, tokens, means)]
        for law in sparsing_law.LAWS:
            with contextlib.suppress(ValueError):  # too few points, or none of the law's shape
                fit = sparsing_law.fit(law, tokens, means)
                values["laws"][law] = fit.params | {"r2": fit.r2}
                curves.append((f"{law} law, R2 {fit.r2:.3f}", tokens, fit(tokens).tolist()))
        figures.append(_figure("Active neurons over training", "share", "tokens", curves))
    return values | {"figures": figures}


def of_massive(run: Opened) -> dict:
    """max / median of every layer at every checkpoint; the five-parameter curve where they suffice."""
    series = {step: _ratios(*nnx.split(model), run.batch) for step, model in run.models()}
    steps, table = list(series), np.stack([jax.device_get(x) for x in series.values()])
    curves = [("max / median", run.layers, table[-1].tolist())]
    figures = [_figure("Massive activations", "max / median", "layer", curves, scale="log")]
    values = {"steps": steps, "ratio": table.tolist(), "fits": {}}
    if len(steps) > 1:
        shown = np.unique(np.linspace(0, table.shape[1] - 1, 6).astype(int)).tolist()
        curves = [(f"layer {layer}", steps, table[:, layer].tolist()) for layer in shown]
        title = "Massive activations over training"
        figures.append(_figure(title, "max / median", "step", curves, scale="log"))
    for layer in run.layers:
        with contextlib.suppress(ValueError):  # too few points, or none of the curve's shape
            fit = massive.fit(steps, table[:, layer])
            quality = {"r2": fit.r2, "aic": fit.aic, "peak": fit.peak}
            values["fits"][str(layer)] = fit.params | quality
    return values | {"figures": figures}


def of_sinks(run: Opened) -> dict:
    """What the heads of the newest model give to first tokens and to sinks."""
    ((step, model),) = run.models(newest=True)
    found = {number: _plain(one) for number, one in _sinks(*nnx.split(model), run.batch).items()}
    numbers = list(found)
    curves = [
        (label, numbers, [reduce(found[n][key]) for n in numbers])
        for label, key, reduce in (
            ("first token, mean of heads", "first_share", np.mean),
            ("first token, highest head", "first_share", np.max),
            ("sinks, mean of heads", "sink_share", np.mean),
        )
    ]
    figure = _figure("Attention sinks", "share of the attention", "layer", curves, scale="zero")
    return {"step": step, "layers": {str(n): x for n, x in found.items()}, "figures": [figure]}


def of_depth(run: Opened) -> dict:
    """Contributions, skip effects and the logit lens of the newest model."""
    ((step, model),) = run.models(newest=True)
    graphdef, state = nnx.split(model)
    batch, layers = run.batch, run.layers
    added, lens = (_plain(x) for x in _depth(graphdef, state, batch))
    half = batch["inputs"].shape[1] // 2
    skips = [_plain(_skip(graphdef, state, batch, layer, half)) for layer in layers]
    whole = [_plain(_skip(graphdef, state, batch, layer, 2 * half)) for layer in layers]
    effective = depth.effective_depth(added["layer"])
    figures = [
        _figure(
            f"What layers add: {effective} of {len(layers)} make 80 %",
            "norm of update / stream",
            "layer",
            [(name, layers, added[name]) for name in ("mixer", "ffn")],
            scale="zero",
        ),
        _figure(
            "Skipping a layer",
            "change of probabilities",
            "layer",
            [
                ("all tokens", layers, [one["all_output"] for one in whole]),
                ("later tokens", layers, [one["future_output"] for one in skips]),
            ],
            scale="zero",
        ),
        _figure(
            "Logit lens", "KL to the output, nats", "layer", [("KL", layers, lens["kl"])], "zero"
        ),
    ]
    values = {"step": step, "effective_depth": effective, "contributions": added, "lens": lens}
    skipping = {"all": [one["all"] for one in whole], "future": [one["future"] for one in skips]}
    return values | {"skipping": skipping, "figures": figures}


KINDS = {"sparsity": of_sparsity, "massive": of_massive, "sinks": of_sinks, "depth": of_depth}


def _figure(title, unit, across, curves, scale="linear") -> dict:
    lines = [
        {"label": label, "x": list(x), "y": [float(value) for value in y]} for label, x, y in curves
    ]
    return dict(title=title, unit=unit, across=across, scale=scale, curves=lines)


def _plain(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


@functools.partial(jax.jit, static_argnums=0)
def _ratios(graphdef, state, batch):
    return massive.ratios(layers_lib.passes(nnx.merge(graphdef, state), batch))


@functools.partial(jax.jit, static_argnums=0)
def _sinks(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    return sinks.measure(model, layers_lib.passes(model, batch), batch)


@functools.partial(jax.jit, static_argnums=0)
def _depth(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    passes = layers_lib.passes(model, batch)
    return depth.contributions(passes, batch), depth.logit_lens(model, passes, batch)


@functools.partial(jax.jit, static_argnums=0)
def _skip(graphdef, state, batch, layer, until):
    model = nnx.merge(graphdef, state)
    passes = layers_lib.passes(model, batch)
    return depth.skip_effects(model, passes, batch, layer, until)
