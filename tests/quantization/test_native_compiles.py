"""FP8 train steps pass the compilers of H100 and tpu7x with FP8 matrix instructions; none is here."""

import json
import re

import pytest

SCRIPT = """
import json, sys
from effarch.aot import plan
from effarch.configs import transformer
from effarch.kernels import platform
from effarch.parallel import topologies

target, fields = topologies.parse(sys.argv[1]), json.loads(sys.argv[2])
config = transformer.get_config("size=tiny")
config.model.width, config.model.depth, config.data.tokenizer = 512, 2, "bytes"
config.update_from_flattened_dict(fields)
with platform.tracing_for(target.device.platform):
    setup = plan.plan(config, target)
    # On a GPU, XLA times its own products against cuBLAS's; here, without one, cuBLAS's are shown.
    options = {"xla_gpu_enable_triton_gemm": False} if target.device.platform == "gpu" else None
    compiled = plan.lower(setup).compile(compiler_options=options)
held = compiled.memory_analysis()
print(held.temp_size_in_bytes, held.argument_size_in_bytes, setup.counts.params_total)
print(compiled.as_text())
"""
NATIVE = {"quantization__native": True}


@pytest.fixture
def compiled(compile_for):
    """Prints bytes of activations and the like and of arguments, parameters, then the compiled text."""

    def run(target, **fields):
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        return compile_for(SCRIPT, target, json.dumps(fields))

    return run


@pytest.mark.slow
def test_h100_multiplies_fp8_numbers(compiled):
    """Three products a layer, in cuBLAS's FP8 form: forward E4M3 x E4M3, gradients E5M2 and E4M3."""
    done = compiled("h100", **NATIVE, quantization__recipe="fp8_current")
    assert done.returncode == 0, done.stderr[-2000:]
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", done.stdout))
    calls = re.findall(
        r"custom-call\((%[\w.\-]+), (%[\w.\-]+).*__cublas\$lt\$matmul\$f8", done.stdout
    )
    pairs = {tuple(sorted(types[name] for name in pair)) for pair in calls}
    assert pairs == {("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")}
    assert (
        len(calls) >= 12
    )  # of 3 x 7 in the one scanned block; XLA joins those that share an operand


@pytest.mark.slow
def test_tpu7x_multiplies_fp8_numbers(compiled):
    """No FP8 operand is widened before its product: it goes into the convolution as it is."""
    done = compiled("tpu7x:1x1x1", **NATIVE, quantization__recipe="fp8_current")
    assert done.returncode == 0, done.stderr[-2000:]
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", done.stdout))
    products = re.findall(r" convolution\((%[\w.\-]+), (%[\w.\-]+)\)", done.stdout)
    pairs = {tuple(types[name] for name in pair) for pair in products}
    assert {("f8e4m3fn", "f8e4m3fn"), ("f8e5m2", "f8e4m3fn")} <= pairs


@pytest.mark.slow
def test_fp4_is_native_on_blackwell_and_refused_on_hopper(compiled):
    done = compiled("b200", **NATIVE, quantization__recipe="nvfp4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "f4e2m1fn" in done.stdout
    done = compiled("h100", **NATIVE, quantization__recipe="nvfp4")
    assert done.returncode != 0 and "needs block-scaled matrix products" in done.stderr


@pytest.mark.slow
def test_coat_takes_a_tpus_memory_as_predicted(compiled):
    """Activations of eight layers, whose copies in FP8 are about half; moments of 2.1 bytes, not 8."""
    sizes = dict(model__depth=8, data__batch_size=64)
    small = dict(quantization__recipe="fp8_current", quantization__saved_group=16)
    held = {}
    for name, fields in (("exact", {}), ("coat", small | dict(optimizer__kind="coat"))):
        done = compiled("v5p:1x1x1", **sizes, **fields)
        assert done.returncode == 0, done.stderr[-2000:]
        held[name] = [int(word) for word in done.stdout.split()[:3]]
    (exact, exact_state, params), (coat, coat_state, _) = held["exact"], held["coat"]
    assert coat < 0.75 * exact, held
    assert exact_state - coat_state == pytest.approx((8 - 2 - 16 / 128) * params, rel=0.03)
