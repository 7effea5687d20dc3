"""What a quantized linear layer holds besides its weights: the recipe, its statistics, its seed.

The builder gives linear layers their quantizer (`attach`); the stack hands out random words before it
runs a block (`prepare`), so that no mixer or ffn knows of quantization.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.grouped_matmul import api as grouped_matmul
from effarch.models.context import Context
from effarch.models.state import ModelState, Probe
from effarch.quantization import diagnostics, estimators, grouped, matmul, products
from effarch.quantization.recipes import Recipe

_KEY = 1 << 20  # folded into the layer's key, away from the numbers that layers use themselves


class Quantizer(nnx.Module):
    """The product of a linear layer by a recipe. No state."""

    seed = None
    """Two random uint32 words of this layer and step; handed out by `prepare`."""
    axes = None
    """Logical axes of a linear layer's matrix; given by `attach`."""
    layout = None
    """The run's mesh and rules; given by `prepare`."""
    observed = None
    """A Probe for `diagnostics`; given by `watch`."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.is_active = True

    def __call__(self, x: Float[Array, "... I"], w: Float[Array, "I O"], *, dtype):
        """y = x w, [..., O] in `dtype`."""
        if not self.is_active:
            return matmul.matmul(x, w, dtype=dtype)
        y = self.product(x, w, dtype)
        if self.observed is None:
            return y
        given = self.given(x)
        seen = diagnostics.forward(self.recipe, x, w, seed=self.seed, **given)
        probe, amax = self.observed[...], given.get("amax")
        return diagnostics.observe(self.recipe, y, probe, seen, self.seed, amax)

    def given(self, x) -> dict[str, Array]:
        """The magnitudes or steps that this layer rounds by, if they are not its arrays' own."""
        return {}

    def product(self, x, w, dtype):
        given = dict(dtype=dtype, seed=self.seed, cuts=self._cuts())
        return matmul.quantized_matmul(x, w, self.recipe, **given)

    def _cuts(self) -> products.Cuts:
        """Tokens are cut by rows of the batch; with time cut as well, pieces are no matrices."""
        layout = self.layout
        if self.axes is None or layout is None or layout.mesh.size == 1 or layout.parts("time") > 1:
            return products.WHOLE
        arrays = (("batch", self.axes[0]), self.axes, ("batch", self.axes[1]))
        return products.Cuts(*(layout.sharding(logical) for logical in arrays))

    def grouped(self, x, w, group_sizes, *, name: str, **options):
        """`kernels.grouped_matmul` of experts; the module's products differ by `name`."""
        if not self.is_active:
            return grouped_matmul.grouped_matmul(x, w, group_sizes, **options)
        seed = None if self.seed is None else self.seed ^ jnp.uint32(zlib.crc32(name.encode()))
        return grouped.quantized_grouped_matmul(
            x, w, group_sizes, self.recipe, seed=seed, **options
        )


