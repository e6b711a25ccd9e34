"""`T5Encoder`: the encoder of T5 v1.1, Stable Diffusion 3's third text encoder, from its config.json.

Raffel et al. 2020, arXiv 1910.10683, with the gated feed-forward layer of Shazeer 2020, arXiv 2002.05202.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Integer

from dspo_jax.errors import UserError
from dspo_jax.kernels.attention import attention
from dspo_jax.models.blocks import linear
from dspo_jax.models.config import NetworkConfig, read_config
from dspo_jax.models.norms import RMSNorm
from dspo_jax.models.remat import run_block
from dspo_jax.schema import REQUIRED, Key, fixed, integer, number

_NAME = "T5EncoderModel"

_KEYS: dict[str, Key] = {
    "vocab_size": integer(32128, high=1 << 22),
    "d_model": integer(512),
    "d_kv": integer(64),
    "d_ff": integer(2048, high=1 << 18),
    "num_layers": integer(6, high=96),
    "num_heads": integer(8),
    "relative_attention_num_buckets": integer(32, low=4),
    "relative_attention_max_distance": integer(128),
    "layer_norm_epsilon": number(1e-6),
    # Absent, it is "relu" in transformers: the feed-forward layer of the first T5, without a gate.
    "feed_forward_proj": Key(REQUIRED, str, allowed=("gated-gelu",)),
    "dense_act_fn": fixed("gelu_new"),
    "is_gated_act": fixed(True),
}
# Of the decoder, training and generation, which the encoder's states do not depend on.
_UNREAD = {
    *("decoder_start_token_id", "num_decoder_layers", "is_encoder_decoder", "tie_word_embeddings"),
    *("dropout_rate", "classifier_dropout", "initializer_factor", "gradient_checkpointing"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_past", "n_positions", "use_cache"),
    *("task_specific_params", "scale_decoder_outputs"),
}


def read_t5_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a transformers `T5EncoderModel` and fills in defaults.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(_NAME, config, _KEYS, _UNREAD)
    buckets, farthest = (cfg[f"relative_attention_{key}"] for key in ("num_buckets", "max_distance"))
    if buckets % 4 or farthest <= buckets // 4:
        raise UserError(
            f"{_NAME} config: relative_attention_num_buckets = {buckets} must be a multiple of 4, and "
            f"relative_attention_max_distance = {farthest} more than a quarter of it"
        )
    return cfg


def find_buckets(length: int, buckets: int, farthest: int) -> np.ndarray:
    """Returns the bucket of each key's distance from each query, [length, length] int32, queries first.

    Keys behind the query have the second half of the buckets. Of a half, the first half is a bucket for each
    distance, and the others grow in proportion to the distance, up to `farthest`.
    """
    half = buckets // 2
    exact = half // 2
    distance_TS = np.arange(length)[None] - np.arange(length)[:, None]
    size_TS = np.abs(distance_TS)
    grown_TS = np.log(np.maximum(size_TS, 1) / exact) / math.log(farthest / exact) * (half - exact)
    far_TS = np.minimum(half - 1, exact + grown_TS.astype(np.int32))
    return (half * (distance_TS > 0) + np.where(size_TS < exact, size_TS, far_TS)).astype(np.int32)


class _SelfAttention(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, first: bool, rngs: nnx.Rngs):
        features, inner = cfg["d_model"], cfg["num_heads"] * cfg["d_kv"]
        self.heads, self.size = cfg["num_heads"], cfg["d_kv"]
        self.q = linear(features, inner, bias=False, rngs=rngs)
        self.k = linear(features, inner, bias=False, rngs=rngs)
        self.v = linear(features, inner, bias=False, rngs=rngs)
        self.o = linear(inner, features, bias=False, rngs=rngs)
        if first:
            self.relative_attention_bias = nnx.Embed(
                cfg["relative_attention_num_buckets"], cfg["num_heads"], rngs=rngs
            )

    def __call__(self, x: jax.Array, bias_HTS: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        # T5 does not scale its products, as `attention` does.
        query = split(self.q(x)) * math.sqrt(self.size)
        out = attention(query, split(self.k(x)), split(self.v(x)), bias=bias_HTS)
        return self.o(out.reshape(*x.shape[:2], -1))


class _GatedFeedForward(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features, hidden = cfg["d_model"], cfg["d_ff"]
        self.wi_0 = linear(features, hidden, bias=False, rngs=rngs)
        self.wi_1 = linear(features, hidden, bias=False, rngs=rngs)
        self.wo = linear(hidden, features, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(nnx.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class _AttentionLayer(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, first: bool, rngs: nnx.Rngs):
        self.SelfAttention = _SelfAttention(cfg, first=first, rngs=rngs)
        self.layer_norm = RMSNorm(cfg["d_model"], cfg["layer_norm_epsilon"])


class _FeedForwardLayer(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.DenseReluDense = _GatedFeedForward(cfg, rngs=rngs)
        self.layer_norm = RMSNorm(cfg["d_model"], cfg["layer_norm_epsilon"])


class _Block(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, first: bool, rngs: nnx.Rngs):
        attending = _AttentionLayer(cfg, first=first, rngs=rngs)
        self.layer = nnx.List([attending, _FeedForwardLayer(cfg, rngs=rngs)])

    def __call__(self, x: jax.Array, bias_HTS: jax.Array) -> jax.Array:
        """Float32 states [B, S, d_model] -> the same, computed in the dtype of the parameters between."""
        attending: Any = self.layer[0]
        feeding: Any = self.layer[1]
        dtype = attending.layer_norm.scale.dtype  # a kernel may be quantized
        attended = attending.SelfAttention(attending.layer_norm(x).astype(dtype), bias_HTS)
        x = x + attended.astype(jnp.float32)
        fed = feeding.DenseReluDense(feeding.layer_norm(x).astype(dtype))
        return x + fed.astype(jnp.float32)


class _Stack(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        self.block = nnx.List([_Block(cfg, first=n == 0, rngs=rngs) for n in range(cfg["num_layers"])])
        self.final_layer_norm = RMSNorm(cfg["d_model"], cfg["layer_norm_epsilon"])


class T5Encoder(nnx.Module):
    """Token ids -> text states. Source: transformers' T5EncoderModel, whose names the parameters have.

    States are added up in float32 whatever the dtype of the parameters: in float16 they overflow.
    """

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_t5_config` returns."""
        self.buckets = cfg["relative_attention_num_buckets"]
        self.farthest = cfg["relative_attention_max_distance"]
        self.shared = nnx.Embed(cfg["vocab_size"], cfg["d_model"], rngs=rngs)
        self.encoder = _Stack(cfg, rngs=rngs)

    def __call__(
        self, input_ids: Integer[jax.Array, "B S"], *, remat: str = "none"
    ) -> Float32[jax.Array, "B S F"]:
        """Returns the states [B, S, d_model] float32 of token ids [B, S], behind the final norm.

        `remat` is a policy of models/remat.py for the backward pass.

        Padding is attended to like any token, as in Stable Diffusion 3: another length gives other states.
        """
        first: Any = self.encoder.block[0].layer[0]
        table = first.SelfAttention.relative_attention_bias.embedding[...]
        buckets_TS = find_buckets(input_ids.shape[1], self.buckets, self.farthest)
        bias_HTS = table.astype(jnp.float32)[buckets_TS].transpose(2, 0, 1)
        x = self.shared.embedding[...][input_ids].astype(jnp.float32)
        for block in self.encoder.block:
            x = run_block(block, remat, x, bias_HTS)
        return self.encoder.final_layer_norm(x)
