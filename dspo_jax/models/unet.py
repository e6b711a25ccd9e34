"""`UNet2DCondition`: the denoiser of Stable Diffusion 1, 2 and XL, built from diffusers' config.json."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Num

from dspo_jax.errors import UserError
from dspo_jax.models.blocks import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    conv2d,
    sinusoidal_embedding,
)
from dspo_jax.models.config import NetworkConfig, check_multiple, per_level, read_config
from dspo_jax.models.norms import GroupNorm
from dspo_jax.models.remat import run_block
from dspo_jax.models.transformer_blocks import Transformer2DModel
from dspo_jax.schema import Key, fixed, flag, integer, number, off

_NAME = "UNet2DConditionModel"

_MAX_BLOCKS = 300  # resnets and transformer blocks; by the same count SDXL has 80
_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

_KEYS: dict[str, Key] = {
    "sample_size": integer(None, high=4096, listed="also", length=range(2, 3), null=True),
    "in_channels": integer(4, high=1024),
    "out_channels": integer(4, high=1024),
    "flip_sin_to_cos": flag(True),
    "freq_shift": integer(0, low=0, high=1),
    "down_block_types": Key(
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), str, allowed=tuple(_DOWN), listed="always"
    ),
    "up_block_types": Key(
        ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, str, allowed=tuple(_UP), listed="always"
    ),
    "block_out_channels": integer((320, 640, 1280, 1280), listed="always"),
    "layers_per_block": integer(2, high=16, listed="also"),
    "norm_num_groups": integer(32),
    "norm_eps": number(1e-5),
    "cross_attention_dim": integer(1280),
    "transformer_layers_per_block": integer(1, high=64, listed="also"),
    "attention_head_dim": integer(8, listed="also"),
    "num_attention_heads": integer(None, listed="also", null=True),
    "use_linear_projection": flag(False),
    "addition_embed_type": fixed(None, "text_time"),
    "addition_time_embed_dim": integer(None, null=True),
    "projection_class_embeddings_input_dim": integer(None, null=True),
    # Computed in one way only.
    "act_fn": fixed("silu"),
    "addition_embed_type_num_heads": fixed(64),  # read by diffusers for other embedding types only
    "attention_type": fixed("default"),
    "conv_in_kernel": fixed(3),
    "conv_out_kernel": fixed(3),
    "downsample_padding": fixed(1),
    "dropout": fixed(0.0),
    "mid_block_scale_factor": fixed(1),
    "mid_block_type": fixed("UNetMidBlock2DCrossAttn"),
    "resnet_out_scale_factor": fixed(1.0),
    "resnet_time_scale_shift": fixed("default"),
    "time_embedding_type": fixed("positional"),
    "upcast_attention": fixed(False, True, None),  # the softmax is in float32 either way
    # Not computed.
    "center_input_sample": off(False),
    "class_embed_type": off(),
    "class_embeddings_concat": off(False),
    "cross_attention_norm": off(),
    "dual_cross_attention": off(False),
    "encoder_hid_dim": off(),
    "encoder_hid_dim_type": off(),
    "mid_block_only_cross_attention": off(),
    "num_class_embeds": off(),
    "only_cross_attention": off(False),
    "resnet_skip_time_act": off(False),
    "reverse_transformer_layers_per_block": off(),
    "time_cond_proj_dim": off(),
    "time_embedding_act_fn": off(),
    "time_embedding_dim": off(),
    "timestep_post_act": off(),
}


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


def read_unet_config(config: NetworkConfig) -> NetworkConfig:
    """Checks a diffusers `unet/config.json` and fill in defaults; what may differ by level becomes a list.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(_NAME, config, _KEYS)
    channels = cfg["block_out_channels"]
    # diffusers' historical misnomer: attention_head_dim holds the number of heads.
    head_key = "attention_head_dim" if cfg["num_attention_heads"] is None else "num_attention_heads"
    for key in ("down_block_types", "up_block_types", "transformer_layers_per_block", "layers_per_block"):
        cfg[key] = per_level(_NAME, key, cfg[key], len(channels))
    cfg["heads"] = per_level(_NAME, head_key, cfg[head_key], len(channels))
    kinds = zip(channels, cfg["down_block_types"], reversed(cfg["up_block_types"]), strict=True)
    for level, (features, down, up) in enumerate(kinds):
        check_multiple(_NAME, "block_out_channels", features, "norm_num_groups", cfg["norm_num_groups"])
        if _DOWN[down] or _UP[up] or level == len(channels) - 1:
            check_multiple(_NAME, "block_out_channels", features, head_key, cfg["heads"][level])
    _check_depth(cfg["layers_per_block"], cfg["transformer_layers_per_block"])
    time_features = {"block_out_channels": channels[0]}
    if cfg["addition_embed_type"]:
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if cfg[key] is None:
                raise UserError(
                    f"{_NAME} config: {key} = None must be an integer where addition_embed_type is set"
                )
        time_features["addition_time_embed_dim"] = cfg["addition_time_embed_dim"]
    for key, features in time_features.items():
        if features // 2 <= cfg["freq_shift"]:  # the sinusoids divide by the difference
            raise UserError(
                f"{_NAME} config: {key} = {features} leaves no frequency with freq_shift = "
                f"{cfg['freq_shift']}"
            )
    return cfg


def _check_depth(layers_per_block: list[int], transformer_layers: list[int]) -> None:
    """Refuses a network of absurd depth, which would take minutes to trace."""
    levels = zip(layers_per_block, transformer_layers, strict=True)
    blocks = sum((2 * layers + 1) * (1 + depth) for layers, depth in levels)
    if blocks > _MAX_BLOCKS:
        raise UserError(
            f"{_NAME} config: layers_per_block = {layers_per_block} with transformer_layers_per_block = "
            f"{transformer_layers} are {blocks} blocks; at most {_MAX_BLOCKS} are built"
        )


class UNet2DCondition(nnx.Module):
    """Predicts eps or v of noisy latents under a text condition. Source: diffusers' UNet2DConditionModel."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_unet_config` returns."""
        channels: list[int] = cfg["block_out_channels"]
        levels = len(channels)
        heads, depths, layers = cfg["heads"], cfg["transformer_layers_per_block"], cfg["layers_per_block"]
        self.in_channels = cfg["in_channels"]
        self.time_features = channels[0]
        self.flip_sin_to_cos = cfg["flip_sin_to_cos"]
        self.freq_shift = float(cfg["freq_shift"])
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
        sample: Float[jax.Array, "B h w C"],
        timesteps: Num[jax.Array, " B"],
        encoder_hidden_states: Float[jax.Array, "captions S F"],
        *,
        text_embeds: Float[jax.Array, "B D"] | None = None,
        time_ids: Num[jax.Array, "B 6"] | None = None,
        remat: str = "none",
    ) -> Float[jax.Array, "B h w out_channels"]:
        """Predicts eps or v of noisy latents.

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
          UserError: SDXL's conditions missing or unexpected; an unknown policy.
        """
        dtype = sample.dtype
        wants = hasattr(self, "add_embedding")
        if wants != (text_embeds is not None and time_ids is not None):
            raise UserError(
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
