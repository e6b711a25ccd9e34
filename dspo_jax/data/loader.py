"""Encoded shards to batches of NumPy arrays, in an order that follows from the seed and the position only.

Batch k of a run with global batch size B holds positions k*B .. k*B + B - 1 of one endless stream of
examples; each epoch of the stream is a fresh permutation of the split. Process p of n takes the p-th n-th of
every batch, so the number of processes changes where an example is read and not when.

Images of several sizes cannot share a batch: there each bucket is a stream of its own, and batch k is the
next of one of them. With weights each dataset is a stream of its own, permuted epoch by epoch, and the next
example is the next of one of them. Which one follows from the position alone, in either case.

With a curriculum a stream begins with permutations of its easiest examples, and more join stage by stage.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Self

import grain
import numpy as np

from dspo_jax.data.datasets import Dataset, check_weights, count_examples, mixing_weights
from dspo_jax.data.records import HostBatch, Records
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject

# As good as endless. (Grain's own endless stream overflows an index when batches hold one example.)
_EPOCHS = 2**30


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Easy pairs first: those whose images a score tells apart most (Croitoru et al. 2024, arXiv 2405.13637).

    As in the released code the pairs are cut into groups of equal size by the gap of their scores, widest
    first. The first batches come from the first group, and one group more joins after every so many batches,
    until all have; whether the score agrees with the label does not matter.

    Attributes:
      groups: how many groups; at least 2.
      every: batches after which the next group joins; at least 1.
    """

    groups: int
    every: int


class BatchIterator:
    """Iterates over batches; its position can be taken with `get_state` and restored with `set_state`."""

    def __init__(
        self,
        batches: grain.MapDataset,
        identity: JsonObject,
        num_threads: int,
        datasets: Sequence[Dataset],
    ):
        """Takes this process's batches, the facts that decide their order, reading threads and datasets."""
        # The buffer counts batches: enough to cover a slow read, few enough not to matter in memory.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._identity = identity
        self._datasets = datasets

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> HostBatch:
        """Returns the next batch, with `index` [B] int64: the positions of its examples in the stream.

        They are unique over the run and seed what is drawn for an example. With several processes B is the
        process's share.

        Raises:
          FileNotFoundError, UserError: a shard has vanished or was cut short meanwhile, by name.
          OSError: one cannot be read for another reason.
        """
        try:
            return next(self._iterator)
        except UserError:  # of T5's stored states, by the name of their file
            raise
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # errors of array_record and Grain
            for dataset in self._datasets:
                dataset.verify()
            reason = str(error).splitlines()[0]
            folders = ", ".join(str(dataset.folder) for dataset in self._datasets)
            raise OSError(f"{folders}: a shard cannot be read: {reason}; encode the data again") from error

    def get_state(self) -> str:
        """Returns the position as a JSON string: the same in every process, and for any number of them."""
        return json.dumps({**self._identity, "next_batch": self._iterator.get_state()["next_index"]})

    def set_state(self, state: str) -> None:
        """Continues where `get_state` was called: with the first batch that had not been returned then.

        Raises:
          UserError: the state is of other data, weights, seed or batch size, so that continuing would repeat
            or miss examples.
        """
        saved = json.loads(state)
        next_batch = saved.pop("next_batch")
        for key in {**self._identity, **saved}:
            theirs, ours = saved.get(key), self._identity.get(key)
            if theirs != ours:
                raise UserError(
                    f"data position: saved with {key} = {theirs!r}, but this run has {ours!r}; resume with "
                    "the same data, weights, seed and batch size, or start a new workdir"
                )
        self._iterator.set_state({"next_index": next_batch})

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._iterator.close()


