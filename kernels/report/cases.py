"""What can be reported: an operation at given sizes, forward or with its gradient, on one backend.

Legend of sizes: B rows, T tokens, H key heads, HV value heads, K and V widths of heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from effarch import names
from effarch.kernels import attention, gated_delta_rule, linear_attention, short_conv
from effarch.kernels.report import whole_arrays

OPS = {
    # name: (function, gate, folder of its sources)
    "delta_rule": (gated_delta_rule, None, "delta_rule"),
    "gated_delta_rule": (gated_delta_rule, "head", "delta_rule"),
    "kda": (gated_delta_rule, "channel", "delta_rule"),
    "ssd": (linear_attention, "head", "linear_attention"),
    "gla": (linear_attention, "channel", "linear_attention"),
    "attention": (attention, None, "attention"),
    "short_conv": (short_conv, None, "short_conv"),
    **{op: (None, None, folder) for op, (_, folder) in whole_arrays.PROGRAMS.items()},
}
"""`ssd` and `gla`: additive states with a decay per head and per key channel (Mamba-2, GLA).
`attention` is causal, HV query heads on H key heads. `short_conv` has 4 taps and a SiLU on HV * V
channels, so that a figure of it is that of V channels of a token."""

RECURRENT = ("delta_rule", "gated_delta_rule", "kda", "ssd", "gla")
TAPS = 4

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes; the defaults are the setting of all published figures."""

    B: int = 1
    T: int = 4096
    H: int = 16
    HV: int | None = None  # H
    K: int = 128
    V: int = 128
    dtype: str = "bfloat16"
    packed: int = 0
    """1: with segment ids and an initial state."""

    @property
    def value_heads(self) -> int:
        return self.HV or self.H

    @property
    def token_heads(self) -> int:
        """What figures are divided by."""
        return self.B * self.T * self.value_heads


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile."""

    op: str
    target: str
    backend: str
    backward: bool = False
    """Forward and backward together."""
    spec: Spec = Spec()

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Case":
        return cls(**values | {"spec": Spec(**values["spec"])})


def parse_spec(text: str) -> Spec:
    """`B=1,T=4096,H=16,K=128,V=128,dtype=bfloat16`; what is left out has its default. ValueError."""
    known = {field.name: field for field in dataclasses.fields(Spec)}
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        field = names.lookup(known, name, "--spec")
        if field.name == "dtype":
            if value not in DTYPES:
                raise ValueError(f"--spec: dtype={value} is not one of {', '.join(DTYPES)}.")
            values[name] = value
            continue
        low = 0 if name == "packed" else 1
        if not value.isdecimal() or int(value) < low:
            raise ValueError(f"--spec: {name}={value} must be a whole number of at least {low}.")
        values[name] = int(value)
    return Spec(**values)


def arguments(case: Case, sharding) -> tuple:
    """The shapes of the inputs; if packed, an initial state (of recurrences) and segments at the end.

    Of recurrences q, k, v, beta of the delta rule, and g if it has one; of `short_conv` x and kernel.
    """
    spec = case.spec
    _, gate, folder = OPS[case.op]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    row, heads = (spec.B, spec.T), spec.value_heads
    keys = array(*row, spec.H, spec.K, dtype=spec.dtype)
    values = array(*row, heads, spec.V, dtype=spec.dtype)
    segments = [array(*row, dtype=jnp.int32)] * spec.packed
    if folder == "short_conv":
        channels = heads * spec.V
        x, kernel = (array(*shape, channels, dtype=spec.dtype) for shape in (row, (TAPS,)))
        return x, kernel, *segments
    if folder == "attention":
        queries = array(*row, heads, spec.K, dtype=spec.dtype)
        return queries, keys, array(*row, spec.H, spec.V, dtype=spec.dtype), *segments
    found = [keys, keys, values]
    if folder == "delta_rule":
        found.append(array(*row, heads))
    if gate is not None:
        found.append(array(*row, heads, *[spec.K] * (gate == "channel")))
    if spec.packed:
        found.append(array(spec.B, heads, spec.K, spec.V))
    return *found, *segments


def _cotangents(case: Case, inputs: tuple) -> tuple:
    """Shapes of what flows back to the outputs."""
    spec, like = case.spec, inputs[0]

    def array(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)

    if case.op == "short_conv":  # its tail is for decoding
        return (like,)
    o = array(spec.B, spec.T, spec.value_heads, spec.V, dtype=like.dtype)
    if case.op == "attention":
        return (o,)
    return o, array(spec.B, spec.value_heads, spec.K, spec.V, dtype=jnp.float32)


def gate_index(case: Case) -> int | None:
    """Where in the arguments of `program` the log decay stands; None if there is none."""
    _, gate, folder = OPS[case.op]
    if gate is None:
        return None
    return 3 + (folder == "delta_rule") + 2 * case.backward


def program(case: Case, sharding) -> tuple:
    """(function, its arguments as shapes): the operation, or the operation and its gradients."""
    if case.op in whole_arrays.PROGRAMS:
        return whole_arrays.program(case, sharding)
    rule, packed, inputs = OPS[case.op][0], case.spec.packed, arguments(case, sharding)
    has_state = packed and case.op in RECURRENT
    num_differentiated = len(inputs) - packed

    def values(*inputs):
        options = dict(backend=case.backend, segment_ids=inputs[-1] if packed else None)
        given = inputs[:num_differentiated]
        if has_state:
            *given, options["initial_state"] = given
        found = rule(*given, **options)
        return found if case.op in RECURRENT else (found,) if case.op == "attention" else found[:1]

    if not case.backward:
        return values, inputs
    cotangents = _cotangents(case, inputs)

    def both(*arrays):
        flowing, inputs = arrays[: len(cotangents)], arrays[len(cotangents) :]
        rest = inputs[num_differentiated:]
        outputs, pull = jax.vjp(lambda *x: values(*x, *rest), *inputs[:num_differentiated])
        return outputs, pull(flowing)

    return both, (*cotangents, *inputs)