class Delayed(Quantizer):
    """Scales from the largest magnitudes of x, w and dL/dy in the last steps.

    largest <- max over the history of finite magnitudes, if that is above 0; else unchanged.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.history = ModelState(jnp.zeros((3, recipe.history)), logical=(None, None))
        self.largest = ModelState(jnp.zeros((3,)), logical=(None,))
        self.seen = Probe(jnp.zeros((3,)), logical=(None,))

    def given(self, x) -> dict[str, Array]:
        return {"amax": self.largest[...]}

    def product(self, x, w, dtype):
        return matmul.quantized_matmul(
            x, w, self.recipe, dtype=dtype, probe=self.seen[...], **self.given(x)
        )

    def next_state(self, state: dict, aux: dict, probes: dict) -> dict:
        """Stacked along the layers: history [layers, 3, steps], largest [layers, 3]."""
        seen = jnp.where(jnp.isfinite(probes["seen"]), probes["seen"], 0.0)
        history = jnp.concatenate([seen[..., None], state["history"][..., :-1]], axis=-1)
        largest = jnp.max(history, axis=-1)
        return {"history": history, "largest": jnp.where(largest > 0, largest, state["largest"])}


class Learned(Quantizer):
    """Learned steps of x and w (LSQ): step = start * factor, the factor learned from 1.

    `start` is LSQ's first step: that of w from the initial weights, that of x from the first batch.
    Where we differ: the factor is the parameter, not the step, so that an optimizer that moves every
    parameter by about its learning rate moves large and small steps alike.
    """

    def __init__(self, recipe: Recipe, kernel: Float[Array, "I O"]):
        super().__init__(recipe)
        bits = recipe.step_bits[1]
        start_w = estimators.initial_step(kernel, bits) if bits else jnp.ones(())
        self.factor = nnx.Param(jnp.ones((2,)), logical=(None,), decay=False)
        self.start = ModelState(jnp.stack([jnp.zeros(()), start_w]), logical=(None,))
        self.seen = Probe(jnp.zeros((1,)), logical=(None,))

    def given(self, x) -> dict[str, Array]:
        start = jnp.where(self.start[...] > 0, self.start[...], self._first(x))
        return {"steps": jnp.maximum(start * self.factor[...], 1e-5)}

    def product(self, x, w, dtype):
        seen = estimators.report(x, self.seen[...], self._first(x)[None])
        return matmul.quantized_matmul(seen, w, self.recipe, dtype=dtype, **self.given(x))

    def _first(self, x):
        return estimators.initial_step(jax.lax.stop_gradient(x), self.recipe.step_bits[0])

    def next_state(self, state: dict, aux: dict, probes: dict) -> dict:
        """start [layers, 2]."""
        return {"start": jnp.where(state["start"] > 0, state["start"], probes["seen"])}


def make(recipe: Recipe, layer: nnx.Module, path: str) -> Quantizer:
    """The quantizer that a recipe needs for a layer."""
    if getattr(layer, "structure", None) is not None:
        raise ValueError(
            f"quantization: {path} is factored (structured), which recipes do not serve; add a rule "
            f"such as 'layers/*/{path} none'."
        )
    if not recipe.has_state:
        return Quantizer(recipe)
    if not isinstance(getattr(layer, "kernel", None), nnx.Param):
        raise ValueError(
            f"quantization: {path} holds experts, which recipes with delayed scales or learned steps do "
            f"not serve; add a rule such as 'layers/*/{path} fp8_current'."
        )
    return Delayed(recipe) if recipe.history else Learned(recipe, layer.kernel[...])


def attach(block: nnx.Module, found: dict[str, Recipe | None]) -> None:
    """Gives each linear layer of a block its quantizer; `found` maps paths in the block to recipes."""
    for path, layer in linear_layers(block).items():
        if found.get(path) is not None:
            layer.quantizer = make(found[path], layer, path)
            layer.quantizer.axes = getattr(layer, "axes", None)


def keep_small(block: nnx.Module, group: int) -> None:
    """Tells norms and activations of a block to keep FP8 copies for the backward pass; 0: none.

    Raises ValueError where groups do not divide a width.
    """
    for path, node in nnx.iter_graph(block) if group else ():
        if isinstance(node, nnx.Module) and hasattr(node, "saved_group"):
            is_norm = hasattr(node, "scale")
            width = node.scale[...].shape[-1] if is_norm else node.up.sizes[1]
            if width % group:
                raise ValueError(
                    f"quantization.saved_group={group} does not divide the width {width} of "
                    f"{'/'.join(map(str, path))}; use one that does, such as 16, or 0."
                )
            node.saved_group = group


def watch(model: nnx.Module) -> list[str]:
    """Gives the quantizers of a model's linear layers probes; the layers' paths, by stack.

    Experts have none: their matrices lie beside each other in one layer.
    """
    watched = []
    for name, block in model.layers.items():
        for path, layer in linear_layers(block).items():
            kernel = getattr(layer, "kernel", None)
            if layer.quantizer is not None and isinstance(kernel, nnx.Param):
                zeros = jnp.zeros((kernel.get_value().shape[0], len(diagnostics.NAMES)))
                layer.quantizer.observed = Probe(zeros, logical=("layers", None))
                watched.append(f"layers/{name}/{path}")
    return watched


def statistical(model: nnx.Module) -> dict[str, tuple[int, int]]:
    """(bits, dimension of a row) of every matrix that StatsQ rounds, by the parameter's path."""
    found = {}
    for name, block in model.layers.items():
        for path, layer in linear_layers(block).items():
            rule = layer.quantizer and layer.quantizer.recipe.w
            if isinstance(rule, estimators.Stats) and isinstance(layer.kernel, nnx.Param):
                found[f"layers/{name}/{path}/kernel"] = rule.bits, -1 if layer.by_outputs else -2
    return found


def detach(model: nnx.Module) -> None:
    """Takes the quantizers of all linear layers of a model away."""
    for layer in linear_layers(model).values():
        if layer.quantizer is not None:
            del layer.quantizer


def linear_layers(block: nnx.Module) -> dict[str, nnx.Module]:
    """The layers of a block that can have a quantizer, by path: `ffn/up`."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(block)
        if isinstance(node, nnx.Module) and hasattr(node, "quantizer")
    }


def prepare(block: nnx.Module, ctx: Context) -> None:
    """Tells a block whether to round and hands each of its quantizers random words of its own."""
    for _, node in () if ctx.quantized else nnx.iter_graph(block):
        if isinstance(node, nnx.Module) and getattr(node, "saved_group", 0):
            node.saved_group = 0
    quantizers = [node for _, node in nnx.iter_graph(block) if isinstance(node, Quantizer)]
    for quantizer in quantizers:
        quantizer.is_active, quantizer.layout = ctx.quantized, ctx.layout
    random = [quantizer for quantizer in quantizers if quantizer.recipe.is_random]
    if ctx.key is not None and ctx.quantized and random:
        key = jax.random.fold_in(ctx.key, _KEY)
        for quantizer, seed in zip(random, jax.random.bits(key, (len(random), 2), jnp.uint32)):
            quantizer.seed = seed
