"""The image autoencoders of Stable Diffusion, built from diffusers' config.json.

Both encode an image to the mean and deviation of a posterior over latents, in the autoencoder's own units.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from dspo_jax.errors import UserError
from dspo_jax.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D, conv2d, double
from dspo_jax.models.config import NetworkConfig, check_multiple, per_level, read_config
from dspo_jax.models.norms import GroupNorm
from dspo_jax.models.transformer_blocks import Attention
from dspo_jax.schema import Key, fixed, flag, integer, number

_NAME = "AutoencoderKL"
_EPSILON = 1e-6

_KEYS: dict[str, Key] = {
    "in_channels": fixed(3),
    "out_channels": fixed(3),
    "latent_channels": integer(4, high=256),
    "block_out_channels": integer((64,), listed="always"),
    "layers_per_block": integer(1, high=16),
    "down_block_types": Key(("DownEncoderBlock2D",), str, allowed=("DownEncoderBlock2D",), listed="always"),
    "up_block_types": Key(("UpDecoderBlock2D",), str, allowed=("UpDecoderBlock2D",), listed="always"),
    "norm_num_groups": integer(32),
    "scaling_factor": number(0.18215, low=1e-6, high=1e6),
    "use_quant_conv": flag(True),
    "use_post_quant_conv": flag(True),
    "mid_block_add_attention": flag(True),
    "act_fn": fixed("silu"),
    "force_upcast": fixed(True, False),  # advice to float16 users; encoding here is float32 or bfloat16
    "shift_factor": number(None, low=-1e6, high=1e6, null=True),
    "latents_mean": fixed(None),
    "latents_std": fixed(None),
}
# The size of the images that it was trained on; it takes others.
_UNREAD = {"sample_size"}


class _SpatialAttention(Attention):
    """Single-head self-attention over positions, with its own norm and skip."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(channels, 1, channels, bias=True, rngs=rngs)
        self.group_norm = GroupNorm(channels, groups, _EPSILON)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        h = super().__call__(self.group_norm(x).reshape(batch, height * width, channels), context)
        return x + h.reshape(x.shape)


