"""Learning rates at several widths, in muP or the standard parametrization.

    python -m effarch.sweep --config=experiments/mup_transfer/grid.py:kind=mup,widths=64+128+256

Four layers of attention and GLU with heads of 16, on the bytes of the Python standard library. At the
smallest width both parametrizations are the same model.
"""

from effarch import config, names, sweeps
from effarch.scaling import mup

HEAD_DIM, DEPTH = 16, 4
KINDS = ("standard", "mup")
SWITCHES = dict(kind="mup", widths="64+128+256", largest=-4, smallest=-12, steps=200)
"""Learning rates are the powers of two from `smallest` to `largest`."""


def get_config(arg=""):
    switches = config.parse_arg(arg, **SWITCHES)
    c = config.default()
    c.name = f"{names.lookup(dict(zip(KINDS, KINDS)), switches['kind'], 'kind')}"
    c.data.tokenizer, c.data.val_permille = "bytes", 5
    c.data.seq_len, c.data.batch_size = 128, 8
    c.model.depth, c.model.tied_head = DEPTH, False
    _widen(c, _widths(switches)[0])
    c.optimizer.schedule.warmup_steps = max(switches["steps"] // 10, 1)
    c.train.num_steps = switches["steps"]
    c.eval.every_steps = c.checkpoint.every_steps = 0
    c.log.sample_prompts, c.log.tensorboard = (), False
    return c


def get_sweep(arg=""):
    switches = config.parse_arg(arg, **SWITCHES)
    rates = [2.0**n for n in range(switches["smallest"], switches["largest"] + 1)]
    sizes = [_overrides(arg, width, switches["kind"]) for width in _widths(switches)]
    return sweeps.product(sizes, {"optimizer.learning_rate": rates})


def _overrides(arg: str, width: int, kind: str) -> dict:
    """The fields that a width changes."""
    base, wide = get_config(arg), get_config(arg)
    _widen(wide, width)
    found = {
        "model.width": width,
        "model.blocks.attention.num_heads": wide.model.blocks.attention.num_heads,
        "model.blocks.glu.hidden": wide.model.blocks.glu.hidden,
    }
    return found | (mup.parametrize(wide, base, kind="mup") if kind == "mup" else {})


def _widen(c, width: int) -> None:
    c.model.width = width
    c.model.blocks.attention.update(num_heads=width // HEAD_DIM, head_dim=HEAD_DIM)
    c.model.blocks.glu.hidden = 3 * width


def _widths(switches: dict) -> list[int]:
    return [int(width) for width in switches["widths"].split("+")]
