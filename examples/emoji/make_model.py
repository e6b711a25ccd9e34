"""Makes the emoji model's starting point: a trained VAE beside a fresh text encoder and a fresh UNet.

    python examples/emoji/make_tokenizer.py --out build/emoji/tokenizer
    python examples/emoji/make_model.py --tokenizer build/emoji/tokenizer --out build/emoji/fresh

Writes a complete diffusers folder of SD1.5's shape at a hundredth of its size. The UNet and the text encoder
in it are random: `configs/emoji_base.py` trains them.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from dspo_jax import cli
from dspo_jax.data.sources import get_source
from dspo_jax.files import appear, refuse_existing, write_json
from dspo_jax.images.decode import decode_image
from dspo_jax.models.model import Model, Params, build_model
from dspo_jax.monitoring.progress import Progress
from dspo_jax.weights.components import write_params

RESOLUTION = 64
LATENT_CHANNELS = 4
TEXT_FEATURES = 96

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 2,  # one channel a group would normalise a picture's overall colour away
    "out_channels": 3,
    "sample_size": RESOLUTION,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [32, 96, 128],
    "center_input_sample": False,
    "cross_attention_dim": TEXT_FEATURES,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": LATENT_CHANNELS,
    "sample_size": RESOLUTION // 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}

TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": TEXT_FEATURES,
    "intermediate_size": 4 * TEXT_FEATURES,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    # At full noise an error in epsilon is 15 times as large in the picture: wrong colours. In v it is not.
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def load_images() -> np.ndarray:
    """Returns every distinct emoji picture, [N, 64, 64, 3] uint8."""
    pictures = {pair.key.split("/")[0]: pair.winner for pair in get_source("emoji_images").pairs("train")}
    size = (RESOLUTION, RESOLUTION)
    return np.stack([np.asarray(decode_image(data).resize(size, 2)) for data in pictures.values()])


def vae_loss(model: Model, params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
    """Absolute and squared error of a sampled reconstruction, its edges, and a light pull towards N(0, 1).

    The edge term (differences between neighbouring pixels) stands in for a perceptual loss: flat art lives by
    its outlines.
    """
    mean, deviation = model.apply(params, images, method="encode")
    latents = mean + deviation * jax.random.normal(key, mean.shape)
    error = model.apply(params, latents, method="decode") - images
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    kl = 0.5 * jnp.mean(mean**2 + deviation**2 - 1.0 - 2.0 * jnp.log(deviation))
    return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error)) + edges + 1e-4 * kl


def train_vae(
    images: np.ndarray, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[Model, Params]:
    """Trains the autoencoder with Adam and a one-cycle cosine learning rate; images [N, H, W, 3] uint8."""
    model = build_model("AutoencoderKL", VAE)
    params = model.init(jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: Params, opt_state: Any, batch: jax.Array, key: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        scaled = batch.astype(jnp.float32) / 127.5 - 1.0
        loss, grads = jax.value_and_grad(partial(vae_loss, model))(params, scaled, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    draw = np.random.default_rng(seed)
    with Progress("train vae", steps) as progress:
        for step in range(steps):
            batch = images[draw.choice(len(images), batch_size, replace=False)]
            params, opt_state, loss = update(params, opt_state, batch, jax.random.key(seed + 1 + step))
            if step % 20 == 19:
                progress.update(step + 1, {"loss": float(loss)})
    return model, params


def measure_vae(model: Model, params: Params, images: np.ndarray) -> tuple[float, float]:
    """Returns standard deviation of the latents; mean absolute reconstruction error in 8-bit grey levels."""

    @jax.jit
    def reconstruct(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, _ = model.apply(params, batch, method="encode")
        return mean, model.apply(params, mean, method="decode")

    means, errors = [], []
    for start in range(0, len(images) - 31, 32):
        batch = images[start : start + 32].astype(np.float32) / 127.5 - 1.0
        mean, output = reconstruct(batch)
        means.append(np.asarray(mean))
        errors.append(float(np.abs(np.asarray(output) - batch).mean()) * 127.5)
    return float(np.concatenate(means).std()), float(np.mean(errors))


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    out, tokenizer = Path(flags.FLAGS.out), Path(flags.FLAGS.tokenizer)
    refuse_existing(out)
    vocab = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    images = load_images()
    logging.info("%d pictures", len(images))
    vae, vae_params = train_vae(
        images, flags.FLAGS.steps, flags.FLAGS.batch_size, flags.FLAGS.learning_rate, flags.FLAGS.seed
    )
    deviation, error = measure_vae(vae, vae_params, images)
    logging.info("latents have standard deviation %.3f; reconstruction error %.2f of 255", deviation, error)
    # diffusers' scaling factor: what brings the latents to unit variance.
    vae = build_model("AutoencoderKL", {**VAE, "scaling_factor": round(1.0 / deviation, 5)})
    text = {
        **TEXT_ENCODER,
        "vocab_size": len(vocab),
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "pad_token_id": vocab["<|endoftext|>"],
    }
    keys = jax.random.split(jax.random.key(flags.FLAGS.seed), 2)
    with appear(out) as partial:
        for name, class_name, config, key in (
            ("unet", "UNet2DConditionModel", UNET, keys[0]),
            ("text_encoder", "CLIPTextModel", text, keys[1]),
        ):
            model = build_model(class_name, config)
            write_params(partial / name, model, model.init(key))
        write_params(partial / "vae", vae, vae_params, dtype="float16")
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(partial / "model_index.json", MODEL_INDEX)
    print(f"{out}: VAE reconstruction error {error:.2f} of 255, latents' deviation {deviation:.3f}")


if __name__ == "__main__":
    flags.DEFINE_string("tokenizer", None, "Folder written by make_tokenizer.py.", required=True)
    flags.DEFINE_string("out", None, "Folder to write the model to.", required=True)
    flags.DEFINE_integer("steps", 1800, "Updates of the VAE.")
    flags.DEFINE_integer("batch_size", 16, "Pictures in an update.")
    flags.DEFINE_float("learning_rate", 2e-3, "Highest learning rate.")
    flags.DEFINE_integer("seed", 0, "Of the initialisation, the order and the noise.")
    cli.run(main)
