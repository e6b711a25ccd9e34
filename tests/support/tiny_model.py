"""Diffusers folders of the shape of Stable Diffusion 1.5, 2.1 and XL with random weights: fast to compile."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspo_jax.models.model import Model, Params, build_model
from dspo_jax.weights.components import write_params

RESOLUTION = 16

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": RESOLUTION // 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": RESOLUTION,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
# Like the small VAE of TAESD: four channels, four pixels a latent.
TINY_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "encoder_block_out_channels": [4] * 3,
    "decoder_block_out_channels": [4] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "num_decoder_blocks": [1] * 3,
    "num_encoder_blocks": [1] * 3,
    "out_channels": 3,
}
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 512,
    "eos_token_id": 513,
    "hidden_act": "quick_gelu",
    "hidden_size": 12,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 513,
    "vocab_size": 514,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
MODEL_INDEX: dict[str, Any] = {
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

# OpenCLIP's towers: another activation, another token that pads, and configs so old that they do not name the
# end token.
OPEN_CLIP = {**TEXT_ENCODER, "hidden_act": "gelu", "eos_token_id": 2, "pad_token_id": 0}
END, EXCLAMATION_MARK = "<|endoftext|>", "!"

# Family -> the configs of its networks, the token its tokenizers pad with, prediction type, model_index.json.
FAMILIES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, str], str, dict[str, Any]]] = {
    "sd15": (
        {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER},
        {"tokenizer": END},
        "epsilon",
        MODEL_INDEX,
    ),
    "sd21": (
        {
            "unet": {**UNET, "attention_head_dim": [2, 4], "use_linear_projection": True},
            "vae": VAE,
            "text_encoder": OPEN_CLIP,
        },
        {"tokenizer": EXCLAMATION_MARK},
        "v_prediction",
        MODEL_INDEX,
    ),
    "sdxl": (
        {
            "unet": {
                **UNET,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 6,
                "attention_head_dim": [1, 2],
                "cross_attention_dim": 12 + 8,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "projection_class_embeddings_input_dim": 10 + 6 * 6,
                "transformer_layers_per_block": [1, 2],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "use_linear_projection": True,
            },
            "vae": {**VAE, "force_upcast": True, "scaling_factor": 0.13025},
            "text_encoder": TEXT_ENCODER,
            "text_encoder_2": {
                **OPEN_CLIP,
                "architectures": ["CLIPTextModelWithProjection"],
                "hidden_size": 8,
                "projection_dim": 10,
            },
        },
        {"tokenizer": END, "tokenizer_2": EXCLAMATION_MARK},
        "epsilon",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "feature_extractor": [None, None],
            "force_zeros_for_empty_prompt": True,
            "image_encoder": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    ),
}


def write_model(
    folder: Path, *, family: str = "sd15", prediction_type: str | None = None, seed: int = 0
) -> Path:
    """Writes the folder of a family; `prediction_type` None is that of its most used model.

    Its tokenizers know bytes and no merge, so that a caption of 90 letters is 92 tokens.
    """
    networks, tokenizers, usual_type, index = FAMILIES[family]
    draw = np.random.default_rng(seed)
    for name, config in networks.items():
        model = build_model(config.get("_class_name") or config["architectures"][0], config)
        write_params(folder / name, model, random_params(model, draw))
    for name, pad_token in tokenizers.items():
        write_tokenizer(folder / name, pad_token)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {**SCHEDULER, "prediction_type": prediction_type or usual_type},
    )
    _write_json(folder / "model_index.json", index)
    return folder


def random_params(model: Model, draw: np.random.Generator) -> Params:
    """Float32 weights, norms near one and biases near zero; `Model.init` compiles for half a minute."""

    def leaf(path: tuple[Any, ...], abstract: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = draw.standard_normal(abstract.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return noise / np.float32(np.sqrt(np.prod(abstract.shape[:-1])))
            case "scale":
                return 1 + noise / 10
            case _:
                return noise / 10

    return jax.tree_util.tree_map_with_path(leaf, model.abstract_params())


def write_tokenizer(folder: Path, pad_token: str = END) -> None:
    """CLIP's file format with an empty list of merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", END]
    special = {"bos_token": tokens[-2], "eos_token": END, "unk_token": END, "pad_token": pad_token}
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special},
    )
    _write_json(folder / "special_tokens_map.json", special)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def write_pairs(
    out: Path,
    model: Path,
    *,
    train: int = 24,
    validation: int | None = 6,
    images: int = 2,
    resolution: int = RESOLUTION,
    buckets: Sequence[str] = (),
    score: str = "",
) -> Path:
    """Writes shards of random latents that carry the fingerprint of `model`.

    With buckets, so many examples of each. A validation of None is no such split. With the name of a reward,
    example i of a split has the scores i and i - 1.
    """
    from dspo_jax.data import shards
    from dspo_jax.data.writer import DatasetWriter
    from dspo_jax.pipelines.loading import load_pipeline

    pipe = load_pipeline(model)
    side, channels = resolution // pipe.vae_scale_factor, 2 * pipe.latent_channels
    stored = (images, *((None, None) if buckets else (side, side)), channels)
    features = shards.feature_spec(stored, pipe.conditioning_shapes(images), scored=bool(score))
    manifest = {"model": pipe.fingerprint(), "resolution": resolution, "source": {"name": "random"}}
    if score:
        manifest["score"] = {"reward": score, "version": "1"}
    counts = {"train": train} if validation is None else {"train": train, "validation": validation}
    writer = DatasetWriter(out, features, manifest, dict.fromkeys(counts, 1), buckets)
    sizes = [tuple(map(int, bucket.split("x"))) for bucket in buckets] or [(resolution, resolution)]
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        captions = [f"{split} {i}" for i in range(count * len(sizes))]
        tokens = pipe.tokenize(captions) if count else []
        examples = []
        for i, caption in enumerate(captions):
            height, width = sizes[i // count]
            shape = (images, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor, channels)
            micro_conditioning = np.int32([height, width, 0, 0, height, width])
            examples.append(
                {
                    "moments": np.abs(draw.standard_normal(shape)).astype(np.float16),
                    "tokens": tokens[i],
                    "micro_conditioning": np.tile(micro_conditioning, (images, 1)),
                    "preference": np.float32(1.0),
                    "loser_won": np.bool_(False),
                    "caption": caption,
                    "key": caption,
                    **({"scores": np.float32([i, i - 1][:images])} if score else {}),
                }
            )
        writer.write_shard(split, 0, examples)
    writer.commit()
    return out


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
