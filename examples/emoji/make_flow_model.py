"""Makes the emoji flow model's starting point: the emoji model's VAE beside fresh networks of SD3's kind.

    python examples/emoji/make_flow_model.py --out build/emoji/fresh_flow

Writes a complete diffusers folder of Stable Diffusion 3.5 medium's shape at a few hundredths of its size,
without a T5. The transformer and both text encoders in it are random: `configs/emoji_flow_base.py` trains
them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dspo_jax import cli
from dspo_jax.files import appear, refuse_existing, write_json
from dspo_jax.models.model import build_model
from dspo_jax.weights.components import write_params

SOURCE = Path(__file__).parent / "model"
TOKENS = 20
"""Length of a caption for the text encoders; the longest caption of the emoji has 18 tokens."""

LAYERS, HEADS, HEAD_FEATURES = 6, 4, 32
TEXT_FEATURES = {"text_encoder": 96, "text_encoder_2": 32}

TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": HEAD_FEATURES,
    "caption_projection_dim": HEADS * HEAD_FEATURES,
    "dual_attention_layers": [0, 1],
    "in_channels": 4,
    "joint_attention_dim": sum(TEXT_FEATURES.values()),
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "out_channels": 4,
    "patch_size": 2,
    "pooled_projection_dim": sum(TEXT_FEATURES.values()),
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
    "sample_size": 16,
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    # A shift of 3 is for images of 1024 pixels: larger ones keep more of their content under the same noise.
    "shift": 1.0,
}

MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder(features: int, vocab: dict[str, int]) -> dict[str, Any]:
    """Returns the config.json of a text encoder of two layers."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "hidden_act": "quick_gelu",
        "hidden_size": features,
        "intermediate_size": 4 * features,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model",
        "num_attention_heads": features // 16,
        "num_hidden_layers": 2,
        "pad_token_id": vocab["<|endoftext|>"],
        "projection_dim": features,
        "vocab_size": len(vocab),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    out = Path(flags.FLAGS.out)
    refuse_existing(out)
    vocab = json.loads((SOURCE / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    networks: dict[str, dict[str, Any]] = {"transformer": TRANSFORMER}
    for name, features in TEXT_FEATURES.items():
        networks[name] = text_encoder(features, vocab)
    keys = jax.random.split(jax.random.key(flags.FLAGS.seed), len(networks))
    with appear(out) as partial:
        for (name, config), key in zip(networks.items(), keys, strict=True):
            model = build_model(config.get("_class_name", "CLIPTextModelWithProjection"), config)
            write_params(partial / name, model, model.init(key), buffers=model.make_buffers())
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(SOURCE / "tokenizer", partial / name)
            settings = json.loads((partial / name / "tokenizer_config.json").read_text(encoding="utf-8"))
            write_json(partial / name / "tokenizer_config.json", settings | {"model_max_length": TOKENS})
        shutil.copytree(SOURCE / "vae", partial / "vae")
        vae = json.loads((partial / "vae" / "config.json").read_text(encoding="utf-8"))
        # diffusers adds the shift whether the config names one or not.
        write_json(partial / "vae" / "config.json", vae | {"shift_factor": 0.0})
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(partial / "model_index.json", MODEL_INDEX)
    print(f"{out}: networks to train, with the VAE and the tokenizer of {SOURCE}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder to write the model to.", required=True)
    flags.DEFINE_integer("seed", 0, "Of the initialisation.")
    cli.run(main)
