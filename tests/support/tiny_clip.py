"""CLIPs of the published rewards' form with random weights, in transformers' and in open_clip's layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import random_params, write_tokenizer

from dspo_jax.models.model import build_model
from dspo_jax.weights.components import write_params

SIDE = 28
# Embeddings are as wide as the published ones, by which converters tell CLIPs apart; the rest is small.
TEXT: dict[str, Any] = {
    "eos_token_id": 513,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 24,
    "max_position_embeddings": 77,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 514,
}
VISION: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 128,
    "image_size": SIDE,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 7,
}
CONFIG: dict[str, Any] = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": TEXT,
    "vision_config": VISION,
}


def clip_config(*, features: int = 1024, activation: str = "gelu", eos_token_id: int = 513) -> dict[str, Any]:
    """A config.json; the vocabulary is that of `tiny_model.write_tokenizer`."""
    return {
        **CONFIG,
        "projection_dim": features,
        "text_config": {**TEXT, "hidden_act": activation, "eos_token_id": eos_token_id},
        "vision_config": {**VISION, "hidden_act": activation},
    }


def write_clip(folder: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> Path:
    """Writes a transformers folder of a `CLIPModel` with its tokenizer."""
    model = build_model("CLIPModel", config)
    params = random_params(model, np.random.default_rng(seed))
    params["logit_scale"] = np.float32(3.5)
    write_params(folder, model, params)
    write_tokenizer(folder)
    return folder


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Random ones [H, W, 3] uint8 of `sizes` (H, W), smooth so that resizing leaves something of them."""
    draw = np.random.default_rng(7)
    images = []
    for height, width in sizes:
        coarse = draw.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        images.append(coarse.repeat(8, 0).repeat(8, 1)[:height, :width].copy())
    return images


def write_json(path: Path, content: Any) -> None:
    """Overwrites a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
