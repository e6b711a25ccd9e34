"""Dropout of adapters: what a layer drops, and that a step's draws follow from its examples alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tables import each_row
from tiny_run import make_config, read_batches

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models import lora
from dspo_jax.models.blocks import conv2d, linear
from dspo_jax.parallel.mesh import make_mesh, replicated, shard_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.training.step import mean_gradient
from dspo_jax.weights.layout import flatten

RATE = 0.25


class Layer(nnx.Module):
    def __init__(self, kind):
        self.one = linear(6, 5, rngs=nnx.Rngs(0)) if kind == "linear" else conv2d(6, 5, 3, rngs=nnx.Rngs(0))


def run_layer(kind, params, keys, x):
    """The output of one adapted layer for rows `x` of examples with the keys."""
    tree = lora.with_dropout({"one": params}, RATE, keys)
    layer = Layer(kind)
    lora.attach(layer, lora.find_adapters(tree), nnx.Rngs(0))
    graph, state = nnx.split(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
    return np.asarray(nnx.merge(graph, state).one(jnp.asarray(x)))


def shapes(kind):
    window = () if kind == "linear" else (3, 3)
    return (*window, 6, 5), (*window, 6, 2), (*(1 for _ in window), 2, 5)


def convolve(x, kernel):
    """A 3 x 3 convolution with padding 1, or a matrix product, in float64."""
    if kernel.ndim == 2:
        return np.float64(x) @ kernel
    _, height, width, _ = x.shape
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ np.float64(kernel[i, j])
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


def find_dropped(keys, x):
    """What becomes of `x`, by a layer whose kernel is 0 and whose adapter is the identity."""
    identity = np.eye(6, dtype=np.float32)
    params = {
        "kernel": np.zeros((6, 6), np.float32),
        "bias": np.zeros(6, np.float32),
        "lora_A": {"kernel": identity},
        "lora_B": {"kernel": identity},
    }
    return run_layer("linear", params, keys, x)


@each_row("kind", ["linear", "convolution"])
@each_row("dora", [False, True])
def test_the_input_of_a_is_dropped_and_nothing_else(kind, dora):
    """Of DoRA, as in PEFT, the share that its lengths add to the layer's output is of the dropped input."""
    random, keys = np.random.default_rng(0), jax.random.split(jax.random.key(1), 2)
    kernel, a, b = (random.standard_normal(shape).astype(np.float32) for shape in shapes(kind))
    bias = random.standard_normal(5).astype(np.float32)
    x = random.standard_normal((4, 3, 3, 6)).astype(np.float32)  # two rows an example
    dropped = find_dropped(keys, x)
    kept = dropped != 0
    np.testing.assert_allclose(dropped, np.where(kept, x / (1 - RATE), 0), rtol=1e-6)
    params = {"kernel": kernel, "bias": bias, "lora_A": {"kernel": a}, "lora_B": {"kernel": b}}
    added = convolve(dropped, a) @ np.float64(b.reshape(b.shape[-2:]))
    expected = convolve(x, kernel) + bias + added
    if dora:
        columns = np.float64(kernel).reshape(-1, 5) + np.float64(a).reshape(-1, 2) @ b.reshape(2, 5)
        params["lora_magnitude_vector"] = np.float32([1, 2, 3, 4, 5])
        factor = np.arange(1, 6) / np.linalg.norm(columns, axis=0)
        expected = convolve(x, kernel) + bias + (factor - 1) * convolve(dropped, kernel) + factor * added
    np.testing.assert_allclose(run_layer(kind, params, keys, x), expected, rtol=1e-4, atol=1e-5)


def test_a_share_is_dropped_of_every_row_and_the_mean_stays():
    keys = jax.random.split(jax.random.key(2), 3)
    dropped = find_dropped(keys, np.ones((6, 20_000 // 6, 6), np.float32))
    share = (dropped == 0).mean((1, 2))
    np.testing.assert_allclose(share, RATE, atol=5 * np.sqrt(RATE * (1 - RATE) / 20_000))
    np.testing.assert_allclose(dropped.mean((1, 2)), 1, atol=0.03)
    rows = (dropped == 0).reshape(6, -1)
    agree = np.mean(rows[:, None] == rows[None], axis=-1)  # of independent rows 1 - 2 p (1 - p)
    np.testing.assert_allclose(agree[~np.eye(6, dtype=bool)], 1 - 2 * RATE * (1 - RATE), atol=0.02)


def test_each_example_has_its_own_whatever_the_batch():
    keys = jax.random.split(jax.random.key(3), 3)
    x = np.ones((6, 50, 6), np.float32)
    whole = find_dropped(keys, x)
    np.testing.assert_array_equal(find_dropped(keys[1:2], x[:2]), whole[2:4])
    two = lora.with_dropout(
        {name: {"lora_A": {"kernel": np.zeros((6, 2))}} for name in ("first", "second")}, RATE, keys
    )
    data = [np.asarray(jax.random.key_data(two[name]["lora_dropout"]["keys"])) for name in two]
    assert (data[0] != data[1]).any(axis=-1).all()


@pytest.mark.ci
def test_a_step_drops_the_same_on_every_mesh_in_parts_and_rematerialised(shallow_model, tiny_pairs):
    (batch,) = read_batches(tiny_pairs, batch_size=8, count=1)
    found = {}
    for name, sizes, changes in (
        ("one device", {}, {}),
        ("mesh", {"data": 2, "fsdp": 2, "tensor": 2}, {"accumulation": 2, "remat": "blocks"}),
    ):
        changes = {
            **{"lora.rank": 2, "lora.dropout": 0.3, "lora.dora": True, "train_text_encoder": True},
            **{"objective.name": "diffusion_dpo", "objective.beta": 2000.0, **changes},
        }
        settings, pipe = parse(make_config(shallow_model, tiny_pairs, changes)), load_pipeline(shallow_model)
        mesh = make_mesh(sizes or {"data": 1}, None if sizes else jax.devices()[:1])
        draw = np.random.default_rng(0).normal
        adapters = jax.tree.map(
            lambda leaf, draw=draw: np.float32(draw(0, 0.1, leaf.shape)), make_adapters(settings, pipe)
        )
        task = make_task(settings, pipe)
        state, reference = make_state(task, mesh, adapters)
        key = jax.device_put(jax.random.key(7), replicated(mesh))
        run = jax.jit(on_mesh(mean_gradient, mesh), static_argnums=1)
        (loss, _), grads = run(state.params, task, reference, shard_batch(batch, mesh), key)
        found[name] = {"loss": float(loss)} | {
            path: np.linalg.norm(leaf) for path, leaf in flatten(grads).items()
        }
    # Policy and reference have the same adapters: what differs is dropped.
    assert abs(found["one device"]["loss"] - np.log(2)) > 0.01
    assert found["mesh"] == pytest.approx(found["one device"], rel=1e-3)
