"""A train state as named arrays: what a checkpoint stores, and how the state is rebuilt from it.

On disk a state is nested dicts of plain arrays; the containers (NamedTuples of optax, tuples,
dicts, None) come from the target at restore time, so no Python type is ever written. The name of a
leaf is its path, `opt_state/0/mu/layers/up`: dict keys, field names and positions, joined by "/".
Typed random keys are stored as their uint32 data, arrays of size zero (which orbax refuses) not at
all; both are recorded in the leaf's description, `"float32[3,4]"` or `"key<fry>[]"`.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

_UNSUPPORTED = ("uint4", "uint2", "object")


def flatten(tree: Any) -> dict[str, Any]:
    """{name: leaf} in tree order; None and empty containers have no leaves."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_escape(entry) for entry in path)
        if name in leaves:
            raise ValueError(f"state: two leaves are called {name!r}; rename one of the dict keys")
        leaves[name] = leaf
    return leaves


def describe(tree: Any) -> dict[str, str]:
    """{name: "dtype[shape]"} of arrays, ShapeDtypeStructs, numpy arrays and Python numbers."""
    return {name: _describe_leaf(name, leaf) for name, leaf in flatten(tree).items()}


def differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """One line a leaf that the two descriptions disagree on, in name order."""
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"{name}: not in the checkpoint, the run wants {wanted[name]}")
        elif name not in wanted:
            lines.append(f"{name}: {saved[name]} in the checkpoint, unknown to the run")
        elif saved[name] != wanted[name]:
            lines.append(f"{name}: {saved[name]} in the checkpoint, the run wants {wanted[name]}")
    return lines


def to_storable(tree: Any) -> dict:
    """The nested dict of arrays that is written."""
    leaves = flatten(tree).items()
    return _nest((name, _storable(leaf)) for name, leaf in leaves if _size(leaf) > 0)


def to_request(target: Any) -> dict:
    """The nested dict of abstract arrays to read, each with the target's dtype and sharding."""
    leaves = flatten(target).items()
    return _nest((name, _request(leaf)) for name, leaf in leaves if _size(leaf) > 0)


def from_stored(stored: dict, target: Any) -> Any:
    """The tree of `target` with the arrays of `stored`, in the target's containers."""
    leaves = [_restore_leaf(stored, name, leaf) for name, leaf in flatten(target).items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _escape(entry: Any) -> str:
    """The text of a path entry; "." and "/" are escaped (orbax joins the names with ".")."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            text = str(getattr(entry, attribute))
            return text.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
    raise ValueError(f"state: path entry {entry!r} has no name; use dicts, tuples or NamedTuples")


def _nest(pairs: Iterable[tuple[str, Any]]) -> dict:
    tree: dict = {}
    for name, leaf in pairs:
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_typed_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _size(leaf: Any) -> int:
    return int(np.prod(np.shape(leaf), dtype=np.int64))


def _describe_leaf(name: str, leaf: Any) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    text = str(dtype) if _is_typed_key(leaf) else np.dtype(dtype).name
    if text in _UNSUPPORTED or text.startswith(("str", "bytes")):
        raise ValueError(
            f"state: {name} has dtype {text}, which a checkpoint cannot hold; "
            "store packed codes as uint8, and text in the record"
        )
    return f"{text}[{','.join(str(size) for size in np.shape(leaf))}]"


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    if _is_typed_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _request(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.zeros_like(leaf)  # orbax answers a numpy array with a numpy array
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_typed_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))


def _sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The leaf's sharding, never the one in the file: that names devices of another run."""
    if leaf.sharding is not None:
        return leaf.sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _restore_leaf(stored: dict, name: str, leaf: Any) -> Any:
    value = _lookup(stored, name) if _size(leaf) > 0 else _empty(_request(leaf))
    if _is_typed_key(leaf):
        return jax.random.wrap_key_data(value, impl=_key_impl(leaf))
    if isinstance(leaf, bool | int | float | complex):
        return type(leaf)(value)
    return value


def _lookup(stored: dict, name: str) -> Any:
    for part in name.split("/"):
        stored = stored[part]
    return stored


def _empty(request: jax.ShapeDtypeStruct | np.ndarray) -> jax.Array | np.ndarray:
    if isinstance(request, np.ndarray):
        return request
    return jax.device_put(jax.numpy.zeros(request.shape, request.dtype), request.sharding)


def _key_impl(leaf: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """The generator of a typed key, abstract or not (`key_impl` itself needs a value)."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]
