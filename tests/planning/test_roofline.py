"""The roofline of programs for GPUs, on short texts: bytes, FLOPs and seconds by arithmetic."""

import importlib.util

import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.monitoring.gpus import GPUS
from dspo_jax.planning import absent_gpu
from dspo_jax.planning.plan import Plan, _judge_gpu, describe_plan, explain
from dspo_jax.planning.program_text import read_instructions
from dspo_jax.planning.roofline import EFFICIENCY, by_kind, longest, seconds
from dspo_jax.planning.works import (
    ATTENTION,
    COMMUNICATION,
    CONVOLUTIONS,
    COPIES,
    ELEMENTWISE,
    OPTIMIZER,
    PRODUCTS,
    Work,
    read_works,
)

H100 = GPUS["h100"]

# As XLA writes a program for a GPU, shortened. The loop runs five times.
TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/train.py"
2 "/home/me/site-packages/dspo_jax/models/blocks.py"
3 "/home/me/site-packages/dspo_jax/kernels/cpu.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=172 end_line=172 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=40 end_line=40 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%fused_silu (p.0: bf16[2,16,16,64]) -> bf16[2,16,16,64] {
  %p.0 = bf16[2,16,16,64]{3,2,1,0} parameter(0)
  %logistic.1 = bf16[2,16,16,64]{3,2,1,0} logistic(%p.0), \
metadata={op_name="jit(f)/jvp()/logistic" stack_frame_id=2}
  ROOT %multiply.1 = bf16[2,16,16,64]{3,2,1,0} multiply(%p.0, %logistic.1)
}

%fused_transpose (p.1: f32[3,3,64,64]) -> bf16[64,3,3,64] {
  %p.1 = f32[3,3,64,64]{3,2,1,0} parameter(0)
  %convert.1 = bf16[3,3,64,64]{3,2,1,0} convert(%p.1)
  ROOT %transpose.1 = bf16[64,3,3,64]{3,2,1,0} transpose(%convert.1), dimensions={3,0,1,2}
}

