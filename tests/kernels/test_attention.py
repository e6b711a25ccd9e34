"""Attention kernels: held to the plain backend, chosen by device and shape, split over a mesh."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from tables import each_row

from dspo_jax.kernels import attention as module
from dspo_jax.kernels import flash
from dspo_jax.kernels.attention import attention, choose, plain_attention
from dspo_jax.kernels.device_kind import (
    DeviceKind,
    current_device_kind,
    device_kind_of,
    on_mesh,
    split_over_heads,
)
from dspo_jax.models import remat
from dspo_jax.parallel.mesh import MESH_AXES, make_mesh

V5P = DeviceKind("tpu", "TPU v5")
H100 = DeviceKind("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
A100 = DeviceKind("gpu", "NVIDIA A100-SXM4-40GB", (8, 0))
B200 = DeviceKind("gpu", "NVIDIA B200", (10, 0))
V100 = DeviceKind("gpu", "Tesla V100-SXM2-16GB", (7, 0))
CPU = DeviceKind("cpu", "cpu")

interpreted = functools.partial(flash.splash_attention, interpret=True)


def make_inputs(queries, keys, heads, head, dtype=jnp.float32, batch=2):
    """Queries, keys, values and the gradient of the output."""
    draw = np.random.default_rng(0)
    return [
        jnp.asarray(draw.normal(size=(batch, length, heads, head)), dtype)
        for length in (queries, keys, keys, queries)
    ]


def value_and_gradients(f):
    """(query, key, value, gradient of the output) -> (output, gradients of the three), jitted."""

    def both(query, key, value, gradient):
        output, backward = jax.vjp(f, query, key, value)
        return output, *backward(gradient)

    return jax.jit(both)


def largest_error(actual, expected):
    """Over the output and each gradient: the largest difference as a share of the largest number."""
    actual, expected = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), each) for each in (actual, expected)
    )
    return max(np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128, of which two are loaded at a time going forward and one going back."""
    monkeypatch.setattr(flash, "_BLOCKS", (128,))
    monkeypatch.setattr(flash, "_KEYS_FORWARD", 256 * 128)
    monkeypatch.setattr(flash, "_KEYS_BACKWARD", 128 * 128)


# 77 keys are padded, 150 queries too; several blocks of everything; a head of more than 128; image and text
# in an odd sequence, and the queries of the image alone.
@each_row(("queries", "keys", "head"), [(150, 77, 40), (256, 512, 160), (157, 157, 64), (80, 157, 64)])
def test_the_tpu_kernel_is_the_plain_backend(queries, keys, head, small_blocks):
    inputs = make_inputs(queries, keys, 1, head, batch=1)
    actual = value_and_gradients(interpreted)(*inputs)
    expected = value_and_gradients(plain_attention)(*inputs)
    assert largest_error(actual, expected) < 2e-6


def test_in_bfloat16_the_tpu_kernel_errs_no_more_than_its_numbers_are_rounded(small_blocks):
    inputs = make_inputs(128, 256, 2, 64, jnp.bfloat16)
    exact = value_and_gradients(plain_attention)(*(x.astype(jnp.float32) for x in inputs))
    error = largest_error(value_and_gradients(interpreted)(*inputs), exact)
    # bfloat16 rounds to a part in 256; queries, weights and results are each rounded once.
    assert 1e-4 < error < 3 / 256
    assert largest_error(value_and_gradients(plain_attention)(*inputs), exact) < 3 / 256


@each_row(
    ("heads", "spec"),
    [(2, P(("data", "fsdp"), None, "tensor")), (1, P(("data", "fsdp"), None, None))],
)
def test_each_device_of_a_mesh_computes_its_examples_and_heads(heads, spec, small_blocks):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    inputs = make_inputs(128, 128, heads, 8)
    parts = []

    def kernel(*arrays):
        parts.append(arrays[0].shape)
        return interpreted(*arrays)

    split = value_and_gradients(functools.partial(split_over_heads, kernel))
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in inputs]
    results = jax.jit(on_mesh(split, mesh))(*placed)
    assert set(parts) == {(1, 128, 1, 8)}
    expected = value_and_gradients(plain_attention)(*inputs)
    assert largest_error(results, expected) < 2e-6
    assert len(results[0].sharding.device_set) == 4


