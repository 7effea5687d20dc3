"""What a period of layers keeps for its backward pass, by name; the rest is computed again.

    none            everything
    dots            the results of all products that are not inside a kernel
    selective       those of linear layers: scores and activations are computed again, arXiv 2205.05198
                    (fused attention never keeps scores in the first place)
    full            the period's input alone
    names:A,B       the period's input and these of NAMES
    offload:A,B     the same, kept in the host's memory (on CPUs where they are)

`tag` gives an array one of the names; it computes nothing.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from effarch import names
from effarch.kernels import platform

NAMES = (
    "product",
    "mixer_in",
    "q",
    "k",
    "v",
    "mixer_hidden",
    "mixer_out",
    "ffn_in",
    "ffn_gate",
    "ffn_up",
    "ffn_hidden",
    "ffn_out",
)
"""What is tagged: results of linear layers; normed inputs and outputs of mixers and feed-forwards;
queries, keys, values and what attention reads out; a feed-forward's first products and their
combination."""
_policies = jax.checkpoint_policies
_products = _policies.save_only_these_names("product")
# The product has a backward pass of its own, inside of which policies do not see it.
PRESETS: dict[str, Callable | None] = {
    "none": None,
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _products),
    "selective": _products,
    "full": _policies.nothing_saveable,
}


def tag(x: jax.Array, name: str) -> jax.Array:
    """x, known to policies by one of NAMES."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def policy(text: str) -> Callable | None:
    """The policy of `model.remat`; None keeps everything. Raises ValueError for what it is not."""
    kind, colon, rest = text.partition(":")
    if not colon:
        known = PRESETS | dict.fromkeys(("names:...", "offload:..."))
        return names.lookup(known, text, "model.remat")
    chosen = [name.strip() for name in rest.split(",")]
    for name in chosen:
        names.lookup(dict.fromkeys(NAMES), name, f"model.remat={text!r}: a name")
    names.lookup(dict.fromkeys(("names", "offload")), kind, "model.remat: before the colon")
    if kind == "names" or platform.current() == "cpu":
        return _policies.save_only_these_names(*chosen)
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=chosen,
        offload_src="device",
        offload_dst="pinned_host",
    )
