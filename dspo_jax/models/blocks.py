"""Building blocks shared by the UNet and the VAE: images and latents are NHWC, attribute names diffusers'."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.kernels import cpu, gpu
from dspo_jax.kernels.attention import attention
from dspo_jax.kernels.device_kind import current_device_kind
from dspo_jax.models.lora import LoRAConv
from dspo_jax.models.remat import run_block


def conv2d(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square convolution with torch's symmetric padding (default: "same" for an odd kernel)."""
    pad = size // 2 if padding is None else padding
    window = (size, size)
    return nnx.Conv(
        in_channels,
        out_channels,
        window,
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        conv_general_dilated=cpu.convolve,
        rngs=rngs,
    )


def linear(in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear layer over the last axis."""
    return nnx.Linear(in_features, out_features, use_bias=bias, dot_general=cpu.dot_general, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalisation over positions and the channels of a group, in float32.

    In float32 two passes, as torch: the variance is taken about the mean. Of a bfloat16 input the mean of
    squares is taken beside the mean, which a TPU's program does while it writes the layer before: what that
    cancels in float32 is below what rounding the input did. Channels are combined by their means and
    variances (Chan et al. 1983), so that only a channel's own mean cancels.

    Positions are reduced first and channels grouped after, which leaves the large array in its own layout: on
    a CPU the other order is slower.

    What is added to all positions first is added here, where the array is read anyway: XLA's program for a
    GPU would write it out as large as the image, for cuDNN to add.
    """

    def __init__(self, channels: int, groups: int, epsilon: float):
        self.groups = groups
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, shift_BC: jax.Array | None = None) -> jax.Array:
        """[B, h, w, C], plus `shift_BC` if it is given -> [B, h, w, C] in the dtype of `x`."""
        groups = self.groups

        def group_mean(means_BC: jax.Array) -> jax.Array:
            if cpu.is_for_cpu(means_BC.shape[0]):
                return cpu.group_mean(means_BC, groups)
            means_BGc = means_BC.reshape(means_BC.shape[0], groups, -1)
            return jnp.broadcast_to(means_BGc.mean(-1, keepdims=True), means_BGc.shape).reshape(
                means_BC.shape
            )

        x_BPC = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
        if shift_BC is not None:
            x_BPC += shift_BC[:, None].astype(jnp.float32)
        channel_BC = x_BPC.mean(1)
        mean_BC = group_mean(channel_BC)
        centred_BPC = x_BPC - mean_BC[:, None]
        if x.dtype == jnp.float32:
            variance_BC = group_mean(jnp.square(centred_BPC).mean(1))
        else:
            within_BC = jnp.maximum(jnp.square(x_BPC).mean(1) - jnp.square(channel_BC), 0.0)
            variance_BC = group_mean(within_BC + jnp.square(channel_BC - mean_BC))
        inverse_B1C = jax.lax.rsqrt(variance_BC + self.epsilon)[:, None]
        scale_11C, bias_11C = (
            param[...][None, None].astype(jnp.float32) for param in (self.scale, self.bias)
        )
        return (centred_BPC * (inverse_B1C * scale_11C) + bias_11C).reshape(x.shape).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32; the variance is computed as `GroupNorm`'s is."""

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> [..., features] in the dtype of `x`."""
        if x.dtype != jnp.float32 and gpu.is_for_gpu(x.shape[0]):
            scale, bias = (param[...].astype(jnp.float32) for param in (self.scale, self.bias))
            return gpu.layer_norm(x, scale, bias, self.epsilon)
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        centred = wide - mean
        if x.dtype == jnp.float32:
            variance = jnp.square(centred).mean(-1, keepdims=True)
        else:
            variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        leading = tuple(range(x.ndim - 1))
        scale, bias = (
            jnp.expand_dims(param[...].astype(jnp.float32), leading) for param in (self.scale, self.bias)
        )
        return (centred * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(x.dtype)


def sinusoidal_embedding(
    timesteps: jax.Array, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Computes sinusoidal features [B, channels] (float32) of timesteps [B], as diffusers orders them."""
    half = channels // 2
    frequencies_F = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles_BF = timesteps.astype(jnp.float32)[:, None] * frequencies_F[None, :]
    parts = [jnp.sin(angles_BF), jnp.cos(angles_BF)]
    features_BC = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(features_BC, ((0, 0), (0, channels - 2 * half)))


