"""What is read from compiled text: executions, collectives, costs."""

import jax
import jax.numpy as jnp
import pytest

from effarch.aot import collectives, costs, hlo, products
from effarch.parallel import topologies

V5P = topologies.parse("v5p:2x2x1")

TEXT = """\
HloModule jit_step, is_scheduled=true

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %ag = f32[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %y = f32[8,128]{1,0:T(8,128)} fusion(%ag, %x), kind=kLoop, calls=%fused.1
  ROOT %t = (s32[], f32[8,128]) tuple(%next, %y)
}

%cond.1 (p: (s32[], f32[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%fused.1 (a: f32[32,128], b: f32[8,128]) -> f32[8,128] {
  %a = f32[32,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[8,128]{1,0} dynamic-slice(%a, %zero, %zero), dynamic_slice_sizes={8,128}
  ROOT %sum = f32[8,128]{1,0} add(%cut, %b)
}

%scatter.1 (g: f32[512,128]) -> f32[128,128] {
  %g = f32[512,128]{0,1:T(8,128)S(1)} parameter(0)
  %ar = f32[512,128]{0,1} all-reduce(%g), replica_groups=[1,4]<=[4], to_apply=%add.1
  %zero.1 = u32[] constant(0)
  ROOT %ds = f32[128,128]{0,1} dynamic-slice(%ar, %zero.1, %zero.1), dynamic_slice_sizes={128,128}
}

%add.1 (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}

ENTRY %main (p0: f32[8,128], p1: f32[512,128]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0} parameter(0)
  %p1 = f32[512,128]{0,1:T(8,128)S(1)} parameter(1)
  %c = s32[] constant(0)
  %start = (s32[], f32[8,128]) tuple(%c, %p0)
  %loop = (s32[], f32[8,128]) while(%start), condition=%cond.1, body=%body.1
  %rs = f32[128,128]{0,1} fusion(%p1), kind=kCustom, calls=%scatter.1
  %w = bf16[128,64]{1,0} constant({...})
  %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %h = bf16[8,128]{1,0} convert(%out)
  %dot = f32[8,64]{1,0} dot(%h, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %res = f32[8,128]{1,0} copy(%out), backend_config={"estimated_cycles":"3500"}
}
"""


def test_a_loops_body_counts_as_often_as_it_runs():
    program = hlo.parse(TEXT)
    assert program.executions["body.1"] == 6
    assert program.executions["fused.1"] == 6 and "fused.1" in program.fused
    assert program.executions["main"] == 1 and "main" not in program.fused
    assert not program.unknown_loops


def test_a_loop_of_unknown_length_is_told():
    program = hlo.parse(TEXT.replace("s32[]{:T(128)} constant(6)", "s32[] parameter(1)"))
    assert program.executions["body.1"] == 1
    assert program.unknown_loops == {"loop"}
    noted = 'body=%body.1, backend_config={"known_trip_count":{"n":"9"}}'
    assert hlo.parse(TEXT.replace("body=%body.1", noted)).executions["body.1"] == 9


def test_a_kernels_notes_over_several_lines_end_nothing():
    """As Splash attention writes them: a line begins with a brace inside of an instruction."""
    line = next(line for line in TEXT.splitlines() if line.startswith("  %y = "))
    notes = (
        ', backend_config={"custom_call_config": {\n"notes":"{\\"block\\": 256}"\n}}, frontend=1'
    )
    program = hlo.parse(TEXT.replace(line, line + notes))
    assert program.computations["body.1"].keys() == hlo.parse(TEXT).computations["body.1"].keys()
    assert program.computations["body.1"]["y"].text.endswith("}}, frontend=1")
    assert program.executions == hlo.parse(TEXT).executions


def test_a_computation_ends_where_it_names_its_thread():
    """As those that run on a SparseCore do."""
    ended = "ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT\n}"
    program = hlo.parse(TEXT.replace(ended, ended + ', execution_thread="sparsecore"'))
    assert program == hlo.parse(TEXT)


def test_collectives_with_their_bytes():
    rows = collectives.totals(collectives.read(hlo.parse(TEXT), V5P))
    found = {row["kind"]: row for row in rows}
    assert set(found) == {"all-gather", "reduce-scatter"}  # an all-reduce that is sliced
    assert found["all-gather"]["count"] == 6
    assert found["all-gather"]["bytes"] == 6 * 3 * 8 * 128 * 4
    assert found["reduce-scatter"]["bytes"] == 512 * 128 * 4 * 3 / 4
    assert found["reduce-scatter"]["seconds"] == pytest.approx(512 * 128 * 3 / 600e9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", list(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", [0, 2]),
        ("source_target_pairs={{0,1},{1,0}}, x", [0, 1]),
        ("replica_groups={}, x", list(range(8))),
    ],
)
def test_groups_in_every_notation(text, expected):
    assert sorted(collectives.group(text, 8)) == expected