%fused_take (p.2: f32[5,1024], p.3: s32[], p.4: f32[5,1024]) -> f32[5,1024] {
  %p.2 = f32[5,1024]{1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %p.4 = f32[5,1024]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %dynamic-slice.1 = f32[1,1024]{1,0} dynamic-slice(%p.2, %p.3, %zero), dynamic_slice_sizes={1,1024}
  %exponential.1 = f32[1,1024]{1,0} exponential(%dynamic-slice.1)
  ROOT %dynamic-update-slice.1 = f32[5,1024]{1,0} dynamic-update-slice(%p.4, %exponential.1, %p.3, %zero)
}

%body (s: (s32[], f32[5,1024], f32[5,1024])) -> (s32[], f32[5,1024], f32[5,1024]) {
  %s = (s32[], f32[5,1024]{1,0}, f32[5,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %from = f32[5,1024]{1,0} get-tuple-element(%s), index=1
  %to = f32[5,1024]{1,0} get-tuple-element(%s), index=2
  %take_fusion.1 = f32[5,1024]{1,0} fusion(%from, %i, %to), kind=kLoop, calls=%fused_take, \
metadata={op_name="jit(f)/jvp()/exp"}
  ROOT %tuple.1 = (s32[], f32[5,1024]{1,0}, f32[5,1024]{1,0}) tuple(%i, %from, %take_fusion.1)
}

ENTRY %main (x: bf16[2,16,16,64], k: f32[3,3,64,64], a: bf16[512,256]) -> bf16[2,16,16,64] {
  %x = bf16[2,16,16,64]{3,2,1,0} parameter(0)
  %k = f32[3,3,64,64]{3,2,1,0} parameter(1)
  %a = bf16[512,256]{1,0} parameter(2)
  %b = f32[256,128]{1,0} parameter(3)
  %q = bf16[2,256,4,40]{3,2,1,0} parameter(4)
  %carried = (s32[], f32[5,1024]{1,0}, f32[5,1024]{1,0}) parameter(5)
  %input_transpose_fusion.7 = bf16[64,3,3,64]{3,2,1,0} fusion(%k), kind=kInput, calls=%fused_transpose
  %cudnn-conv.1 = (bf16[2,16,16,64]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %input_transpose_fusion.7), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(f)/jvp()/conv" stack_frame_id=3}
  %y = bf16[2,16,16,64]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %loop_silu_fusion.2 = bf16[2,16,16,64]{3,2,1,0} fusion(%y), kind=kLoop, calls=%fused_silu
  %conv-filter.1 = (bf16[64,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %loop_silu_fusion.2), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %product.1 = (bf16[512,512]{1,0}, s8[33554432]{0}) custom-call(%a, %a), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}
  %product.2 = (f32[128,128]{1,0}, s8[0]{0}) custom-call(%b, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %attend.1 = (bf16[2,4,256,40]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "256", "256"]}}}
  %attend.2 = (bf16[2,4,256,40]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "256", "256"]}}}
  %while.1 = (s32[], f32[5,1024]{1,0}, f32[5,1024]{1,0}) while(%carried), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-start.1 = f32[1000]{0} all-reduce-start(%b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %all-reduce-done.1 = f32[1000]{0} all-reduce-done(%all-reduce-start.1)
  %all-gather.1 = f32[4096,128]{1,0} all-gather(%b), replica_groups=[1,16]<=[16], dimensions={0}
  %update_fusion.1 = f32[256,128]{1,0} fusion(%b), kind=kLoop, calls=%fused_silu, \
metadata={op_name="jit(f)/mul"}
  ROOT %copy.1 = bf16[2,16,16,64]{3,2,1,0} copy(%loop_silu_fusion.2)
}
"""

IMAGE, KERNEL = 2 * 2 * 16 * 16 * 64, 3 * 3 * 64 * 64
CONVOLUTION = 2 * (2 * 16 * 16 * 64) * (3 * 3 * 64)
QUERY = 2 * 2 * 256 * 4 * 40
SCORES = 2 * 4 * 256 * 256


@each_row(
    ("groups", "group"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("[1,16]<=[16]", tuple(range(16))),
        ("[8,2]<=[2,8]T(1,0)", (0, 8)),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", tuple(range(8))),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0'}", (0, 8)),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", tuple(range(16))),
    ],
)
def test_the_devices_of_a_collective(groups, group):
    text = f"""ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = f32[64]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[64]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
}}"""
    (work,) = read_works(text)
    assert work.group == group
    assert work.bytes == int(2 * (len(group) - 1) / len(group) * 4 * 64)


def test_what_each_instruction_moves_and_computes():
    works = read_works(TEXT)
    assert [(work.kind, work.what, work.bytes, work.flops, work.times) for work in works] == [
        (COPIES, "input_transpose_fusion", 4 * KERNEL + 2 * KERNEL, 0, 1),
        (CONVOLUTIONS, "__cudnn$convForward", IMAGE + 2 * KERNEL + IMAGE, CONVOLUTION, 1),
        (ELEMENTWISE, "loop_silu_fusion", 2 * IMAGE, 0, 1),
        (CONVOLUTIONS, "__cudnn$convBackwardFilter", 2 * IMAGE + 2 * KERNEL, CONVOLUTION, 1),
        # An operand that comes twice is read once, and a library's workspace is no traffic.
        (PRODUCTS, "__cublas$lt$matmul", 2 * 512 * 256 + 2 * 512 * 512, 2 * 512 * 512 * 256, 1),
        (PRODUCTS, "__cublas$lt$matmul", 4 * 256 * 128 + 4 * 128 * 128, 2 * 128 * 128 * 256, 1),
        (ATTENTION, "__cudnn$fmhaSoftmax", 2 * QUERY + 4 * 2 * 4 * 256, 4 * SCORES * 40, 1),
        (ATTENTION, "__cudnn$fmhaSoftmaxBackward", 2 * QUERY, 10 * SCORES * 40, 1),
        # A row is read, the counter, and a row written into what the loop carries.
        (ELEMENTWISE, "take_fusion", 4 * 1024 + 4 + 4 * 1024, 0, 5),
        (COMMUNICATION, "all-reduce", int(4 * 256 * 128 * 2 * 3 / 4), 0, 1),
        (COMMUNICATION, "all-gather", 4 * 256 * 128 * 15, 0, 1),
        (OPTIMIZER, "update_fusion", 2 * 4 * 256 * 128, 0, 1),
        (COPIES, "copy", 2 * IMAGE, 0, 1),
    ]
    assert [work.dtype for work in works if work.kind == PRODUCTS] == ["bfloat16", "tf32"]
    assert [len(work.group) for work in works if work.kind == COMMUNICATION] == [4, 16]
    assert [(work.head, work.backward) for work in works if work.kind == ATTENTION] == [
        (40, False),
        (40, True),
    ]


@pytest.mark.parametrize(
    "branches", ["true_computation=%yes, false_computation=%no", "branch_computations={%no, %yes}"]
)
def test_both_branches_of_a_condition_count(branches):
    text = f"""HloModule jit_f

