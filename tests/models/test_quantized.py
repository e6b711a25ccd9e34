"""Frozen kernels in int8: their numbers, layers that take them, and runs whose base is stored so."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_model
import tiny_run
import tiny_sd3
from flax import nnx
from tables import each_row

from dspo_jax.models import blocks, lora, quantized
from dspo_jax.models.model import build_model
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.weights.layout import flatten, unflatten

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="needs the package qwix: pip install 'dspo_jax[quant]'"
)
EMOJI = Path(__file__).parents[2] / "examples" / "emoji" / "model"
DPO = {"objective.name": "diffusion_dpo", "objective.beta": 20.0, "lora.rank": 2}


def plain_of(stored):
    """The kernel that int8 gives back: whole numbers times the scale of their output."""
    return (np.float64(stored.qvalue) * np.float64(stored.scale)).astype(np.float32)


def split(params):
    """The tree with the kernels of its blocks quantized, and the plain tree of what these are."""
    stored, plain = {}, {}
    for path, leaf in flatten(params).items():
        inside = any(name in path for name in ("blocks.", "mid_block.", "layers.", "block."))
        chosen = inside and path.endswith(".kernel")
        stored[path] = quantized.quantize(jnp.asarray(leaf), "int8") if chosen else leaf
        plain[path] = plain_of(stored[path]) if chosen else leaf
    return unflatten(stored), unflatten(plain)


@needs_qwix
@each_row("shape", [(40, 7), (3, 3, 8, 5)])
def test_a_kernel_is_rounded_to_steps_of_each_output(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = quantized.quantize(jnp.asarray(kernel), "int8")
    assert stored.qvalue.dtype == jnp.int8
    assert stored.scale.shape == (*(1 for _ in shape[1:]), shape[-1])
    step = np.abs(np.float64(kernel)).reshape(-1, shape[-1]).max(0) / 127.5
    np.testing.assert_allclose(stored.scale.reshape(-1), step, rtol=1e-6)
    # The largest number of an output lies between two steps, and may be taken for either.
    inside = np.abs(kernel) / step < 127
    np.testing.assert_array_equal(np.asarray(stored.qvalue)[inside], np.rint(kernel / step)[inside])
    assert (np.abs(quantized.dequantize(stored) - kernel) <= 0.5001 * step).all()


@needs_qwix
@each_row("layer", [blocks.Upsample2D, partial(blocks.Downsample2D, padding=1)], ids=["up", "down"])
def test_convolutions_of_doubled_and_skipped_pixels_take_quantized_kernels(layer):
    module, plain = (layer(8, rngs=nnx.Rngs(0)) for _ in range(2))
    stored = quantized.quantize(module.conv.kernel[...], "int8")
    quantized.attach(module, ["conv"])
    module.conv.kernel.set_value(stored)
    plain.conv.kernel.set_value(jnp.asarray(plain_of(stored)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 8)), jnp.float32)
    out, back = jax.vjp(module, x)
    expected, expected_back = jax.vjp(plain, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(out)[0], expected_back(expected)[0], rtol=1e-4, atol=1e-4)


NETWORKS = {
    "UNet": (tiny_run.UNET, ["to_q", "to_out.0", "conv1", "ff.net.0.proj"]),
    "MMDiT": (tiny_sd3.NETWORKS["transformer"], ["to_q", "ff.net.0.proj"]),
    "CLIP": (tiny_run.TEXT_ENCODER, ["q_proj", "fc1"]),
    "T5": (tiny_sd3.NETWORKS["text_encoder_3"], ["q", "wo"]),
}


def call(model, params, draw, remat):
    """The output of a network for random inputs."""
    if model.class_name in ("CLIPTextModel", "T5EncoderModel"):
        tokens = jnp.asarray(draw.integers(0, 9, (2, 6)))
        out = model.apply(params, tokens, **({} if model.class_name == "CLIPTextModel" else {"remat": remat}))
        return jax.tree.leaves(out)[0]
    noisy = jnp.asarray(draw.standard_normal((2, 4, 4, 4)), jnp.float32)
    times = jnp.asarray([3, 500])
    if model.class_name == "UNet2DConditionModel":
        words = jnp.asarray(draw.standard_normal((2, 5, 12)), jnp.float32)
        return model.apply(params, noisy, times, words, remat=remat)
    words = jnp.asarray(draw.standard_normal((2, 5, 24)), jnp.float32)
    pooled = jnp.asarray(draw.standard_normal((2, 18)), jnp.float32)
    positions = jnp.asarray(draw.standard_normal((2, 2, 16)), jnp.float32)
    more = {"pooled_projections": pooled, "positions": positions}
    return model.apply(params, noisy, times.astype(jnp.float32), words, remat=remat, **more)


@pytest.mark.ci
@needs_qwix
@pytest.mark.parametrize(
    ("name", "remat"), [("UNet", "dots"), ("MMDiT", "blocks"), ("CLIP", ""), ("T5", "none")]
)
def test_networks_compute_with_the_kernels_that_int8_gives_back(name, remat):
    config, targets = NETWORKS[name]
    model = build_model(config.get("_class_name") or config["architectures"][0], config)
    params = tiny_model.random_params(model, np.random.default_rng(0))
    stored, plain = split(params)
    adapters = lora.init_adapters(params, targets, 2, jax.random.key(0))
    draw = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), leaf.dtype), adapters
    )

    def loss(adapters, base):
        return jnp.square(call(model, lora.combine(base, adapters), np.random.default_rng(2), remat)).sum()

    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(adapters, plain)
    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters, stored)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for path, leaf in flatten(gradient).items():
        wanted = flatten(expected_gradient)[path]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=path)


@pytest.mark.slow
@needs_qwix
def test_the_emoji_model_predicts_with_int8_as_well_as_in_bfloat16():
    """Prints figures of docs/measurements.md: why int8 is there, float8 is not, and adapters are needed."""
    pipe, draw = load_pipeline(EMOJI), np.random.default_rng(0)
    params = {name: pipe.read_params(name, "float32") for name in pipe.components}
    latents, noise = (
        jnp.asarray(draw.standard_normal((32, 1, *pipe.latent_size, 4)), jnp.float32) for _ in range(2)
    )
    times = jnp.asarray(np.linspace(20, 980, 32)[:, None].astype(np.int32))
    noisy = pipe.schedule.add_noise(latents, noise, times)
    prompts = (EMOJI.parent / "prompts.txt").read_text().splitlines()
    words = pipe.tokenize((prompts * 32)[:32])
    batch = prompt_batch(pipe, jnp.asarray(words), pipe.image_size)

    def predict(params, dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return pipe.predict_pairs(params, noisy.astype(dtype), times, batch).astype(jnp.float32)

    predict = jax.jit(predict, static_argnums=1)
    exact = predict(params, "float32")

    def through(kind, chosen):
        def give_back(path, leaf):
            if not chosen(path):
                return leaf
            largest = np.abs(leaf).max(tuple(range(leaf.ndim - 1)), keepdims=True)
            if kind == "int8":
                return np.rint(leaf / largest * 127) * largest / 127
            return np.float32((leaf / largest * 448).astype(ml_dtypes.float8_e4m3fn)) * largest / 448

        return predict(jax.tree_util.tree_map_with_path(give_back, params), "float32")

    def error(found):
        return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))

    def every_kernel(path):
        return path[-1].key == "kernel"

    found = {
        "bfloat16": error(predict(params, "bfloat16")),
        "int8": error(through("int8", quantized.is_stored_so)),
        "int8, ends of the networks too": error(through("int8", every_kernel)),
        "float8_e4m3fn": error(through("float8_e4m3fn", quantized.is_stored_so)),
    }
    # A policy in float32 against its own start in int8: the margin of a winner before the first update.
    reference = through("int8", quantized.is_stored_so)
    gained = ((jnp.square(reference - noise) - jnp.square(exact - noise)).mean((1, 2, 3, 4))) * 1000
    found["implicit reward of an untrained policy, beta 2000"] = float(jnp.sqrt(jnp.square(gained).mean()))
    print("\n".join(f"{name}: {value:.4g}" for name, value in found.items()))
    assert found["int8"] < 1.5 * found["bfloat16"]
    assert found["float8_e4m3fn"] > 3 * found["bfloat16"]
    assert found["int8"] < found["int8, ends of the networks too"]
