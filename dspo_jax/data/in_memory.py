"""Preference pairs encoded in memory, without a dataset on disk: for notebooks and tests."""

from collections.abc import Sequence

import numpy as np

from dspo_jax.data.encoder import PairEncoder
from dspo_jax.data.prepare import Framing
from dspo_jax.data.sources import PreferencePair
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow
from dspo_jax.pipelines.pipeline import Pipeline


def encode_pairs(
    pipe: Pipeline,
    pairs: Sequence[PreferencePair],
    *,
    resolution: int | None = None,
    vae_dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Encodes pairs as `dspo_jax.encode` does, and returns the arrays of all of them as one batch.

    Args:
      pipe: gives the VAE and the tokenizers.
      pairs: N pairs, N single images, or N lists of as many images; few enough for their pixels to fit into
        memory.
      resolution: side in pixels of the square that images are resized and cropped to; None is the model's.
      vae_dtype: compute dtype of the VAE, "float32" or "bfloat16".

    Returns:
      The arrays of a batch of N examples (`data.records.HostBatch`), in the order of `pairs`.

    Raises:
      UserError: no pairs, pairs beside single images, pairs with scores beside some without, a pair that
        cannot be used (by its key), or a resolution that is not a multiple of the pixels per latent.
    """
    if not pairs:
        raise UserError("pairs: empty; give at least one")
    if len({pair.loser is None for pair in pairs}) > 1:
        raise UserError("pairs: some have a loser and some have none; give pairs or single images")
    if len({pair.scores is None for pair in pairs}) > 1:
        raise UserError("pairs: some have scores and some have none; give scores to all or to none")
    if len({len(pair.images) for pair in pairs}) > 1:
        raise UserError("pairs: lists of different numbers of images; give as many in each")
    side = pipe.image_side if resolution is None else resolution
    if side < 1 or side % pipe.side_multiple:
        raise UserError(
            f"resolution = {side}: must be a positive multiple of {pipe.side_multiple}, the pixels per "
            "latent of this model's VAE, or per patch of its transformer"
        )

    def refuse(pair: PreferencePair, problem: BadRow) -> None:
        raise UserError(f"pair {pair.key or pair.caption!r}: {problem}")

    encoder = PairEncoder(pipe, Framing(((side, side),)), batch_size=min(len(pairs), 16), vae_dtype=vae_dtype)
    examples = list(encoder.examples(pairs, refuse))
    names = examples[0].keys() - {"caption", "key"}
    return {name: np.stack([example[name] for example in examples]) for name in sorted(names)}
