"""`SD3Transformer2D`: the denoiser of Stable Diffusion 3 and 3.5, built from diffusers' config.json.

In an MMDiT (Esser et al. 2024, arXiv 2403.03206) patches of the image and tokens of the text have weights of
their own and attend to one another in one softmax. Norms are shifted and scaled, and residuals gated, by the
time and the pooled text. Stable Diffusion 3.5 medium attends from image to image once more in some blocks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Num

from dspo_jax.errors import UserError
from dspo_jax.kernels.attention import attention
from dspo_jax.models.blocks import Identity, TimestepEmbedding, conv2d, linear, sinusoidal_embedding
from dspo_jax.models.config import NetworkConfig, check_multiple, read_config
from dspo_jax.models.norms import RMSNorm, layer_norm
from dspo_jax.models.remat import run_block
from dspo_jax.schema import Key, fixed, integer

_NAME = "SD3Transformer2DModel"
_EPSILON = 1e-6
_TIME_FEATURES = 256
_MAX_LAYERS = 128

POSITIONS = "pos_embed.pos_embed"
"""Name of the table of positions in a transformer's weights, as `crop_positions` takes it."""

_KEYS: dict[str, Key] = {
    "sample_size": integer(128, high=4096),
    "patch_size": integer(2, high=16),
    "in_channels": integer(16, high=1024),
    "out_channels": integer(16, high=1024, null=True),
    "num_layers": integer(18, high=_MAX_LAYERS),
    "num_attention_heads": integer(18, high=1024),
    "attention_head_dim": integer(64, high=1024),
    "joint_attention_dim": integer(4096),
    "caption_projection_dim": integer(1152),
    "pooled_projection_dim": integer(2048),
    "pos_embed_max_size": integer(96, high=1024),
    "dual_attention_layers": integer(
        (), low=0, high=_MAX_LAYERS - 1, listed="always", length=range(_MAX_LAYERS + 1)
    ),
    "qk_norm": fixed(None, "rms_norm"),
}


def read_mmdit_config(config: NetworkConfig) -> NetworkConfig:
    """Checks a diffusers `transformer/config.json` of Stable Diffusion 3 and fills in defaults.

    Returns:
      The settings, with `features`, the width of image and text.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    cfg = read_config(_NAME, config, _KEYS)
    features = cfg["num_attention_heads"] * cfg["attention_head_dim"]
    if cfg["caption_projection_dim"] != features:
        raise UserError(
            f"{_NAME} config: caption_projection_dim = {cfg['caption_projection_dim']} must be "
            f"num_attention_heads * attention_head_dim = {features}, the width of text and image"
        )
    check_multiple(_NAME, "caption_projection_dim", features, "the parts of a sinusoid,", 4)
    for layer in cfg["dual_attention_layers"]:
        if layer >= cfg["num_layers"]:
            raise UserError(
                f"{_NAME} config: dual_attention_layers has {layer}, but num_layers = {cfg['num_layers']} "
                "counts the layers from 0"
            )
    if cfg["out_channels"] is None:
        cfg["out_channels"] = cfg["in_channels"]
    cfg["features"] = features
    return cfg


def position_shape(cfg: NetworkConfig) -> tuple[int, int, int]:
    """Returns the shape of the table `POSITIONS`, of what `read_mmdit_config` returns."""
    return (1, cfg["pos_embed_max_size"] ** 2, cfg["features"])


def make_positions(cfg: NetworkConfig) -> np.ndarray:
    """Computes the table of positions of a fresh model: that of diffusers' `PatchEmbed`.

    Half of the features are sinusoids of the column and half of the row, which are counted in patches of an
    image of `sample_size`. A published model's own table is read with its weights.

    Returns:
      [1, pos_embed_max_size ** 2, features] float32.
    """
    side, quarter = cfg["pos_embed_max_size"], cfg["features"] // 4
    patches = cfg["sample_size"] // cfg["patch_size"]
    places_P = np.arange(side, dtype=np.float32) / np.float32(side / patches)
    frequencies_F = 10_000.0 ** -(np.arange(quarter) / quarter)
    angles_PF = places_P.astype(np.float64)[:, None] * frequencies_F
    sinusoids_PF = np.concatenate([np.sin(angles_PF), np.cos(angles_PF)], axis=1).astype(np.float32)
    shape = (side, side, 2 * quarter)
    columns, rows = (np.broadcast_to(part, shape) for part in (sinusoids_PF, sinusoids_PF[:, None]))
    return np.concatenate([columns, rows], axis=-1).reshape(position_shape(cfg))


def crop_positions(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts the positions of an image out of the middle of a model's table, as diffusers does.

    The table is no parameter: it has no gradient, and is neither decayed nor averaged. It takes up to a
    gigabyte, of which an image needs a few megabytes; so it stays on the host.

    Args:
      table: [1, side ** 2, D], the model's `POSITIONS`.
      height, width: of the image, in patches.

    Returns:
      [height, width, D] float32.

    Raises:
      UserError: the image is larger than the table.
    """
    side = math.isqrt(table.shape[1])
    if height > side or width > side:
        raise UserError(
            f"an image of {height} x {width} patches is larger than pos_embed_max_size = {side} of this "
            f"transformer; draw at most {side} patches along a side"
        )
    top, left = (side - height) // 2, (side - width) // 2
    grid = table.reshape(side, side, -1)
    return np.asarray(grid[top : top + height, left : left + width], np.float32)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift


