"""Muon: matrices step by the orthogonal part of their momentum, all other parameters by AdamW."""

import math

import jax
import optax

_RMS = 0.2  # of an update of AdamW, as Moonlight measured it


def muon(
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    moment_dtype: str,
) -> optax.GradientTransformation:
    """Builds Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for every matrix that is no table.

    The Nesterov momentum of a matrix [in, out] is brought near its orthogonal factor by five Newton-Schulz
    iterations in float32 (`optax.contrib.scale_by_muon`), and multiplied by 0.2 sqrt(max(in, out)). That
    makes the root mean square of an update AdamW's, so that AdamW's learning rate and weight decay serve both
    (Liu et al. 2025, "Muon is scalable for LLM training", arXiv 2502.16982, Eq. 4). Matrices are the kernels
    of linear layers and LoRA's; kernels of convolutions, biases, norms and tables of embeddings are left to
    AdamW.

    Args:
      learning_rate: number of updates done -> learning rate of the next one.
      momentum: decay of a matrix' momentum.
      b1, b2, eps: AdamW's.
      weight_decay: decoupled, of every parameter.
      moment_dtype: of the momentum and of AdamW's first moment.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum, mu_dtype=moment_dtype, weight_dimension_numbers=_dimension_numbers
        ),
        optax.stateless(lambda updates, params: jax.tree.map(_match_adamw, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=moment_dtype
    )
    return optax.partition({"matrix": matrices, "other": others}, _label)


def _label(params: optax.Params) -> optax.Params:
    def label(path: jax.tree_util.KeyPath, leaf: jax.Array) -> str:
        is_table = jax.tree_util.keystr(path[-1:], simple=True) == "embedding"
        return "matrix" if leaf.ndim == 2 and not is_table else "other"

    return jax.tree_util.tree_map_with_path(label, params)


def _dimension_numbers(updates: optax.Updates) -> optax.Params:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)


def _match_adamw(update: jax.Array) -> jax.Array:
    return _RMS * math.sqrt(max(update.shape)) * update
