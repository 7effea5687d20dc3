"""Activation memory by compiled programs: python experiments/activation_memory/run.py

Compiles the gradient of a transformer of 4096 channels for eight TPU v5p chips with 16 and with 32
layers, and each with 1 and with 3 sequences: what the temporary memory grows by with both is what a
layer keeps of a sequence. Copies of weights in other layouts grow with the layers alone, logits with the
sequences alone. Writes results/table.json and the table of README.md, a row as soon as it is done; rows
that are there are kept. About a minute a compile on one core, 32 compiles. Needs the extra `aot`.
"""

import argparse
import json
import os
import pathlib
import time

import jax
from flax import nnx

from effarch import config as config_lib
from effarch import experiment_record
from effarch.aot import activations
from effarch.aot import plan as plan_lib
from effarch.kernels import platform
from effarch.models.context import Context
from effarch.parallel import topologies
from effarch.training import setup as setup_lib
from effarch.training import step as step_lib

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results/table.json"
SIZES = dict(s=2048, b=1, h=4096, a=32, t=8)
HIDDEN = 4 * SIZES["h"]
TARGET = "v5p:2x2x2"
DEPTHS, SEQUENCES = (16, 32), (1, 3)
SOME = "names:q,k,v,mixer_hidden,ffn_up"
WHOLE = ("stream=context",)
"""Rules that leave the stream between blocks uncut: no sequence parallelism."""
ROWS = {  # name: (published technique or None, remat, devices of tensor parallelism, mesh rules)
    "tensor, full": ("full", "full", 8, WHOLE),
    "tensor, sequence, names": (None, SOME, 8, ()),
    "tensor, sequence, selective": ("tensor, sequence, selective", "selective", 8, ()),
    "tensor, sequence": ("tensor, sequence", "none", 8, ()),
    "tensor, sequence, offload": (None, SOME.replace("names", "offload"), 8, ()),
    "tensor, selective": ("tensor, selective", "selective", 8, WHOLE),
    "tensor": ("tensor", "none", 8, WHOLE),
    "none": ("none", "none", 1, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="the rows whose name holds this text")
    parser.add_argument("--write_only", action="store_true", help="compile nothing")
    options = parser.parse_args()
    _without_devices()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in ROWS:
        if options.only in name and name not in found and not options.write_only:
            start = time.perf_counter()
            found[name] = {"kept": _kept(name), "seconds": time.perf_counter() - start}
            experiment_record.write_json(RESULTS, found)
        _write_table(found)


def _without_devices() -> None:
    """Before JAX looks for any: the CPU alone, and libtpu as a compiler."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _kept(name: str) -> float:
    """Bytes of a layer, a sequence and a device."""
    few, many = (
        [_temporary(_config(name, depth, sequences)) for sequences in SEQUENCES] for depth in DEPTHS
    )
    more = (many[1] - many[0]) - (few[1] - few[0])
    return more / (DEPTHS[1] - DEPTHS[0]) / (SEQUENCES[1] - SEQUENCES[0])


def _config(name: str, depth: int, sequences: int):
    _, remat, tensor, rules = ROWS[name]
    c = config_lib.default()
    c.model.width, c.model.depth, c.model.layers = SIZES["h"], depth, "attention/mlp"
    c.model.blocks.attention.num_heads = SIZES["a"]
    c.model.blocks.mlp.hidden = HIDDEN
    c.model.vocab_size, c.model.remat, c.model.param_dtype = 1024, remat, "bfloat16"
    c.data.seq_len, c.data.batch_size = SIZES["s"], sequences * SIZES["t"] // tensor
    c.mesh.tensor, c.mesh.rules = tensor, rules
    return c


def _temporary(config) -> int:
    """Bytes of one device that the gradient's program needs beside its arguments and results."""
    target = topologies.parse(TARGET)
    setup = plan_lib.plan(config, target)
    place = setup.layout.sharding(step_lib.BATCH_AXES)
    shape = (setup.config.data.batch_size, setup.config.data.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, dtype in plan_lib.BATCH.items()
    }
    gradient = jax.jit(_gradient(setup), out_shardings=setup.shardings.params)
    with (
        platform.tracing_for(target.device.platform),
        jax.sharding.set_mesh(setup.layout.mesh),
    ):
        compiled = gradient.lower(setup.target().params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _gradient(setup: setup_lib.Setup):
    def gradient(params, batch):
        def loss(params):
            model = nnx.merge(setup.plan.graphdef, params)
            return model.loss(batch, Context(layout=setup.layout))[0]

        return jax.grad(loss)(params)

    return gradient


def _write_table(found: dict) -> None:
    unit = SIZES["s"] * SIZES["b"] * SIZES["h"]
    rows = []
    for name, (technique, remat, tensor, rules) in ROWS.items():
        if name not in found:
            continue
        sizes = {key: SIZES[key] for key in "sbh"} | dict(f=HIDDEN, t=tensor)
        sizes["pieces"] = 1 if rules else tensor
        on_device = not remat.startswith("offload:")
        ours = f"{activations.kept(remat, **sizes) / unit:.2f}" if on_device else ""
        theirs = f"{activations.published(technique, **SIZES) / unit:g}" if technique else ""
        rows.append([name, f"`{remat}`", theirs, ours, f"{found[name]['kept'] / unit:.2f}"])
    header = ["technique", "model.remat", "published", "our prediction", "compiled"]
    experiment_record.write_table(HERE / "README.md", "memory", header, rows)


if __name__ == "__main__":
    main()
