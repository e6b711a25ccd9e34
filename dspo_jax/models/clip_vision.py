"""CLIP's image tower, and both towers as one model, built from transformers' config.json."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from dspo_jax.errors import UserError
from dspo_jax.models.blocks import conv2d
from dspo_jax.models.clip import (
    PROJECTION,
    TEXT_KEYS,
    TOWER_KEYS,
    UNREAD,
    CLIPTextModelWithProjection,
    Encoder,
    read_tower_config,
)
from dspo_jax.models.config import NetworkConfig, read_config
from dspo_jax.models.norms import LayerNorm
from dspo_jax.schema import Key, fixed, integer

_TOWERS: dict[str, dict[str, Key]] = {
    "text_config": TEXT_KEYS,
    "vision_config": {
        **TOWER_KEYS,
        "hidden_size": integer(768),
        "image_size": integer(224, high=4096),
        "intermediate_size": integer(3072, high=1 << 18),
        "num_attention_heads": integer(12),
        "num_channels": fixed(3),
        "patch_size": integer(32, high=4096),
    },
}
_KEYS: dict[str, Key] = {
    **PROJECTION,
    **{name: Key(None, dict, null=True) for key in _TOWERS for name in (key, f"{key}_dict")},
}
# The projection's width is the model's, for both towers; the end token is the text tower's.
_UNREAD = {"projection_dim", "eos_token_id"}

_FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # with which CLIP began its training


def read_clip_model_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a transformers `CLIPModel`.

    Older ones say a tower twice; transformers then takes what `text_config_dict` (or `vision_config_dict`)
    says, and the class's defaults for what it does not, before `text_config`. So does this.

    Returns:
      {"text": settings of `CLIPTextModelWithProjection`, "vision": those of the image tower}.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config("CLIPModel", config, _KEYS, {*UNREAD, *_UNREAD, "logit_scale_init_value"})
    text, vision = (_read_tower(key, cfg[key] or {}, cfg[f"{key}_dict"]) for key in _TOWERS)
    if vision["patch_size"] > vision["image_size"]:
        raise UserError(
            f"CLIPModel's vision config: patch_size = {vision['patch_size']} is larger than image_size = "
            f"{vision['image_size']}"
        )
    return {"text": {**text, "projection_dim": cfg["projection_dim"]}, "vision": vision}


def _read_tower(key: str, config: NetworkConfig, duplicate: NetworkConfig | None) -> NetworkConfig:
    keys = _TOWERS[key]
    if duplicate is not None:
        config = {**config, **{name: entry.default for name, entry in keys.items()}, **duplicate}
    name = f"CLIPModel's {key.removesuffix('_config')}"
    return read_tower_config(name, config, keys, _UNREAD - keys.keys())


class _ImageEmbeddings(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
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
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
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

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_clip_model_config` returns."""
        text, vision = cfg["text"], cfg["vision"]
        super().__init__(text, rngs=rngs)
        self.vision_model = _VisionModel(vision, rngs=rngs)
        self.visual_projection = nnx.Linear(
            vision["hidden_size"], text["projection_dim"], use_bias=False, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.full((), _FIRST_LOGIT_SCALE))

    def encode_image(self, pixels: Float[jax.Array, "B H W 3"]) -> Float[jax.Array, "B D"]:
        """Pixels [B, image_size, image_size, 3], normalised as its training images -> embeddings [B, D]."""
        return self.visual_projection(self.vision_model(pixels))