@each_row(
    ("what", "kind", "query", "keys", "dtype", "expected"),
    [
        ("SD1.5, 64x64", V5P, (8, 4096, 8, 40), 4096, "bfloat16", "flash"),
        ("SD1.5, 32x32", V5P, (8, 1024, 8, 80), 1024, "bfloat16", "flash"),
        ("SD1.5, 16x16", V5P, (8, 256, 8, 160), 256, "bfloat16", "plain"),
        ("text and image", V5P, (8, 1357, 24, 64), 1357, "bfloat16", "flash"),
        ("text", V5P, (8, 4096, 8, 40), 77, "bfloat16", "plain"),
        ("a reward", V5P, (8, 4096, 8, 64), 4096, "float32", "plain"),
        ("TPUs have no float16", V5P, (8, 4096, 8, 64), 4096, "float16", "plain"),
        ("the VAE", V5P, (8, 4096, 1, 512), 4096, "bfloat16", "plain"),
        ("SD1.5, 64x64", H100, (8, 4096, 8, 40), 4096, "bfloat16", "cudnn"),
        ("text", H100, (8, 4096, 8, 40), 77, "float16", "cudnn"),
        ("SD1.5, 16x16", H100, (8, 256, 8, 160), 256, "bfloat16", "cudnn"),
        ("text and image", H100, (8, 4173, 24, 64), 4173, "bfloat16", "cudnn"),
        ("SD1.5, 16x16", A100, (8, 256, 8, 160), 256, "bfloat16", "plain"),
        ("SD1.5, 16x16", B200, (8, 256, 8, 160), 256, "bfloat16", "plain"),
        ("SD1.5, 32x32", B200, (8, 1024, 8, 80), 77, "bfloat16", "cudnn"),
        ("SD1.5, 32x32", A100, (8, 1024, 8, 80), 1024, "bfloat16", "cudnn"),
        ("a reward", H100, (8, 4096, 8, 64), 4096, "float32", "plain"),
        ("before Ampere", V100, (8, 4096, 8, 64), 4096, "float16", "plain"),
        ("a CPU", CPU, (8, 4096, 8, 64), 4096, "bfloat16", "plain"),
        ("nobody knows", None, (8, 4096, 8, 64), 4096, "bfloat16", "plain"),
    ],
)
def test_the_backend_follows_from_device_and_shape(what, kind, query, keys, dtype, expected):
    assert choose(kind, query, keys, jnp.dtype(dtype)) == expected, what
    for words in ({"causal": True}, {"masked": True}, {"wanted": "plain"}):
        assert choose(kind, query, keys, jnp.dtype(dtype), **words) == "plain"


def test_a_wanted_kernel_takes_what_it_can():
    text = ((8, 4096, 8, 40), 77, jnp.bfloat16)
    assert choose(V5P, *text) == "plain"
    assert choose(V5P, *text, wanted="flash") == "flash"
    assert choose(V5P, *text, wanted="flash", causal=True) == "plain"
    assert choose(V5P, (8, 4096, 8, 40), 77, jnp.float32, wanted="flash") == "plain"