%yes (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %negate.1 = f32[64]{{0}} negate(%a)
}}

%no (b: f32[64]) -> f32[64] {{
  %b = f32[64]{{0}} parameter(0)
  ROOT %exponential.1 = f32[64]{{0}} exponential(%b)
}}

ENTRY %main (p: pred[], x: f32[64]) -> f32[64] {{
  %p = pred[] parameter(0)
  %x = f32[64]{{0}} parameter(1)
  ROOT %conditional.1 = f32[64]{{0}} conditional(%p, %x, %x), {branches}
}}
"""
    assert sorted(work.what for work in read_works(text)) == ["exponential", "negate"]
    assert {"negate", "exponential"} <= {each.op for each in read_instructions(text)}


def test_a_loop_whose_length_the_text_does_not_tell_runs_as_often_as_is_said():
    """An open loop around one of three trips: a product of 2 x 4 x 8 x 16 FLOPs in each."""
    text = """HloModule jit_f

%inner (s: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %s = (s32[], f32[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[4,8]{1,0} constant({...})
  %b = f32[8,16]{1,0} constant({...})
  %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,16]{1,0}) tuple(%i, %dot.1)
}

%three (s.1: (s32[], f32[4,16])) -> pred[] {
  %s.1 = (s32[], f32[4,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%outer (s.2: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %s.2 = (s32[], f32[4,16]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[4,16]{1,0}) while(%s.2), condition=%three, body=%inner
}

%open (s.3: (s32[], f32[4,16])) -> pred[] {
  %s.3 = (s32[], f32[4,16]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%s.3), index=0
  %n.3 = s32[] get-tuple-element(%s.3), index=0
  ROOT %less.3 = pred[] compare(%i.3, %n.3), direction=LT
}

ENTRY %main (x: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %x = (s32[], f32[4,16]{1,0}) parameter(0)
  ROOT %while.2 = (s32[], f32[4,16]{1,0}) while(%x), condition=%open, body=%outer
}
"""

    def flops(*trips):
        return sum(work.times * work.flops for work in read_works(text, *trips))

    assert (flops(), flops(1), flops(10)) == (3 * 1024, 3 * 1024, 30 * 1024)
    products = [each.times for each in read_instructions(text, 10) if each.op == "dot"]
    assert products == [30]


def test_the_line_of_our_code():
    sources = {work.what: work.source for work in read_works(TEXT)}
    assert sources["__cudnn$convForward"] == "models/blocks.py:172"  # what calls the kernel
    assert sources["loop_silu_fusion"] == "models/blocks.py:172"  # by what the fusion holds
    assert sources["copy"] == ""


def test_a_program_that_has_no_gradient_has_no_optimizer():
    text = TEXT.replace("jvp()", "f")
    assert OPTIMIZER not in {work.kind for work in read_works(text)}


@each_row(
    ("work", "expected"),
    [
        # Bound by memory, by the peak of each dtype, by the launch.
        (Work(ELEMENTWISE, "", 10**9), 1e9 / (0.91 * 3352.32e9)),
        (Work(PRODUCTS, "", 10**6, 10**12), 1e12 / (0.80 * 989e12)),
        (Work(PRODUCTS, "", 10**6, 10**12, "tf32"), 1e12 / (0.80 * 494.5e12)),
        (Work(PRODUCTS, "", 10**6, 10**12, "float32"), 1e12 / (0.80 * 2 * 132 * 128 * 1.98e9)),
        (Work(CONVOLUTIONS, "", 10**6, 10**12), 1e12 / (0.6 * 989e12)),
        (Work(COPIES, "", 8), 3e-6),
        # A head of 40 takes the time of 64, one of 160 that of 256; none is wider.
        (Work(ATTENTION, "", 0, 10**12, head=40), 1e12 * 64 / 40 / (0.41 * 989e12)),
        (Work(ATTENTION, "", 0, 10**12, head=160, backward=True), 1e12 * 256 / 160 / (0.50 * 989e12)),
        (Work(ATTENTION, "", 0, 10**12, head=512), 1e12 / (0.59 * 989e12)),
        # Over NVLink; over the network,
        (Work(COMMUNICATION, "", 10**9, group=tuple(range(8))), 1e9 / (0.81 * 450e9)),
        # from each host by the ports of all that take part.
        (Work(COMMUNICATION, "", 10**9, group=(0, 8)), 1e9 / (0.81 * 50e9)),
        (Work(COMMUNICATION, "", 10**9, group=tuple(range(4)) + tuple(range(8, 12))), 1e9 / (0.81 * 200e9)),
        (Work(COMMUNICATION, "", 10**9, group=tuple(range(16))), 1e9 / (0.81 * 400e9)),
    ],
)
def test_seconds(work, expected):
    assert seconds(work, H100, 8) == pytest.approx(expected)


@each_row(
    ("name", "share"),
    [
        ("a100-40", 0.73),
        ("rtx4090", 0.95),
        ("l4", 0.59),  # held to 72 W
        ("h200", 0.62),
        ("b200", 0.62),
        ("rtx5090", 0.85),
    ],
)
def test_every_card_has_a_share_for_attention(name, share):
    gpu = GPUS[name]
    work = Work(ATTENTION, "", 0, 10**13, head=128)
    assert seconds(work, gpu, 1) == pytest.approx(1e13 / (share * gpu.bfloat16))


def test_sums_and_the_longest():
    works = [Work(COPIES, "a", 10**9, times=3), Work(ELEMENTWISE, "b", 2 * 10**9), Work(COPIES, "c", 10**6)]
    kinds = by_kind(works, H100, 1)
    assert list(kinds) == [ELEMENTWISE, COPIES]
    a_gigabyte = 1 / (EFFICIENCY.memory * 3352.32)
    assert kinds[COPIES] == {
        "count": 4,
        "bytes": 3 * 10**9 + 10**6,
        "flops": 0,
        "seconds": pytest.approx(3.0 * a_gigabyte + 3e-6),
    }
    assert [entry["what"] for entry in longest(works, H100, 1, 2)] == ["a", "b"]
    assert longest(works, H100, 1)[0]["seconds"] == pytest.approx(3 * a_gigabyte)


def facts(**changes):
    """The facts of a compilation, with two works."""
    works = [
        Work(PRODUCTS, "__cublas$lt$matmul", 10**6, 10**13),
        Work(COMMUNICATION, "all-reduce", 10**9, group=(0, 1)),
    ]
    found = {
        "peak_bytes": 50 * 2**30,
        "argument_bytes": 2**30,
        "temporary_bytes": 2**30,
        "compile_seconds": 60.0,
    }
    return (
        found | {"works": [vars(work) for work in works], "collectives": {}, "bytes_accessed": 1e6} | changes
    )


@each_row(
    ("gib", "fraction", "devices", "fits"),
    [
        (59, None, 1, True),
        (60, None, 1, False),
        (70, "0.9", 1, True),
        (78, "1.0", 1, True),
        (78, "1.0", 2, False),
    ],
)
def test_whether_a_program_fits_into_what_jax_takes(gib, fraction, devices, fits, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if fraction:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    assert _judge_gpu(facts(peak_bytes=gib * 2**30), H100, devices, 8, 4, 1e13)["fits"] is fits


def test_the_peak_is_that_of_the_arithmetic_that_most_is_in():
    works = [Work(CONVOLUTIONS, "", 0, 10**12, "tf32", times=3), Work(PRODUCTS, "", 0, 2 * 10**12)]
    judged = _judge_gpu(facts(works=[vars(work) for work in works]), H100, 1, 1, 4, None)
    assert judged["flops"] == 5e12
    estimate = 3e12 / (0.6 * 494.5e12) + 2e12 / (0.80 * 989e12)
    assert judged["mfu"] == pytest.approx(5e12 / estimate / 494.5e12)


def test_a_plan_for_gpus_in_lines(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    judged = _judge_gpu(facts(), H100, 2, 2, 4, 8e12)
    estimate = 1e13 / (0.80 * 989e12)
    assert judged["estimated_seconds"] == pytest.approx(estimate)
    assert judged["mfu"] == pytest.approx(8e12 / estimate / 989e12)
    known = {"topology": "h100:2", "device_kind": H100.kind, "devices": 2, "mesh": {"data": 2}}
    found = Plan(**known, pairs_per_device=4, **judged)
    said = "\n".join(describe_plan(found))
    assert "peak 50 GiB of 59.3 GiB on each device: fits" in said
    assert "75% (XLA_PYTHON_CLIENT_MEM_FRACTION; launch/gpu.sh sets 0.9)" in said
    assert f"estimate: {estimate:.4g} s a step, {4 / estimate:.4g} pairs/s on each device, MFU 64.0%" in said
    slowest = estimate + 1e9 / (0.81 * 450e9)
    assert f"if nothing hid them: {4 / slowest:.4g} pairs/s" in said
    assert [line.split()[4] for line in explain(found)] == ["__cublas$lt$matmul", "all-reduce"]


@each_row(
    ("topology", "expected"),
    [
        ("h100", ("h100", 1, 1)),
        ("rtx4090:1", ("rtx4090", 1, 1)),
        ("h100:8", ("h100", 1, 8)),
        ("b200:2x8", ("b200", 2, 8)),
    ],
)
def test_topologies_of_gpus(topology, expected):
    name, *numbers = expected
    assert absent_gpu.is_gpu(topology)
    assert absent_gpu.parse_topology(topology) == (GPUS[name], *numbers)


@pytest.mark.parametrize("topology", ["h100:0", "h100:2x", "h100:2x2x2", "h100:two"])
def test_a_topology_that_is_written_otherwise_is_refused(topology):
    with pytest.raises(
        UserError, match=f"--topology={topology}: after the colon .* as in h100:8, .* h100:2x8"
    ):
        absent_gpu.parse_topology(topology)


def test_a_topology_of_cards_before_ampere_is_refused_with_the_reason():
    assert absent_gpu.is_gpu("v100:8")
    assert not absent_gpu.is_gpu("v5e:2x2")
    with pytest.raises(UserError, match="--topology = 'v100': cannot be used: Volta has no bfloat16"):
        absent_gpu.find_devices("v100:8")


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the compiler is here")
def test_without_the_compiler_a_topology_of_gpus_is_refused():
    with pytest.raises(UserError, match=r"--topology=h100: .* pip install 'dspo_jax\[plan-gpu\]'"):
        absent_gpu.find_devices("h100")
