"""BLIP's image encoder and its text encoder that looks at the image: ImageReward, and answers to questions.

Sources: Li et al. 2022, "BLIP" (arXiv:2201.12086); Xu et al. 2023, "ImageReward" (arXiv:2304.05977). Names
and operations are those of the released code of each, without dropout and stochastic depth, which do nothing
when a model scores.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Integer

from dspo_jax.kernels.attention import attention
from dspo_jax.models.blocks import Identity, conv2d
from dspo_jax.models.config import NetworkConfig, check_multiple, read_config
from dspo_jax.models.norms import LayerNorm
from dspo_jax.schema import REQUIRED, Key, integer, number

_LAYERS: dict[str, Key] = {
    "hidden_size": integer(),
    "intermediate_size": integer(high=1 << 18),
    "num_hidden_layers": integer(high=96),
    "num_attention_heads": integer(),
    "layer_norm_eps": number(),
}
_PARTS: dict[str, dict[str, Key]] = {
    "vision_config": {**_LAYERS, "image_size": integer(high=4096), "patch_size": integer(high=4096)},
    "text_config": {**_LAYERS, "vocab_size": integer(high=1 << 22), "max_position_embeddings": integer()},
}
_KEYS: dict[str, Key] = {part: Key(REQUIRED, dict) for part in _PARTS}
_HEAD_KEYS: dict[str, Key] = {"head_features": integer(listed="always", length=range(4, 5))}


def read_image_reward_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of an ImageReward, whose parts are named as in transformers' `BlipConfig`.

    Its keys: `vision_config`, `text_config`, and `head_features`, the widths of the head's hidden layers.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    return _read_parts("ImageReward", config, _KEYS | _HEAD_KEYS)


def read_blip_vqa_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a `BLIPVQA`: `vision_config`, and `text_config`, which is the decoder's too.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    return _read_parts("BLIP_VQA", config, _KEYS)


def _read_parts(class_name: str, config: NetworkConfig, known: dict[str, Key]) -> NetworkConfig:
    cfg = read_config(class_name, config, known)
    for part, keys in _PARTS.items():
        name = f"{class_name} {part}"
        cfg[part] = read_config(name, cfg[part], keys)
        features, heads = cfg[part]["hidden_size"], cfg[part]["num_attention_heads"]
        check_multiple(name, "hidden_size", features, "num_attention_heads", heads)
    size, patch = (cfg["vision_config"][key] for key in ("image_size", "patch_size"))
    check_multiple(f"{class_name} vision_config", "image_size", size, "patch_size", patch)
    return cfg


def _split(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


class _ImageAttention(nnx.Module):
    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(features, 3 * features, rngs=rngs)
        self.proj = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (_split(part, self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(attention(query, key, value).reshape(x.shape))


class _ImageMLP(nnx.Module):
    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(features, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class _ImageBlock(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features, epsilon = cfg["hidden_size"], cfg["layer_norm_eps"]
        self.norm1 = LayerNorm(features, epsilon)
        self.attn = _ImageAttention(features, cfg["num_attention_heads"], rngs=rngs)
        self.norm2 = LayerNorm(features, epsilon)
        self.mlp = _ImageMLP(features, cfg["intermediate_size"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nnx.Module):
    def __init__(self, patch: int, features: int, *, rngs: nnx.Rngs):
        self.proj = conv2d(3, features, patch, stride=patch, padding=0, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.proj(pixels)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class _ImageEncoder(nnx.Module):
    """Pixels [B, S, S, 3] -> states [B, 1 + patches, features]; the first is the image's own."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features, patch = cfg["hidden_size"], cfg["patch_size"]
        patches = (cfg["image_size"] // patch) ** 2
        draw = nnx.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, features)))
        self.pos_embed = nnx.Param(draw(rngs.params(), (1, 1 + patches, features)))
        self.patch_embed = _PatchEmbed(patch, features, rngs=rngs)
        self.blocks = nnx.List([_ImageBlock(cfg, rngs=rngs) for _ in range(cfg["num_hidden_layers"])])
        self.norm = LayerNorm(features, cfg["layer_norm_eps"])

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embed(pixels)
        first = jnp.broadcast_to(self.cls_token[...], (patches.shape[0], 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1)
        x = x + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Projections(nnx.Module):
    def __init__(self, features: int, context_features: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Linear(features, features, rngs=rngs)
        self.key = nnx.Linear(context_features, features, rngs=rngs)
        self.value = nnx.Linear(context_features, features, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, visible: jax.Array | None) -> jax.Array:
        query, key, value = self.query(x), self.key(context), self.value(context)
        out = attention(*(_split(part, self.heads) for part in (query, key, value)), visible=visible)
        return out.reshape(x.shape)


class _Output(nnx.Module):
    """A linear layer, the skip connection, and the norm behind both."""

    def __init__(self, in_features: int, features: int, epsilon: float, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(in_features, features, rngs=rngs)
        self.LayerNorm = LayerNorm(features, epsilon)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + skip)


class _TextAttention(nnx.Module):
    def __init__(self, cfg: NetworkConfig, context_features: int, *, rngs: nnx.Rngs):
        features = cfg["hidden_size"]
        self.self = _Projections(features, context_features, cfg["num_attention_heads"], rngs=rngs)
        self.output = _Output(features, features, cfg["layer_norm_eps"], rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        return self.output(self.self(x, context, visible), x)


class _Intermediate(nnx.Module):
    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(features, hidden, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.gelu(self.dense(x), approximate=False)


class _TextLayer(nnx.Module):
    """Attention among the tokens, then to other states, then the feed-forward; a norm behind each."""

    def __init__(self, cfg: NetworkConfig, other_features: int, *, rngs: nnx.Rngs):
        features, hidden = cfg["hidden_size"], cfg["intermediate_size"]
        self.attention = _TextAttention(cfg, features, rngs=rngs)
        self.crossattention = _TextAttention(cfg, other_features, rngs=rngs)
        self.intermediate = _Intermediate(features, hidden, rngs=rngs)
        self.output = _Output(hidden, features, cfg["layer_norm_eps"], rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, others: jax.Array, visible: jax.Array | None
    ) -> jax.Array:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, others, visible)
        return self.output(self.intermediate(x), x)


class _TextEmbeddings(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features, draw = cfg["hidden_size"], nnx.initializers.normal(0.02)
        self.word_embeddings = nnx.Embed(cfg["vocab_size"], features, embedding_init=draw, rngs=rngs)
        self.position_embeddings = nnx.Embed(
            cfg["max_position_embeddings"], features, embedding_init=draw, rngs=rngs
        )
        self.LayerNorm = LayerNorm(features, cfg["layer_norm_eps"])

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        # Not by calling nnx.Embed, which gives the dtype that its table was made with.
        words, positions = (
            table.embedding[...] for table in (self.word_embeddings, self.position_embeddings)
        )
        return self.LayerNorm(words[input_ids] + positions[None, : input_ids.shape[1]])


class _TextLayers(nnx.Module):
    def __init__(self, cfg: NetworkConfig, other_features: int, *, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [_TextLayer(cfg, other_features, rngs=rngs) for _ in range(cfg["num_hidden_layers"])]
        )


class _TextEncoder(nnx.Module):
    """Token ids [B, S], which of them are text [B, S], and states to look at -> states [B, S, features]."""

    def __init__(self, cfg: NetworkConfig, other_features: int, *, rngs: nnx.Rngs):
        self.embeddings = _TextEmbeddings(cfg, rngs=rngs)
        self.encoder = _TextLayers(cfg, other_features, rngs=rngs)

    def __call__(
        self, input_ids: jax.Array, mask: jax.Array, others: jax.Array, visible: jax.Array | None = None
    ) -> jax.Array:
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, others, visible)
        return x


class _BLIP(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        vision, text = cfg["vision_config"], cfg["text_config"]
        self.visual_encoder = _ImageEncoder(vision, rngs=rngs)
        self.text_encoder = _TextEncoder(text, vision["hidden_size"], rngs=rngs)


class _Head(nnx.Module):
    """Five linear layers; nothing between them but the places of the first three's dropouts."""

    def __init__(self, in_features: int, hidden: list[int], *, rngs: nnx.Rngs):
        widths = [in_features, *hidden, 1]
        a, b, c, d, e = (nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))
        self.layers = nnx.List([a, Identity(), b, Identity(), c, Identity(), d, e])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class ImageReward(nnx.Module):
    """The score of an image under a text, in the head's units. Names as in the published weights."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_image_reward_config` returns."""
        self.blip = _BLIP(cfg, rngs=rngs)
        self.mlp = _Head(cfg["text_config"]["hidden_size"], cfg["head_features"], rngs=rngs)

    def __call__(
        self,
        pixels: Float[jax.Array, "B S S 3"],
        input_ids: Integer[jax.Array, "B T"],
        mask: Bool[jax.Array, "B T"],
    ) -> Float[jax.Array, " B"]:
        """Scores [B] float32 of images under texts.

        Args:
          pixels: [B, S, S, 3] float32, normalised as CLIP's; S is the config's image_size.
          input_ids: [B, T] int32.
          mask: [B, T] bool; False where a token is padding.
        """
        image_states = self.blip.visual_encoder(pixels)
        states = self.blip.text_encoder(input_ids, mask, image_states)
        return self.mlp(states[:, 0])[:, 0]


class _Transform(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features = cfg["hidden_size"]
        self.dense = nnx.Linear(features, features, rngs=rngs)
        self.LayerNorm = LayerNorm(features, cfg["layer_norm_eps"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(nnx.gelu(self.dense(x), approximate=False))


class _Predictions(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.transform = _Transform(cfg, rngs=rngs)
        self.decoder = nnx.Linear(cfg["hidden_size"], cfg["vocab_size"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.transform(x))


class _WordHead(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.predictions = _Predictions(cfg, rngs=rngs)


class _AnswerDecoder(nnx.Module):
    """BERT that looks at the states of a question, and logits of words."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.bert = _TextEncoder(cfg, cfg["hidden_size"], rngs=rngs)
        self.cls = _WordHead(cfg, rngs=rngs)


class BLIPVQA(nnx.Module):
    """Logits of the first word of the answer to a question about an image. Names as in published weights."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_blip_vqa_config` returns."""
        vision, text = cfg["vision_config"], cfg["text_config"]
        self.visual_encoder = _ImageEncoder(vision, rngs=rngs)
        self.text_encoder = _TextEncoder(text, vision["hidden_size"], rngs=rngs)
        self.text_decoder = _AnswerDecoder(text, rngs=rngs)

    def __call__(
        self,
        pixels: Float[jax.Array, "B S S 3"],
        input_ids: Integer[jax.Array, "B K T"],
        mask: Bool[jax.Array, "B K T"],
        start: int,
    ) -> Float[jax.Array, "B K V"]:
        """Returns logits over the vocabulary [B, K, V] of the word that follows the start of an answer.

        Args:
          pixels: [B, S, S, 3] float32, normalised as CLIP's; S is the config's image_size.
          input_ids: [B, K, T] int32, K questions of each image.
          mask: [B, K, T] bool; False where a token is padding.
          start: the token that an answer begins with.
        """
        batch, questions, length = input_ids.shape
        image_states = jnp.repeat(self.visual_encoder(pixels), questions, axis=0)
        mask = mask.reshape(-1, length)
        states = self.text_encoder(input_ids.reshape(-1, length), mask, image_states)
        first = jnp.full((batch * questions, 1), start, input_ids.dtype)
        answer = self.text_decoder.bert(first, jnp.ones_like(first, bool), states, mask)
        return self.text_decoder.cls.predictions(answer[:, 0]).reshape(batch, questions, -1)