class Identity(nnx.Module):
    """Holds the place of a torch module without parameters so that list indices agree."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.linear_1 = linear(in_features, features, rngs=rngs)
        self.linear_2 = linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """Norm-SiLU-conv twice around an optional shift by the time embedding, plus a skip connection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb: int | None,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(in_channels, groups, epsilon)
        self.conv1 = conv2d(in_channels, out_channels, 3, rngs=rngs)
        if temb is not None:
            self.time_emb_proj = linear(temb, out_channels, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups, epsilon)
        self.conv2 = conv2d(out_channels, out_channels, 3, rngs=rngs)
        if in_channels != out_channels:
            self.conv_shortcut = conv2d(in_channels, out_channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        shift_BC = None if temb is None else self.time_emb_proj(nnx.silu(temb))
        if shift_BC is not None and not gpu.is_for_gpu(x.shape[0]):  # a TPU adds while it writes the image
            h, shift_BC = h + shift_BC[:, None, None], None
        h = self.conv2(nnx.silu(self.norm2(h, shift_BC)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample2D(nnx.Module):
    """Stride-2 convolution; `padding=0` pads right and bottom only, as the VAE's encoder does."""

    def __init__(self, channels: int, *, padding: int, rngs: nnx.Rngs):
        self.pad_right_bottom = padding == 0
        self.conv = conv2d(channels, channels, 3, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.pad_right_bottom:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


def double(x: jax.Array) -> jax.Array:
    """Enlarges by nearest neighbours, [B, h, w, C] -> [B, 2h, 2w, C]."""
    batch, height, width, channels = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return doubled.reshape(batch, 2 * height, 2 * width, channels)


def convolve_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns a 3 x 3 convolution of `double(x)` with padding 1, from `x` itself: 4/9 of the arithmetic.

    Two of the three rows that an output looks at are the same row of `x`, and so with columns. Their weights
    are added, and the four outputs at a pixel of `x` have each a kernel of 2 x 2.

    Args:
      x: [B, h, w, C].
      kernel: [3, 3, C, O].

    Returns:
      [B, 2h, 2w, O], equal to the plain one but for rounding.
    """
    batch, height, width, _ = x.shape

    def merge(kernel: jax.Array, second: int) -> jax.Array:
        """Returns the weights of the two rows that the first or second of doubled rows sees; rows lead."""
        above, middle, below = kernel
        return jnp.stack([above + middle, below] if second else [above, middle + below])

    weights = kernel.astype(jnp.float32)  # sums are rounded once

    def outputs(i: int, j: int) -> jax.Array:
        columns = merge(weights, i).swapaxes(0, 1)
        return jax.lax.conv_general_dilated(
            x,
            merge(columns, j).swapaxes(0, 1).astype(kernel.dtype),
            (1, 1),
            ((1 - i, i), (1 - j, j)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rows = [jnp.stack([outputs(i, j) for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


# By the estimate for a v5p; with fewer channels a forward pass alone takes longer so (benchmarks.layers).
# On a GPU a step moves 2.6 GB more and computes 4.8 TFLOP less: a gain, by the roofline (measurements.md).
_FEWEST_CHANNELS_ON_TPU = 256


def _merges_rows(batch: int, channels: int) -> bool:
    """Returns whether `convolve_doubled` is faster on the device that the program is traced for."""
    device = current_device_kind(batch)
    if device is None:
        return False
    if device.platform == "tpu":
        return channels >= _FEWEST_CHANNELS_ON_TPU
    return device.platform in ("cpu", "gpu")


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling followed by a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv2d(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        """[B, h, w, C] -> [B, 2h, 2w, C], or `size` (height, width), which may be one less each."""
        height, width = size or (None, None)
        whole = size in (None, (2 * x.shape[1], 2 * x.shape[2]))
        bias = self.conv.bias
        if not whole or bias is None or not _merges_rows(x.shape[0], x.shape[-1]):
            return self.conv(double(x)[:, :height, :width])
        out = convolve_doubled(x, self.conv.kernel[...]) + bias[...][None, None, None]
        if isinstance(self.conv, LoRAConv):
            out = out + self.conv.adapt(double(x))
        return out


class Attention(nnx.Module):
    """Multi-head self- or cross-attention with diffusers' names (`to_q`, `to_k`, `to_v`, `to_out.0`)."""

    def __init__(
        self,
        features: int,
        heads: int,
        head_dim: int,
        *,
        context_features: int | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_dim
        context_features = features if context_features is None else context_features
        self.heads = heads
        self.to_q = linear(features, inner, bias=bias, rngs=rngs)
        self.to_k = linear(context_features, inner, bias=bias, rngs=rngs)
        self.to_v = linear(context_features, inner, bias=bias, rngs=rngs)
        self.to_out = nnx.List([linear(inner, features, rngs=rngs)])

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x [B, T, features], context [B, S, context_features] (default x) -> [B, T, features].

        Of a context [B / n, ...] each is for n images in a row, and is made keys and values of once.
        """
        context = x if context is None else context
        images = len(x) // len(context)

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        # The few keys are repeated: on a TPU the queries of n images as those of one are moved in memory.
        key, value = (jnp.repeat(split(of(context)), images, axis=0) for of in (self.to_k, self.to_v))
        out = attention(split(self.to_q(x)), key, value)
        return self.to_out[0](out.reshape(*x.shape[:2], -1))


class GEGLU(nnx.Module):
    """Gated linear unit with an exact (erf) GELU."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.proj = linear(in_features, 2 * features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = self._halves(x)
        return hidden * nnx.gelu(gate, approximate=False)

    def _halves(self, x: jax.Array) -> Sequence[jax.Array]:
        if type(self.proj) is nnx.Linear and self.proj.bias is not None and gpu.is_for_gpu(x.shape[0]):
            # Two products: XLA puts their gradients nowhere side by side, and sums the biases' on the way.
            pairs = (jnp.split(param[...], 2, axis=-1) for param in (self.proj.kernel, self.proj.bias))
            leading = tuple(range(x.ndim - 1))
            return [x @ kernel + jnp.expand_dims(bias, leading) for kernel, bias in zip(*pairs, strict=True)]
        return jnp.split(self.proj(x), 2, axis=-1)


class FeedForward(nnx.Module):
    """GEGLU to four times the width, then back; index 1 of `net` is torch's dropout."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.net = nnx.List(
            [
                GEGLU(features, 4 * features, rngs=rngs),
                Identity(),
                linear(4 * features, features, rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a layer norm and a skip."""

    def __init__(self, features: int, heads: int, head_dim: int, context_features: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(features)
        self.attn1 = Attention(features, heads, head_dim, rngs=rngs)
        self.norm2 = LayerNorm(features)
        self.attn2 = Attention(features, heads, head_dim, context_features=context_features, rngs=rngs)
        self.norm3 = LayerNorm(features)
        self.ff = FeedForward(features, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """`depth` transformer blocks over the flattened positions of a feature map, between two projections."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        depth: int,
        context_features: int,
        groups: int,
        linear_projection: bool,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, groups, 1e-6)
        self.proj_in = (
            linear(channels, channels, rngs=rngs)
            if linear_projection
            else conv2d(channels, channels, 1, rngs=rngs)
        )
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, heads, channels // heads, context_features, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.proj_out = (
            linear(channels, channels, rngs=rngs)
            if linear_projection
            else conv2d(channels, channels, 1, rngs=rngs)
        )

    def __call__(self, x: jax.Array, context: jax.Array, remat: str = "none") -> jax.Array:
        # In NHWC a 1x1 convolution and a linear layer act on the last axis alike; only their kernels differ.
        batch, height, width, channels = x.shape
        # The norm too: its float32 intermediate results are larger than what a block keeps.
        h = run_block(self.norm, remat, x)
        h = self.proj_in(h).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            h = run_block(block, remat, h, context)
        h = self.proj_out(h.reshape(batch, height, width, channels))
        return x + h
