"""Attention kernels that keep no weights in memory: cuDNN's for NVIDIA GPUs, JAX's splash attention for TPUs.

Both work through blocks of queries and keys with a running softmax (Dao et al. 2022, "FlashAttention",
arXiv 2205.14135), and compute the weights again in the backward pass. What they are given is padded to the
sizes they take: zeros at the end of a head change neither its products nor its outputs, and keys that were
added are not attended to.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# Name of the TPU kernel's residuals, for the policies of models/remat.py: running the kernel
# again costs far more than its outputs take.
RESIDUALS = "attention_residuals"

# Queries, and keys, whose products are in a TPU's vector memory at a time, if they are not fewer.
_BLOCKS = (512, 384, 256)
_SMALLEST_BLOCK = 128
# Numbers of a block of keys that is loaded at a time, which leaves room for the rest in 16 MiB: half as many
# going back where not all keys are loaded at once, or heads are wide. That pass writes the gradients of
# queries once for each such block, and XLA sums them, which for four blocks of 1,024 keys takes a third as
# long as the kernel.
_KEYS_FORWARD = 4096 * 128
_KEYS_BACKWARD = 4096 * 128
_LANES = 128  # the last axis takes a multiple of that in memory
_NARROW = 64  # heads no wider leave room for all keys

_CUDNN_BLOCK = 128  # keys whose products cuDNN's backward pass computes at a time on Hopper


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Calls cuDNN's fused attention; float16 or bfloat16, on an NVIDIA GPU of compute capability 8.0 or more.

    JAX takes only even lengths in training, because its rule for attention with a bias counts the empty bias
    that it passes on. Text has 77 keys. Keys that are added are masked. Queries that are added are cut off
    with their outputs, so that no gradient comes from them.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].

    Returns:
      [B, T, H, D].
    """
    batch, queries, _, size = query.shape
    keys = key.shape[1]
    padded = [
        _pad(_pad(array, axis=3, size=_round_up(size, 8)), axis=1, size=_round_up(array.shape[1], 2))
        for array in (query, key, value)
    ]
    # A mask by length is also the way around cuDNN's gradients that are NaN where keys fill half a block and
    # the products are far below zero (github.com/NVIDIA/cudnn-frontend/pull/628, of 2026, on Hopper).
    lengths = jnp.full(batch, keys, jnp.int32) if keys % _CUDNN_BLOCK else None
    out = jax.nn.dot_product_attention(
        *padded, scale=size**-0.5, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :queries, :, :size]


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Calls JAX's splash attention without a mask.

    Args:
      query: [B, T, H, D].
      key: [B, S, H, D].
      value: [B, S, H, D].
      interpret: runs the kernel's program with XLA, for tests on a CPU.

    Returns:
      [B, T, H, D].
    """
    tiling = Tiling.of(query.shape[1], key.shape[1], query.shape[3])
    # The kernel takes [H, T, D], and does not scale.
    query_BHTD = _pad(query * query.shape[3] ** -0.5, axis=1, size=tiling.queries).swapaxes(1, 2)
    key_BHSD, value_BHSD = (_pad(array, axis=1, size=tiling.keys).swapaxes(1, 2) for array in (key, value))
    segments = None
    if tiling.keys > key.shape[1]:
        # Queries attend to the keys of their own segment, and no query is in that of the padding.
        segments = splash.SegmentIds(
            q=jnp.zeros(tiling.queries, jnp.int32),
            kv=(jnp.arange(tiling.keys) >= key.shape[1]).astype(jnp.int32),
        )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((tiling.queries, tiling.keys))] * query.shape[2]),
        block_sizes=tiling.blocks(),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    out_BHTD = jax.vmap(lambda *one: kernel(*one, segments))(query_BHTD, key_BHSD, value_BHSD)
    return out_BHTD.swapaxes(1, 2)[:, : query.shape[1]]


def kernel_flops(name: str, operands: Sequence[Sequence[int]], lanes: int) -> float:
    """Returns FLOPs of one call of a kernel of `splash_attention`, which XLA's analysis does not count.

    Args:
      name: of the call in the compiled program.
      operands: shapes of its operands; the first two of four axes are the queries [B, H, D, T] and the keys.
      lanes: side of the matrix unit, to which a head is padded.

    Returns:
      0 for any other kernel.
    """
    # Queries by keys and weights by values; in the backward pass the first again and four gradients.
    products = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
    count = next((count for start, count in products.items() if name.startswith(start)), 0)
    if not count:
        return 0.0
    (batch, heads, head, queries), keys = [shape for shape in operands if len(shape) == 4][:2]
    return 2.0 * count * batch * heads * queries * keys[3] * _round_up(head, lanes)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Block sizes of `splash_attention`.

    Attributes:
      queries: T or more, in blocks.
      keys: S or more, in blocks, several of which are loaded at a time.
      head: D.
      forward: queries and keys of a block in the forward pass.
      backward: the same in the backward pass.
    """

    queries: int
    keys: int
    head: int
    forward: tuple[int, int]
    backward: tuple[int, int]

    @classmethod
    def of(cls, queries: int, keys: int, head: int) -> "Tiling":
        """Chooses the block sizes for T, S and D."""
        query_block, key_block = _block(queries), _block(keys)
        queries, keys = _round_up(queries, query_block), _round_up(keys, key_block)
        # The forward pass is 7 % faster so (benchmarks/kernel_schedule.py). With both sides doubled, or of
        # wider heads, it would not fit.
        twice = key_block == _BLOCKS[0] and head <= _LANES and keys % (2 * key_block) == 0
        forward = query_block, (2 if twice else 1) * key_block
        # The largest block halved leaves room for all keys.
        backward = query_block, key_block // 2 if key_block == 2 * _BLOCKS[-1] else key_block
        return cls(queries, keys, head, forward, backward)

    def blocks(self) -> splash.BlockSizes:
        """Makes the kernel's own block sizes; its backward pass computes all gradients at once."""
        (queries, keys), (queries_backward, keys_backward) = self.forward, self.backward
        at_once = self.head <= _NARROW and self.keys * _LANES <= _KEYS_BACKWARD
        return splash.BlockSizes(
            block_q=queries,
            block_kv=self._loaded(keys, _KEYS_FORWARD),
            block_kv_compute=keys,
            block_q_dkv=queries_backward,
            block_kv_dkv=self._loaded(keys_backward, _KEYS_BACKWARD // (1 if at_once else 2)),
            block_kv_dkv_compute=keys_backward,
            use_fused_bwd_kernel=True,
            # The last axis takes a multiple of 128 in memory: of a length it wastes nothing, of a head of 40
            # more than two thirds.
            q_layout=splash.QKVLayout.SEQ_MINOR,
            k_layout=splash.QKVLayout.SEQ_MINOR,
            v_layout=splash.QKVLayout.SEQ_MINOR,
        )

    def _loaded(self, block: int, numbers: int) -> int:
        """Returns the most keys that divide theirs evenly and are no more than so many numbers."""
        blocks = self.keys // block
        most = max(1, numbers // _round_up(self.head, _LANES) // block)
        return block * max(n for n in range(1, most + 1) if blocks % n == 0)


def _block(length: int) -> int:
    """Returns the largest block of those that pad a length the least."""
    if length <= _SMALLEST_BLOCK:
        return _SMALLEST_BLOCK
    return min(_BLOCKS, key=lambda block: (_round_up(length, block), -block))


def _pad(x: jax.Array, *, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
