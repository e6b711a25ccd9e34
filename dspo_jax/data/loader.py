"""Encoded shards to batches of NumPy arrays, in an order that follows from the seed and the position only.

Batch k of a run with global batch size B holds positions k*B .. k*B + B - 1 of one endless stream of
examples; each epoch of the stream is a fresh permutation of the split. Process p of n takes the p-th n-th of
every batch, so the number of processes changes where an example is read and not when.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grain
import numpy as np
import tensorflow_datasets as tfds

from dspo_jax import spelling
from dspo_jax.data import shards

# As good as endless. (Grain's own endless stream overflows an index when batches hold one example.)
_EPOCHS = 2**30

Batch = dict[str, Any]
"""`moments` [B, P, h, w, 2C] float16, `tokens` [B, E, 77] int32, `micro_conditioning` [B, P, 6] int32,
`preference` [B] float32, `loser_won` [B] bool, `caption` and `key` lists of B strings, and `index` [B] int64,
the example's position in the stream: unique over the run, it seeds what is drawn for the example. With
several processes B is the process's share."""


class BatchIterator:
    """Iterates over batches; its position can be taken with `get_state` and restored with `set_state`."""

    def __init__(
        self, batches: grain.MapDataset, identity: dict[str, Any], num_threads: int, directory: str | Path
    ):
        """Takes this process's batches, what decides their order (JSON-able), how many threads read ahead,
        and from where."""
        # The buffer counts batches: enough to cover a slow read, few enough not to matter in memory.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._identity = identity
        self._directory = directory

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          FileNotFoundError, ValueError: a shard has vanished or was cut short meanwhile, by name.
          OSError: one cannot be read for another reason.
        """
        try:
            return next(self._iterator)
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # what array_record and Grain raise
            shards.verify_shards(self._directory)
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{self._directory}: a shard cannot be read: {reason}; encode the data again"
            ) from error

    def get_state(self) -> str:
        """The position as a JSON string: the same in every process, and for any number of them."""
        return json.dumps({**self._identity, "next_batch": self._iterator.get_state()["next_index"]})

    def set_state(self, state: str) -> None:
        """Continues where `get_state` was called: with the first batch that had not been returned then.

        Raises:
          ValueError: the state is of another dataset, seed or batch size, so that continuing would repeat or
            miss examples.
        """
        saved = json.loads(state)
        next_batch = saved.pop("next_batch")
        for key, ours in self._identity.items():
            if saved.get(key) != ours:
                raise ValueError(
                    f"data position: saved with {key} = {saved.get(key)!r}, but this run has {ours!r}; "
                    "resume with the same data, seed and batch size, or start a new workdir"
                )
        self._iterator.set_state({"next_index": next_batch})

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._iterator.close()


def num_examples(directory: str | Path, split: str) -> int:
    """The number of examples of a split.

    Raises:
      ValueError: the split does not exist or is empty.
    """
    splits = shards.read_manifest(directory)["splits"]
    if split not in splits:
        raise ValueError(f"{directory}: {spelling.unknown('split', split, splits)}")
    count = splits[split]["num_examples"]
    if count == 0:
        raise ValueError(f"{directory}: split {split!r} is empty; encode the data again or choose another")
    return count


def train_batches(
    directory: str | Path,
    *,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> BatchIterator:
    """Endless shuffled batches. Batches may span two epochs, so every example comes exactly once in each.

    Args:
      directory: a dataset made by `dspo_jax.encode`.
      batch_size: global, over all processes.
      seed: of the permutations.
      split: which split to read.
      process_index: this process's number, from 0.
      process_count: how many processes share each batch.
      num_threads: that read and decode ahead.

    Raises:
      FileNotFoundError: no dataset there, or a shard is missing.
      ValueError: the split is unknown or empty, a shard is truncated, or the batch cannot be shared equally.
    """
    examples = _open(directory, split).seed(seed).shuffle().repeat(_EPOCHS)
    identity = {"num_examples": num_examples(directory, split), "seed": seed, "batch_size": batch_size}
    share = _share(examples, batch_size, process_index, process_count)
    return BatchIterator(share, identity, num_threads, directory)


def eval_batches(
    directory: str | Path,
    *,
    batch_size: int,
    split: str = "validation",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> BatchIterator:
    """One pass over a split in stored order; the last batch is smaller where the batch size does not divide
    it.

    Arguments and errors as for `train_batches`. With several processes the last batch is shared out in order,
    so a process's share of it may be smaller than another's, or missing.
    """
    identity = {"num_examples": num_examples(directory, split), "batch_size": batch_size}
    examples = _open(directory, split)
    share = _share(examples, batch_size, process_index, process_count)
    return BatchIterator(share, identity, num_threads, directory)


def _open(directory: str | Path, split: str) -> grain.MapDataset:
    """The split's examples by their number, after a check that no shard is missing or truncated."""
    num_examples(directory, split)
    shards.verify_shards(directory)
    return grain.MapDataset.source(tfds.builder_from_directory(directory).as_data_source(split))


def _share(
    examples: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """This process's part of every batch: of the stream cut into n shares a batch, those number k*n + p."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch size {batch_size}: must be a positive multiple of the {process_count} process(es)"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process index {process_index}: must be between 0 and {process_count - 1}")
    shares = examples.map_with_index(_add_index).batch(batch_size // process_count, batch_fn=_stack)
    return shares[process_index::process_count]


def _add_index(index: int, example: dict[str, Any]) -> dict[str, Any]:
    # TFDS hands scalars over as Python numbers, which would be stacked in float64.
    scalars = {"preference": np.float32(example["preference"]), "loser_won": np.bool_(example["loser_won"])}
    return {**example, **scalars, "index": np.int64(index)}


def _stack(examples: Sequence[dict[str, Any]]) -> Batch:
    batch: Batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        is_text = isinstance(values[0], bytes)
        batch[name] = [value.decode() for value in values] if is_text else np.stack(values)
    return batch