@each_row(
    ("kind", "wanted", "message"),
    [
        (
            None,
            "flsh",
            "DSPO_ATTENTION = 'flsh': unknown; did you mean 'flash'? (allowed: cudnn, flash, plain)",
        ),
        (
            V5P,
            "cudnn",
            "DSPO_ATTENTION=cudnn: is no kernel for TPU v5 (tpu); set it to plain or flash, or unset",
        ),
        (
            H100,
            "flash",
            "DSPO_ATTENTION=flash: is no kernel for NVIDIA H100 80GB HBM3 (gpu); set it to plain or",
        ),
        (
            V100,
            "cudnn",
            "DSPO_ATTENTION=cudnn: is no kernel for Tesla V100-SXM2-16GB (gpu); set it to plain, or",
        ),
    ],
)
def test_a_wanted_kernel_that_cannot_be_is_refused(kind, wanted, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        choose(kind, (8, 4096, 8, 40), 4096, jnp.bfloat16, wanted=wanted)


def test_the_environment_variable_is_obeyed(monkeypatch):
    inputs = make_inputs(4, 4, 1, 8)[:3]
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    monkeypatch.setenv(module.VARIABLE, "flash")
    with pytest.raises(ValueError, match="DSPO_ATTENTION=flash: is no kernel for cpu"):
        jax.eval_shape(on_mesh(attention, mesh), *inputs)
    monkeypatch.setenv(module.VARIABLE, "plain")
    jax.eval_shape(on_mesh(attention, mesh), *inputs)


def test_a_program_is_for_the_devices_of_its_mesh(monkeypatch):
    mesh = make_mesh({"data": 4, "tensor": 2})
    seen = []

    def see(x):
        seen.extend(current_device_kind(batch) for batch in (8, 6))
        return x

    jax.jit(on_mesh(see, mesh))(1.0)
    assert seen == [CPU, None]  # four devices split a batch of 8, and not one of 6
    with jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("x",), (AxisType.Auto,))):
        assert current_device_kind(8) is None  # nor any batch of somebody else's
    assert current_device_kind(8) is None  # of several devices none in particular
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert current_device_kind(8) == CPU
    with jax.default_device(jax.devices()[1]):
        assert current_device_kind(8) is None


@each_row(
    ("query", "kernels"),
    [((8, 1024, 4, 40), 1), ((8, 256, 4, 40), 0), ((6, 1024, 4, 40), 0)],
)
def test_a_program_for_a_tpu_that_is_not_there_holds_its_kernel(query, kernels):
    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2, 2, 2), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=tpu)
    arrays = [jax.ShapeDtypeStruct(query, jnp.bfloat16)] * 3

    def traced(*arrays):
        with jax.sharding.use_abstract_mesh(mesh):
            return attention(*arrays)

    program = str(jax.make_jaxpr(traced)(*arrays))
    assert program.count("splash_mha_fwd_no_residuals") >= kernels
    assert ("pallas_call" in program) == ("shard_map" in program) == bool(kernels)
    if kernels:
        assert "bf16[2,1024,2,40]" in program  # 8 examples over data and fsdp, 4 heads over tensor


class Block(nnx.Module):
    """Nothing but the kernel."""

    def __call__(self, *arrays):
        return interpreted(*arrays)


@each_row(("policy", "keeps"), [("none", True), ("dots", True), ("blocks", False)])
def test_what_the_kernel_keeps_is_kept_where_layers_outputs_are(policy, keeps):
    inputs = make_inputs(128, 128, 2, 8)[:3]
    run = functools.partial(remat.run_block, Block(), policy)
    backward = jax.eval_shape(lambda *arrays: jax.vjp(run, *arrays)[1], *inputs)
    shapes = {leaf.shape for leaf in jax.tree.leaves(backward)}
    assert ({(2, 2, 128), (2, 2, 128, 8)} <= shapes) == keeps  # a number for each query, and the output


