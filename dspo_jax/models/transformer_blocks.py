"""Attention and the transformer of the UNet and the VAE, with diffusers' attribute names."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dspo_jax.kernels import gpu
from dspo_jax.kernels.attention import attention
from dspo_jax.models import quantized
from dspo_jax.models.blocks import Identity, conv2d, linear
from dspo_jax.models.norms import GroupNorm, LayerNorm
from dspo_jax.models.remat import run_block


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
        kernel = self.proj.kernel[...]
        trained = type(self.proj) is nnx.Linear and not quantized.is_quantized(kernel)
        if trained and self.proj.bias is not None and gpu.is_for_gpu(x.shape[0]):
            # Two products: XLA puts their gradients nowhere side by side, and sums the biases' on the way.
            pairs = (jnp.split(param, 2, axis=-1) for param in (kernel, self.proj.bias[...]))
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