def _normalize(x: jax.Array) -> jax.Array:
    features = x.shape[-1]
    return layer_norm(x, jnp.ones(features), jnp.zeros(features), _EPSILON)


class _Modulation(nnx.Module):
    """Vectors that shift, scale and gate, from the time and the pooled text; at first all zero."""

    def __init__(self, features: int, vectors: int, *, rngs: nnx.Rngs):
        self.vectors = vectors
        self.linear = linear(features, vectors * features, zero=True, rngs=rngs)

    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        """[B, D] -> as many arrays [B, 1, D] as there are vectors."""
        return jnp.split(self.linear(nnx.silu(condition))[:, None], self.vectors, axis=-1)


class _SelfAttention(nnx.Module):
    """Attention within the image; `qk_norm` normalises each head's queries and keys."""

    def __init__(self, features: int, heads: int, *, qk_norm: bool, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = linear(features, features, rngs=rngs)
        self.to_k = linear(features, features, rngs=rngs)
        self.to_v = linear(features, features, rngs=rngs)
        self.to_out = nnx.List([linear(features, features, rngs=rngs)])
        if qk_norm:
            self.norm_q = RMSNorm(features // heads, _EPSILON)
            self.norm_k = RMSNorm(features // heads, _EPSILON)

    def _split(self, x: jax.Array, norm: str = "") -> jax.Array:
        heads = x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads)
        return getattr(self, norm)(heads) if hasattr(self, norm) else heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        query, key = self._split(self.to_q(x), "norm_q"), self._split(self.to_k(x), "norm_k")
        return self.to_out[0](attention(query, key, self._split(self.to_v(x))).reshape(x.shape))


class _JointAttention(_SelfAttention):
    """Attention of image and text to both, each with projections of its own.

    Behind the last block nothing reads the text, whose queries are not computed there, although published
    files have their weights.
    """

    def __init__(self, features: int, heads: int, *, qk_norm: bool, last: bool, rngs: nnx.Rngs):
        super().__init__(features, heads, qk_norm=qk_norm, rngs=rngs)
        self.add_q_proj = linear(features, features, rngs=rngs)
        self.add_k_proj = linear(features, features, rngs=rngs)
        self.add_v_proj = linear(features, features, rngs=rngs)
        if not last:
            self.to_add_out = linear(features, features, rngs=rngs)
        if qk_norm:
            self.norm_added_q = RMSNorm(features // heads, _EPSILON)
            self.norm_added_k = RMSNorm(features // heads, _EPSILON)

    def attend(self, x: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the outputs for the image x [B, T, D] and the text [B, S, D]; None for the last text."""
        queries = [self._split(self.to_q(x), "norm_q")]
        if hasattr(self, "to_add_out"):
            queries.append(self._split(self.add_q_proj(text), "norm_added_q"))
        keys = [self._split(self.to_k(x), "norm_k"), self._split(self.add_k_proj(text), "norm_added_k")]
        values = [self._split(self.to_v(x)), self._split(self.add_v_proj(text))]
        out = attention(*(jnp.concatenate(parts, axis=1) for parts in (queries, keys, values)))
        out = out.reshape(*out.shape[:2], x.shape[2])
        image = self.to_out[0](out[:, : x.shape[1]])
        return image, self.to_add_out(out[:, x.shape[1] :]) if hasattr(self, "to_add_out") else None


class _GELU(nnx.Module):
    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.proj = linear(in_features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.gelu(self.proj(x), approximate=True)


class _FeedForward(nnx.Module):
    """Four times the width and back, with GELU's tanh form; index 1 of `net` is torch's dropout."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        hidden = 4 * features
        self.net = nnx.List(
            [_GELU(features, hidden, rngs=rngs), Identity(), linear(hidden, features, rngs=rngs)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class _JointBlock(nnx.Module):
    """A block of image and text; `dual` attends within the image once more, and `last` ends the text."""

    def __init__(self, cfg: NetworkConfig, layer: int, *, rngs: nnx.Rngs):
        features, heads = cfg["features"], cfg["num_attention_heads"]
        qk_norm = cfg["qk_norm"] is not None
        self.dual, self.last = layer in cfg["dual_attention_layers"], layer == cfg["num_layers"] - 1
        self.norm1 = _Modulation(features, 9 if self.dual else 6, rngs=rngs)
        self.norm1_context = _Modulation(features, 2 if self.last else 6, rngs=rngs)
        self.attn = _JointAttention(features, heads, qk_norm=qk_norm, last=self.last, rngs=rngs)
        if self.dual:
            self.attn2 = _SelfAttention(features, heads, qk_norm=qk_norm, rngs=rngs)
        self.ff = _FeedForward(features, rngs=rngs)
        if not self.last:
            self.ff_context = _FeedForward(features, rngs=rngs)

    def __call__(
        self, x: jax.Array, text: jax.Array, condition: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Image [B, T, D] and text [B, S, D] under a condition [B, D] -> both; None for the last text."""
        shift, scale, gate, *of_ff = self.norm1(condition)
        normed = _normalize(x)
        if self.last:
            text_scale, text_shift = self.norm1_context(condition)  # in this order
        else:
            text_shift, text_scale, text_gate, *text_of_ff = self.norm1_context(condition)
        attended, text_attended = self.attn.attend(
            _modulate(normed, shift, scale), _modulate(_normalize(text), text_shift, text_scale)
        )
        x = x + gate * attended
        if self.dual:
            shift, scale, gate = of_ff[3:]
            x = x + gate * self.attn2(_modulate(normed, shift, scale))
        shift, scale, gate = of_ff[:3]
        x = x + gate * self.ff(_modulate(_normalize(x), shift, scale))
        if text_attended is None:
            return x, None
        text = text + text_gate * text_attended
        shift, scale, gate = text_of_ff
        return x, text + gate * self.ff_context(_modulate(_normalize(text), shift, scale))


class _Patches(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        size = cfg["patch_size"]
        self.proj = conv2d(cfg["in_channels"], cfg["features"], size, stride=size, padding=0, rngs=rngs)


class _TimeAndText(nnx.Module):
    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        features = cfg["features"]
        self.timestep_embedder = TimestepEmbedding(_TIME_FEATURES, features, rngs=rngs)
        self.text_embedder = TimestepEmbedding(cfg["pooled_projection_dim"], features, rngs=rngs)


class SD3Transformer2D(nnx.Module):
    """Predicts v of noisy latents under a text condition. Source: diffusers' SD3Transformer2DModel.

    Fresh blocks are the identity and the output is zero, as what shifts, scales and gates is zero (adaLN-Zero
    of Peebles and Xie 2023, arXiv 2212.09748).
    """

    def __init__(self, cfg: NetworkConfig, *, rngs: nnx.Rngs):
        """Builds from what `read_mmdit_config` returns."""
        features = cfg["features"]
        self.patch_size, self.out_channels = cfg["patch_size"], cfg["out_channels"]
        self.pos_embed = _Patches(cfg, rngs=rngs)
        self.time_text_embed = _TimeAndText(cfg, rngs=rngs)
        self.context_embedder = linear(cfg["joint_attention_dim"], features, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_JointBlock(cfg, layer, rngs=rngs) for layer in range(cfg["num_layers"])]
        )
        self.norm_out = _Modulation(features, 2, rngs=rngs)
        self.proj_out = linear(features, self.patch_size**2 * self.out_channels, zero=True, rngs=rngs)

    def __call__(
        self,
        sample: Float[jax.Array, "B H W C"],
        timesteps: Num[jax.Array, " B"],
        encoder_hidden_states: Float[jax.Array, "captions S F"],
        *,
        pooled_projections: Float[jax.Array, "captions P"],
        positions: Float[jax.Array, "h w D"],
        remat: str = "none",
        skip_layers: tuple[int, ...] = (),
    ) -> Float[jax.Array, "B H W out_channels"]:
        """Predicts v = noise - latents of noisy latents.

        Args:
          sample: [B, H, W, in_channels] noisy latents; H and W are multiples of `patch_size`.
          timesteps: [B] 1000 sigma, in float32 whatever the dtype of `sample`: bfloat16 rounds 998.4 to 1000.
          encoder_hidden_states: [B, S, joint_attention_dim] text states; or [B / n, ...], each for n images
            in a row. All are attended to, those of padding too.
          pooled_projections: [B, pooled_projection_dim] or [B / n, ...].
          positions: of the patches, from `crop_positions`.
          remat: a policy of models/remat.py, by which each transformer block is a block.
          skip_layers: numbers of blocks that are left out, for skip-layer guidance.

        Returns:
          [B, H, W, out_channels] in the dtype of `sample`.

        Raises:
          UserError: latents that do not split into patches, positions of another size, timesteps in half
            precision, or an unknown policy.
        """
        dtype, size = sample.dtype, self.patch_size
        batch, height, width, _ = sample.shape
        rows, columns = height // size, width // size
        if height % size or width % size:
            raise UserError(f"latents of {height} x {width} do not split into patches of {size} x {size}")
        if positions.shape[:2] != (rows, columns):
            found = " x ".join(map(str, positions.shape[:2]))
            raise UserError(f"positions of {found} patches do not fit latents of {rows} x {columns} patches")
        if jnp.issubdtype(timesteps.dtype, jnp.floating) and timesteps.dtype.itemsize < 4:
            raise UserError(f"timesteps are {timesteps.dtype}, which rounds them; pass them in float32")

        images = batch // len(encoder_hidden_states)
        time = sinusoidal_embedding(timesteps, _TIME_FEATURES).astype(dtype)
        pooled = self.time_text_embed.text_embedder(pooled_projections.astype(dtype))
        condition = self.time_text_embed.timestep_embedder(time) + jnp.repeat(pooled, images, axis=0)
        text = jnp.repeat(self.context_embedder(encoder_hidden_states.astype(dtype)), images, axis=0)

        x = self.pos_embed.proj(sample).astype(jnp.float32) + positions[None].astype(jnp.float32)
        x = x.astype(dtype).reshape(batch, rows * columns, -1)
        for number, block in enumerate(self.transformer_blocks):
            if number not in skip_layers:
                x, text = run_block(block, remat, x, text, condition)
        scale, shift = self.norm_out(condition)  # in this order
        x = self.proj_out(_modulate(_normalize(x), shift, scale))
        x = x.reshape(batch, rows, columns, size, size, self.out_channels).swapaxes(2, 3)
        return x.reshape(batch, height, width, self.out_channels)
