"""What can be reported: an operation at given sizes, forward or with its gradient, on one backend.

Legend of sizes: B rows, T tokens, H key heads, HV value heads, K and V widths of heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from effarch import names
from effarch.kernels import gated_delta_rule, linear_attention

OPS = {
    # name: (function, gate, folder of its sources)
    "delta_rule": (gated_delta_rule, None, "delta_rule"),
    "gated_delta_rule": (gated_delta_rule, "head", "delta_rule"),
    "kda": (gated_delta_rule, "channel", "delta_rule"),
    "ssd": (linear_attention, "head", "linear_attention"),
    "gla": (linear_attention, "channel", "linear_attention"),
}
"""`ssd` and `gla`: additive states with a decay per head and per key channel (Mamba-2, GLA)."""

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
    """Shapes of q, k, v, g and, where the operation has it, beta; then state and segments if packed."""
    spec = case.spec
    _, gate, folder = OPS[case.op]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    row, heads = (spec.B, spec.T), spec.value_heads
    keys = array(*row, spec.H, spec.K, dtype=spec.dtype)
    found = [keys, keys, array(*row, heads, spec.V, dtype=spec.dtype)]
    if folder == "delta_rule":
        found.append(array(*row, heads))
    if gate is not None:
        found.append(array(*row, heads, *[spec.K] * (gate == "channel")))
    if spec.packed:
        found += [array(spec.B, heads, spec.K, spec.V), array(*row, dtype=jnp.int32)]
    return tuple(found)


def gate_index(case: Case) -> int | None:
    """Where in the arguments of `program` the log decay stands; None if there is none."""
    _, gate, folder = OPS[case.op]
    if gate is None:
        return None
    return 3 + (folder == "delta_rule") + 2 * case.backward


def program(case: Case, sharding) -> tuple:
    """(function, its arguments as shapes): the operation, or the operation and its gradients."""
    spec, rule, inputs = case.spec, OPS[case.op][0], arguments(case, sharding)
    num_rows = len(inputs) - 2 * spec.packed

    def forward(*differentiated, segments=None):
        initial = differentiated[num_rows] if spec.packed else None
        options = dict(initial_state=initial, segment_ids=segments, backend=case.backend)
        return rule(*differentiated[:num_rows], **options)

    num_differentiated = num_rows + spec.packed

    def values(*inputs):
        segments = inputs[-1] if spec.packed else None
        return forward(*inputs[:num_differentiated], segments=segments)

    def both(d_o, d_final, *inputs):
        segments = inputs[-1] if spec.packed else None
        outputs, pull = jax.vjp(
            lambda *x: forward(*x, segments=segments), *inputs[:num_differentiated]
        )
        return outputs, pull((d_o, d_final))

    if not case.backward:
        return values, inputs
    shape = (spec.B, spec.value_heads, spec.K, spec.V)
    d_final = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return both, (inputs[2], d_final, *inputs)
