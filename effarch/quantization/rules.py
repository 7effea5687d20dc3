"""Which linear layer gets which recipe: rules over public paths.

`quantization.recipe` is for every linear layer of the blocks. Rules change it, one line each: a glob
over paths (`*` within one level, `**` over any number of levels), a recipe and maybe options that
differ from the recipe's section. Later rules win.

    layers/*/ffn/** mxfp8                 every projection of the feed-forwards
    layers/*/mixer/out quest bits=8
    layers/3/** none                      this layer stays as it is

`quantization.keep` names what stays unrounded whatever the rules say: routers, gates, decays. The
embedding, the head and the norms are no linear layers of blocks and are never reached.
"""

import difflib
from collections.abc import Sequence

import jax

from effarch import names
from effarch.quantization import native, recipes
from effarch.quantization.recipes import Recipe

KEEP = (
    "layers/*/**/router",
    "layers/*/mixer/beta",
    "layers/*/mixer/decay/**",
    "layers/*/mixer/decay",
    "layers/*/mixer/forget",
    "layers/*/mixer/step",
)
"""The default of `quantization.keep`."""


def is_off(section) -> bool:
    """Whether the section asks for no quantization at all."""
    return section is None or (section.recipe == "none" and not section.rules)


def assign(section, paths: Sequence[str], depth: int) -> dict[str, Recipe | None]:
    """The recipe of each public module path; None is the plain product.

    section: the config's `quantization`, maybe None. paths: such as `layers/3/ffn/up`, all linear layers
    of the `depth` blocks. Raises ValueError for a rule that cannot be read or matches nothing.
    """
    if is_off(section):
        return dict.fromkeys(paths)
    found = dict.fromkeys(paths, _build(section, section.recipe, {}))
    for index, text in enumerate(section.rules):
        pattern, recipe = _parse(section, text, index)
        matched = [path for path in paths if pattern.fullmatch(path)]
        if not matched:
            nearest = difflib.get_close_matches(text.split()[0], paths, n=1, cutoff=0.0)
            raise ValueError(
                f"quantization.rules[{index}]: {text!r} matches no linear layer; the nearest path is "
                f"{nearest[0]!r}."
            )
        found |= dict.fromkeys(matched, recipe)
    kept = [names.glob(pattern) for pattern in section.keep]
    last = depth - section.keep_last
    for path in paths:
        outside = not section.keep_first <= int(path.split("/")[1]) < last
        if outside or any(pattern.fullmatch(path) for pattern in kept):
            found[path] = None
    return found


def check_sizes(path: str, recipe: Recipe, sizes: tuple[int, int]) -> None:
    """Raises ValueError if the recipe's blocks do not divide the layer's inputs and outputs."""
    for size, block, word in zip(sizes, recipe.block_sizes(), ("inputs", "outputs")):
        if size % block:
            raise ValueError(
                f"quantization: blocks of {block} do not divide the {size} {word} of {path}; change "
                f"that size or the recipe's block, or leave the layer out with the rule '{path} none'."
            )


def check_device(section, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for native products that the mesh's devices have no instructions for."""
    if is_off(section) or not section.native:
        return
    found = {section.recipe: _build(section, section.recipe, {})}
    for index, text in enumerate(section.rules):
        found[text.split()[1]] = _parse(section, text, index)[1]
    for kind, recipe in found.items():
        if recipe is not None and recipe.products.native_blocks:
            native.check(kind, mesh.devices.flat[0])


def _parse(section, text: str, index: int):
    field = f"quantization.rules[{index}]"
    pattern, *words = text.split() or [""]
    if not words:
        raise ValueError(
            f"{field}: {text!r} must be a path pattern and a recipe, such as 'layers/*/ffn/** mxfp8'."
        )
    kind, *settings = words
    names.lookup(recipes.KINDS, kind, f"{field}: recipe")
    defaults, given = recipes.options(kind), {}
    for setting in settings:
        name, _, value = setting.partition("=")
        names.refuse_unknown([name], defaults, f"{field}: {kind}")
        given[name] = _typed(f"{field}: {name}", value, type(defaults[name]))
    return names.glob(pattern), _build(section, kind, given)


def _typed(field: str, value: str, kind: type):
    if kind is bool and value in ("0", "1"):
        return value == "1"
    try:
        if kind is not bool:
            return kind(value)
    except ValueError:
        pass
    wanted = "0 or 1" if kind is bool else f"a value of type {kind.__name__}"
    raise ValueError(f"{field}={value} must be {wanted}.")


def _build(section, kind: str, given: dict) -> Recipe | None:
    names.lookup(recipes.KINDS, kind, "quantization.recipe")
    options = dict(section.get(kind, {})) | given
    return recipes.build(kind, native=section.native, **options)
