"""FLOPs of matrix products that a training step does for a token, what it does twice included.

Beside the model's (`accounting`): whole blocks of attention, chunks of recurrences, backward passes
that compute scores or states again (`hardware_flops` of the modules that have it: `layers.executed`),
and what `model.remat` does not keep. A module without that method does forward what the model needs and
backward twice as much. Left out: rows that fill up the groups of experts, the optimizer's products,
those of rounding (Hadamard transforms), the further passes over a row that is cut in time, and that
frozen weights need no gradient.
"""

from flax import nnx

from effarch.kernels import platform
from effarch.models import language_model, parameters
from effarch.models.ffns.experts import products
from effarch.models.layers import executed, linear
from effarch.models.mixers import attention

# What a policy's name keeps, as paths of linear layers in a block.
_KEPT = {
    "mixer_out": "mixer/out",
    "ffn_gate": "ffn/gate",
    "ffn_up": "ffn/up",
    "ffn_out": "ffn/down",
}


def per_token(model: language_model.LanguageModel, seq_len: int, head: int) -> float:
    """Forward, backward and again; `head` is the number of weights of the output head."""
    total = 3 * 2.0 * head
    for names in model.runs:
        for name in names:
            block, repeats = model.layers[name], len(parameters.stack_layers(name))
            for path, node in nnx.iter_graph(block):
                if not isinstance(node, nnx.Module) or not hasattr(node, "forward_flops"):
                    continue
                forward, backward = of_module(node, seq_len)
                path = "/".join(map(str, path))
                is_last = name == names[-1] and _ends(block, path)
                again = forward if _is_repeated(model.remat, node, path, block, is_last) else 0.0
                total += repeats * (forward + backward + again)
    return total


def of_module(module: nnx.Module, seq_len: int) -> executed.Flops:
    """Without its submodules and without remat."""
    if hasattr(module, "hardware_flops"):
        return module.hardware_flops(seq_len)
    forward = module.forward_flops(seq_len)
    return executed.Flops(forward, 2 * forward)


def _ends(block, path: str) -> bool:
    """Whether a block does nothing with a linear layer's result but add it to the stream."""
    last = block.mixer_residual if block.ffn is None else block.ffn_residual
    return last.placement == "pre" and path == ("mixer/out" if block.ffn is None else "ffn/down")


def _is_repeated(remat: str, node, path: str, block, is_last: bool) -> bool:
    """Whether the backward pass of a period runs it forward again."""
    kind, _, chosen = remat.partition(":")
    if kind == "none" or is_last:
        return False
    is_linear = isinstance(node, linear.Linear)
    if kind == "selective":
        return not is_linear
    if kind == "dots":  # it sees the products of plain JAX, not those inside of kernels or loops
        is_kernel = hasattr(node, "hardware_flops") and platform.current() != "cpu"
        return is_kernel or isinstance(node, products.GroupedProducts)
    kept = [name.strip() for name in chosen.split(",")]
    if "product" in kept and is_linear:
        return False
    return path not in _kept(kept, block)


def _kept(names: list[str], block) -> set[str]:
    """Paths of the linear layers whose results nobody needs once these names are kept."""
    found = {_KEPT[name] for name in names if name in _KEPT}
    if isinstance(block.mixer, attention.Attention):  # the only one that tags them
        tags = "v" if block.mixer.qk_norm else "qkv"  # a norm needs its input again
        found |= {f"mixer/{name}" for name in names if name in tags}
    return found
