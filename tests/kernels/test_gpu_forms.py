"""Layers in the forms for NVIDIA GPUs: equal to the plain ones, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspo_jax.kernels import gpu
from dspo_jax.models import norms
from dspo_jax.models.transformer_blocks import GEGLU


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def values_and_gradients(f, *arrays):
    """The result of `f`, and what a random gradient of it becomes, in float32."""
    out, backward = jax.vjp(f, *arrays)
    return [np.asarray(leaf, np.float32) for leaf in (out, *backward(normal(9, *out.shape, dtype=out.dtype)))]


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_layer_norm_is_the_plain_one(mean):
    x, scale, bias = mean + normal(0, 2, 5, 16), 1 + 0.1 * normal(1, 16), normal(2, 16)

    def plain(x, scale, bias):
        layer = norms.LayerNorm(16)
        layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
        return layer(x)

    expected = values_and_gradients(plain, x, scale, bias)
    found = values_and_gradients(lambda *arrays: gpu.layer_norm(*arrays, 1e-5), x, scale, bias)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["norm", "gated"])
def test_a_layer_in_bfloat16_is_within_rounding_of_the_plain_one(layer, monkeypatch):
    rngs = nnx.Rngs(0)
    module = norms.LayerNorm(16) if layer == "norm" else GEGLU(16, 8, rngs=rngs)
    graph, params = nnx.split(module)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x = normal(0, 2, 5, 16, dtype=jnp.bfloat16)

    def run(x, *leaves):
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves))(x)

    expected = values_and_gradients(run, x, *jax.tree.leaves(params))
    calls = []
    monkeypatch.setattr(gpu, "is_for_gpu", lambda batch: calls.append(batch) or True)
    found = values_and_gradients(run, x, *jax.tree.leaves(params))
    assert calls == [2]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2**-6, atol=2**-6 * np.abs(theirs).max())


def test_what_a_group_norm_adds_first_is_what_would_have_been_added_before_it():
    x, shift = normal(0, 2, 3, 4, 8), normal(1, 2, 8)
    norm = norms.GroupNorm(8, 2, 1e-5)
    expected = values_and_gradients(lambda x, shift: norm(x + shift[:, None, None]), x, shift)
    found = values_and_gradients(norm, x, shift)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
