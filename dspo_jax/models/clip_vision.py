"""CLIP's image tower, and both towers as one model, built from transformers' config.json."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.models.blocks import LayerNorm, conv2d
from dspo_jax.models.clip import (
    FIXED,
    TEXT_KEYS,
    UNREAD,
    CLIPTextModelWithProjection,
    Encoder,
    read_tower_config,
)
from dspo_jax.models.config import check_config

# Whatever a tower's config leaves out: the defaults of transformers' CLIPTextConfig and CLIPVisionConfig.
_COMMON = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_hidden_layers": 12,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text_config": {
        **_COMMON,
        "eos_token_id": 49407,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 77,
        "num_attention_heads": 8,
        "vocab_size": 49408,
    },
    "vision_config": {
        **_COMMON,
        "hidden_size": 768,
        "image_size": 224,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "patch_size": 32,
    },
}
_USED = {"text_config": TEXT_KEYS, "vision_config": set(_DEFAULTS["vision_config"])}
_FIXED: dict[str, tuple[Any, ...]] = {**FIXED, "num_channels": (3,), "pruned_heads": ({},)}
# What transformers 4 wrote into every config: text generation, classification, the form of the outputs.
# `projection_dim` too: that of the model holds for both towers.
_IGNORED = UNREAD | {
    *("early_stopping", "eos_token_id", "id2label", "label2id", "length_penalty", "max_length", "min_length"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states"),
    *("projection_dim", "repetition_penalty", "return_dict", "temperature", "tie_word_embeddings", "top_k"),
    *("top_p", "typical_p"),
}

_FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # with which CLIP began its training


def read_clip_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check the config.json of a transformers `CLIPModel`.

    Older ones say a tower twice; transformers then takes what `text_config_dict` (or `vision_config_dict`)
    says, and the class's defaults for what it does not, before `text_config`. So does this.

    Returns:
      {"text": settings of `CLIPTextModelWithProjection`, "vision": those of the image tower}.

    Raises:
      ValueError: names the key and value of what is not supported.
    """
    towers = {key: _read_tower(key, config.get(key), config.get(f"{key}_dict")) for key in _DEFAULTS}
    duplicates = {f"{key}_dict" for key in _DEFAULTS}
    unread = (_IGNORED | duplicates | {"logit_scale_init_value"}) - {"projection_dim"}
    rest = {key: value for key, value in config.items() if key not in unread}
    check_config("CLIPModel", rest, {"projection_dim", *_DEFAULTS}, {})
    text = {**towers["text_config"], "projection_dim": config["projection_dim"]}
    return {"text": text, "vision": towers["vision_config"]}


def _read_tower(key: str, config: Any, duplicate: Any) -> dict[str, Any]:
    for name, value in ((key, config), (f"{key}_dict", duplicate)):
        if not isinstance(value, Mapping | None):
            raise ValueError(f"CLIPModel config: {name} = {value!r} must be an object")
    values = {**_DEFAULTS[key], **(config or {})}
    if duplicate is not None:
        values = {**values, **_DEFAULTS[key], **duplicate}
    name = f"CLIPModel's {key.removesuffix('_config')}"
    tower = read_tower_config(name, values, _USED[key], _FIXED, _IGNORED - _USED[key])
    for size in ("image_size", "patch_size"):
        if not isinstance(tower.get(size, 0), int):
            raise ValueError(f"{name} config: {size} = {tower[size]!r} must be one number")
    return {used: tower[used] for used in sorted(_USED[key])}


class _ImageEmbeddings(nnx.Module):
    def __init__(self, cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        features, patch = cfg["hidden_size"], cfg["patch_size"]
        # CLIP's own initialisation.
        init = nnx.initializers.normal(features**-0.5)
        self.class_embedding = nnx.Param(init(rngs.params(), (features,)))
        self.patch_embedding = conv2d(3, features, patch, stride=patch, padding=0, bias=False, rngs=rngs)
        positions = (cfg["image_size"] // patch) ** 2 + 1
        self.position_embedding = nnx.Embed(positions, features, embedding_init=init, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        batch, _, _, features = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (batch, 1, features))
        sequence = jnp.concatenate([first, patches.reshape(batch, -1, features)], axis=1)
        # Not by calling nnx.Embed, which gives the dtype that its table was made with.
        return sequence + self.position_embedding.embedding[...][None]


class _VisionModel(nnx.Module):
    def __init__(self, cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        features, epsilon = cfg["hidden_size"], cfg["layer_norm_eps"]
        self.embeddings = _ImageEmbeddings(cfg, rngs=rngs)
        self.pre_layrnorm = LayerNorm(features, epsilon)  # spelt as in every checkpoint
        self.encoder = Encoder(cfg, causal=False, rngs=rngs)
        self.post_layernorm = LayerNorm(features, epsilon)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(CLIPTextModelWithProjection):
    """A text tower, called with token ids, and an image tower that projects into the same space.

    Source: transformers' CLIPModel; names as in published checkpoints.
    """

    def __init__(self, cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        """Build from what `read_clip_model_config` returns."""
        text, vision = cfg["text"], cfg["vision"]
        super().__init__(text, rngs=rngs)
        self.vision_model = _VisionModel(vision, rngs=rngs)
        self.visual_projection = nnx.Linear(
            vision["hidden_size"], text["projection_dim"], use_bias=False, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.full((), _FIRST_LOGIT_SCALE))

    def encode_image(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, image_size, image_size, 3], normalised as its training images -> embeddings [B, D]."""
        return self.visual_projection(self.vision_model(pixels))
