"""How many parameters a model has and how many FLOPs a token costs.

Conventions: a multiply-add is 2 FLOPs; causal attention counts its causal half; recurrent mixers count
the recurrence, whatever kernel runs; the backward pass costs twice the forward pass; recomputation is
not counted; the input table does no work. What a program computes for inactive neurons and for keys that
are not attended to is counted, and beside it the count without it: what a sparse program would need.
What the kernels really compute, twice where they do, is counted apart: `hardware_flops`.
"""

import dataclasses
import math

import jax
from flax import nnx

from effarch.models import hardware_flops, language_model, parameters
from effarch.models import state as state_lib

BACKWARD_FACTOR = 3.0
"""Forward plus backward, in forward passes."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters as numbers, FLOPs per token."""

    params_total: int
    params_matmul: int
    """Weights that do matrix work, the output head included, without the input table and without the
    guides of factored layers, which fade out (`layers.guide`)."""
    params_non_embedding: int
    """The same without the output head."""
    params_active: int
    """Weights of `params_matmul` that one token touches."""
    flops_per_token: float
    """Forward and backward, exact for the given sequence length."""
    flops_head: float
    """Of `flops_per_token`, those of the output head."""
    flops_idle: float
    """Of `flops_per_token`, those of inactive neurons and of keys that are not attended to."""
    flops_hardware: float
    """What a training step computes for a token, what it does twice included: `hardware_flops`."""

    @property
    def flops_forward(self) -> dict[str, float]:
        """Forward FLOPs per token: all and those in use, with and without the output head."""
        found = {}
        for name, total in (
            ("flops_forward", self.flops_per_token),
            ("flops_active", self.flops_per_token - self.flops_idle),
        ):
            found[name] = total / BACKWARD_FACTOR
            found[f"{name}_no_head"] = (total - self.flops_head) / BACKWARD_FACTOR
        return found

    @property
    def flops_6n(self) -> float:
        """The 6 N approximation per token, N = params_active."""
        return 6.0 * self.params_active


def count(model: language_model.LanguageModel, seq_len: int) -> Counts:
    """Counts of a model, real or abstract, on sequences of `seq_len` tokens."""
    infos = jax.tree.leaves(parameters.describe(nnx.state(model, nnx.Param)))
    counted = jax.tree.leaves(parameters.describe(nnx.state(model, state_lib.CountedState)))
    total = sum(_size(info) for info in (*infos, *counted))
    table = next(_size(info) for info in infos if info.path == "embed/table")
    head = table if model.head is None else _size_of(infos, "head/kernel")
    inner = [info for info in infos if info.path.startswith("layers/")]
    weights = sum(_size(info) for info in inner if _is_matrix(info))
    idle = sum(_idle(block) * _repeats(name) for name, block in model.layers.items())
    return Counts(
        params_total=total,
        params_matmul=weights + head,
        params_non_embedding=weights,
        params_active=weights + head - idle,
        flops_per_token=BACKWARD_FACTOR
        * (2.0 * head + sum(flops_by_module(model, seq_len).values())),
        flops_head=BACKWARD_FACTOR * 2.0 * head,
        flops_idle=BACKWARD_FACTOR * sum(flops_by_module(model, seq_len, "idle_flops").values()),
        flops_hardware=hardware_flops.per_token(model, seq_len, head),
    )


def flops_by_module(
    model: language_model.LanguageModel, seq_len: int, count: str = "forward_flops"
) -> dict[str, float]:
    """Forward FLOPs per token of every part of every stack, by path, summed over its layers.

    `count`: the method that is asked; `idle_flops` are those of what is not in use.
    """
    found = {}
    for name, block in model.layers.items():
        for path, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Module) and hasattr(node, count):
                public = "/".join(("layers", name, *map(str, path)))
                found[public] = _repeats(name) * getattr(node, count)(seq_len)
    return found


def _idle(block) -> int:
    """Weights of a block that a token does not touch (experts that are not chosen)."""
    return sum(
        node.idle_params()
        for _, node in nnx.iter_graph(block)
        if isinstance(node, nnx.Module) and hasattr(node, "idle_params")
    )


def _is_matrix(info: parameters.ParamInfo) -> bool:
    if "sparse" in info.logical:  # the entries of a sparse matrix
        return True
    is_work = "conv" not in info.logical and "/guide/" not in info.path
    return len(info.matrix_axes) >= 2 and info.decay and is_work  # 2, or a matrix for each head


def _repeats(name: str) -> int:
    return len(parameters.stack_layers(name))


def _size(info: parameters.ParamInfo) -> int:
    return math.prod(info.shape)


def _size_of(infos, path: str) -> int:
    return next(_size(info) for info in infos if info.path == path)


PEAK_FLOPS = (
    ("v5 lite", 197e12),
    ("v5e", 197e12),
    ("v5", 459e12),  # v5p calls itself "TPU v5"
    ("v6 lite", 918e12),
    ("v6e", 918e12),
    ("v4", 275e12),
    ("tpu7x", 1153.5e12),  # a chip is two devices
    ("a100", 312e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("b200", 2250e12),
)
"""Dense bfloat16 FLOP/s of one device by its kind, as the vendors state it."""


def peak_flops(device: jax.Device) -> float | None:
    """The device's peak, or None where it is not known (CPUs)."""
    kind = device.device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)
