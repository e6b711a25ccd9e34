"""Diffusers folders of the shape of Stable Diffusion 3 with random weights, and a tokenizer of T5's kind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tiny_model import END, EXCLAMATION_MARK, OPEN_CLIP, TEXT_ENCODER, VAE, random_params, write_tokenizer

from dspo_jax.models.model import build_model
from dspo_jax.weights.components import write_params

WORDS = ["a", "red", "fox", "on", "snow"]
_CLIP = {"architectures": ["CLIPTextModelWithProjection"]}
NETWORKS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "dual_attention_layers": [0],
        "in_channels": 4,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": 2,
        "pooled_projection_dim": 18,
        "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
        "sample_size": 4,
    },
    "vae": {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": {**TEXT_ENCODER, **_CLIP, "projection_dim": 12},
    "text_encoder_2": {**OPEN_CLIP, **_CLIP, "hidden_size": 8, "projection_dim": 6},
    "text_encoder_3": {
        "architectures": ["T5EncoderModel"],
        "d_ff": 16,
        "d_kv": 4,
        "d_model": 24,
        "feed_forward_proj": "gated-gelu",
        "model_type": "t5",
        "num_heads": 2,
        "num_layers": 1,
        "vocab_size": 9,
    },
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def write_t5_tokenizer(folder: Path) -> None:
    """Unigrams with a space before each word; the end token is added to a caption."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"\u2581{word}", -2.0) for word in WORDS] + [("\u2581", -4.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([*special, *pieces], unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_sd3(
    folder: Path,
    *,
    has_t5: bool = True,
    networks: Mapping[str, Mapping[str, Any]] = NETWORKS,
    dtype: str | None = None,
) -> Path:
    """Writes a model, which diffusers' StableDiffusion3Pipeline loads; `dtype` is that of the files."""
    draw = np.random.default_rng(0)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    for name, config in networks.items():
        if name == "text_encoder_3" and not has_t5:
            continue
        class_name = config.get("_class_name") or config["architectures"][0]
        model = build_model(class_name, config)
        params = random_params(model, draw)
        if name == "text_encoder":  # as in the published models, whose single files leave it out
            params["text_projection"]["kernel"] = np.eye(config["projection_dim"], dtype=np.float32)
        write_params(folder / name, model, params, dtype=dtype, buffers=model.make_buffers())
        index[name] = ["transformers" if name.startswith("text") else "diffusers", class_name]
    for name, pad_token in (("tokenizer", END), ("tokenizer_2", EXCLAMATION_MARK)):
        write_tokenizer(folder / name, pad_token)
        index[name] = ["transformers", "CLIPTokenizer"]
    if has_t5:
        write_t5_tokenizer(folder / "tokenizer_3")
        index["tokenizer_3"] = ["transformers", "PreTrainedTokenizerFast"]
    for file, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", index)):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder
