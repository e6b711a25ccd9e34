"""`UNet2DCondition`: the denoiser of Stable Diffusion 1, 2 and XL, built from diffusers' config.json."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.models.blocks import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    conv2d,
    sinusoidal_embedding,
)
from dspo_jax.models.config import check_config, per_level
from dspo_jax.models.remat import run_block

_NAME = "UNet2DConditionModel"

_USED = {
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
}

# Absent in the older config.json files that Stable Diffusion 1.x was published with.
_OPTIONAL: dict[str, Any] = {
    "num_attention_heads": None,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}

_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type_num_heads": (64,),  # read by diffusers for other embedding types only
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upcast_attention": (None, False, True),  # the softmax is in float32 either way
}

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


class _Block(nnx.Module):
    """A resolution level: `resnets`, `attentions` if the level has them, `downsamplers` or `upsamplers`."""

    resnets: nnx.List
    attentions: nnx.List
    downsamplers: nnx.List
    upsamplers: nnx.List

    def layers(self):
        """The level's (resnet, attention or None) in order."""
        attentions = self.attentions if hasattr(self, "attentions") else [None] * len(self.resnets)
        return zip(self.resnets, attentions, strict=True)


def read_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a diffusers `unet/config.json` and fill in defaults; what may differ by level becomes a list.

    Raises:
      ValueError: names the key and value of what is not supported.
    """
    cfg = {**_OPTIONAL, **config}
    check_config(_NAME, cfg, _USED | set(_OPTIONAL), _FIXED)
    levels = len(cfg["block_out_channels"])
    for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        for kind in per_level(_NAME, key, cfg[key], levels):
            if kind not in known:
                raise ValueError(f"{_NAME} config: {key} has {kind!r}; supported: {', '.join(known)}")
    # diffusers' historical misnomer: attention_head_dim holds the number of heads.
    heads = cfg["num_attention_heads"] or cfg["attention_head_dim"]
    cfg["heads"] = per_level(_NAME, "attention_head_dim", heads, levels)
    for key in ("transformer_layers_per_block", "layers_per_block"):
        cfg[key] = per_level(_NAME, key, cfg[key], levels)
    if not isinstance(cfg["cross_attention_dim"], int):
        raise ValueError(
            f"{_NAME} config: cross_attention_dim = {cfg['cross_attention_dim']!r} must be one integer"
        )
    if cfg["addition_embed_type"] not in (None, "text_time"):
        raise ValueError(
            f"{_NAME} config: addition_embed_type = {cfg['addition_embed_type']!r} is not supported; "
            "allowed: None, 'text_time'"
        )
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if cfg["addition_embed_type"] and not isinstance(cfg[key], int):
            raise ValueError(
                f"{_NAME} config: {key} = {cfg[key]!r} must be an integer where addition_embed_type is set"
            )
    return cfg


class UNet2DCondition(nnx.Module):
    """Predicts eps or v of noisy latents under a text condition. Source: diffusers' UNet2DConditionModel."""

    def __init__(self, cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        """Build from what `read_unet_config` returns."""
        channels: list[int] = cfg["block_out_channels"]
        levels = len(channels)
        heads, depths, layers = cfg["heads"], cfg["transformer_layers_per_block"], cfg["layers_per_block"]
        self.in_channels = cfg["in_channels"]
        self.time_features = channels[0]
        self.flip_sin_to_cos = cfg["flip_sin_to_cos"]
        self.freq_shift = cfg["freq_shift"]
        temb = 4 * channels[0]
        groups, epsilon = cfg["norm_num_groups"], cfg["norm_eps"]

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels, out_channels, temb=temb, groups=groups, epsilon=epsilon, rngs=rngs
            )

        def transformer(level: int) -> Transformer2DModel:
            return Transformer2DModel(
                channels[level],
                heads[level],
                depth=depths[level],
                context_features=cfg["cross_attention_dim"],
                groups=groups,
                linear_projection=cfg["use_linear_projection"],
                rngs=rngs,
            )

        self.conv_in = conv2d(cfg["in_channels"], channels[0], 3, rngs=rngs)
        self.time_embedding = TimestepEmbedding(channels[0], temb, rngs=rngs)
        if cfg["addition_embed_type"] == "text_time":
            self.addition_time_features = cfg["addition_time_embed_dim"]
            self.add_embedding = TimestepEmbedding(
                cfg["projection_class_embeddings_input_dim"], temb, rngs=rngs
            )

        self.down_blocks: nnx.List = nnx.List([])
        skips = [channels[0]]
        width = channels[0]
        for level, kind in enumerate(cfg["down_block_types"]):
            block = _Block()
            block.resnets = nnx.List([])
            for _ in range(layers[level]):
                block.resnets.append(resnet(width, channels[level]))
                width = channels[level]
                skips.append(width)
            if _DOWN[kind]:
                block.attentions = nnx.List([transformer(level) for _ in range(layers[level])])
            if level < levels - 1:
                block.downsamplers = nnx.List([Downsample2D(width, padding=1, rngs=rngs)])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = _Block()
        self.mid_block.resnets = nnx.List([resnet(width, width), resnet(width, width)])
        self.mid_block.attentions = nnx.List([transformer(levels - 1)])

        self.up_blocks: nnx.List = nnx.List([])
        for index, kind in enumerate(cfg["up_block_types"]):
            level = levels - 1 - index
            block = _Block()
            block.resnets = nnx.List([])
            for _ in range(layers[level] + 1):
                block.resnets.append(resnet(width + skips.pop(), channels[level]))
                width = channels[level]
            if _UP[kind]:
                block.attentions = nnx.List([transformer(level) for _ in range(layers[level] + 1)])
            if level > 0:
                block.upsamplers = nnx.List([Upsample2D(width, rngs=rngs)])
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNorm(width, groups, epsilon)
        self.conv_out = conv2d(width, cfg["out_channels"], 3, rngs=rngs)

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        *,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        remat: str = "none",
    ) -> jax.Array:
        """Predict the target of the noisy latents.

        Args:
          sample: [B, h, w, in_channels] noisy latents (UNet units).
          timesteps: [B] integers.
          encoder_hidden_states: [B, S, cross_attention_dim] text states; or [B / n, ...], each for n images
            in a row.
          text_embeds: [B, F] pooled text (SDXL only).
          time_ids: [B, 6] original h, w, crop top, left, target h, w (SDXL only).
          remat: a policy of models/remat.py, by which each resnet and transformer block is a block.

        Returns:
          [B, h, w, out_channels] in the dtype of `sample`.

        Raises:
          ValueError: SDXL's conditions missing or unexpected; an unknown policy.
        """
        dtype = sample.dtype
        wants = hasattr(self, "add_embedding")
        if wants != (text_embeds is not None and time_ids is not None):
            raise ValueError(
                "this UNet needs text_embeds and time_ids"
                if wants
                else "this UNet takes no text_embeds or time_ids"
            )

        def sinusoids(t: jax.Array, features: int) -> jax.Array:
            return sinusoidal_embedding(
                t, features, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
            ).astype(dtype)

        temb = self.time_embedding(sinusoids(timesteps, self.time_features))
        if text_embeds is not None and time_ids is not None:
            ids = sinusoids(time_ids.reshape(-1), self.addition_time_features)
            added = jnp.concatenate([text_embeds.astype(dtype), ids.reshape(sample.shape[0], -1)], axis=-1)
            temb = temb + self.add_embedding(added)

        context = encoder_hidden_states.astype(dtype)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = run_block(resnet, remat, x, temb)
                if transformer is not None:
                    x = transformer(x, context, remat)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)

        x = run_block(self.mid_block.resnets[0], remat, x, temb)
        x = self.mid_block.attentions[0](x, context, remat)
        x = run_block(self.mid_block.resnets[1], remat, x, temb)

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = run_block(resnet, remat, jnp.concatenate([x, skips.pop()], axis=-1), temb)
                if transformer is not None:
                    x = transformer(x, context, remat)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[1:3])  # the level above may be of odd size
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))
