"""Statistics of an encoded dataset, read without TensorFlow and without the model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError

from dspo_jax import spelling
from dspo_jax.data import shards
from dspo_jax.data.records import Example
from dspo_jax.errors import UserError
from dspo_jax.images.resize import Crop
from dspo_jax.json_files import JsonObject
from dspo_jax.monitoring.progress import Progress
from dspo_jax.pipelines.stored import T5_KEY, count_chunks, count_tokens, read_crops

_READ_AT_ONCE = 64
_SHOWN = 5  # repeated captions that are listed


class Examples:
    """The examples of a split by their number, in the order of the manifest's shards."""

    def __init__(self, directory: Path, split: str, manifest: JsonObject):
        """Opens the shards.

        Raises:
          UserError: they do not hold as many examples as the manifest says.
          OSError: they cannot be opened.
        """
        content = manifest["splits"][split]
        self._where = f"{directory}: split {split!r}"
        self._features = shards.read_features(directory)
        try:
            self._records = ArrayRecordDataSource(
                [str(directory / each["file"]) for each in content["shards"]]
            )
        except (RuntimeError, ValueError) as error:
            raise self._unreadable(error) from error
        if len(self) != content["num_examples"]:
            raise UserError(
                f"{self._where}: {len(self)} examples in its shards, but {shards.MANIFEST} says "
                f"{content['num_examples']}; encode the data again"
            )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, numbers: Sequence[int], *, moments: bool = False) -> Iterator[Example]:
        """Yields examples as `shards.feature_spec` describes them, without their moments unless asked.

        Raises:
          OSError: a shard is damaged.
        """
        # A record can only be read whole, but what is not wanted need not be decoded.
        features = tfds.features.FeaturesDict(
            {name: feature for name, feature in self._features.items() if moments or name != "moments"}
        )
        for start in range(0, len(numbers), _READ_AT_ONCE):
            try:
                records = self._records.__getitems__(numbers[start : start + _READ_AT_ONCE])
                examples = [features.deserialize_example_np(record) for record in records]
            except (RuntimeError, ValueError, DecodeError) as error:
                raise self._unreadable(error) from error
            for example in examples:
                yield {**example, "caption": example["caption"].decode(), "key": example["key"].decode()}

    def _unreadable(self, error: Exception) -> OSError:
        reason = str(error).splitlines()[0]
        return OSError(f"{self._where}: a shard cannot be read: {reason}; --verify says which one")


def describe_manifest(manifest: JsonObject, path: Path) -> JsonObject:
    """Reads from a manifest how the dataset was made, and the size and the rows left out of each split.

    Raises:
      UserError: a key is missing or holds something else.
    """
    try:
        model, source = manifest["model"], manifest["source"]
        report: JsonObject = {
            "model": {"model": model["model"], **model},
            "resolution": manifest["resolution"],
            "images_per_example": manifest["images_per_example"],
            "source": {"name": source["name"], "arguments": dict(source.get("arguments", {}))},
            "encoding": dict(manifest.get("encoding", {})),
            "score": None,
            "caption_states": None,
            "splits": {},
        }
        if made_of := manifest.get(T5_KEY):
            stored = manifest["captions"]
            report["caption_states"] = {
                "captions": stored["count"],
                "length": made_of["length"],
                "computed_in": made_of["dtype"],
                "bytes": sum(file["bytes"] for file in stored["files"]),
            }
        if score := manifest.get("score"):
            report["score"] = {"reward": score["reward"], "version": score["version"], **manifest["select"]}
        for split, content in manifest["splits"].items():
            entry = report["splits"][split] = {
                "num_examples": content["num_examples"],
                "num_shards": len(content["shards"]),
                "bytes": sum(shard["bytes"] for shard in content["shards"]),
                "skipped": dict(content["skipped"]),
                "left_out": dict(content.get("left_out", {})),
            }
            if "buckets" in manifest:
                entry["buckets"] = dict.fromkeys(manifest["buckets"], 0)
                for shard in content["shards"]:
                    entry["buckets"][shard["bucket"]] += shard["num_examples"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged manifest ({type(error).__name__}: {error}); encode the data again"
        ) from error
    return report


class Columns(NamedTuple):
    """N examples without their moments, P images each."""

    captions: list[str]
    keys: list[str]
    num_tokens: np.ndarray  # [N]
    num_places: np.ndarray  # [N], the most tokens that a caption can have
    crops: list[Crop]  # of N * P images
    preferences: np.ndarray  # [N]
    loser_won: np.ndarray  # [N]
    scores: np.ndarray | None  # [N, P]


