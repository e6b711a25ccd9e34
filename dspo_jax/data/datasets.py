"""Encoded datasets of a run: one or several, with images of one size or of several (buckets)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from dspo_jax import spelling
from dspo_jax.data import shards
from dspo_jax.data.caption_states import CaptionTable
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.pipelines.stored import T5_KEY, comparable


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An encoded dataset.

    Attributes:
      folder: where it lies.
      manifest: what `shards.read_manifest` says of it.
    """

    folder: Path
    manifest: JsonObject

    def buckets(self, split: str) -> dict[str, int]:
        """Counts the examples of each image size, "HEIGHTxWIDTH" in pixels; a square without buckets.

        {} where the split is absent or empty.
        """
        counts: dict[str, int] = {}
        for bucket, shard in self._shards(split):
            counts[bucket] = counts.get(bucket, 0) + shard["num_examples"]
        return {bucket: count for bucket, count in counts.items() if count}

    def disliked(self, split: str) -> int:
        """Counts the single images of a split that are labelled as disliked; 0 where nothing is labelled."""
        count: int = self.manifest["splits"].get(split, {}).get("disliked", 0)
        return count

    def files(self, split: str, bucket: str) -> list[str]:
        """Returns the files that hold a bucket, as array_record takes them: each followed by [0:EXAMPLES]."""
        return [
            f"{self.folder / shard['file']}[0:{shard['num_examples']}]"
            for of_bucket, shard in self._shards(split)
            if of_bucket == bucket
        ]

    @functools.cached_property
    def caption_table(self) -> CaptionTable | None:
        """T5's states of the captions, if they are stored."""
        made_of = self.manifest.get(T5_KEY)
        return CaptionTable(self.folder, made_of["length"]) if made_of else None

    def without_states(self) -> "Dataset":
        """Returns the dataset as if T5's states were not stored."""
        kept = {key: value for key, value in self.manifest.items() if key not in (T5_KEY, "captions")}
        return Dataset(self.folder, kept)

    def verify(self) -> None:
        """Refuses shards that have vanished or were cut short (`shards.verify_shards`)."""
        shards.verify_shards(self.folder, self.manifest)

    def _shards(self, split: str) -> list[tuple[str, JsonObject]]:
        square = "{0}x{0}".format(self.manifest["resolution"])
        content = self.manifest["splits"].get(split, {"shards": []})
        return [(shard.get("bucket", square), shard) for shard in content["shards"]]


def read_datasets(path: str | Path, *, verify: bool = True) -> list[Dataset]:
    """Reads the datasets that `config.data.path` names, and looks whether their shards are whole.

    Args:
      path: one folder, or several separated by commas.
      verify: whether to look for the shards; without, manifests are enough.

    Raises:
      FileNotFoundError, UserError: a folder is no dataset, a manifest or a shard is damaged
        (`shards.read_manifest`, `shards.verify_shards`), or two datasets do not fit one another; the message
        names both folders, the key and both values.
    """
    folders = [Path(name.strip()) for name in str(path).split(",")]
    datasets = [Dataset(folder, shards.read_manifest(folder)) for folder in folders]
    first = datasets[0]
    for other in datasets[1:]:
        models = comparable(first.manifest["model"], other.manifest["model"])
        ours, theirs = map(_shared, (first.manifest, other.manifest), models)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{first.folder}, {other.folder}: {key} = {ours.get(key)!r} and {theirs.get(key)!r}: "
                    "datasets of one run must agree in it; encode one of them again, or leave it out of "
                    "config.data.path"
                )
    for dataset in datasets if verify else ():
        dataset.verify()
    return datasets


def _shared(manifest: JsonObject, model: JsonObject) -> JsonObject:
    """Facts that all datasets of a run must share: image size, images of an example, model."""
    made_with = {f"model.{key}": value for key, value in model.items() if key != "model"}
    made_with |= {f"{T5_KEY}.{key}": value for key, value in (manifest.get(T5_KEY) or {}).items()}
    return {key: manifest[key] for key in ("resolution", "images_per_example")} | made_with


def count_examples(
    datasets: Sequence[Dataset], split: str, option: str = "split", fix: str = ""
) -> dict[str, int]:
    """Returns the number of examples of each bucket that a split has in any of the datasets.

    Args:
      datasets: what is read.
      split: of each.
      option: how the user names the split, for the message.
      fix: what the user can do without one, which the message ends with.

    Raises:
      UserError: none of them has the split, or it is empty in all that have it.
    """
    names = {name for dataset in datasets for name in dataset.manifest["splits"]}
    where = ", ".join(str(dataset.folder) for dataset in datasets)
    if split not in names:
        raise UserError(f"{where}: {spelling.unknown(option, split, names)}{fix and '; '}{fix}")
    counts: dict[str, int] = {}
    for dataset in datasets:
        for bucket, count in dataset.buckets(split).items():
            counts[bucket] = counts.get(bucket, 0) + count
    if not counts:
        fix = fix or "encode the data again or choose another"
        raise UserError(f"{where}: split {split!r} is empty; {fix}")
    return counts


def check_weights(weights: Sequence[float], datasets: Sequence[Dataset]) -> None:
    """Refuses `config.data.weights` unless there is none, or a positive one for each dataset.

    Raises:
      UserError: names the key, its value and the fix.
    """
    if not weights:
        return
    if len(weights) != len(datasets) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(
            f"config.data.weights = {tuple(weights)}: must be {len(datasets)} positive number(s), one for "
            "each folder of config.data.path, or () to take every example equally often"
        )


def check_scores(datasets: Sequence[Dataset], key: str) -> None:
    """Refuses datasets that an objective cannot read scores from.

    Args:
      datasets: of a run.
      key: what reads the scores, for the message.

    Raises:
      UserError: one of them has no scores, or two have those of different rewards.
    """
    first = datasets[0]
    for dataset in datasets:
        score = dataset.manifest.get("score")
        if not score:
            raise UserError(
                f"{key}: needs a score of each image, and {dataset.folder} has none; encode it with "
                "--config.score=REWARD, or leave the key out"
            )
        if score != first.manifest["score"]:
            rewards = (" ".join(each.manifest["score"].values()) for each in (first, dataset))
            raise UserError(
                f"{key}: {first.folder} and {dataset.folder} hold scores of different rewards "
                f"({', '.join(rewards)}); encode one of them again, or leave it out of config.data.path"
            )


def mixing_weights(
    datasets: Sequence[Dataset], split: str, weights: Sequence[float] = ()
) -> dict[str, list[float]]:
    """Returns how often an example is drawn from each bucket of each dataset, up to a common factor.

    Args:
      datasets: what is mixed.
      split: of each; where weights are given none may lack it.
      weights: one for each dataset; none are in proportion to the numbers of examples.

    Returns:
      For each bucket, a number for each dataset: 0 for one without such images.
    """
    sizes = [sum(dataset.buckets(split).values()) for dataset in datasets]
    portions = [weight / size for weight, size in zip(weights, sizes, strict=True)] if weights else None
    return {
        bucket: [
            portion * dataset.buckets(split).get(bucket, 0)
            for dataset, portion in zip(datasets, portions or [1] * len(datasets), strict=True)
        ]
        for bucket in count_examples(datasets, split)
    }


def bucket_size(bucket: str) -> tuple[int, int]:
    """Parses the name of a bucket: (height, width) of its images in pixels."""
    height, width = bucket.split("x")
    return int(height), int(width)