@pytest.mark.ci
@each_row(
    ("queries", "keys", "head", "given"),
    [
        # queries, keys and size of a head as they are handed on; whether keys are masked
        (6, 77, 40, (6, 78, 40, True)),
        (7, 77, 36, (8, 78, 40, True)),
        (93, 93, 64, (94, 94, 64, True)),  # image and text in one sequence
        (7, 64, 8, (8, 64, 8, True)),  # half a block
        (6, 128, 160, (6, 128, 160, False)),
    ],
)
def test_cudnn_is_given_what_it_takes(queries, keys, head, given, monkeypatch):
    seen = []
    compute = jax.nn.dot_product_attention

    def cudnn(query, key, value, *, scale, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        assert key.shape == value.shape
        seen.append((query.shape[1], *key.shape[1::2], key_value_seq_lengths is not None))
        # XLA's form of the same call means the same by lengths.
        return compute(query, key, value, scale=scale, key_value_seq_lengths=key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    inputs = make_inputs(queries, keys, 2, head)
    actual = value_and_gradients(flash.cudnn_attention)(*inputs)
    assert seen == [given]
    assert largest_error(actual, value_and_gradients(plain_attention)(*inputs)) < 2e-6


def check_cudnn(queries, keys, head):
    """For a process that sees a GPU, as this one does not; says which backend computes such heads there."""
    backend = choose(
        device_kind_of(jax.devices()[0]), (2, queries, 2, head), keys, jnp.bfloat16, wanted="cudnn"
    )
    print(backend)
    if backend == "plain":
        return
    inputs = make_inputs(queries, keys, 2, head, jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients(plain_attention)(*(x.astype(jnp.float32) for x in inputs))
    error = largest_error(value_and_gradients(flash.cudnn_attention)(*inputs), exact)
    assert 1e-4 < error < 3 / 256, error


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU")
@pytest.mark.parametrize(
    ("queries", "keys", "head"),
    [
        (1024, 1024, 40),
        (256, 77, 80),
        (3600, 3600, 64),
        (256, 256, 160),
        (64, 77, 160),
        (64, 64, 160),
        (1101, 1101, 64),
    ],
)
def test_on_a_gpu_cudnn_is_the_plain_backend(queries, keys, head):
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "", "PYTHONPATH": path}
    check = f"import test_attention; test_attention.check_cudnn({queries}, {keys}, {head})"
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=root / "tests" / "kernels",
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    if "plain" in done.stdout.splitlines():
        pytest.skip(f"this GPU's cuDNN takes no heads of {head}")


@each_row(
    ("queries", "keys", "head", "expected"),
    [
        # T, S, loaded forward, loaded back
        (4096, 4096, 40, (4096, 4096, 4096, 4096)),
        (4096, 4096, 128, (4096, 4096, 4096, 2048)),
        (4096, 4096, 160, (4096, 4096, 2048, 1024)),
        (1024, 1024, 160, (1024, 1024, 1024, 1024)),
        (256, 77, 160, (256, 128, 128, 128)),
        (3600, 3600, 64, (3840, 3840, 3840, 3840)),
        (9216, 9216, 64, (9216, 9216, 3072, 1536)),
        (1357, 1357, 64, (1536, 1536, 1536, 1536)),  # Stable Diffusion 3 at 512 and 1024 pixels
        (4429, 4429, 64, (4608, 4608, 1536, 1536)),
    ],
)
def test_lengths_are_padded_little_and_loaded_in_large_parts(queries, keys, head, expected):
    tiling = flash.Tiling.of(queries, keys, head)
    blocks = tiling.blocks()
    assert (tiling.queries, tiling.keys, blocks.block_kv, blocks.block_kv_dkv) == expected
    assert tiling.queries % blocks.block_q == tiling.keys % blocks.block_kv_compute == 0
    # `kernel_flops` reads lengths from the last axis of what the kernel is given.
    assert {blocks.q_layout.name, blocks.k_layout.name, blocks.v_layout.name} == {"SEQ_MINOR"}


@each_row(
    ("length", "head", "forward", "backward"),
    [
        (4096, 40, (512, 1024), (512, 256)),
        (4096, 256, (512, 512), (512, 256)),  # two lane tiles a head: twice the vector memory
        (1536, 64, (512, 512), (512, 256)),  # is no multiple of 1024
        (768, 64, (384, 384), (384, 384)),
    ],
)
def test_blocks_of_keys_are_large_going_forward_and_leave_room_for_all_keys_going_back(
    length, head, forward, backward
):
    blocks = flash.Tiling.of(length, length, head).blocks()
    assert (blocks.block_q, blocks.block_kv_compute) == forward
    assert (blocks.block_q_dkv, blocks.block_kv_dkv_compute) == backward
    assert length % blocks.block_q_dkv == blocks.block_kv % blocks.block_kv_compute == 0


def test_the_kernels_flops_are_those_of_their_padded_products():
    operands = [(1, 8, 2), (8, 10, 64, 4096), (8, 10, 64, 1024), (8, 10, 64, 1024), (8, 10, 8, 4096)]
    product = 2 * 8 * 10 * 4096 * 1024 * 128
    assert flash.kernel_flops("splash_mha_fwd_segmented_residuals.3", operands, 128) == 2 * product
    assert flash.kernel_flops("splash_mha_dkv_no_residuals", operands, 256) == 2 * 5 * product
    assert flash.kernel_flops("another", operands, 128) == 0
