"""Compiling for machines that are not here: targets, memory, search, and real compiles (slow)."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from effarch import config as config_lib
from effarch.aot import advice, memory, plan, search
from effarch.configs import transformer
from effarch.models import accounting, build, ffns, mixers
from effarch.models.context import Context
from effarch.models.layers import quantizer
from effarch.parallel import topologies
from effarch.quantization import recipes

ROOT = pathlib.Path(__file__).resolve().parent.parent
V5P = topologies.parse("v5p:2x2x1")


def run(*arguments):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "effarch.compile", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**env, "PYTHONPATH": str(ROOT)},
        check=False,
    )


# Targets.


def test_targets_are_parsed():
    assert topologies.parse("v5p:4x4x4").num_devices == 64
    assert topologies.parse("tpu7x:4x4x4").num_devices == 128  # two devices a chip
    assert topologies.parse("h100").shape == (1, 1, 1)
    assert topologies.parse("v6e").shape == (1, 1)
    gpus = topologies.parse("h100:1x8x8")
    assert (gpus.num_devices, gpus.devices_per_host, str(gpus)) == (64, 8, "h100:1x8x8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5:4x4", ["'v5' is not known", "v5p"]),
        ("v5p:4x4", ["3 numbers (chips)", "v5p:4x4x4"]),
        ("h100:8", ["slices x hosts x GPUs a host", "h100:1x1x8"]),
        ("v6e:0x8", ["2 numbers"]),
    ],
)
def test_a_wrong_target_is_one_sentence(text, words):
    with pytest.raises(ValueError) as error:
        topologies.parse(text)
    for word in words:
        assert word in str(error.value)


def test_missing_wheels_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(topologies, "_is_installed", lambda name: False)
    with pytest.raises(
        ValueError, match=r"libtpu cannot be imported: pip install 'effarch\[aot\]'"
    ):
        topologies.devices(V5P)
    with pytest.raises(ValueError, match=r"jax_plugins\.xla_cuda13"):
        topologies.devices(topologies.parse("h100"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v5e", "TPU v5 lite"),
        ("v5p", "TPU v5"),
        ("v6e", "TPU v6 lite"),
        ("tpu7x", "TPU7x"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("b200", "NVIDIA B200"),
    ],
)
def test_the_loop_and_the_targets_agree_on_peaks(name, kind):
    device = type("Device", (), {"device_kind": kind})
    assert accounting.peak_flops(device) == topologies.DEVICES[name].peak_flops


# Memory.


def test_memory_from_a_refusal():
    message = (
        "the total memory required for HLO temporaries (62.85G) exceeds available HBM (15.75G)."
    )
    held = memory.read_failure(message, 1e9, 15.75 * 2**30)
    assert held.total == 62.85 * 2**30 and not held.fits
    assert memory.read_failure("another reason", 1e9, 1e10) is None


def small_plan(**fields):
    """A plan on the CPU device that is here."""
    config = transformer.get_config("size=tiny")
    config.update_from_flattened_dict(fields)
    mesh = jax.make_mesh((1,) * 5, ("data", "fsdp", "expert", "context", "tensor"))
    return plan.setup_lib.on_mesh(config, mesh, vocab_size=4096)


def test_state_bytes_are_parameters_and_moments():
    setup = small_plan()
    params = setup.counts.params_total
    found = memory.state_bytes(setup.abstract, setup.shardings)
    assert 3 * 4 * params <= found <= 3 * 4 * params + 64  # and a few counters


def test_advice_shrinks_what_is_in_the_way():
    setup = small_plan(**{"data.batch_size": 8})
    gradients = 4 * setup.counts.params_total
    state = memory.state_bytes(setup.abstract, setup.shardings)
    held = memory.Memory(state, 0.0, gradients + 800.0, state + gradients + 250)
    changes = advice.changes(setup, held)
    assert [change.setting for change in changes] == ["train.accumulate=4", "model.remat=full"]
    assert changes[0].fits and changes[0].total == state + gradients + 200
    assert advice.micro_batches(setup, held) == 4


def test_search_grows_micro_batches_until_one_fits(monkeypatch):
    class Found:
        def __init__(self, config):
            needed = {"none": 8, "selective": 4, "full": 1}[config.model.remat]
            fits = config.train.accumulate >= needed
            self.memory = type("Memory", (), {"fits": fits})
            self.shrink = 1 if fits else needed // config.train.accumulate
            self.seconds = {"none": 1.0, "selective": 1.1, "full": 1.3}[config.model.remat]

    monkeypatch.setattr(search.report, "compile_step", lambda config, target: Found(config))
    done = list(search.run(transformer.get_config("size=tiny"), V5P))
    tried = [(one["model.remat"], one["train.accumulate"]) for one, _ in done]
    assert tried == [("none", 1), ("none", 8), ("selective", 1), ("selective", 4), ("full", 1)]
    assert search.best(done)[0]["model.remat"] == "none"
    assert search.best(done[:1]) is None


# The plan.


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"data.tokenizer": "bpe:32000"}, 32000),
        ({"data.tokenizer": "bpe:4097"}, 4160),
        ({"data.tokenizer": "bytes"}, 320),
        ({"model.vocab_size": 1000}, 1000),
    ],
)
def test_the_vocabulary_is_known_without_data(fields, size):
    config = transformer.get_config("size=tiny")
    config.update_from_flattened_dict(fields)
    assert plan.vocab_size(config) == size


def test_auto_means_what_the_target_would_choose():
    from effarch.kernels import dispatch, platform

    assert build.activation_dtype("auto") == jnp.float32 and build.unrolled("auto")
    with platform.tracing_for("tpu"):
        assert build.activation_dtype("auto") == jnp.bfloat16 and not build.unrolled("auto")
        assert dispatch.preferred(("xla", "pallas_tpu")) == ("pallas_tpu", "xla")
        with dispatch.plain():
            assert dispatch.preferred(("xla", "pallas_tpu")) == ("xla",)
    assert platform.current() == jax.default_backend()


# Formula FLOPs against XLA's count.


# XLA counts the body of a loop once, and the products of these run in a loop over groups of rows;
# `tests/models/test_flops_by_xla.py` compares them.
GROUPED = ("moe", "mole", "latent_moe")
CORE = ("attention", "gated_delta_net", "glu")
KINDS = [
    kind if kind in CORE else pytest.param(kind, marks=[pytest.mark.slow])
    for kind in (*mixers.KINDS, *ffns.KINDS)
    if kind not in GROUPED
]


@pytest.mark.parametrize("kind", KINDS)
def test_formula_flops_of_two_unrolled_periods(kind):
    """Wide layers and few tokens: what the formula leaves out (norms, masks) is below 2 %."""
    config = config_lib.default()
    mixer, ffn = (kind, "glu") if kind in mixers.KINDS else ("attention", kind)
    config.model.layers = f"{mixer}/{ffn}"
    config.model.width, config.model.depth, config.model.scan = 4096, 2, "never"
    config.model.dtype, config.model.tied_head = "bfloat16", False
    config.model.blocks.attention.num_heads = 32
    rows, length, vocab = 2, 128, 8192
    model = build.abstract(config.model, vocab_size=vocab)
    formula = accounting.count(model, length).flops_per_token * rows * length
    assert gradient_flops(model, rows, length) == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize(
    "recipe",
    [
        kind if kind == "fp8_current" else pytest.param(kind, marks=[pytest.mark.slow])
        for kind in recipes.KINDS
        if kind != "none"
    ],
)
def test_formula_flops_of_recipes(recipe):
    """A recipe does the products of the plain layer: so wide, with so many tokens, that what rounds and
    rotates the numbers is below 1 %."""
    config = config_lib.default()
    config.model.width, config.model.depth, config.model.layers = 16384, 1, "attention/glu"
    config.model.blocks.attention.num_heads, config.model.dtype = 128, "bfloat16"
    plain = build.abstract(config.model, vocab_size=64)
    config.quantization.recipe = recipe
    rounded = build.abstract(config.model, vocab_size=64, quantization=config.quantization)
    assert isinstance(rounded.layers["0"].ffn.up.quantizer, quantizer.Quantizer)
    found, same = (accounting.count(model, 128) for model in (rounded, plain))
    assert found.flops_per_token == same.flops_per_token
    assert found.params_active == same.params_active
    formula = found.flops_per_token * 512 * 128
    assert gradient_flops(rounded, 512, 128) == pytest.approx(formula, rel=0.01)


def gradient_flops(model, rows: int, length: int) -> float:
    """XLA's count for loss and gradients; traced and lowered only, so width costs nothing."""
    from flax import nnx

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, batch, key):
        total, _, _ = nnx.merge(graphdef, params, rest).loss(batch, Context(key=key))
        return total

    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in plan.BATCH.items()
    }
    states = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(jax.grad(loss)).lower(*states, batch, key)
    return lowered.cost_analysis()["flops"]


