"""The forms of layers for the CPU, one of them for TPUs too: equal to the plain ones, in no other program."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tables import each_row

from dspo_jax.kernels import cpu
from dspo_jax.kernels.device_kind import DeviceKind, on_mesh
from dspo_jax.models import blocks, lora, norms
from dspo_jax.parallel.mesh import make_mesh

CPU, GPU = DeviceKind("cpu", "cpu"), DeviceKind("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
TPU = DeviceKind("tpu", "TPU v5")


@pytest.fixture
def trace_for(monkeypatch):
    """Traces what follows for a kind of device."""

    def trace_for(device: DeviceKind | None) -> None:
        for module in (cpu, blocks):
            monkeypatch.setattr(module, "current_device_kind", lambda batch: device)

    return trace_for


def layers() -> dict[str, Callable[[], nnx.Module]]:
    rngs = nnx.Rngs(0)
    return {
        "linear": lambda: blocks.linear(6, 10, rngs=rngs),
        "convolution of one position": lambda: blocks.conv2d(6, 10, 1, rngs=rngs),
        "the same with stride": lambda: blocks.conv2d(6, 10, 1, stride=2, rngs=rngs),
        "convolution": lambda: blocks.conv2d(6, 10, 3, rngs=rngs),
        "convolution with stride": lambda: blocks.conv2d(6, 10, 3, stride=2, rngs=rngs),
        "convolution with no padding": lambda: blocks.conv2d(6, 10, 2, stride=2, padding=0, rngs=rngs),
        "doubling": lambda: blocks.Upsample2D(6, rngs=rngs),
        "group norm": lambda: norms.GroupNorm(6, 2, 1e-5),
    }


def value_and_gradients(layer: nnx.Module, x: jax.Array) -> Any:
    graph, params = nnx.split(layer)

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = nnx.merge(graph, params)(x)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * weights).sum(), out

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads


@pytest.mark.ci
@each_row("name", layers())
@each_row("size", [(4, 4), (5, 3)])
def test_values_and_gradients_are_those_of_the_plain_layer(name, size, trace_for):
    layer = layers()[name]()
    draw = np.random.default_rng(0)
    for _, param in nnx.iter_graph(layer):
        if isinstance(param, nnx.Param):
            param[...] = jnp.asarray(draw.normal(size=param.shape), jnp.float32)
    x = jnp.asarray(draw.normal(size=(3, *size, 6)), jnp.float32)
    results = []
    for device in (None, CPU):
        trace_for(device)
        results.append(value_and_gradients(layer, x))
    plain, other = map(jax.tree.leaves, results)
    assert len(plain) == len(other) > 2
    for expected, actual in zip(plain, other, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@each_row("name", ["convolution", "convolution with stride", "doubling"])
def test_in_a_loop_every_convolution_has_the_order_of_axes_that_xla_is_fast_in(name, trace_for):
    trace_for(CPU)
    graph, params = nnx.split(layers()[name]())

    def loss(params, x):
        return (nnx.merge(graph, params)(x) ** 2).sum()

    def parts(params, x):
        return jax.lax.map(lambda part: jax.grad(loss, argnums=(0, 1))(params, part), x)

    text = jax.jit(parts).lower(params, jnp.zeros((5, 3, 8, 8, 6))).compile().as_text()
    orders = re.findall(r" convolution\(.*?dim_labels=(\S+?)[,\s]", text)
    assert len(orders) >= 3
    assert set(orders) == {"b01f_01io->b01f"}


def primitives(program: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(primitive, shape of its second operand) of the products of a program, in order."""
    found = []
    for equation in program.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += primitives(inner)
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            found.append((equation.primitive.name, equation.invars[1].aval.shape))
    return found


def products(layer: nnx.Module, batch: int, wrap: Callable[..., Any] = lambda f: f) -> Any:
    # A function of its own, or what was traced for another device would be found again.
    return primitives(jax.make_jaxpr(lambda x: wrap(layer)(x))(jnp.zeros((batch, 4, 4, 6))).jaxpr)


def test_a_program_for_another_device_has_the_plain_layers(trace_for):
    made = {name: make() for name, make in layers().items()}
    expected = {
        "linear": [("dot_general", (6, 10))],
        "convolution of one position": [("conv_general_dilated", (1, 1, 6, 10))],
        "the same with stride": [("conv_general_dilated", (1, 1, 6, 10))],
        "convolution": [("conv_general_dilated", (3, 3, 6, 10))],
        "convolution with stride": [("conv_general_dilated", (3, 3, 6, 10))],
        "convolution with no padding": [("conv_general_dilated", (2, 2, 6, 10))],
        "doubling": [("conv_general_dilated", (3, 3, 6, 6))],
        "group norm": [],
    }
    # A linear layer's kernel is the same in two dimensions.
    forms = {"convolution of one position", "doubling", "group norm"}
    for device, differing in ((GPU, {"doubling"}), (TPU, set()), (None, set()), (CPU, forms)):
        trace_for(device)
        assert {name for name, layer in made.items() if products(layer, 8) != expected[name]} == differing


@each_row(
    ("device", "channels", "merged"), [(TPU, 256, True), (TPU, 255, False), (GPU, 8, True), (None, 8, False)]
)
def test_convolutions_after_doubling_are_merged_on_gpus_and_wide_ones_on_tpus(
    device, channels, merged, trace_for
):
    layer = blocks.Upsample2D(channels, rngs=nnx.Rngs(0))
    trace_for(device)
    jaxpr = jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((1, 4, 4, channels))).jaxpr
    side, times = (2, 4) if merged else (3, 1)
    assert primitives(jaxpr) == [("conv_general_dilated", (side, side, channels, channels))] * times


def test_the_mesh_in_use_says_what_a_program_is_for():
    layer, mesh = blocks.Upsample2D(6, rngs=nnx.Rngs(0)), make_mesh({"data": -1})

    def for_mesh(f):
        return on_mesh(f, mesh)

    assert products(layer, 8, for_mesh) == [("conv_general_dilated", (2, 2, 6, 6))] * 4
    # A batch that the mesh does not split, or devices without a mesh: nothing is known.
    for plain in (products(layer, 3, for_mesh), products(layer, 8)):
        assert plain == [("conv_general_dilated", (3, 3, 6, 6))]


def test_an_odd_size_is_cut_before_the_plain_convolution(trace_for):
    layer, x = blocks.Upsample2D(6, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
    trace_for(CPU)
    expected = layer.conv(blocks.double(x)[:, :7, :5])
    np.testing.assert_array_equal(layer(x, (7, 5)), expected)
    assert np.abs(layer(x, (8, 6))[:, :7, :5] - expected).max() > 1e-3


def test_an_adapter_beside_the_convolution_is_not_lost(trace_for):
    layer = blocks.Upsample2D(6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    trace_for(CPU)
    lora.attach(layer, {"conv": lora.Adapter(2)}, nnx.Rngs(1))
    kernel = layer.conv.lora_B.kernel
    kernel[...] = jnp.zeros(kernel.shape)
    base = layer(x)
    # Bit for bit, or a policy would begin off its reference.
    bias = layer.conv.bias[...][None, None, None]
    np.testing.assert_array_equal(base, blocks.convolve_doubled(x, layer.conv.kernel[...]) + bias)
    kernel[...] = jnp.ones(kernel.shape)
    expected = layer.conv(blocks.double(x))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - base).max() > 0.1
