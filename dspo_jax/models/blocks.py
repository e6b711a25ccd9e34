"""Building blocks shared by the UNet and the VAE: images and latents are NHWC, attribute names diffusers'."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.kernels import cpu, gpu
from dspo_jax.kernels.device_kind import current_device_kind
from dspo_jax.models import quantized
from dspo_jax.models.lora import LoRAConv
from dspo_jax.models.norms import GroupNorm


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


def linear(
    in_features: int, out_features: int, *, bias: bool = True, zero: bool = False, rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a linear layer over the last axis; `zero` starts it with a kernel of zeros."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        kernel_init=nnx.initializers.zeros if zero else nnx.initializers.lecun_normal(),
        dot_general=cpu.dot_general,
        rngs=rngs,
    )


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
        return cpu.convolve(
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
        out = quantized.run(convolve_doubled, x, self.conv.kernel[...]) + bias[...][None, None, None]
        if isinstance(self.conv, LoRAConv):
            out = self.conv.adapt(out, double(x))
        return out