# The command.


def test_mistakes_in_the_command():
    done = run("--config=transformer:size=tiny")
    assert done.returncode == 2 and "--target is missing" in done.stderr
    done = run("--config=transformer:size=tiny", "--target=v5p:4x4")
    assert done.returncode == 2 and "3 numbers (chips)" in done.stderr
    assert "Traceback" not in done.stderr


def test_targets_are_listed():
    rows = json.loads(run("--list_targets", "--json").stdout)
    assert {row["name"] for row in rows} == set(topologies.DEVICES)
    assert all(row["source"] for row in rows)


def needs(module: str):
    missing = not topologies._is_installed(module)
    return pytest.mark.skipif(
        missing, reason=f"the compiler wheel {module} is not installed (extra aot)"
    )


def compiled_report(*arguments):
    done = run("--json", *arguments)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


SMALL = (  # shards of whole tiles: the compiler pads smaller ones
    "--config.model.width=2048",
    "--config.model.blocks.attention.num_heads=16",
    "--config.model.blocks.gated_delta_net.num_heads=8",
    "--config.model.blocks.gated_delta_net.head_dim=128",
    "--config.data.seq_len=256",
    "--config.data.batch_size=64",
    "--config.data.tokenizer=bpe:4096",
)


@pytest.mark.slow
@needs("libtpu")
@pytest.mark.parametrize("target", ["v5p:1x1x1", "v5p:4x4x4"])
@pytest.mark.parametrize("config", ["transformer:size=tiny", "gated_deltanet:layers=hybrid"])
def test_state_bytes_equal_the_compilers_arguments(config, target):
    found = compiled_report(f"--config={config}", f"--target={target}", *SMALL)
    held = found["memory"]
    batch = 64 * 256 * 5 * 4 / topologies.parse(target).num_devices
    assert held["state"] + held["batch"] == pytest.approx(held["state"] + batch, rel=0.01)
    assert held["fits"]
    assert 0 < found["mfu"] < found["hfu"] < 1
    assert found["backends"]["attention"] == "pallas_tpu"
    assert bool(found["collectives"]) == (target != "v5p:1x1x1")


@pytest.mark.slow
@needs("libtpu")
def test_an_axis_may_take_a_part_of_a_physical_one():
    found = compiled_report(
        "--config=moe:size=mixtral_tiny",
        "--config.mesh.expert=8",
        "--config.data.batch_size=64",
        "--target=v5p:4x4x4",
    )
    assert found["mesh"]["expert"] == 8 and found["memory"]["fits"]
    assert {row["kind"] for row in found["collectives"]} >= {"all-to-all"}


@pytest.mark.slow
@needs("jax_plugins.xla_cuda13")
def test_a_step_compiles_for_gpus_on_two_hosts():
    found = compiled_report("--config=transformer:size=tiny", "--target=h100:1x2x4", *SMALL)
    assert found["memory"]["fits"] and 0 < found["mfu"] < 1
    assert {row["kind"] for row in found["collectives"]} >= {"all-gather"}