def train_batches(
    datasets: Sequence[Dataset],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    curriculum: Curriculum | None = None,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> BatchIterator:
    """Endless shuffled batches. Batches may span two epochs, so every example comes exactly once in each.

    With weights, the epochs are those of each dataset; with buckets, those of each bucket. Buckets come up in
    proportion to their examples, to within 1 %, as do datasets in proportion to their weights.

    Args:
      datasets: from `read_datasets`.
      batch_size: global, over all processes.
      seed: of the permutations.
      weights: the datasets' shares of the examples, up to a factor; none are in proportion to their sizes.
      curriculum: what comes first; not with weights. The scores of all examples are read for it.
      split: which split to read.
      process_index: this process's number, from 0.
      process_count: how many processes share each batch.
      num_threads: that read and decode ahead.

    Raises:
      UserError: the split is unknown or empty in a dataset, the weights are not one for each, the batch
        cannot be shared equally, or a curriculum has fewer examples of a bucket than groups.
      ValueError: no process has this number.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size}: must be a positive multiple of the {process_count} process(es)"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process index {process_index}: must be between 0 and {process_count - 1}")
    check_weights(weights, datasets)
    sizes = [sum(count_examples([dataset], split).values()) for dataset in datasets]
    buckets = count_examples(datasets, split)
    share, seeds = batch_size // process_count, itertools.count(seed)
    batches, bucket_weights = [], []
    for bucket, row in mixing_weights(datasets, split, weights).items():
        records = Records(datasets, split, bucket)
        ends = list(itertools.accumulate(dataset.buckets(split).get(bucket, 0) for dataset in datasets))
        if not weights:  # shuffled as one
            ends, row = ends[-1:], [sum(row)]
        # Streams of numbers of examples. They are read by the batch.
        streams = [
            grain.MapDataset.range(start, end).seed(next(seeds)).shuffle().repeat(_EPOCHS)
            for start, end in itertools.pairwise([0, *ends])
            if start < end
        ]
        if curriculum is not None:
            share_of_bucket = buckets[bucket] / sum(buckets.values())
            gaps = np.abs(records.read_gaps(quiet=process_index > 0))
            early = _early_stages(gaps, curriculum, batch_size * share_of_bucket, seeds)
            streams = [grain.MapDataset.concatenate([*early, *streams])]
        mixed = grain.MapDataset.mix(streams, [drawn for drawn in row if drawn])
        # Process p of n reads the p-th of the n shares that each batch is cut into.
        batches.append(mixed.batch(share, batch_fn=records.read)[process_index::process_count])
        bucket_weights.append(sum(row))
    numbered = grain.MapDataset.mix(batches, bucket_weights).map_with_index(
        partial(_add_index, first=process_index * share, stride=batch_size)
    )
    # Keys that one dataset of one image size does not need are left out, as in the states of older runs.
    identity: JsonObject = {"num_examples": sum(sizes), "seed": seed, "batch_size": batch_size}
    if len(datasets) > 1:
        identity["datasets"] = sizes
    if weights:
        identity["weights"] = [float(weight) for weight in weights]
    if len(buckets) > 1:
        identity["buckets"] = buckets
    if curriculum is not None:
        identity["curriculum"] = dataclasses.asdict(curriculum)
    return BatchIterator(numbered, identity, num_threads, datasets)


def _early_stages(
    gaps: np.ndarray, curriculum: Curriculum, examples_per_batch: float, seeds: Iterator[int]
) -> list[grain.MapDataset]:
    """Makes a stream of numbers of examples for each stage of a curriculum but the last, that of all."""
    if len(gaps) < curriculum.groups:
        raise UserError(
            f"config.data.curriculum_groups = {curriculum.groups}: more than the {len(gaps)} examples of an "
            "image size; lower it"
        )
    # Equal gaps, and those of scores that are missing, stay in stored order; the latter come last.
    widest_first = np.argsort(-np.nan_to_num(gaps, nan=-1.0), kind="stable")
    length = round(curriculum.every * examples_per_batch)
    stages = []
    for group in range(1, curriculum.groups):
        easiest = widest_first[: group * len(gaps) // curriculum.groups]
        stage = grain.MapDataset.source(easiest).seed(next(seeds)).shuffle()
        stages.append(stage.repeat(-(-length // len(easiest)))[:length])
    return stages


def eval_batches(
    datasets: Sequence[Dataset], *, batch_size: int, split: str = "validation", num_threads: int = 2
) -> BatchIterator:
    """Makes one pass over a split in stored order, dataset after dataset or bucket after bucket.

    The last batch (of a bucket) is smaller where the batch size does not divide it.

    Arguments and errors as for `train_batches`, but a dataset without the split is passed over if another has
    it.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: must be at least 1")
    buckets = count_examples(datasets, split)
    batches, first = [], 0
    for bucket, count in buckets.items():
        records = Records(datasets, split, bucket)
        of_bucket = grain.MapDataset.range(count).batch(batch_size, batch_fn=records.read)
        batches.append(of_bucket.map_with_index(partial(_add_index, first=first, stride=batch_size)))
        first += count
    identity = {"num_examples": first, "batch_size": batch_size}
    return BatchIterator(grain.MapDataset.concatenate(batches), identity, num_threads, datasets)


def _add_index(number: int, batch: HostBatch, *, first: int, stride: int) -> HostBatch:
    """Numbers the examples of a batch on from `first`; the same process's next batch is `stride` further."""
    start = first + number * stride
    return {**batch, "index": np.arange(start, start + len(batch["key"]), dtype=np.int64)}
