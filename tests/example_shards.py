"""Small datasets for tests of what reads shards."""

from pathlib import Path
from typing import Any

import numpy as np

from dspo_jax.data import shards
from dspo_jax.data.writer import DatasetWriter

FINGERPRINT = {
    "model": "tiny",
    "vae_sha256": "a" * 64,
    "scaling_factor": 0.18215,
    "vae_scale_factor": 4,
    "latent_channels": 3,
    "tokenizer_sha256": ["b" * 64],
}
MANIFEST = {"model": FINGERPRINT, "resolution": 16, "source": {"name": "numbers", "arguments": {"seed": 0}}}


def make_example(i: int, *, images: int = 2) -> dict[str, Any]:
    """Example number i: its key is its number, its moments are its own."""
    moments = np.random.default_rng(i).standard_normal((images, 4, 4, 6)).astype(np.float16)
    return {
        "moments": moments,
        "tokens": np.full((1, 77), i, np.int32),
        "micro_conditioning": np.tile(np.asarray([20 + i, 30, 0, 4, 16, 16], np.int32), (images, 1)),
        "preference": np.float32(0.75),
        "loser_won": np.bool_(True),
        "caption": f"caption «{i}»",
        "key": str(i),
    }


def start_dataset(out: Path, num_shards: dict[str, int], *, images: int = 2) -> DatasetWriter:
    """A writer of numbered examples."""
    return DatasetWriter(out, shards.feature_spec((images, 4, 4, 6), 1), MANIFEST, num_shards)


def write_dataset(
    out: Path, *, train: int = 10, validation: int = 5, rows_per_shard: int = 4, images: int = 2
) -> dict[str, Any]:
    """Writes a dataset of numbered examples (keys "0", "1", ... in each split) and returns its manifest."""
    counts = {"train": train, "validation": validation}
    writer = start_dataset(
        out, {split: max(1, -(-count // rows_per_shard)) for split, count in counts.items()}, images=images
    )
    for split, count in counts.items():
        for number in range(max(1, -(-count // rows_per_shard))):
            of_shard = range(count)[number * rows_per_shard : (number + 1) * rows_per_shard]
            writer.write_shard(split, number, [make_example(i, images=images) for i in of_shard])
    return writer.commit()
