"""Translates CLIP weights from the names and layout of open_clip and OpenAI to those of transformers."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import build_model
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.tensors import Tensor

# Prefix of a name in open_clip -> in transformers.
_BEGINNINGS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_IN_A_LAYER = {
    ".ln_1.": ".layer_norm1.",
    ".attn.in_proj_": ".self_attn.{}_proj.",  # queries, keys and values, one above the other
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")


def is_open_clip(stored: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the tensors of a CLIP with open_clip's names."""
    return "visual.conv1.weight" in stored


def translate(
    file: Path, stored: Mapping[str, Tensor], activation: str
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Returns the config.json of transformers' `CLIPModel` and its tensors.

    Args:
      file: where `stored` comes from, for messages.
      stored: tensors with open_clip's names.
      activation: "gelu" or "quick_gelu" (OpenAI's), which no weight tells.

    Raises:
      UserError: a tensor is missing, not part of such a model, or of another shape.
    """
    translated: dict[str, Tensor] = {}
    origin = {}
    for name, tensor in stored.items():
        for target, part in _translate(file, name, tensor).items():
            translated[target], origin[target] = part, name
    config = _find_config(file, translated, activation)
    shapes = torch_shapes(build_model("CLIPModel", config))
    for name, shape in shapes.items():
        if name not in translated:
            raise UserError(f"{file}: what transformers calls {name} is missing; fetch the weights again")
        if translated[name].shape != shape:
            raise UserError(
                f"{file}: tensor {origin[name]} has shape {stored[origin[name]].shape}, which does not fit "
                "the others; is it an open_clip ViT?"
            )
    extra = sorted(translated.keys() - shapes)
    if extra:
        raise UserError(f"{file}: tensor {origin[extra[0]]} is not part of an open_clip ViT")
    return config, translated


def _translate(file: Path, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Renames one tensor; the stacked queries, keys and values become three."""
    beginning = next((old for old in _BEGINNINGS if name.startswith(old)), None)
    if beginning is None:
        raise UserError(f"{file}: tensor {name} is not part of an open_clip ViT")
    target = _BEGINNINGS[beginning] + name.removeprefix(beginning)
    for old, new in _IN_A_LAYER.items():
        target = target.replace(old, new)
    if name in _TRANSPOSED:
        return {target: Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)}
    if "{}" not in target:
        return {target: tensor}
    shape = (tensor.shape[0] // 3, *tensor.shape[1:])

    def third(number: int) -> Tensor:
        return Tensor(shape, tensor.dtype, lambda: np.split(tensor.read(), 3)[number])

    return {target.format(letter): third(number) for number, letter in enumerate("qkv")}


def _find_config(file: Path, translated: Mapping[str, Tensor], activation: str) -> NetworkConfig:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in translated or len(translated[name].shape) != axes:
            found = translated[name].shape if name in translated else "missing"
            raise UserError(f"{file}: what transformers calls {name} is {found}; is it an open_clip ViT?")
        return translated[name].shape

    def tower(prefix: str) -> NetworkConfig:
        hidden, width = shape(f"{prefix}.encoder.layers.0.mlp.fc1.weight", 2)
        layer = re.compile(re.escape(prefix) + r"\.encoder\.layers\.(\d+)\.")
        return {
            "hidden_act": activation,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_attention_heads": _count_heads(file, width),
            "num_hidden_layers": len({match[1] for name in translated if (match := layer.match(name))}),
        }

    patch = shape("vision_model.embeddings.patch_embedding.weight", 4)[-1]
    patches = shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    vocabulary = shape("text_model.embeddings.token_embedding.weight", 2)[0]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": shape("text_projection.weight", 2)[0],
        "text_config": {
            **tower("text_model"),
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight", 2)[0],
            "vocab_size": vocabulary,
            "eos_token_id": vocabulary - 1,  # open_clip looks for the highest id, which is the last
        },
        "vision_config": {
            **tower("vision_model"),
            "image_size": patch * math.isqrt(patches),
            "patch_size": patch,
        },
    }


def _count_heads(file: Path, width: int) -> int:
    """Counts the heads of a tower: a head is 64 wide, but 80 in the image tower of ViT-H/14 (1280 wide)."""
    heads, rest = divmod(width, 80 if width == 1280 else 64)
    if rest or not heads:
        raise UserError(f"{file}: a tower is {width} wide, no multiple of 64; is it an open_clip ViT?")
    return heads
