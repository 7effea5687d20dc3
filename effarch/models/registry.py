"""From a constructor to a config section and back: what a kind of block accepts.

A block's constructor is `Kind(width, *, option=default, ..., rngs)`. Its keyword-only arguments are its
config section, except the ones in SHARED, which the builder passes to whoever takes them.
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
        for name, parameter in inspect.signature(_function(constructor)).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SHARED
    }


def section(constructor) -> config_dict.ConfigDict:
    """The config section of a constructor: its defaults, optional fields as typed placeholders."""
    fields = config_dict.ConfigDict()
    hints = typing.get_type_hints(_function(constructor))
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
    names = inspect.signature(_function(constructor)).parameters
    return {name: value for name, value in supplied.items() if name in names}


def _function(constructor):
    """What holds the signature: of a module class, its __init__ (NNX hides the class's own)."""
    return constructor.__init__ if inspect.isclass(constructor) else constructor
