"""The compile report: its readers on small listings, its command, figures that must not worsen."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

from effarch.kernels.report import cases, compiling, gpu_listing, table, tpu_listing

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1.05
GUARDED = [row for row in table.read() if row["case"]["backend"] == "pallas_tpu"]

LISTING = """
     0   :  { %1 = inlined_call_operand.vmem [shape: bf16[8]]
iteration_bounds: (1, 2, 3)
strides: (1, 16, 16) */ }
   0x1 LB: > { %2 = sst }
   0x2   : > { %3 = vmatmul  ;;  %4 = vadd }
   0x3 LH: > > { %5 = vadd }
   0x4   :  { %6 = sst }
"""
UNITS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
0 1 0 0 0 3 1 0 2 0
1 0 2 0 1 0 0 2 1 0
2 2 4 2 1 3 3 2 2 2
0 0 0 0 0 0 0 0 0 1
"""


def test_a_tpu_kernel_is_counted_by_bundles_of_a_grid_step(tmp_path):
    (tmp_path / "table.txt").write_text(UNITS)
    (tmp_path / "listing.txt").write_text(LISTING)
    found = tpu_listing.kernel(tmp_path / "table.txt", tmp_path / "listing.txt", token_heads=8)
    assert (found["bundles"], found["steps"], found["inner_loop_bundles"]) == (2, 6, 1)
    assert found["per_token_and_head"] == 2 * 6 / 8
    full = {"MXU": 1 / 4, "XLU": 1 / 4, "VPU": 2 / 8, "EUP": 1 / 2, "load": 3 / 6, "store": 2 / 4}
    assert found["occupancy"] == full
    assert (found["spill_stores"], found["spill_loads"]) == (3, 1)


# The outer loop of `coat_adam`, eight blocks of rows by sixteen of columns, all operands in fast memory.
RESIDENT = """
  0x10   :  { %s21810_s23 = smov 0 /* copy for cssa */ } /* End region 406 */
  0x11 LB: > { %s40_s24 = sadd.s32 1, %s21709_s21  ;;  %s21717_s23 = sphi %s21810_s23, %s31_s23 }
  0x12   : > > { %p5 = scmp.ge.s32.totalorder %s40_s24, 16 /* loop exit test */ }
 0xda9   : > { %p28_p4 = scmp.ge.s32.totalorder %s31_s23, 130 /* loop exit test */  ;;  %s1 = sld 2 }
 0xdac   :  { %30 = sbr.rel (!%p28_p4) target = $region411 }
"""


@pytest.mark.parametrize(("listing", "bundles", "steps"), [(RESIDENT, 2, 128), (LISTING, 2, 6)])
def test_the_grid_is_known_also_where_nothing_comes_from_slow_memory(
    tmp_path, listing, bundles, steps
):
    (tmp_path / "table.txt").write_text(UNITS)
    (tmp_path / "listing.txt").write_text(listing)
    found = tpu_listing.kernel(tmp_path / "table.txt", tmp_path / "listing.txt", token_heads=4)
    assert (found["bundles"], found["steps"]) == (bundles, steps)
    assert found["per_token_and_head"] == bundles * steps / 4


PTX = """(
	.param .u64 x_param_0
)
.reqntid 128, 1, 1
{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [x_param_0];
	mov.b32 	%r1, 0;
$L__BB0_1:                              // a loop
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r5, %r6}, %rd2, %p1;
	{ // begin inline asm
	wgmma.wait_group.sync.aligned 0;
	}
	add.s32 	%r1, %r1, 4;
	setp.ne.b32 	%p7, %r1, 40;
	@%p7 bra 	$L__BB0_1;
// %bb.2:
	ret;
}
"""


def test_a_gpu_kernel_is_counted_by_instructions_of_its_warps():
    """Three outside of the loop, five in it, ten trips; four warps, six blocks."""
    found = gpu_listing.kernel(PTX, blocks=6, token_heads=8)
    assert found["warps"] == 4 and found["matrix"] == {"wgmma": 1}
    assert found["per_token_and_head"] == (3 + 5 * 10) * 4 * 6 / 8


@pytest.mark.parametrize(
    ("comparison", "trips"),
    [
        ("setp.lt.u32 %p7, %r1, 40;", 10),  # of the counter after its increase
        ("setp.le.u32 %p7, %r1, 40;", 11),
        ("setp.lt.u32 %p7, %r9, 36;", 10),  # of the counter before
        ("setp.lt.u32 %p7, %r1, %r2;", 1),  # not to be known
    ],
)
def test_trips_of_a_loop(comparison, trips):
    body = PTX.replace("setp.ne.b32 	%p7, %r1, 40;", comparison)
    body = body.replace("add.s32 	%r1, %r1, 4;", "add.s32 	%r1, %r9, 4;")
    assert gpu_listing.issued_by_warp(body) == 3 + 5 * trips


