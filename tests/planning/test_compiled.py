"""What is read off a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tables import each_row

from dspo_jax.kernels.flash import kernel_flops
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.planning.program_text import (
    array_bytes,
    assigned_bytes,
    collectives,
    kernels,
    loop_factor,
    read_instructions,
)

# As the TPU's compiler writes it, shortened: a transfer that goes on in a second fusion, a kernel inside a
# loop of six, whose condition alone tells its length, and attributes that go over several lines and end as a
# computation does.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused (p: bf16[4,1024]) -> bf16[4,1024] {
  %p = bf16[4,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}

%called (p: bf16[70]) -> bf16[70] {
  %p.4 = bf16[70]{0} parameter(0)
  ROOT %all-reduce.5 = bf16[70]{0} all-reduce(%p.4), channel_id=5, to_apply=%add
}, execution_thread="sparsecore"

%offloaded (p: bf16[70]) -> bf16[70] {
  %p.3 = bf16[70]{0} parameter(0)
  ROOT %all-reduce.5.cloned.1 = bf16[70]{0} call(%p.3), to_apply=%called
}, execution_thread="sparsecore"

%continued (p: bf16[4,1024]) -> bf16[16,1024] {
  %p.2 = bf16[4,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered.2 = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=3, dimensions={0}
}

%body (s: (s32[], bf16[8,1024])) -> (s32[], bf16[8,1024]) {
  %s = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %fusion.1 = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%s), calls=%fused, \
backend_config={"estimated_cycles":"100"}
  %fusion.3 = bf16[16,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%s), calls=%continued
  %splash_mha_fwd.1 = (f32[2,8,4096]{2,1,0}, bf16[2,8,4096,40]{3,2,1,0}) custom-call(%a), \
custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,8,2]{2,1,0}, bf16[2,8,40,4096]{3,2,1,0}, \
bf16[2,8,40,256]{3,2,1,0}, bf16[2,8,40,256]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)"}
  ROOT %tuple.31 = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)}) tuple(%s, %fusion.1)
}

%condition (t: (s32[], bf16[8,1024])) -> pred[] {
  %constant.38 = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%t, %constant.38), direction=LT
}

ENTRY %main (x: bf16[8,1024]) -> bf16[8,1024] {
  %x = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.4 = (f32[8]{0}, f32[3,3]{1,0}) all-reduce(%x), to_apply=%add
  %all-reduce.5.call-start = ((bf16[70]), bf16[70]{0}, u32[]) async-start(%x), \
async_execution_thread="sparsecore", calls=%offloaded
  %collective-permute-start.1 = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x)
  %all-gather-start.1 = (f32[3,5]{1,0:T(8,128)}, f32[12,5]{1,0:T(8,128)}) all-gather-start(%x), \
channel_id=4, backend_config={"collective_backend_config":{"is_sync":true}}
  %reduce-scatter-start.1 = ((f32[8,5]{1,0}, bf16[8]), (f32[2,5]{1,0}, bf16[2])) reduce-scatter-start(%x)
  %fusion.2 = bf16[8,1024]{1,0} fusion(%x), calls=%other, backend_config={"estimated_cycles":"50"}
  ROOT %while.13 = (s32[]{:T(128)}, bf16[8,1024]{1,0}) while(%x), condition=%condition, body=%body
}
"""


def test_the_text_of_a_tpu_program():
    instructions = list(read_instructions(TPU_TEXT))
    assert {each.name: each.times for each in instructions if each.op == "fusion"} == {
        "fusion.1": 6,
        "fusion.2": 1,
        "fusion.3": 6,
    }
    gathered = 6 * 2 * 16 * 1024  # by fusions in the loop
    assert collectives(instructions) == {
        # Of the two in the entry computation the second is started there and runs on another core.
        "all-reduce": {"count": 2, "bytes": 4 * (8 + 9) + 2 * 70, "asynchronous": 2 * 70},
        "all-gather": {"count": 6 + 1, "bytes": gathered + 4 * 12 * 5, "asynchronous": gathered},
        "collective-permute": {"count": 1, "bytes": 2 * 8, "asynchronous": 2 * 8},
        "reduce-scatter": {"count": 1, "bytes": 4 * 2 * 5 + 2 * 2, "asynchronous": 4 * 2 * 5 + 2 * 2},
    }
    assert loop_factor(instructions) == pytest.approx((50 + 6 * 100) / (50 + 100))
    ((name, operands, size, times),) = kernels(instructions)
    assert (name, times) == ("splash_mha_fwd.1", 6)
    assert operands == [(1, 8, 2), (2, 8, 40, 4096), (2, 8, 40, 256), (2, 8, 40, 256)]
    assert size == 16 + 2 * 2 * 8 * 40 * (4096 + 2 * 256) + 4 * 2 * 8 * 4096 + 2 * 2 * 8 * 4096 * 40
    # Two products of 4096 queries with 256 keys, in heads that fill the 128 lanes.
    assert kernel_flops(name, operands, 128) == 2 * 2 * (2 * 8) * 4096 * 256 * 128


def test_loops_and_collectives_of_a_real_program():
    mesh = make_mesh({"data": 8})

    def step(x, _):
        return jax.lax.psum(jnp.sin(x), "data"), None

    def f(x):
        return jax.lax.scan(step, x, length=5)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros((3, 4))).compile().as_text()
    found = collectives(read_instructions(text))
    assert found == {"all-reduce": {"count": 5, "bytes": 5 * 4 * 12, "asynchronous": 0}}


@each_row(
    ("written", "size"),
    [
        ("f32[]", 4),
        ("pred[3]", 3),
        ("(bf16[2,3]{1,0}, s8[5]{0:T(8,128)(4,1)})", 17),
        ("f8e4m3fn[7]", 7),
        ("s4[8]", 8),
    ],
)
def test_bytes_of_a_type(written, size):
    assert array_bytes(written) == size


BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <488 reduce_sum.800 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 122, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
 value: <37497 param.165 @0> (size=4096,offset=0): f32[32,32]{1,0:T(8,128)}
allocation 2: size 1024, parameter 3, shape |f32[256]| at ShapeIndex {}:
allocation 3: size 70000, color 1, preallocated-temp:
allocation 4: size 8192, preallocated-temp:
allocation 5: size 64, output shape is |(f32[], f32[3])|, maybe-live-out:
"""


def test_the_text_of_a_tpu_programs_buffers():
    arguments = 4096 + 1024
    assert assigned_bytes(BUFFERS) == (arguments, 512 + arguments + 8192 + 64)
