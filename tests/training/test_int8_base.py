"""Runs with LoRA whose frozen base is in int8: what is stored so, the step, meshes and refusals."""

import importlib.util
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tables import each_row
from tiny_run import make_config, read_batches

from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models import quantized
from dspo_jax.parallel.mesh import make_mesh, shard_batch
from dspo_jax.parallel.rules import place
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.weights.layout import flatten

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="needs the package qwix: pip install 'dspo_jax[quant]'"
)
DPO = {"objective.name": "diffusion_dpo", "objective.beta": 20.0, "lora.rank": 2}


@pytest.fixture(scope="module")
def shallow_pipe(shallow_model):
    return load_pipeline(shallow_model)


def start(pipe, config, mesh, abstract=False):
    settings = parse(config)
    return make_state(make_task(settings, pipe), mesh, make_adapters(settings, pipe), abstract=abstract)


@needs_qwix
def test_only_the_kernels_of_blocks_are_bytes_and_policy_and_reference_share_them(
    shallow_model, shallow_pipe, tiny_pairs
):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    config = make_config(shallow_model, tiny_pairs, {**DPO, "reference_dtype": "int8"})
    state, reference = start(shallow_pipe, config, mesh)
    _, shapes = start(shallow_pipe, config, mesh, abstract=True)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), reference) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    found = flatten(reference)
    for name in shallow_pipe.components:
        for path, leaf in flatten(shallow_pipe.read_params(name, "float32")).items():
            stored = np.asarray(quantized.dequantize(found[f"{name}.{path}"]))
            step = np.abs(leaf).max(tuple(range(leaf.ndim - 1)), keepdims=True) / 127.5
            error = np.abs(stored - leaf)
            assert (error <= (0.5001 * step if path.endswith("kernel") else 0)).all(), path
    kinds = {path: quantized.is_quantized(found[path]) for path in found}
    assert kinds["unet.mid_block.attentions.0.proj_in.kernel"]
    assert kinds["text_encoder.text_model.encoder.layers.0.mlp.fc1.kernel"]
    for path in ("unet.conv_in.kernel", "unet.conv_out.kernel", "unet.time_embedding.linear_1.kernel"):
        assert not kinds[path]
    assert not any(stored for path, stored in kinds.items() if "lora_" in path)

    batch = shard_batch(read_batches(tiny_pairs, batch_size=8, count=1)[0], mesh)
    loss, _ = jax.jit(state.task.loss, static_argnums=1)(
        state.params, state.task, reference, batch, jax.random.key(0)
    )
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)


def drawn(params):
    draw = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: np.float32(0.3 * draw.standard_normal(leaf.shape)), params)
    return place(values, jax.tree.map(lambda leaf: leaf.sharding, params))


@pytest.mark.ci
@needs_qwix
def test_the_loss_is_the_same_on_a_mesh_that_splits_the_bytes(shallow_model, shallow_pipe, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, {**DPO, "reference_dtype": "int8"})
    batch, losses = read_batches(tiny_pairs, batch_size=8, count=1)[0], []
    for sizes in ({"data": 1}, {"fsdp": 2, "tensor": 2}):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        state, reference = start(shallow_pipe, config, mesh)
        loss, _ = jax.jit(on_mesh(state.task.loss, mesh), static_argnums=1)(
            drawn(state.params), state.task, reference, shard_batch(batch, mesh), jax.random.key(0)
        )
        losses.append(float(loss))
    attention = reference["unet"]["mid_block"]["attentions"]["0"]["transformer_blocks"]["0"]["attn1"]
    assert attention["to_q"]["kernel"].qvalue.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert attention["to_q"]["kernel"].scale.sharding.is_fully_replicated
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(np.log(2), rel=1e-3)


@needs_qwix
@each_row(
    "changes, words",
    [
        ({}, ["config.reference_dtype = 'int8'", "--config.lora.rank=8"]),
        ({"lora.rank": 2, "reference.model": "other", "reference.every": 5}, ["config.reference.every = 5"]),
    ],
    ids=["without adapters", "a reference whose kernels move"],
)
def test_what_would_not_stay_one_base_is_refused(changes, words):
    config = make_config("model", "pairs", {"reference_dtype": "int8", **changes})
    with pytest.raises(UserError) as raised:
        parse(config)
    assert all(word in str(raised.value) for word in words)


def test_without_qwix_the_key_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"config\.reference_dtype = 'int8'.*dspo_jax\[quant\]"):
        parse(make_config("model", "pairs", {"reference_dtype": "int8", "lora.rank": 2}))
