"""Attention kernels that keep no weights in memory: cuDNN's for NVIDIA GPUs, JAX's splash attention for TPUs.

Both work through blocks of queries and keys with a running softmax (Dao et al. 2022, "FlashAttention",
arXiv 2205.14135), and compute the weights again in the backward pass. What they are given is padded to the
sizes they take: zeros at the end of a head change neither its products nor its outputs, and padded keys are
not attended to.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# What the TPU kernel keeps for its backward pass, for the policies of models/remat.py: running the kernel
# again costs far more than its outputs take.
RESIDUALS = "attention_residuals"

# Queries, and keys, whose products are in a TPU's vector memory at a time.
_BLOCKS = (512, 384, 256)
_SMALLEST_BLOCK = 128
# Keys that are loaded at a time. With all of a sequence the backward pass needs no sum over parts of it.
_KEYS_AT_A_TIME = 2048


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN's fused attention; float16 or bfloat16, on an NVIDIA GPU of compute capability 8.0 or more.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].

    Returns:
      [B, T, H, D].
    """
    size = query.shape[-1]
    padded = _round_up(size, 8)
    parts = (_pad(array, axis=3, size=padded) for array in (query, key, value))
    out = jax.nn.dot_product_attention(*parts, scale=size**-0.5, implementation="cudnn")
    return out[..., :size]


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """JAX's splash attention without a mask.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].
      interpret: runs the kernel's program with XLA, for tests on a CPU.

    Returns:
      [B, T, H, D].
    """
    sizes = Padded.of(query.shape[1], key.shape[1], query.shape[-1])
    # The kernel takes [H, T, D], and does not scale.
    query_BHTD = _to_heads(query * query.shape[-1] ** -0.5, sizes.queries, sizes.head)
    key_BHSD, value_BHSD = (_to_heads(array, sizes.keys, sizes.head) for array in (key, value))
    segments = None
    if sizes.keys > key.shape[1]:
        # Queries attend to the keys of their own segment, and no query is in that of the padding.
        segments = splash.SegmentIds(
            q=np.zeros(sizes.queries, np.int32),
            kv=(np.arange(sizes.keys) >= key.shape[1]).astype(np.int32),
        )
    everything = masks.MultiHeadMask([masks.FullMask((sizes.queries, sizes.keys))] * query.shape[2])
    kernel = splash.make_splash_mha_single_device(
        everything,
        block_sizes=sizes.blocks(),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    out_BHTD = jax.vmap(lambda *one: kernel(*one, segments))(query_BHTD, key_BHSD, value_BHSD)
    return out_BHTD.swapaxes(1, 2)[:, : query.shape[1], :, : value.shape[-1]]


@dataclasses.dataclass(frozen=True)
class Padded:
    """The sizes that `splash_attention` computes with.

    Attributes:
      queries: T or more, in blocks of `query_block`.
      keys: S or more, in blocks of `key_block`, several of which are loaded at a time.
      head: D or more.
    """

    queries: int
    keys: int
    head: int
    query_block: int
    key_block: int

    @classmethod
    def of(cls, queries: int, keys: int, head: int) -> "Padded":
        """Chooses them for T, S and D."""
        query_block, key_block = _block(queries), _block(keys)
        return cls(
            queries=_round_up(queries, query_block),
            keys=_round_up(keys, key_block),
            head=head,
            query_block=query_block,
            key_block=key_block,
        )

    def blocks(self) -> splash.BlockSizes:
        """What the kernel is told."""
        parts = self.keys // self.key_block
        most = max(1, _KEYS_AT_A_TIME // self.key_block)
        loaded = self.key_block * max(n for n in range(1, most + 1) if parts % n == 0)
        return splash.BlockSizes(
            block_q=self.query_block,
            block_kv=loaded,
            block_kv_compute=self.key_block,
            block_q_dkv=self.query_block,
            block_kv_dkv=loaded,
            block_kv_dkv_compute=self.key_block,
            use_fused_bwd_kernel=True,
        )


def _block(length: int) -> int:
    """The largest block of those that pad a length the least."""
    if length <= _SMALLEST_BLOCK:
        return _SMALLEST_BLOCK
    return min(_BLOCKS, key=lambda block: (_round_up(length, block), -block))


def _to_heads(x_BTHD: jax.Array, length: int, head: int) -> jax.Array:
    """[B, T, H, D] -> [B, H, length, head], with zeros at the ends."""
    return _pad(_pad(x_BTHD, axis=1, size=length), axis=3, size=head).swapaxes(1, 2)


def _pad(x: jax.Array, *, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
