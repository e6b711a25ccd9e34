"""The published models at full size with random weights against torch, and what computing in bfloat16 costs.

    pytest -m slow -s tests/parity/test_full_size.py -k "sdxl and unet"

One at a time: SDXL's UNet needs 16 GB of memory and 5 GB of disk, Stable Diffusion 3's transformers 17 GB and
5 GB; of the largest of them and of T5 a few layers stand for all. Every test prints its errors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import published
import pytest

from dspo_jax.models.mmdit import crop_positions
from dspo_jax.models.model import Model, Params
from dspo_jax.weights.components import read_model, read_params

torch = pytest.importorskip("torch")
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402
from torch_modules import assert_close, compile_fast, randomize, to_nchw, to_nhwc  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

pytestmark = pytest.mark.slow

Outputs = dict[str, Any]


def place(tree: dict[str, Any], dtype: str) -> Params:
    """Moves every leaf to the device in `dtype`, in place: the tree is never held twice."""
    for name, child in tree.items():
        tree[name] = place(child, dtype) if isinstance(child, dict) else jnp.asarray(child, dtype)
    return tree


def check(
    make: Callable[[], torch.nn.Module],
    theirs_of: Callable[[torch.nn.Module], Outputs],
    ours_of: Callable[[Model, Params, str], Outputs],
    folder: Path,
) -> None:
    """Bounds and prints the errors of `ours_of(model, params, dtype)` in float32 and in bfloat16.

    The weights are bfloat16 numbers, so that the same ones are used throughout and fill half the disk.
    """
    module = randomize(make())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
        theirs = theirs_of(module)
    module.bfloat16().save_pretrained(folder)
    del module
    model = read_model(folder)
    params = read_params(folder, model)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        params = place(params, dtype)
        ours = compile_fast(lambda params, dtype=dtype: ours_of(model, params, dtype))(params)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            actual = np.asarray(ours[name], np.float32)
            error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
            print(f"\n{dtype} {name}: largest error {error:.2e}, of the largest value {error / scale:.2e}")
            assert_close(actual, expected, tolerance, f"{dtype} {name}")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def empty(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The module without the time that torch's own initialisation takes."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (published.SD15_UNET, {}),
        (
            published.SDXL_UNET,
            {
                "text_embeds": normal(2, 1, 1280),
                "time_ids": np.int32([[640, 480, 0, 12, 1024, 1024]]),
            },
        ),
    ],
    ids=["sd15", "sdxl"],
)
def test_unet(config, added, tmp_path):
    latents, timesteps = normal(0, 1, 16, 16, 4), np.int32([871])
    text = normal(1, 1, 77, config["cross_attention_dim"])

    def theirs_of(module):
        conditions = {name: torch.from_numpy(value) for name, value in added.items()}
        output = module(
            to_nchw(latents),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
            added_cond_kwargs=conditions or None,
        )
        return {"prediction": to_nhwc(output.sample)}

    def ours_of(model, params, dtype):
        output = model.apply(
            params, jnp.asarray(latents, dtype), timesteps, jnp.asarray(text, dtype), **added
        )
        return {"prediction": output}

    check(lambda: empty(lambda: UNet2DConditionModel(**config)), theirs_of, ours_of, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        published.SD3_MEDIUM,
        published.SD35_MEDIUM,
        published.SD35_LARGE | {"num_layers": 3},
    ],
    ids=["sd3_medium", "sd35_medium", "sd35_large"],
)
def test_mmdit(config, tmp_path):
    latents, timesteps, text = normal(0, 1, 24, 32, 16), np.float32([871.25]), normal(1, 1, 333, 4096)
    pooled, table = normal(2, 1, 2048), normal(3, 1, 20**2, config["caption_projection_dim"])

    def make():
        module = empty(lambda: SD3Transformer2DModel(**config | {"pos_embed_max_size": 20}))
        module.pos_embed.pos_embed.copy_(torch.from_numpy(table))
        return module

    def theirs_of(module):
        inputs = map(torch.from_numpy, (text, pooled, timesteps))
        return {"prediction": to_nhwc(module(to_nchw(latents), *inputs).sample)}

    def ours_of(model, params, dtype):
        sample, states, vector = (jnp.asarray(array, dtype) for array in (latents, text, pooled))
        conditions = {"pooled_projections": vector, "positions": crop_positions(table, 12, 16)}
        return {"prediction": model.apply(params, sample, timesteps, states, **conditions)}

    check(make, theirs_of, ours_of, tmp_path)


def test_t5(tmp_path):
    """Two of 24 layers: all of them in float32 take 19 GB."""
    tokens = np.random.default_rng(0).integers(2, 32_000, (2, 256)).astype(np.int32)
    tokens[0, 40], tokens[0, 41:], tokens[1, -1] = 1, 0, 1

    def theirs_of(module):
        return {"states": module(torch.from_numpy(tokens).long()).last_hidden_state.numpy()}

    def ours_of(model, params, dtype):
        return {"states": model.apply(params, tokens)}

    check(
        lambda: T5EncoderModel(T5Config(**published.T5_XXL | {"num_layers": 2})), theirs_of, ours_of, tmp_path
    )


@pytest.mark.parametrize(
    ("module_class", "config"),
    [
        (CLIPTextModel, published.SDXL_TEXT_ENCODER),
        (CLIPTextModelWithProjection, published.SDXL_TEXT_ENCODER_2),
    ],
    ids=["first", "second"],
)
def test_sdxl_text_encoder(module_class, config, tmp_path):
    tokens = np.random.default_rng(0).integers(1000, 40_000, (2, 77)).astype(np.int32)
    tokens[0, 10], tokens[0, 11:], tokens[1, -1] = 49_407, 0, 49_407

    def theirs_of(module):
        output = module(torch.from_numpy(tokens).long(), output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        states = {"last": output.last_hidden_state, "penultimate": output.hidden_states[-2], "pooled": pooled}
        return {name: value.numpy() for name, value in states.items()}

    def ours_of(model, params, dtype):
        return model.apply(params, tokens)._asdict()

    check(lambda: module_class(CLIPTextConfig(**config)), theirs_of, ours_of, tmp_path)


@pytest.mark.parametrize("config", [published.CLIP_H, published.CLIP_L], ids=["clip_h", "clip_l"])
def test_clip(config, tmp_path):
    """Both towers of the rewards' models: PickScore, HPS and CLIP score have H, the aesthetic score L."""
    tokens = np.random.default_rng(0).integers(1000, 40_000, (2, 77)).astype(np.int32)
    tokens[0, 10], tokens[0, 11:], tokens[1, -1] = 49_407, 0, 49_407
    pixels = normal(1, 2, 224, 224, 3)

    def theirs_of(module):
        output = module(pixel_values=to_nchw(pixels), input_ids=torch.from_numpy(tokens).long())
        return {
            "image": output.vision_model_output.pooler_output.numpy(),
            "text": output.text_model_output.pooler_output.numpy(),
        }

    def ours_of(model, params, dtype):
        image = model.apply(params, jnp.asarray(pixels, dtype), method="encode_image")
        return {"image": image, "text": model.apply(params, tokens).pooled}

    check(lambda: CLIPModel(CLIPConfig(**config)), theirs_of, ours_of, tmp_path)


@pytest.mark.parametrize("config", [published.SDXL_VAE, published.SD3_VAE], ids=["sdxl", "sd3"])
def test_vae(config, tmp_path):
    images = normal(0, 1, 64, 64, 3).clip(-1, 1)
    latents = normal(1, 1, 8, 8, config["latent_channels"])

    def theirs_of(module):
        posterior = module.encode(to_nchw(images)).latent_dist
        decoded = module.decode(to_nchw(latents)).sample
        outputs = {"mean": posterior.mean, "deviation": posterior.std, "decoded": decoded}
        return {name: to_nhwc(value) for name, value in outputs.items()}

    def ours_of(model, params, dtype):
        mean, deviation = model.apply(params, jnp.asarray(images, dtype), method="encode")
        decoded = model.apply(params, jnp.asarray(latents, dtype), method="decode")
        return {"mean": mean, "deviation": deviation, "decoded": decoded}

    check(lambda: empty(lambda: AutoencoderKL(**config)), theirs_of, ours_of, tmp_path)
