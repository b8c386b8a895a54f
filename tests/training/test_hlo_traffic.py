"""Bytes, launches and collectives of small modules, as XLA's GPU compiler writes them."""

import pytest

from affectgpt_jax.training import hlo, hlo_traffic, sharding
from affectgpt_jax.training.hlo_traffic import Sent

RANK = 4


def launches(text):
    return {launch.name: launch for launch in hlo_traffic.launches(hlo.parse(text), RANK)}


def traffic(text):
    """Kind, launches a step, bytes read and bytes written, by name."""
    found = launches(text).values()
    return {
        launch.name: (launch.kind, launch.times, launch.read, launch.written) for launch in found
    }


# --- Loops, branches and calls --------------------------------------------------------------------

LOOP = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[6,8]{1,0})->f32[8]{0}}

%fused_slice (p0: f32[6,8], p1: s32[]) -> f32[8] {
  %p0 = f32[6,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %less = pred[] compare(%p1, %zero), direction=LT
  %place = s32[] select(%less, %zero, %p1)
  %row = f32[1,8]{1,0} dynamic-slice(%p0, %place, %zero), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%fused_add (p2: f32[8], p3: f32[8]) -> f32[8] {
  %p2 = f32[8]{0} parameter(0)
  %p3 = f32[8]{0} parameter(1)
  ROOT %sum = f32[8]{0} add(%p2, %p3)
}

%body (arg: (s32[], f32[8], f32[6,8])) -> (s32[], f32[8], f32[6,8]) {
  %arg = (s32[], f32[8]{0}, f32[6,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %carry = f32[8]{0} get-tuple-element(%arg), index=1
  %stack = f32[6,8]{1,0} get-tuple-element(%arg), index=2
  %slice_fusion = f32[8]{0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %add_fusion = f32[8]{0} fusion(%carry, %slice_fusion), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[8]{0}, f32[6,8]{1,0}) tuple(%i, %add_fusion, %stack)
}

%condition (arg2: (s32[], f32[8], f32[6,8])) -> pred[] {
  %arg2 = (s32[], f32[8]{0}, f32[6,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%small_branch (b0: f32[8]) -> f32[8] {
  ROOT %b0 = f32[8]{0} parameter(0)
}

%large_branch (b1: f32[8]) -> f32[8] {
  %b1 = f32[8]{0} parameter(0)
  ROOT %negated = f32[8]{0} negate(%b1)
}

%called (c0: f32[8]) -> f32[8] {
  %c0 = f32[8]{0} parameter(0)
  ROOT %root = f32[8]{0} sqrt(%c0)
}

ENTRY %main (w: f32[6,8]) -> f32[8] {
  %w = f32[6,8]{1,0} parameter(0)
  %n = s32[] constant(0)
  %start = f32[8]{0} broadcast(%n), dimensions={}
  %t = (s32[], f32[8]{0}, f32[6,8]{1,0}) tuple(%n, %start, %w)
  %while = (s32[], f32[8]{0}, f32[6,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  %done = f32[8]{0} get-tuple-element(%while), index=1
  %branch = f32[8]{0} conditional(%n, %done, %done), BRANCHES
  ROOT %call = f32[8]{0} call(%branch), to_apply=%called
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%small_branch, %large_branch}",
        "true_computation=%small_branch, false_computation=%large_branch",
    ],
)
def test_what_a_loop_holds_counts_for_every_round_and_slices_as_slices(branches):
    assert traffic(LOOP.replace("BRANCHES", branches)) == {
        "start": ("movement", 1, 4, 32),  # a fill
        "slice_fusion": ("movement", 6, 32 + 4, 32),
        "add_fusion": ("other", 6, 64, 32),
        "negated": ("other", 1, 32, 32),  # the branch that moves something
        "root": ("other", 1, 32, 32),
    }


# --- Fusions --------------------------------------------------------------------------------------

FUSION = """HloModule m

%fused (p0: bf16[4,8], p1: bf16[8], p2: s32[]) -> bf16[4,8] {{
  %p0 = bf16[4,8]{{1,0}} parameter(0)
  %p1 = bf16[8]{{0}} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  {body}
}}

ENTRY %main (stack: bf16[4,8], row: bf16[8], i: s32[]) -> bf16[4,8] {{
  %stack = bf16[4,8]{{1,0}} parameter(0)
  %row = bf16[8]{{0}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %fusion = {shape} fusion(%stack, %row, %i), kind=kLoop, calls=%fused
}}
"""
STACK, ROW = "bf16[4,8]{1,0}", "bf16[8]{0}"


@pytest.mark.parametrize(
    ("shape", "body", "expected"),
    [
        (
            STACK,
            """%wide = bf16[1,8]{1,0} bitcast(%p1)
  ROOT %u = bf16[4,8]{1,0} dynamic-update-slice(%p0, %wide, %p2, %zero)""",
            ("movement", 16 + 4, 16),
        ),
        (  # A stack that is made here is written as a whole.
            STACK,
            """%c = bf16[] constant(0)
  %zeros = bf16[4,8]{1,0} broadcast(%c), dimensions={}
  %wide = bf16[1,8]{1,0} bitcast(%p1)
  ROOT %u = bf16[4,8]{1,0} dynamic-update-slice(%zeros, %wide, %p2, %zero)""",
            ("movement", 16 + 4, 64),
        ),
        (  # Two results, one of which is an update in place of what was computed.
            f"({STACK}, {ROW})",
            """%twice = bf16[8]{0} add(%p1, %p1)
  %wide = bf16[1,8]{1,0} bitcast(%twice)
  %u = bf16[4,8]{1,0} dynamic-update-slice(%p0, %wide, %p2, %zero)
  ROOT %both = (bf16[4,8]{1,0}, bf16[8]{0}) tuple(%u, %twice)""",
            ("other", 16 + 4, 16 + 16),
        ),
        (
            "bf16[8,4]{1,0}",
            "ROOT %t = bf16[8,4]{1,0} transpose(%p0), dimensions={1,0}",
            ("movement", 64, 64),
        ),
        (  # Two slices are read, not the stack.
            ROW,
            """%a = bf16[1,8]{1,0} slice(%p0), slice={[0:1], [0:8]}
  %b = bf16[1,8]{1,0} slice(%p0), slice={[1:2], [0:8]}
  %s = bf16[1,8]{1,0} add(%a, %b)
  ROOT %flat = bf16[8]{0} bitcast(%s)""",
            ("other", 32, 16),
        ),
        (  # Arithmetic between arrays is no movement, even if it only converts them.
            "f32[8]{0}",
            "ROOT %c = f32[8]{0} convert(%p1)",
            ("other", 16, 32),
        ),
    ],
)
def test_a_fusion_reads_and_writes_what_it_touches(shape, body, expected):
    (found,) = launches(FUSION.format(shape=shape, body=body)).values()
    assert (found.kind, found.read, found.written) == expected


# --- Matmuls and kernels --------------------------------------------------------------------------

DOT = (
    '"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":'
    '["LC"],"rhs_contracting_dimensions":["RC"],"lhs_batch_dimensions":[],'
    '"rhs_batch_dimensions":[]}}'
)


def dot(left, right):
    return DOT.replace("LC", str(left)).replace("RC", str(right))


MATMULS = f"""HloModule m

%dynamic-slice-fusion (s0: bf16[3,128,256], s1: bf16[512,128], s2: s32[]) -> (bf16[512,256], s8[4194304]) {{
  %s0 = bf16[3,128,256]{{2,1,0}} parameter(0)
  %s1 = bf16[512,128]{{1,0}} parameter(1)
  %s2 = s32[] parameter(2)
  %s3 = s32[] constant(0)
  %one = bf16[1,128,256]{{2,1,0}} dynamic-slice(%s0, %s2, %s3, %s3), dynamic_slice_sizes={{1,128,256}}
  %kernel = bf16[128,256]{{1,0}} bitcast(%one)
  %inner = (bf16[512,256]{{1,0}}, s8[4194304]{{0}}) custom-call(%s1, %kernel), custom_call_target="__cublas$gemm", backend_config={{{dot(1, 0)}}}
  %y = bf16[512,256]{{1,0}} get-tuple-element(%inner), index=0
  %ws = s8[4194304]{{0}} get-tuple-element(%inner), index=1
  ROOT %pair = (bf16[512,256]{{1,0}}, s8[4194304]{{0}}) tuple(%y, %ws)
}}

ENTRY %main (x: bf16[512,128], w: bf16[3,128,256], a: bf16[128,4], i: s32[]) -> bf16[512,4] {{
  %x = bf16[512,128]{{1,0}} parameter(0)
  %w = bf16[3,128,256]{{2,1,0}} parameter(1)
  %a = bf16[128,4]{{1,0}} parameter(2)
  %k = bf16[256,128]{{1,0}} parameter(3)
  %i = s32[] parameter(4)
  %large = (bf16[512,256]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %k), custom_call_target="__cublas$gemm", metadata={{op_name="jit(step)/up_proj/dot_general"}}, backend_config={{"operation_queue_id":"0",{dot(1, 1)}}}
  %narrow = (bf16[512,4]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %a), custom_call_target="__cublas$lt$matmul", backend_config={{{dot(1, 0)}}}
  %few_rows = (bf16[4,512]{{1,0}}, s8[4194304]{{0}}) custom-call(%a, %x), custom_call_target="__cublas$gemm", metadata={{op_name="jit(step)/jvp(lm_head)/dot_general"}}, backend_config={{{dot(0, 1)}}}
  %of_a_slice = (bf16[512,256]{{1,0}}, s8[4194304]{{0}}) fusion(%w, %x, %i), kind=kCustom, calls=%dynamic-slice-fusion, backend_config={{"fusion_backend_config":{{"kind":"__custom_fusion"}}}}
  %fmha = (bf16[2,8,16,4]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%x, %x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{}}
  ROOT %out = bf16[512,4]{{1,0}} get-tuple-element(%narrow), index=0
}}
"""  # noqa: E501


def test_matmuls_are_told_by_their_smallest_side_and_workspaces_are_not_counted():
    assert traffic(MATMULS) == {
        "large": ("matmul", 1, 2 * (512 * 128 + 256 * 128), 2 * 512 * 256),
        "narrow": ("lora", 1, 2 * (512 * 128 + 128 * 4), 2 * 512 * 4),
        "few_rows": ("other", 1, 2 * (512 * 128 + 128 * 4), 2 * 512 * 4),
        "of_a_slice": ("matmul", 1, 2 * (512 * 128 + 128 * 256) + 4, 2 * 512 * 256),
        "fmha": ("attention", 1, 2 * 512 * 128, 2 * 2 * 8 * 16 * 4),
    }
    found = launches(MATMULS)
    assert found["large"].flops == found["of_a_slice"].flops == 2 * 512 * 128 * 256
    assert found["narrow"].flops == 2 * 512 * 128 * 4
    assert found["large"].op_name == "jit(step)/up_proj/dot_general"


# --- Asynchronous operations and collectives ------------------------------------------------------

ASYNC = f"""HloModule m

%fused_copy (q0: bf16[64,128]) -> bf16[64,128] {{
  %q0 = bf16[64,128]{{1,0}} parameter(0)
  ROOT %copied = bf16[64,128]{{1,0}} copy(%q0)
}}

%wrapped (r0: f32[128]) -> f32[16] {{
  %r0 = f32[128]{{0}} parameter(0)
  ROOT %scattered = f32[16]{{0}} reduce-scatter(%r0), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}, to_apply=%add
}}

ENTRY %main (x: bf16[64,128], k: bf16[128,128], g: f32[128]) -> bf16[64,128] {{
  %x = bf16[64,128]{{1,0}} parameter(0)
  %k = bf16[128,128]{{1,0}} parameter(1)
  %g = f32[128]{{0}} parameter(2)
  %buffer = bf16[64,128]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  %copy-start = (bf16[64,128]{{0,1}}, bf16[64,128]{{1,0}}, u32[]) copy-start(%x)
  %fusion-start = ((bf16[64,128]{{1,0}}), bf16[64,128]{{1,0}}, s32[]) fusion-start(%x), kind=kLoop, calls=%fused_copy
  %all-reduce-start = f32[128]{{0}} all-reduce-start(%g), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  %first = (bf16[64,128]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %k), custom_call_target="__cublas$gemm", backend_config={{{dot(1, 0)}}}
  %y = bf16[64,128]{{1,0}} get-tuple-element(%first), index=0
  %all-reduce-done = f32[128]{{0}} all-reduce-done(%all-reduce-start)
  %all-gather-start = (bf16[64,128]{{1,0}}, bf16[512,128]{{1,0}}) all-gather-start(%y), channel_id=2, replica_groups=[1,8]<=[8], dimensions={{0}}
  %all-gather-done = bf16[512,128]{{1,0}} all-gather-done(%all-gather-start)
  %all-reduce-start.1 = ((f32[128]{{0}}), f32[128]{{0}}) all-reduce-start(%all-reduce-done), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %all-reduce-done.1 = f32[128]{{0}} all-reduce-done(%all-reduce-start.1)
  %rs-start = ((f32[128]{{0}}), f32[16]{{0}}) async-start(%all-reduce-done), calls=%wrapped
  %second = (bf16[64,128]{{1,0}}, s8[4194304]{{0}}) custom-call(%y, %k), custom_call_target="__cublas$gemm", backend_config={{{dot(1, 0)}}}
  %rs-done = f32[16]{{0}} async-done(%rs-start)
  %fusion-done = bf16[64,128]{{1,0}} fusion-done(%fusion-start)
  %copy-done = bf16[64,128]{{0,1}} copy-done(%copy-start)
  ROOT %z = bf16[64,128]{{1,0}} get-tuple-element(%second), index=0
}}
"""  # noqa: E501


def test_what_runs_beside_others_counts_once_with_its_own_result():
    array = 2 * 64 * 128
    found = traffic(ASYNC)
    assert found.pop("first")[0] == found.pop("second")[0] == "matmul"
    assert found == {
        "copy-start": ("movement", 1, array, array),
        "fusion-start": ("movement", 1, array, array),
        "all-reduce-start": ("collective", 1, 512, 512),
        "all-reduce-start.1": ("collective", 1, 512, 512),
        "all-gather-start": ("collective", 1, array, 8 * array),
        "scattered": ("collective", 1, 512, 64),
    }


def test_collectives_are_told_with_what_runs_beside_them():
    mesh = sharding.make_mesh("data:2,fsdp:4")
    both, matmul = ("data", "fsdp"), 2 * 64 * 128 * 128
    assert hlo_traffic.sent(hlo.parse(ASYNC), RANK, mesh) == [
        Sent("all-gather", both, 1, 2 * 512 * 128, False, 0, 0),
        Sent("all-reduce", both, 1, 512, False, 1, matmul),
        Sent("all-reduce", ("fsdp",), 1, 512, False, 0, 0),
        Sent("reduce-scatter", both, 1, 512, False, 1, matmul),
    ]


def test_totals_are_of_a_step():
    module = hlo.parse(LOOP.replace("BRANCHES", "branch_computations={%small_branch}"))
    sums = hlo_traffic.totals(hlo_traffic.launches(module, RANK))
    assert sums["movement"] == (7, 36 + 6 * 68)
    assert sums["other"] == (7, 6 * 96 + 64)
    assert sums["matmul"] == sums["collective"] == (0, 0)


def test_shapes_of_nested_tuples_are_taken_apart():
    shape = "((bf16[4,8]{1,0:T(8,128)}, /*index=1*/f32[]), (s8[16]{0}), token[])"
    assert hlo.elements(shape) == [
        "(bf16[4,8]{1,0:T(8,128)}, f32[])", "(s8[16]{0})", "token[]",
    ]  # fmt: skip
    assert hlo.shape_bytes(shape) == 64 + 4 + 16
    assert hlo.shape_bytes("f8e4m3fn[8]{0}") == hlo.shape_bytes("s4[16]{0}") == 8
