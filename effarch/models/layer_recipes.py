"""Which layer has which number recipes, and the cut of a run where they change.

Layers that are scanned together are one program, so they must round alike: a run of equal periods is
cut into parts of equal recipes. Public paths and initial parameters do not change with the cut.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from effarch.models.layer_language import Layer, Run
from effarch.models.layers import quantizer
from effarch.quantization import rules
from effarch.quantization.recipes import Recipe

Recipes = dict[str, Recipe]
"""Path of a linear layer within its block -> its recipe; without those that have none."""


def assign(
    section, runs: Sequence[Run], makers: Mapping[Layer, Callable[[nnx.Rngs], nnx.Module]]
) -> dict[int, Recipes]:
    """The recipes of every layer by its number. `section` is the config's, or None.

    Raises ValueError for rules that do not fit the model, and for sizes that blocks do not divide.
    """
    layers = [layer for run in runs for layer in run.period * run.repeats]
    found: dict[int, Recipes] = {number: {} for number in range(len(layers))}
    if rules.is_off(section):
        return found
    inside = {layer: _sizes(make) for layer, make in makers.items()}
    sizes = {
        f"layers/{number}/{path}": size
        for number, layer in enumerate(layers)
        for path, size in inside[layer].items()
    }
    for path, recipe in rules.assign(section, list(sizes), len(layers)).items():
        if recipe is not None:
            for one in sizes[path]:
                rules.check_sizes(path, recipe, one)
            _, number, own = path.split("/", 2)
            found[int(number)][own] = recipe
    return found


def parts(run: Run, found: Mapping[int, Any]) -> list[Run]:
    """The run cut into runs whose periods have equal finds (recipes and the like) layer by layer."""
    length = len(run.period)

    def finds(repeat: int):
        start = run.start + repeat * length
        return [found[number] for number in range(start, start + length)]

    groups = [list(group) for _, group in itertools.groupby(range(run.repeats), finds)]
    return [Run(run.start + group[0] * length, run.period, len(group)) for group in groups]


def with_quantizers(make: Callable[[nnx.Rngs], nnx.Module], found: Recipes, saved_group: int = 0):
    """`make` followed by giving the block its quantizers and its FP8 copies in groups of that size."""

    def make_both(rngs: nnx.Rngs) -> nnx.Module:
        block = make(rngs)
        quantizer.attach(block, found)
        quantizer.keep_small(block, saved_group)
        return block

    return make_both


def _sizes(make) -> dict[str, tuple[tuple[int, int], ...]]:
    block = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return {path: layer.product_sizes for path, layer in quantizer.linear_layers(block).items()}
