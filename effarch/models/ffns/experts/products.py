"""The one way in which experts multiply rows, plainly or as a recipe says."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.grouped_matmul import api as grouped_matmul
from effarch.models.ffns.experts import dispatch


class GroupedProducts(nnx.Module):
    """A base of experts; `backend` is that of `grouped_matmul`."""

    quantizer = None
    """What takes the place of the plain grouped products; given by the builder."""
    backend: str | None

    def product(
        self, x_MD: Float[Array, "M D"], weights: dict[str, Array], name: str, plan: dispatch.Plan
    ) -> Float[Array, "M F"]:
        """Each row of a plan times its expert's matrix in `weights[name]`, which may be a part of it."""
        args = (x_MD, weights[name], plan.group_sizes_E)
        options = dict(aligned=plan.aligned, backend=self.backend)
        if self.quantizer is not None:
            return self.quantizer.grouped(*args, name=name, **options)
        return grouped_matmul.grouped_matmul(*args, **options)

    def feed_forward(
        self,
        x_MD: Float[Array, "M D"],
        weights: dict[str, Array],
        activation: Callable[[Array], Array],
        plan: dispatch.Plan,
    ) -> Float[Array, "M D"]:
        """act(x W_up) W_down, or (act(x W_gate) * (x W_up)) W_down if there is a gate."""
        names = [name for name in ("gate", "up") if name in weights]
        if self.quantizer is None:
            return grouped_matmul.grouped_feed_forward(
                x_MD,
                [weights[name] for name in names],
                weights["down"],
                plan.group_sizes_E,
                activation,
                aligned=plan.aligned,
                backend=self.backend,
            )
        first, *second = (self.product(x_MD, weights, name, plan) for name in names)
        h_MF = activation(first) * second[0] if second else activation(first)
        return self.product(h_MF, weights, "down", plan)
