"""Small datasets for tests of what reads shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

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
    height, width = map(int, bucket.split("x"))
    moments = np.random.default_rng(i).standard_normal((images, height // 4, width // 4, 6))
    return {
        "moments": moments.astype(np.float16),
        "tokens": np.full((1, 77), i, np.int32),
        "micro_conditioning": np.tile(np.asarray([20 + i, 30, 0, 4, height, width], np.int32), (images, 1)),
        "preference": np.float32(0.75),
        "loser_won": np.bool_(True),
        "caption": f"caption «{i}»",
        "key": str(i),
    }


def conditioning_shapes(text_encoders: int, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of an example that the denoiser is conditioned on."""
    return {
        "tokens": jax.ShapeDtypeStruct((text_encoders, 77), np.int32),
        "micro_conditioning": jax.ShapeDtypeStruct((images, 6), np.int32),
    }


def feature_spec(
    images: int, height: int | None, width: int | None, channels: int = 6
) -> tfds.features.FeaturesDict:
    """The schema of examples for one text encoder; latents of several sizes have no height and width."""
    return shards.feature_spec((images, height, width, channels), conditioning_shapes(1, images))


def start_dataset(
    out: Path,
    num_shards: Mapping[str, int],
    *,
    images: int = 2,
    buckets: Sequence[str] = (),
    manifest: Mapping[str, Any] = MANIFEST,
) -> DatasetWriter:
    """A writer of numbered examples."""
    features = feature_spec(images, *((None, None) if buckets else (4, 4)))
    return DatasetWriter(out, features, manifest, num_shards, buckets)


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
    buckets: Mapping[str, int],
    *,
    validation: Mapping[str, int] | None = None,
    rows_per_shard: int = 4,
    first: int = 0,
) -> dict[str, Any]:
    """Writes a dataset with images of several sizes and returns its manifest.

    The keys of each split are the numbers from `first`, bucket after bucket.
    """
    counts = {"train": buckets, "validation": validation or {}}
    examples = {}
    for split, of_bucket in counts.items():
        in_order = [bucket for bucket, count in of_bucket.items() for _ in range(count)]
        examples[split] = [make_example(i, bucket=bucket) for i, bucket in enumerate(in_order, first)]
    num_shards = {split: max(1, -(-len(rows) // rows_per_shard)) for split, rows in examples.items()}
    writer = start_dataset(out, num_shards, buckets=list(dict.fromkeys([*buckets, *(validation or {})])))
    for split, rows in examples.items():
        for number in range(num_shards[split]):
            writer.write_shard(split, number, rows[number * rows_per_shard : (number + 1) * rows_per_shard])
    return writer.commit()