def test_a_loop_may_count_down_or_end_in_its_middle():
    down = PTX.replace("%r1, 4;", "%r1, -4;").replace("%r1, 40;", "%r1, -40;")
    assert gpu_listing.issued_by_warp(down) == 3 + 5 * 10
    # The way back asks nothing of a counter; the way out, a line earlier, does.
    middle = PTX.replace("@%p7 bra", "@%p7 bra 	$L__OUT;\n	bra.uni")
    middle = middle.replace("// %bb.2:", "$L__OUT:")
    assert gpu_listing.issued_by_warp(middle) == 3 + 6 * 10


def test_kernels_of_a_gradient_are_known_as_ours(tmp_path):
    names = ("first", "second", "third", "fourth")
    told = ("first", "jvp(second)", "transpose(jvp(third))")
    lines = [f'metadata={{op_name="jit(both)/{name}/pallas_call" stack=1}}' for name in told]
    (tmp_path / "program.txt").write_text("\n".join(lines))
    for name in names:
        (tmp_path / f"{name}.ptx").write_text(f".target sm_90\n.visible .entry {name}{PTX}")
    found = gpu_listing.read(tmp_path, token_heads=1)
    assert {kernel["name"]: kernel["is_pallas"] for kernel in found} == {
        name: name != "fourth" for name in names
    }


def test_a_spec_is_read_and_mistakes_are_named():
    spec = cases.parse_spec("T=512,HV=8,dtype=float32,packed=1")
    assert (spec.T, spec.H, spec.value_heads, spec.dtype) == (512, 16, 8, "float32")
    assert spec.token_heads == 512 * 8
    for text, match in [
        ("T=0", "T=0 must be a whole number of at least 1"),
        ("T=many", "T=many must be"),
        ("dtype=int8", "dtype=int8 is not one of bfloat16, float32"),
        ("t=4", "--spec"),
    ]:
        with pytest.raises(ValueError, match=match):
            cases.parse_spec(text)


def test_the_committed_table_is_that_of_the_figures():
    rows = table.read()
    shown = table.README.read_text()
    assert shown.split(table.START)[1].split(table.END)[0] == table.markdown(rows)
    wanted = [json.dumps(case.to_dict()) for case in table.committed()]
    assert [x for x in wanted if x in {json.dumps(row["case"]) for row in rows}] == [
        json.dumps(row["case"]) for row in rows
    ]
    for row in rows:
        assert table.lines(row)


@pytest.mark.slow
def test_the_command_without_the_compiler_says_what_to_install():
    if compiling_wheel_is_here("libtpu"):
        pytest.skip("about machines without libtpu, and it is installed")
    done = run("--op=delta_rule", "--target=v6e")
    assert done.returncode == 2
    assert "pip install 'effarch[aot]'" in done.stderr and "Traceback" not in done.stderr


def _name(row):
    case = row["case"]
    return f"{case['op']}-{case['target']}-{'both' if case['backward'] else 'forward'}"


@pytest.mark.slow
@pytest.mark.parametrize("row", GUARDED, ids=_name)
def test_no_kernel_needs_more_bundles_than_committed(row):
    """The figures belong to one version of the compiler."""
    if not compiling_wheel_is_here("libtpu"):
        pytest.skip("the compiler wheel libtpu is not installed (extra aot)")
    measured_with, here = row["versions"]["libtpu"], importlib.metadata.version("libtpu")
    if measured_with != here:
        pytest.skip(f"the figures are those of libtpu {measured_with}, and this is {here}")
    found = compiling.measure(cases.Case.from_dict(row["case"]))
    assert found["per_token_and_head"] <= TOLERANCE * row["per_token_and_head"]
    assert found["temporary_bytes"] <= TOLERANCE * row["temporary_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "unit", "shared"),
    [("a100", "mma.sync", 166912), ("h100", "wgmma", 232448), ("b200", "tcgen05", 232448)],
)
@pytest.mark.parametrize(
    ("op", "kernels", "mosts"),
    [
        ("gated_delta_rule", 3, dict(a100=435, h100=340, b200=425)),
        ("ssd", 2, dict(a100=180, h100=138, b200=166)),
        ("gla", 3, dict(a100=595, h100=645, b200=760)),
    ],
)
def test_the_gpu_forward_takes_the_matrix_unit_without_spills(
    op, kernels, mosts, target, unit, shared
):
    """340 is the goal of the delta rule on H100; the others guard what was measured plus a few percent:
    there 420 and 412 (goals: 500 and 380)."""
    if not compiling_wheel_is_here("jax-cuda13-pjrt"):
        pytest.skip("the compiler wheel jax-cuda13-pjrt is not installed (extra aot)")
    found = compiling.measure(cases.Case(op, target, "pallas_gpu"))
    ours = [kernel for kernel in found["kernels"] if kernel["is_pallas"]]
    assert len(ours) == kernels and all(kernel["matrix"].get(unit) for kernel in ours)
    assert not any(kernel["spill_bytes"] for kernel in ours)
    assert all(kernel["shared_bytes"] <= shared for kernel in ours)
    assert found["per_token_and_head"] <= mosts[target]


def compiling_wheel_is_here(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "effarch.kernels.report", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
