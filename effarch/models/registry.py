"""From a constructor to a config section and back: what a kind of block accepts.

A block's constructor is `Kind(width, *, option=default, ..., rngs)`. Its keyword-only arguments are its
config section, except the ones in SHARED, which the builder passes to whoever takes them. A class whose
constructor ends in `**options` has the options of its base class as well.
"""

import inspect
import types
import typing
from collections.abc import Mapping

from ml_collections import config_dict

SHARED = ("rngs", "dtype", "param_dtype", "norm_eps", "init_std")
"""Arguments that the builder supplies to every block that names them."""


def options(constructor) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a constructor that a config may set."""
    return {
        name: parameter
        for function in _functions(constructor)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SHARED
    }


def section(constructor) -> config_dict.ConfigDict:
    """The config section of a constructor: its defaults, optional fields as typed placeholders."""
    fields = config_dict.ConfigDict()
    hints: dict[str, typing.Any] = {}
    for function in reversed(_functions(constructor)):
        hints |= typing.get_type_hints(function)
    for name, parameter in options(constructor).items():
        if parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{constructor.__name__}: option {name!r} needs a default.")
        if parameter.default is None:
            fields[name] = config_dict.placeholder(optional_type(hints[name]))
        else:
            fields[name] = parameter.default
    return fields


def optional_type(hint) -> type:
    """`int | None` -> int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def accepted(constructor, supplied: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """Those of the supplied arguments that the constructor names."""
    names = {
        name
        for function in _functions(constructor)
        for name in inspect.signature(function).parameters
    }
    return {name: value for name, value in supplied.items() if name in names}


def _functions(constructor) -> list:
    """What holds the signature, most special first: of a module class its __init__ (NNX hides the
    class's own), and that of its base class as long as it takes `**options` to pass on."""
    if not inspect.isclass(constructor):
        return [constructor]
    found = []
    for kind in constructor.__mro__:
        if "__init__" in vars(kind):
            found.append(vars(kind)["__init__"])
            parameters = inspect.signature(found[-1]).parameters.values()
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found