def read_columns(examples: Examples, split: str, max_examples: int, chunks: int = 1) -> Columns:
    """Reads a split, or of a larger one `max_examples` examples that are spread evenly.

    Their captions are of so many chunks.
    """
    total = len(examples)
    count = min(total, max_examples)
    rows = []
    with Progress(f"read {split}", count) as progress:
        for example in examples.read([i * total // count for i in range(count)]):
            rows.append(example)
            progress.update(len(rows))
    num_tokens, num_places = np.transpose([count_tokens(row, chunks) for row in rows])
    return Columns(
        [row["caption"] for row in rows],
        [row["key"] for row in rows],
        num_tokens,
        num_places,
        [crop for row in rows for crop in read_crops(row)],
        np.asarray([row["preference"] for row in rows]),
        np.asarray([row["loser_won"] for row in rows]),
        np.asarray([row[shards.SCORES] for row in rows]) if shards.SCORES in rows[0] else None,
    )


def summarize_examples(columns: Columns) -> JsonObject:
    """Counts what is in examples.

    Returns:
      JSON-able: `examples_read`; `captions`, their length in tokens with the two that begin and end them;
      `images`, sizes in pixels before they were resized; `preferences`, of pairs only; `labels`, of
      labelled single images; `scores`, where images
      were scored; `duplicate_keys`.
    """
    captions, num_examples = Counter(columns.captions), len(columns.captions)
    crops = columns.crops
    duplicates = {key: count for key, count in Counter(columns.keys).items() if count > 1}
    summary: JsonObject = {
        "examples_read": num_examples,
        "captions": {
            "tokens": _spread(columns.num_tokens),
            "full": int((columns.num_tokens == columns.num_places).sum()),
            "characters": _spread([len(caption) for caption in columns.captions]),
            "empty": sum(not caption.strip() for caption in columns.captions),
            "distinct": len(captions),
            "most_repeated": {text: count for text, count in captions.most_common(_SHOWN) if count > 1},
        },
        "images": {
            "count": len(crops),
            "width": _spread([crop.width for crop in crops]),
            "height": _spread([crop.height for crop in crops]),
            "width_by_height": _spread([crop.width / crop.height for crop in crops]),
            "enlarged": sum(
                crop.target_height > crop.height or crop.target_width > crop.width for crop in crops
            ),
        },
        "duplicate_keys": {"count": len(duplicates), "first": dict(list(duplicates.items())[:_SHOWN])},
    }
    if len(crops) == 2 * num_examples:
        soft = columns.preferences[columns.preferences < 1].round(6)  # as float32, 0.7 lies below 0.7
        edges = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
        bins = [f"{low}-{high}" for low, high in pairwise(edges)]
        summary["preferences"] = {
            "hard": num_examples - len(soft),
            "soft": dict(zip(bins, np.histogram(soft, edges)[0].tolist(), strict=True)),
            "loser_won": int(columns.loser_won.sum()),
        }
    elif (columns.preferences < 1).any():
        summary["labels"] = {
            "liked": int((columns.preferences >= 0.5).sum()),
            "disliked": int((columns.preferences < 0.5).sum()),
            "soft": int(((columns.preferences > 0) & (columns.preferences < 1)).sum()),
        }
    if columns.scores is not None:
        of_images = columns.scores.T.astype(np.float64)
        summary["scores"] = {"winner": _spread(of_images[0])}
        if len(of_images) > 1:  # the last of a list is its worst
            summary["scores"]["loser"] = _spread(of_images[-1])
            gap = of_images[0] - of_images[-1]
            summary["scores"] |= {"gap": _spread(gap), "agree": int((gap > 0).sum())}
    return summary


def summarize_dataset(
    directory: Path, *, split: str | None = None, max_examples: int = 20_000, checksums: bool = False
) -> JsonObject:
    """Reports on an encoded dataset.

    Args:
      directory: the dataset.
      split: only this one; None means all.
      max_examples: of each split that are read; the counts of a larger one are over an even sample.
      checksums: also compare the SHA-256 sums of all shards, which reads every byte.

    Returns:
      JSON-able: what `describe_manifest` returns, with what `summarize_examples` returns added to each split
      that is not empty; and to others than "train" `captions_in_train`, how many `examples` have a caption
      that "train" has too, as far as it was read; and `directory`, `checksums_verified`.

    Raises:
      FileNotFoundError: no dataset there, or a shard is missing.
      UserError: an unknown split, a damaged manifest, a truncated shard or wrong checksum.
      OSError: a shard cannot be read.
    """
    if max_examples < 1:
        raise UserError(f"--max_examples={max_examples}: must be at least 1")
    manifest = shards.read_manifest(directory)
    report = {"directory": str(directory), **describe_manifest(manifest, directory / shards.MANIFEST)}
    splits = report["splits"]
    if split is not None and split not in splits:
        raise UserError(spelling.unknown("--split", split, splits))
    shards.verify_shards(directory, manifest, checksums=checksums)
    report["checksums_verified"] = checksums
    report["splits"] = {name: splits[name] for name in splits if split in (None, name)}
    captions = {}
    for name, content in report["splits"].items():
        if content["num_examples"]:
            chunks = count_chunks(manifest["model"])
            columns = read_columns(Examples(directory, name, manifest), name, max_examples, chunks)
            content.update(summarize_examples(columns))
            captions[name] = columns.captions
    known = set(captions.pop("train", ()))
    for name in captions if known else ():
        report["splits"][name]["captions_in_train"] = {
            "examples": sum(caption in known for caption in captions[name]),
            "train_examples_read": report["splits"]["train"]["examples_read"],
        }
    return report


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    low, median, p95, high = (round(float(each), 3) for each in np.percentile(values, (0, 50, 95, 100)))
    return {"min": low, "median": median, "p95": p95, "max": high}
