"""Small datasets for tests of what reads shards."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspo_jax.data import shards

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
    height, width = (int(side) // 4 for side in bucket.split("x"))
    moments = np.random.default_rng(i).standard_normal((images, height, width, 6)).astype(np.float16)
    return {
        "moments": moments,
        "tokens": np.full((1, 77), i, np.int32),
        "micro_conditioning": np.tile(np.asarray([20 + i, 30, 0, 4, 16, 16], np.int32), (images, 1)),
        "preference": np.float32(0.75),
        "loser_won": np.bool_(True),
        "caption": f"caption «{i}»",
        "key": str(i),
    }


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
    splits = {"train": train, "validation": validation}
    with shards.DatasetWriter(out, shards.feature_spec((images, 4, 4, 6), 1)) as writer:
        for split, count in splits.items():
            numbers: Iterator[int] = iter(range(first, first + count))
            num_shards = max(1, -(-count // rows_per_shard))
            for shard in range(num_shards):
                examples = (make_example(i, images=images) for i in itertools.islice(numbers, rows_per_shard))
                writer.write_shard(split, shard, num_shards, examples)
        return writer.commit(manifest, {split: {} for split in splits})


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
    splits = {"train": buckets, "validation": validation or {}}
    with shards.DatasetWriter(out, shards.feature_spec((2, None, None, 6), 1)) as writer:
        for split, counts in splits.items():
            numbers = itertools.count(first)
            for bucket, count in counts.items():
                num_shards = -(-count // rows_per_shard)
                for shard in range(num_shards):
                    rows = min(rows_per_shard, count - shard * rows_per_shard)
                    examples = [make_example(next(numbers), bucket=bucket) for _ in range(rows)]
                    writer.write_shard(f"{split}_{bucket}", shard, num_shards, examples)
        writer.commit(
            MANIFEST, {f"{split}_{bucket}": {} for split, counts in splits.items() for bucket in counts}
        )
    return fold_buckets(out)


def fold_buckets(out: Path) -> dict[str, Any]:
    """Brings the manifest of a dataset whose splits are {split}_{bucket} into its form: a split of several
    buckets, whose shards say which."""
    manifest = shards.read_manifest(out)
    splits: dict[str, Any] = {}
    for name, content in manifest["splits"].items():
        split, bucket = name.rsplit("_", 1)
        whole = splits.setdefault(split, {"num_examples": 0, "skipped": {}, "shards": []})
        whole["num_examples"] += content["num_examples"]
        whole["shards"] += [{**shard, "bucket": bucket} for shard in content["shards"]]
    manifest["buckets"] = list(dict.fromkeys(name.rsplit("_", 1)[1] for name in manifest["splits"]))
    manifest["splits"] = splits
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    return manifest
