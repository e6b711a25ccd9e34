"""Small datasets for tests of what reads shards."""

from collections.abc import Mapping
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


def make_example(i: int, *, images: int = 2, bucket: str = "16x16") -> dict[str, Any]:
    """Example number i: its key is its number, its moments are its own."""
    height, width = (int(side) for side in bucket.split("x"))
    shape = (images, height // 4, width // 4, 6)
    moments = np.random.default_rng(i).standard_normal(shape).astype(np.float16)
    return {
        "moments": moments,
        "tokens": np.full((1, 77), i, np.int32),
        "micro_conditioning": np.tile(np.asarray([20 + i, 30, 0, 4, height, width], np.int32), (images, 1)),
        "preference": np.float32(0.75),
        "loser_won": np.bool_(True),
        "caption": f"caption «{i}»",
        "key": str(i),
    }


def start_dataset(
    out: Path,
    num_shards: dict[str, int],
    *,
    images: int = 2,
    manifest: Mapping[str, Any] = MANIFEST,
) -> DatasetWriter:
    """A writer of numbered examples."""
    return DatasetWriter(out, shards.feature_spec((images, 4, 4, 6), 1), manifest, num_shards)


def write_dataset(
    out: Path,
    *,
    train: int = 10,
    validation: int = 5,
    rows_per_shard: int = 4,
    images: int = 2,
    first: int = 0,
    manifest: Mapping[str, Any] = MANIFEST,
) -> dict[str, Any]:
    """Writes a dataset of numbered examples and returns its manifest.

    The keys of each split are the numbers from `first`.
    """
    counts = {"train": train, "validation": validation}
    num_shards = {split: max(1, -(-count // rows_per_shard)) for split, count in counts.items()}
    writer = start_dataset(out, num_shards, images=images, manifest=manifest)
    for split, count in counts.items():
        for number in range(num_shards[split]):
            of_shard = range(first, first + count)[number * rows_per_shard : (number + 1) * rows_per_shard]
            writer.write_shard(split, number, [make_example(i, images=images) for i in of_shard])
    return writer.commit()


def write_buckets(
    out: Path,
    train: Mapping[str, int],
    *,
    validation: Mapping[str, int],
    rows_per_shard: int = 4,
    first: int = 0,
) -> dict[str, Any]:
    """Writes a dataset of so many images of each size and returns its manifest.

    The keys of each split are the numbers from `first`, one size after another.
    """
    sizes = {
        split: [bucket for bucket, count in counts.items() for _ in range(count)]
        for split, counts in (("train", train), ("validation", validation))
    }
    num_shards = {split: -(-len(of_split) // rows_per_shard) for split, of_split in sizes.items()}
    features = shards.feature_spec((2, None, None, 6), 1)
    writer = DatasetWriter(out, features, MANIFEST, num_shards, list(train))
    for split, of_split in sizes.items():
        examples = [make_example(first + i, bucket=bucket) for i, bucket in enumerate(of_split)]
        for number in range(num_shards[split]):
            of_shard = examples[number * rows_per_shard : (number + 1) * rows_per_shard]
            writer.write_shard(split, number, of_shard)
    return writer.commit()
