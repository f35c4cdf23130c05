"""What a program does is read rightly from its text: figures worked out by hand."""

# ruff: noqa: E501  (lines of HLO are as long as they are)

import pytest

from lib.preflight import hlo

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[10,64,128], p1: s32[], p2: f32[10,64,128]) -> (f32[64,256], f32[10,64,128]) {
  %p0 = bf16[10,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %flat = bf16[64,128]{1,0} bitcast(%cut)
  %w = bf16[128,256]{1,0} constant({...})
  %product = f32[64,256]{1,0} dot(%flat, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while/body/mlp/dot"}
  %p2 = f32[10,64,128]{2,1,0} parameter(2)
  %piece = f32[1,64,128]{2,1,0} convert(%cut)
  %put = f32[10,64,128]{2,1,0} dynamic-update-slice(%p2, %piece, %p1, %zero, %zero)
  ROOT %both = (f32[64,256]{1,0}, f32[10,64,128]{2,1,0}) tuple(%product, %put)
}

%body (s: (s32[], bf16[10,64,128], f32[10,64,128])) -> (s32[], bf16[10,64,128], f32[10,64,128]) {
  %s = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[10,64,128]{2,1,0} get-tuple-element(%s), index=1
  %kept = f32[10,64,128]{2,1,0} get-tuple-element(%s), index=2
  %f = (f32[64,256]{1,0:T(8,128)S(1)}, f32[10,64,128]{2,1,0}) fusion(%x, %i, %kept), kind=kOutput, calls=%fused
  %g0 = f32[64,256]{1,0:T(8,128)S(1)} get-tuple-element(%f), index=0
  %g1 = f32[10,64,128]{2,1,0} get-tuple-element(%f), index=1
  %sum = f32[64,256]{1,0:T(8,128)S(1)} all-reduce(%g0), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(step)/attn/psum"}
  ROOT %t = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) tuple(%i, %x, %g1)
}

%condition (c: (s32[], bf16[10,64,128], f32[10,64,128])) -> pred[] {
  %c = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) parameter(0)
  %bound = s32[] constant(10)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

ENTRY %main (a: s32[], b: bf16[10,64,128], c: f32[10,64,128]) -> (s32[], bf16[10,64,128], f32[10,64,128]) {
  %a = s32[] parameter(0)
  %b = bf16[10,64,128]{2,1,0} parameter(1)
  %c = f32[10,64,128]{2,1,0} parameter(2)
  %init = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) tuple(%a, %b, %c)
  ROOT %loop = (s32[], bf16[10,64,128]{2,1,0}, f32[10,64,128]{2,1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_loops_count_as_often_as_they_run_and_cuts_are_not_wholes():
    analysis = hlo.analyse(PROGRAM, matrix_unit=256, devices=4)
    mlp = analysis.components["mlp"]
    # 128 summed on a unit of 256
    assert mlp.flops == 10 * 2 * 64 * 128 * 256
    assert mlp.busy == 2 * mlp.flops
    # a cut of x in, a piece of the kept out, the loop's counter; the product stays on the chip
    assert mlp.bytes == 10 * (64 * 128 * 2 + 4 + 64 * 128 * 4)

    (collective,) = analysis.collectives
    assert collective.kind == "all-reduce" and collective.component == "attention"
    assert collective.times == 10
    assert collective.bytes == 10 * 2 * 64 * 256 * 4 * 3 / 4


def test_a_known_trip_count_goes_before_the_condition():
    program = hlo.parse(PROGRAM)
    loop = program.computations["main"]["loop"]
    assert hlo.trip_count(loop, program.computations) == 10
    known = loop._replace(rest=loop.rest + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.trip_count(known, program.computations) == 7

    # and what runs in the loop counts so often
    line = "while(%init), condition=%condition, body=%body"
    changed = PROGRAM.replace(line, line + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.analyse(changed).components["mlp"].flops == 7 * 2 * 64 * 128 * 256


@pytest.mark.parametrize(
    "kind, sent",
    [
        # of four devices in a ring, each with 100 bytes: a sum goes round twice in quarters
        ("all-reduce", 150),
        ("all-gather", 300),
        ("reduce-scatter", 75),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_what_a_ring_of_four_sends(kind, sent):
    assert hlo.sent_bytes(kind, 100, 4) == sent


@pytest.mark.parametrize(
    "attributes, kind, sent",
    [
        # 64 x 256 float32 numbers are 65,536 bytes
        ("replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 65536 * 3 / 2),
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", "all-reduce", 65536),
        ("replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 65536 * 3 / 2),
        # no groups: all eight devices
        ("to_apply=%add", "all-reduce", 65536 * 7 / 4),
        # alone, nothing is sent
        ("replica_groups={{0},{1}}, to_apply=%add", "all-reduce", None),
    ],
)
def test_collectives_within_groups(attributes, kind, sent):
    usual = "replica_groups={{0,1,2,3}}, to_apply=%add"
    analysis = hlo.analyse(PROGRAM.replace(usual, attributes), devices=8)
    if sent is None:
        assert analysis.collectives == []
        return
    (collective,) = analysis.collectives
    assert (collective.kind, collective.bytes) == (kind, 10 * sent)


@pytest.mark.parametrize(
    "line, flops",
    [
        # D x (N H) with heads as a window over padding: only half of the places meet data
        (
            "f32[2,256,2,128]{3,2,1,0} convolution(%l, %r), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * 2 * 256 * 256 * 2 * 128,
        ),
        (
            "f32[256,2,128,1]{3,2,1,0} convolution(%k, %m), window={size=2x2 pad=1_1x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1",
            2 * 2 * 256 * 256 * 2 * 128,
        ),
    ],
)
def test_products_written_as_convolutions(line, flops):
    op, _ = hlo.parse_op("  %x = " + line)
    types = dict(
        l="bf16[2,256,256,1]", r="bf16[256,2,128,1]", k="bf16[2,256,256,1]", m="bf16[2,256,2,128]"
    )
    assert hlo.products(op, types)[0] == flops


def test_types_are_counted_in_bytes_where_they_lie():
    assert hlo.size("(bf16[2,3]{1,0}, f32[4]{0:S(1)}, s4[8]{0})") == 12 + 16 + 4
    assert hlo.hbm("(bf16[2,3]{1,0}, f32[4]{0:S(1)}, s4[8]{0})") == 12 + 4
    assert hlo.size("f32[]") == 4


def program(entry: str, others: str = "") -> hlo.Analysis:
    """What a program of these lines does on four devices."""
    return hlo.analyse(f"{others}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n", devices=4)


def test_a_loop_in_a_loop_runs_as_often_as_both_together():
    tuple_ = "(s32[], f32[8,16]{1,0}, f32[16,4]{1,0})"
    count = 'backend_config={"known_trip_count":{"n":"%d"}}'
    inner = f"""%inner (p: {tuple_}) -> {tuple_} {{
  %p = {tuple_} parameter(0)
  %l = f32[8,16]{{1,0}} get-tuple-element(%p), index=1
  %r = f32[16,4]{{1,0}} get-tuple-element(%p), index=2
  %d = f32[8,4]{{1,0}} dot(%l, %r), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, metadata={{op_name="jit(f)/mlp/dot"}}
  ROOT %t = {tuple_} tuple(%p, %l, %r)
}}

%outer (q: {tuple_}) -> {tuple_} {{
  %q = {tuple_} parameter(0)
  ROOT %w = {tuple_} while(%q), condition=%none, body=%inner, {count % 5}
}}
"""
    entry = f"""  %a = {tuple_} parameter(0)
  ROOT %x = {tuple_} while(%a), condition=%none, body=%outer, {count % 3}"""
    assert program(entry, inner).components["mlp"].flops == 3 * 5 * 2 * 8 * 16 * 4


def test_what_is_changed_in_place_counts_with_what_is_changed():
    # 4 of 1,000 rows of 8 float32 numbers: read and written
    lines = """  %a = f32[1000,8]{1,0} parameter(0)
  %piece = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[1000,8]{1,0} dynamic-update-slice(%a, %piece, %i, %i), metadata={op_name="jit(f)/mlp/put"}"""
    assert program(lines).components["mlp"].bytes == 2 * 4 * 8 * 4

    # and one that cuts: the cut is read and written
    lines = """  %a = f32[1000,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%a, %i, %i), metadata={op_name="jit(f)/mlp/cut"}"""
    assert program(lines).components["mlp"].bytes == 2 * 4 * 8 * 4


@pytest.mark.parametrize("nested", [False, True])
def test_a_scatter_reads_and_writes_what_it_adds_to(nested):
    """Also as the last of a fusion in a fusion, as libtpu writes it with what sorts its lines."""
    fused = """%added (p: f32[1000,8], i: s32[4], u: f32[4,8]) -> f32[1000,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %u = f32[4,8]{1,0} parameter(2)
  ROOT %s = f32[1000,8]{1,0} scatter(%p, %i, %u), to_apply=%sum
}
"""
    if nested:
        fused += """%outer (p: f32[1000,8], i: s32[4], u: f32[4,8]) -> f32[1000,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %u = f32[4,8]{1,0} parameter(2)
  ROOT %inner = f32[1000,8]{1,0} fusion(%p, %i, %u), kind=kCustom, calls=%added
}
"""
    calls = "outer" if nested else "added"
    lines = f"""  %a = f32[1000,8]{{1,0}} parameter(0)
  %b = s32[4]{{0}} parameter(1)
  %c = f32[4,8]{{1,0}} parameter(2)
  ROOT %f = f32[1000,8]{{1,0}} fusion(%a, %b, %c), kind=kLoop, calls=%{calls}, metadata={{op_name="jit(f)/embed/add"}}"""
    # four rows there and back, the rows that are added, and where
    expected = 2 * 4 * 8 * 4 + 4 * 8 * 4 + 4 * 4
    assert program(lines, fused).components["embedding"].bytes == expected


def test_a_product_reads_the_weight_that_it_is_handed_through_other_fusions():
    """As libtpu writes products of a decoded token: no byte of the weight must be forgotten."""
    fused = """%turned (p: bf16[32,16]) -> bf16[32,16] {
  %p = bf16[32,16]{1,0} parameter(0)
  ROOT %same = bf16[32,16]{1,0} copy(%p)
}

%viewed (p: bf16[32,16]) -> bf16[32,16] {
  %p = bf16[32,16]{1,0} parameter(0)
  %inner = bf16[32,16]{1,0} fusion(%p), kind=kLoop, calls=%turned
  ROOT %view = bf16[32,16]{1,0} bitcast(%inner)
}

%product (x: bf16[8,32], w: bf16[32,16]) -> bf16[8,16] {
  %x = bf16[8,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %weight = bf16[32,16]{1,0} fusion(%w), kind=kLoop, calls=%viewed
  ROOT %dot = bf16[8,16]{1,0} dot(%x, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    lines = """  %a = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %f = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kOutput, calls=%product, metadata={op_name="jit(f)/mlp/dot"}"""
    # all else lies on the chip
    assert program(lines, fused).components["mlp"].bytes == 2 * 32 * 16


def test_a_sum_fused_with_its_cut_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.1 (p: f32[100]) -> f32[25] {
  %p = f32[100]{0} parameter(0)
  %sum = f32[100]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %cut = f32[25]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={25}
}
"""
    lines = """  %a = f32[100]{0} parameter(0)
  ROOT %f = f32[25]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"""
    (collective,) = program(lines, fused).collectives
    assert (collective.kind, collective.bytes) == ("reduce-scatter", 400 * 3 / 4)