def test_a_collective_across_hosts_waits_for_the_network():
    target = topologies.parse("h100:1x2x4")
    text = TEXT.replace("replica_groups={{0,1,2,3}}", "replica_groups=[1,8]<=[8]")
    rows = collectives.totals(collectives.read(hlo.parse(text), target))
    row = next(row for row in rows if row["kind"] == "all-gather")
    whole = 8 * 8 * 128 * 4  # of which half is on the other host, and four adapters bring it
    assert row["bytes"] == 6 * whole * 7 / 8
    assert row["seconds"] == pytest.approx(6 * whole / 2 / 4 / 50e9)


def test_costs_of_instructions():
    found = costs.read(hlo.parse(TEXT), V5P)
    assert found.matmul_flops == 2 * 8 * 64 * 128
    row = 8 * 128 * 4
    loop = 6 * (3 * row + 3 * 4)  # the slice of `a`, `b`, the result; and `next`, one and i
    scattered = 128 * 128 * 4  # its operand is in on-chip memory
    products = row + row / 2 + row / 2 + 128 * 64 * 2 + 8 * 64 * 4  # convert; dot
    compare = 6 * (1 + 4 + 4)
    assert found.hbm_bytes == loop + scattered + products + 2 * row + compare
    assert found.seconds > 3500 / 1.75e9  # the compiler's own word for the copy
    assert found.seconds == pytest.approx(
        3500 / 1.75e9 + (found.hbm_bytes - 2 * row) / 2765e9, rel=1e-6
    )


def test_products_are_counted_by_the_types_of_their_operands():
    """One dot as it stands, one FP8 call to a library in a loop of six."""
    call = (
        "  %q = f8e4m3fn[8,128]{1,0} convert(%ag)\n  %e = f8e5m2[8,128]{1,0} convert(%ag)\n"
        '  %z = f32[8,8]{1,0} custom-call(%e, %q), custom_call_target="__cublas$lt$matmul$f8"\n'
    )
    line = next(line for line in TEXT.splitlines() if line.startswith("  %y = "))
    found = products.read(hlo.parse(TEXT.replace(line, call + line)))
    assert found == {"f8e5m2 x f8e4m3fn": 6, "bf16 x bf16": 1}


def test_an_asynchronous_fusion_costs_what_a_fusion_costs():
    plain = "  %y = f32[8,128]{1,0:T(8,128)} fusion(%ag, %x), kind=kLoop, calls=%fused.1"
    begun = (
        "  %begun = ((f32[32,128], f32[8,128]), f32[8,128], u32[]) fusion-start(%ag, %x), "
        "kind=kLoop, calls=%fused.1\n  %y = f32[8,128]{1,0:T(8,128)} fusion-done(%begun)"
    )
    assert TEXT.count(plain) == 1
    program = hlo.parse(TEXT.replace(plain, begun))
    assert costs.read(program, V5P) == costs.read(hlo.parse(TEXT), V5P)


def test_prefetched_slices_move_what_they_take_beside_the_rest():
    """4 of 32 rows into on-chip memory; a gather that another core does is counted where it is done."""
    line = "  %one = s32[] constant(1)\n"
    begun = (
        "  %begun = ((f32[32,128]{1,0}), f32[4,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%ag), slice={[0:4], [0:128]}\n"
        "  %cut = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%begun)\n"
        "  %sent = ((f32[32,128]{1,0}), f32[8,128]{1,0}, u32[]{:S(8)}) call-start(%ag), "
        'async_execution_thread="sparsecore"\n'
    )
    assert TEXT.count(line) == 1
    before, found = (
        costs.read(hlo.parse(text), V5P) for text in (TEXT, TEXT.replace(line, line + begun))
    )
    assert found.hbm_bytes - before.hbm_bytes == 6 * 4 * 128 * 4
    assert found.seconds == before.seconds


def test_a_scanned_product_compiled_here_is_counted_in_full():
    """The text of a real compile: 5 products of [32,64] by [64,64] in a scan."""

    def f(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    text = jax.jit(f).lower(jnp.zeros((32, 64)), jnp.zeros((5, 64, 64))).compile().as_text()
    found = costs.read(hlo.parse(text), V5P)
    assert found.matmul_flops == 5 * 2 * 32 * 64 * 64