class _Level(nnx.Module):
    """`resnets`, then a `downsamplers` or `upsamplers` list where the resolution changes."""

    resnets: nnx.List
    downsamplers: nnx.List
    upsamplers: nnx.List

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [
                _resnet(in_channels if layer == 0 else channels, channels, groups, rngs=rngs)
                for layer in range(layers)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in getattr(self, "downsamplers", ()) or getattr(self, "upsamplers", ()):
            x = resample(x)
        return x


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, *, attention: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(channels, channels, groups, rngs=rngs) for _ in range(2)])
        if attention:
            self.attentions = nnx.List([_SpatialAttention(channels, groups, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in getattr(self, "attentions", ()):
            x = attention(x)
        return self.resnets[1](x)


def _resnet(in_channels: int, out_channels: int, groups: int, *, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, temb=None, groups=groups, epsilon=_EPSILON, rngs=rngs)


class _Encoder(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        channels, groups = list(cfg["block_out_channels"]), cfg["norm_num_groups"]
        self.conv_in = conv2d(cfg["in_channels"], channels[0], 3, rngs=rngs)
        self.down_blocks: nnx.List = nnx.List([])
        width = channels[0]
        for level, features in enumerate(channels):
            block = _Level(width, features, cfg["layers_per_block"], groups, rngs=rngs)
            width = features
            if level < len(channels) - 1:
                block.downsamplers = nnx.List([Downsample2D(width, padding=0, rngs=rngs)])
            self.down_blocks.append(block)
        self.mid_block = _MidBlock(width, groups, attention=cfg["mid_block_add_attention"], rngs=rngs)
        self.conv_norm_out = GroupNorm(width, groups, _EPSILON)
        self.conv_out = conv2d(width, 2 * cfg["latent_channels"], 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        channels, groups = list(cfg["block_out_channels"])[::-1], cfg["norm_num_groups"]
        self.conv_in = conv2d(cfg["latent_channels"], channels[0], 3, rngs=rngs)
        self.mid_block = _MidBlock(channels[0], groups, attention=cfg["mid_block_add_attention"], rngs=rngs)
        self.up_blocks: nnx.List = nnx.List([])
        width = channels[0]
        for level, features in enumerate(channels):
            block = _Level(width, features, cfg["layers_per_block"] + 1, groups, rngs=rngs)
            width = features
            if level < len(channels) - 1:
                block.upsamplers = nnx.List([Upsample2D(width, rngs=rngs)])
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(width, groups, _EPSILON)
        self.conv_out = conv2d(width, cfg["out_channels"], 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


def read_vae_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a diffusers `AutoencoderKL` and fill in defaults.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(_NAME, config, _KEYS, _UNREAD)
    channels = cfg["block_out_channels"]
    for key in ("down_block_types", "up_block_types"):
        per_level(_NAME, key, cfg[key], len(channels))
    for features in channels:
        check_multiple(_NAME, "block_out_channels", features, "norm_num_groups", cfg["norm_num_groups"])
    cfg["vae_scale_factor"] = 2 ** (len(channels) - 1)
    return cfg


class AutoencoderKL(nnx.Module):
    """Images <-> posterior moments and latents, in the VAE's own units. Source: diffusers' AutoencoderKL."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_vae_config` returns."""
        self.encoder = _Encoder(cfg, rngs=rngs)
        self.decoder = _Decoder(cfg, rngs=rngs)
        channels = cfg["latent_channels"]
        if cfg["use_quant_conv"]:
            self.quant_conv = conv2d(2 * channels, 2 * channels, 1, rngs=rngs)
        if cfg["use_post_quant_conv"]:
            self.post_quant_conv = conv2d(channels, channels, 1, rngs=rngs)

    def encode(
        self, images: Float[jax.Array, "B H W 3"]
    ) -> tuple[Float[jax.Array, "B h w C"], Float[jax.Array, "B h w C"]]:
        """Encodes images [B, H, W, 3] in [-1, 1]: mean and deviation of the posterior, each [B, h, w, C]."""
        h = self.encoder(images)
        if hasattr(self, "quant_conv"):
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h, 2, axis=-1)
        # The limits of diffusers' DiagonalGaussianDistribution.
        return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[jax.Array, "B h w C"]) -> Float[jax.Array, "B H W 3"]:
        """Decodes latents [B, h, w, C] in VAE units to images [B, H, W, 3].

        They are UNet units / scaling_factor + shift_factor.
        """
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


_TINY_NAME = "AutoencoderTiny"
_TINY_KEYS: dict[str, Key] = {
    "in_channels": fixed(3),
    "out_channels": fixed(3),
    "encoder_block_out_channels": integer((64, 64, 64, 64), listed="always"),
    "decoder_block_out_channels": integer((64, 64, 64, 64), listed="always"),
    "latent_channels": integer(4, high=256),
    "num_encoder_blocks": integer((1, 3, 3, 3), high=16, listed="always"),
    "num_decoder_blocks": integer((3, 3, 3, 1), high=16, listed="always"),
    "scaling_factor": number(1.0, low=1e-6, high=1e6),
    "act_fn": fixed("relu"),
    "force_upcast": fixed(False, True),  # as above
    "shift_factor": fixed(0.0, None),
    "upsample_fn": fixed("nearest"),
    "upsampling_scaling_factor": fixed(2),
}
# Keys for storing latents as bytes, and a copy of decoder_block_out_channels.
_TINY_UNREAD = {"latent_magnitude", "latent_shift", "block_out_channels"}


class _ReLU(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x)


class _Double(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return double(x)


class _Sequence(nnx.Module):
    """Layers one after the other; layers without parameters keep the numbers of the others."""

    def __init__(self, layers: list[nnx.Module]):
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class _TinyBlock(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        def conv() -> nnx.Conv:
            return conv2d(channels, channels, 3, rngs=rngs)

        self.conv = nnx.List([conv(), _ReLU(), conv(), _ReLU(), conv()])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for layer in self.conv:
            h = layer(h)
        return nnx.relu(h + x)


def _tiny_encoder(cfg: NetworkConfig, *, rngs: nnx.Rngs) -> _Sequence:
    width = cfg["encoder_block_out_channels"][0]
    layers: list[nnx.Module] = []
    for level, blocks in enumerate(cfg["num_encoder_blocks"]):
        if level == 0:
            layers.append(conv2d(cfg["in_channels"], width, 3, rngs=rngs))
        else:
            layers.append(conv2d(width, width, 3, stride=2, bias=False, rngs=rngs))
        layers += [_TinyBlock(width, rngs=rngs) for _ in range(blocks)]
    return _Sequence([*layers, conv2d(width, cfg["latent_channels"], 3, rngs=rngs)])


def _tiny_decoder(cfg: NetworkConfig, *, rngs: nnx.Rngs) -> _Sequence:
    width = cfg["decoder_block_out_channels"][0]
    layers: list[nnx.Module] = [conv2d(cfg["latent_channels"], width, 3, rngs=rngs), _ReLU()]
    for level, blocks in enumerate(cfg["num_decoder_blocks"]):
        if level > 0:
            layers += [_Double(), conv2d(width, width, 3, bias=False, rngs=rngs)]
        layers += [_TinyBlock(width, rngs=rngs) for _ in range(blocks)]
    return _Sequence([*layers, conv2d(width, cfg["out_channels"], 3, rngs=rngs)])


def read_tiny_vae_config(config: NetworkConfig) -> NetworkConfig:
    """Checks the config.json of a diffusers `AutoencoderTiny` and fill in defaults.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(_TINY_NAME, config, _TINY_KEYS, _TINY_UNREAD)
    levels = len(cfg["num_encoder_blocks"])
    per_level(_TINY_NAME, "num_decoder_blocks", cfg["num_decoder_blocks"], levels)
    for key in ("encoder_block_out_channels", "decoder_block_out_channels"):
        if len(set(per_level(_TINY_NAME, key, cfg[key], levels))) > 1:
            raise UserError(f"{_TINY_NAME} config: {key} = {cfg[key]!r} must be the same number throughout")
    cfg["vae_scale_factor"] = 2 ** (levels - 1)
    return cfg


class AutoencoderTiny(nnx.Module):
    """TAESD: a small, deterministic stand-in for `AutoencoderKL`. Source: diffusers' AutoencoderTiny."""

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_tiny_vae_config` returns."""
        self.encoder = _tiny_encoder(cfg, rngs=rngs)
        self.decoder = _tiny_decoder(cfg, rngs=rngs)

    def encode(
        self, images: Float[jax.Array, "B H W 3"]
    ) -> tuple[Float[jax.Array, "B h w C"], Float[jax.Array, "B h w C"]]:
        """Encodes images [B, H, W, 3] in [-1, 1]: latents [B, h, w, C] and their deviation, which is zero."""
        latents = self.encoder((images + 1) / 2)
        return latents, jnp.zeros_like(latents)

    def decode(self, latents: Float[jax.Array, "B h w C"]) -> Float[jax.Array, "B H W 3"]:
        """Returns latents [B, h, w, C] -> images [B, H, W, 3], about [-1, 1]."""
        return self.decoder(3 * jnp.tanh(latents / 3)) * 2 - 1
