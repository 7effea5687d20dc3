"""One run: two gated-DeltaNet layers on text, by a backend of the delta rule and a type of activations.

cd experiments/kernel_backends && python interpreted.py --config=grid.py:backend=pallas_tpu
"""

from effarch import config, experiment_runs


def get_config(arg=""):
    found = config.parse_arg(arg, backend="xla", dtype="bfloat16")
    c = experiment_runs.text_config(
        "-".join(str(value) for value in found.values()),
        **dict(learning_rate=4e-3, warmup_steps=30, num_steps=300, batch=(4, 256)),
    )
    c.model.width, c.model.depth, c.model.layers = 64, 2, "gated_delta_net/glu"
    c.model.dtype = found["dtype"]
    c.model.blocks.glu.hidden = 128
    mixer = c.model.blocks.gated_delta_net
    mixer.num_heads, mixer.head_dim, mixer.expand_v = 1, 32, 1.0
    mixer.backend, mixer.allow_neg_eigval = found["backend"], True
    c.log.every_steps = 1
    return c
