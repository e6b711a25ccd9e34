"""The text towers of Stable Diffusion, built from transformers' config.json."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Integer

from dspo_jax.kernels.attention import attention
from dspo_jax.models.config import NetworkConfig, check_multiple, read_config
from dspo_jax.models.norms import LayerNorm
from dspo_jax.models.remat import run_block
from dspo_jax.schema import Key, fixed, integer, number

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "gelu": lambda x: nnx.gelu(x, approximate=False),
}

TOWER_KEYS: dict[str, Key] = {
    "num_hidden_layers": integer(12, high=96),
    "hidden_act": fixed(*_ACTIVATIONS),
    "layer_norm_eps": number(1e-5),
    "attention_dropout": fixed(0.0),
    "dropout": fixed(0.0),  # transformers no longer has this key
    "pruned_heads": fixed({}),
}
TEXT_KEYS: dict[str, Key] = {
    **TOWER_KEYS,
    "vocab_size": integer(49408, high=1 << 22),
    "hidden_size": integer(512),
    "intermediate_size": integer(2048, high=1 << 18),
    "num_attention_heads": integer(8),
    "max_position_embeddings": integer(77),
    "eos_token_id": integer(49407, low=0, high=1 << 22),
}
PROJECTION = {"projection_dim": integer(512)}
# Keys of initialisation, and those that transformers 4 wrote into every config: text generation,
# classification, the form of the outputs.
UNREAD = {
    *("bos_token_id", "pad_token_id", "initializer_factor", "initializer_range"),
    *("early_stopping", "id2label", "label2id", "length_penalty", "max_length", "min_length"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states"),
    *("repetition_penalty", "return_dict", "temperature", "tie_word_embeddings", "top_k", "top_p"),
    "typical_p",
}


class _SelfAttention(nnx.Module):
    def __init__(self, features: int, heads: int, *, causal: bool, rngs: nnx.Rngs):
        self.heads, self.causal = heads, causal
        self.q_proj = nnx.Linear(features, features, rngs=rngs)
        self.k_proj = nnx.Linear(features, features, rngs=rngs)
        self.v_proj = nnx.Linear(features, features, rngs=rngs)
        self.out_proj = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        return self.out_proj(attention(query, key, value, causal=self.causal).reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, features: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = nnx.Linear(features, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, causal: bool, rngs: nnx.Rngs):
        features, heads, epsilon = (
            cfg[key] for key in ("hidden_size", "num_attention_heads", "layer_norm_eps")
        )
        self.layer_norm1 = LayerNorm(features, epsilon)
        self.self_attn = _SelfAttention(features, heads, causal=causal, rngs=rngs)
        self.layer_norm2 = LayerNorm(features, epsilon)
        self.mlp = _MLP(features, cfg["intermediate_size"], cfg["hidden_act"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        # CLIP's own initialisation: the tokens at 0.02, the positions at 0.01.
        token_init, position_init = nnx.initializers.normal(0.02), nnx.initializers.normal(0.01)
        features = cfg["hidden_size"]
        self.token_embedding = nnx.Embed(cfg["vocab_size"], features, embedding_init=token_init, rngs=rngs)
        self.position_embedding = nnx.Embed(
            cfg["max_position_embeddings"], features, embedding_init=position_init, rngs=rngs
        )

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        # Not by calling nnx.Embed, which gives the dtype that its table was made with.
        tokens, positions = (
            table.embedding[...] for table in (self.token_embedding, self.position_embedding)
        )
        return tokens[input_ids] + positions[None, : input_ids.shape[1]]


class Encoder(nnx.Module):
    """The layers of a tower: `causal` where a position sees only those before it, as in the text towers."""

    def __init__(self, cfg: NetworkConfig, *, causal: bool, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [_Layer(cfg, causal=causal, rngs=rngs) for _ in range(cfg["num_hidden_layers"])]
        )


class _TextModel(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.embeddings = _Embeddings(cfg, rngs=rngs)
        self.encoder = Encoder(cfg, causal=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(cfg["hidden_size"], cfg["layer_norm_eps"])


def read_clip_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a transformers `CLIPTextModel`.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    return read_tower_config("CLIPTextModel", config, TEXT_KEYS, PROJECTION)


def read_projecting_clip_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a transformers `CLIPTextModelWithProjection`.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    return read_tower_config("CLIPTextModelWithProjection", config, TEXT_KEYS | PROJECTION)


def read_tower_config(
    class_name: str, config: NetworkConfig, keys: Mapping[str, Key], ignored: Collection[str] = ()
) -> NetworkConfig:
    """Checks the config of a tower, text or image, whose features must be a multiple of its heads.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(class_name, config, keys, {*UNREAD, *ignored})
    heads = cfg["num_attention_heads"]
    check_multiple(class_name, "hidden_size", cfg["hidden_size"], "num_attention_heads", heads)
    return cfg


class TextStates(NamedTuple):
    """Outputs of a text tower for token ids [B, S].

    Attributes:
      last: [B, S, F] after the last layer, or an earlier one by `clip_skip`, and the final norm; what Stable
        Diffusion 1 and 2 read.
      penultimate: [B, S, F] before the last layer, without a norm; what SDXL reads.
      pooled: [B, F] `last` at the end token, or [B, projection_dim] where the tower projects it.
    """

    last: Float[jax.Array, "B S F"]
    penultimate: Float[jax.Array, "B S F"]
    pooled: Float[jax.Array, "B D"]


class CLIPTextModel(nnx.Module):
    """Token ids -> text states. Source: transformers' CLIPTextModel; names as in published checkpoints."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_clip_config` returns."""
        self.eos_token_id = cfg["eos_token_id"]
        self.text_model = _TextModel(cfg, rngs=rngs)

    def __call__(
        self, input_ids: Integer[jax.Array, "B S"], *, clip_skip: int = 1, remat: str = "none"
    ) -> TextStates:
        """Returns the states of token ids [B, S]; under `jax.jit`, those that are not used cost nothing.

        Args:
          input_ids: of B texts.
          clip_skip: 1 for `last` after the last layer, 2 after the layer before it, and so on.
          remat: a policy of models/remat.py, by which each layer is a block.
        """
        states = [self.text_model.embeddings(input_ids)]
        for layer in self.text_model.encoder.layers:
            states.append(run_block(layer, remat, states[-1]))
        penultimate, last = states[-2], self.text_model.final_layer_norm(states[-clip_skip])
        # Configs written before transformers 4.31 say eos_token_id = 2, whatever the tokenizer: the end token
        # was then found as the highest id.
        end_scores = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id)
        ends = jnp.argmax(end_scores, axis=-1)
        return TextStates(last, penultimate, jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0])


class CLIPTextModelWithProjection(CLIPTextModel):
    """`CLIPTextModel` with a linear map behind the pooled state: SDXL's second text encoder."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_projecting_clip_config` returns."""
        super().__init__(cfg, rngs=rngs)
        self.text_projection = nnx.Linear(
            cfg["hidden_size"], cfg["projection_dim"], use_bias=False, rngs=rngs
        )

    def __call__(
        self, input_ids: Integer[jax.Array, "B S"], *, clip_skip: int = 1, remat: str = "none"
    ) -> TextStates:
        """Returns the states as `CLIPTextModel` does, but with `pooled` [B, projection_dim]."""
        states = super().__call__(input_ids, clip_skip=clip_skip, remat=remat)
        return states._replace(pooled=self.text_projection(states.pooled))
