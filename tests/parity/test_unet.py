"""`UNet2DCondition` against diffusers' UNet2DConditionModel with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from diffusers import UNet2DConditionModel  # noqa: E402
from torch_modules import (  # noqa: E402
    assert_close,
    assert_gradients_close,
    compile_fast,
    randomize,
    save,
    to_nchw,
    to_nhwc,
)

# Stable Diffusion 1.5: projections by convolution, one number of heads, no attention in the lowest level.
SD15 = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
# Stable Diffusion 2: linear projections, a number of heads for each level.
SD2 = SD15 | {
    "layers_per_block": 1,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# SDXL: pooled text and micro-conditioning join the time embedding, deeper transformers below.
SDXL = SD15 | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "use_linear_projection": True,
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
}


def inputs(channels: int = 4, size: tuple[int, int] = (8, 4)):
    """Latents [2, *size, channels], timesteps [2] and text states [2, 5, 12]."""
    draw = np.random.default_rng(0)
    latents = draw.standard_normal((2, *size, channels), np.float32)
    return latents, np.int32([3, 871]), draw.standard_normal((2, 5, 12), np.float32)


def theirs_of(module, latents, timesteps, text, **added):
    added = {"added_cond_kwargs": {k: torch.from_numpy(v) for k, v in added.items()}} if added else {}
    return module(to_nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(text), **added).sample


ADDED = {
    "text_embeds": np.random.default_rng(2).standard_normal((2, 10), np.float32),
    "time_ids": np.int32([[640, 480, 0, 12, 512, 512], [1024, 1024, 3, 0, 1024, 1024]]),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("config", "added"), [(SD15, {}), (SD2, {}), (SDXL, ADDED)], ids=["sd15", "sd2", "sdxl"]
)
def test_forward_and_gradients_match_diffusers(config, added, tmp_path):
    module = randomize(UNet2DConditionModel(**config))
    model, params = save(module, tmp_path)
    latents, timesteps, text = inputs()
    target = np.random.default_rng(1).standard_normal(latents.shape, np.float32)

    @compile_fast
    def gradients_of(params):
        def loss(params):
            prediction = model.apply(params, latents, timesteps, text, **added)
            return jnp.square(prediction - target).mean(), prediction

        return jax.grad(loss, has_aux=True)(params)

    gradients, prediction = gradients_of(params)
    theirs = theirs_of(module, latents, timesteps, text, **added)
    assert_close(prediction, to_nhwc(theirs), 1e-4)
    (theirs - to_nchw(target)).square().mean().backward()
    assert_gradients_close(module, model, gradients, tmp_path)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("config", "added", "size"),
    [
        # Other values than the published ones: both embeddings must follow them.
        (SDXL | {"flip_sin_to_cos": False, "freq_shift": 1}, ADDED, (8, 4)),
        # Inpainting: noisy latents, a mask, and the latents of the masked image.
        (SD2 | {"in_channels": 9}, {}, (8, 4)),
        # Two levels that cannot be halved, 7 x 5 and 4 x 3.
        (SDXL, ADDED, (7, 5)),
    ],
    ids=["sin first", "inpaint", "odd size"],
)
def test_forward_matches_diffusers(config, added, size, tmp_path):
    module = randomize(UNet2DConditionModel(**config))
    model, params = save(module, tmp_path)
    latents, timesteps, text = inputs(model.config["in_channels"], size)
    with torch.no_grad():
        theirs = theirs_of(module, latents, timesteps, text, **added)
    prediction = compile_fast(model.apply)(params, latents, timesteps, text, **added)
    assert_close(prediction, to_nhwc(theirs), 1e-4)


def test_bfloat16_stays_bfloat16_and_near_float32(tmp_path):
    module = randomize(UNet2DConditionModel(**SD15 | {"layers_per_block": 1}))
    model, params = save(module, tmp_path)
    latents, timesteps, text = inputs()
    with torch.no_grad():
        exact = to_nhwc(theirs_of(module, latents, timesteps, text))
    params, latents, text = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, latents, text)
    )
    rounded = compile_fast(model.apply)(params, latents, timesteps, text)
    assert rounded.dtype == jnp.bfloat16
    # A bfloat16 number is good to 2^-9; some twenty roundings in a row add up to a few per cent.
    assert_close(rounded.astype(jnp.float32), exact, 0.05)
