"""What a parameter is called and which axes it has, whatever the stacking.

Layers that are scanned together keep their parameters in one array with a leading `layers` axis under
a stack name: `0+4x3` holds layers 0, 4 and 8; `3` holds layer 3 alone (leading axis of 1). Public paths
name single layers (`layers/4/ffn/up/kernel`), and everything that addresses layers uses them.
"""

import dataclasses
import re

import jax
from flax import nnx

STACKING = ("layers", "experts", "blocks")
"""Axes along which an array holds separate matrices."""
_STACK = re.compile(r"^(\d+)(?:\+(\d+)x(\d+))?$")


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One parameter array. `logical` has an entry a dimension, `layers` first if stacked."""

    path: str
    public_paths: tuple[str, ...]
    logical: tuple[str | None, ...]
    shape: tuple[int, ...]
    decay: bool
    """Whether weight decay applies: matrices and tables, not norms, biases, gates or states."""
    units: tuple[int, ...] | None = None
    """What must stay whole in each dimension when it is split: a head's width, else 1. None: all 1."""

    @property
    def matrix_axes(self) -> tuple[str | None, ...]:
        """The logical axes of one layer's (and one expert's, or block's) part."""
        return tuple(axis for axis in self.logical if axis not in STACKING)


def stack_name(start: int, step: int, repeats: int) -> str:
    """The name of the stack that holds layers start, start + step, ... (`repeats` of them)."""
    return f"{start}+{step}x{repeats}" if repeats > 1 else str(start)


def stack_layers(name: str) -> tuple[int, ...]:
    """The layer numbers held by a stack, in order: `0+4x3` -> (0, 4, 8)."""
    match = _STACK.match(name)
    if match is None:
        raise ValueError(f"{name!r} is not a stack of layers; expected '3' or '0+4x3'.")
    start, step, repeats = (int(part or 1) for part in match.groups())
    return tuple(start + step * index for index in range(repeats))


def public_paths(path: str) -> tuple[str, ...]:
    """`layers/0+4x2/ffn/up/kernel` -> (`layers/0/ffn/up/kernel`, `layers/4/ffn/up/kernel`)."""
    head, _, rest = path.partition("/")
    if head != "layers":
        return (path,)
    stack, _, tail = rest.partition("/")
    return tuple(f"layers/{layer}/{tail}" for layer in stack_layers(stack))


def path_of(key_path) -> str:
    """A JAX key path as text joined by `/`."""
    return "/".join(_entry(key) for key in key_path)


def _entry(key) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    raise TypeError(f"{key!r} is not an entry of a key path")


def describe(variables: nnx.State) -> dict:
    """A nested plain dict of ParamInfo in the shape of the parameters.

    `variables` is a State of Variables, real or abstract, that carry `logical` and maybe `decay`.
    """

    def one(key_path, variable):
        path = path_of(key_path)
        logical = variable.get_metadata("logical")
        own = [axis for axis in logical if axis != "layers"]
        decay = variable.get_metadata("decay", len(own) >= 2)
        shape = tuple(variable.get_value().shape)
        units = variable.get_metadata("units", None)
        if units is not None:  # those of one layer
            units = (1,) * (len(shape) - len(units)) + tuple(units)
        return ParamInfo(path, public_paths(path), logical, shape, decay, units)

    tree = jax.tree_util.tree_map_with_path(
        one, variables, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
