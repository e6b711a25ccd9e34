"""Speed of writing pairs to shards and of reading shuffled batches, beside TFDS alone.

    python -m benchmarks.input_pipeline --folder /tmp/pairs --pairs 4000

The pairs are those of Stable Diffusion 1.5 at 512 pixels: random moments [2, 64, 64, 8] in float16 and 77
tokens, 128 KiB each. `folder` gets them and must not exist; it is removed at the end. They are read from the
page cache: a disk that gives less than the printed MB/s is slower than that. At the end it says how far ahead
of a training step the reading keeps: --target is the pairs a second of that step, by default those of Stable
Diffusion 1.5 on an H100 at half of its measured peak.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from tensorflow_datasets.core import example_serializer

from benchmarks import measuring
from dspo_jax import cli
from dspo_jax.data import loader, shards
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.pipelines import published

MOMENTS = (2, 64, 64, 8)
BATCH_SIZE, PAIRS_PER_SHARD = 64, 1000
MANIFEST = {
    "model": {"model": "none", "vae_scale_factor": 8, "latent_channels": 4},
    "resolution": 512,
    "source": {"name": "random", "arguments": {}},
}
FEATURES = shards.feature_spec(MOMENTS, published.architecture("sd15").conditioning_shapes(images=2))


def make_pairs(count: int) -> Iterator[dict[str, Any]]:
    """Random pairs; their moments are parts of one array, as drawing them would take longer than writing."""
    draw = np.random.default_rng(0)
    size = int(np.prod(MOMENTS))
    pool = draw.standard_normal(size + count, np.float32).astype(np.float16)
    for i in range(count):
        yield {
            "moments": pool[i : i + size].reshape(MOMENTS),
            "tokens": np.full((1, 77), i, np.int32),
            "micro_conditioning": np.full((2, 6), 512, np.int32),
            "preference": np.float32(1.0),
            "loser_won": np.bool_(False),
            "caption": f"caption of pair {i}",
            "key": f"{i:08d}",
        }


def seconds(work: Callable[[], Any]) -> float:
    """Returns the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(folder: Path, count: int) -> None:
    """Writes pairs as `dspo_jax.encode` does, with sums."""
    pairs, num_shards = make_pairs(count), -(-count // PAIRS_PER_SHARD)
    writer = DatasetWriter(folder, FEATURES, MANIFEST, {"train": num_shards})
    for number in range(num_shards):
        writer.write_shard("train", number, itertools.islice(pairs, PAIRS_PER_SHARD))
    writer.commit()


def serialise(features: tfds.features.FeaturesDict, count: int) -> None:
    """Serialises examples as TFDS does before it writes bytes to a file."""
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    for pair in make_pairs(count):
        serializer.serialize_example(features.encode_example(pair))


def read(folder: Path, count: int, num_threads: int) -> None:
    """Reads so many pairs in batches as a training run does."""
    with closing(
        loader.train_batches(read_datasets(folder), batch_size=BATCH_SIZE, seed=0, num_threads=num_threads)
    ) as batches:
        for _ in range(count // BATCH_SIZE):
            next(batches)


def read_with_tfds(folder: Path, count: int, num_threads: int) -> None:
    """The same with TFDS's own decoding and Grain's own batches."""
    source = tfds.builder_from_directory(folder).as_data_source("train")
    examples = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    with closing(iter(examples.batch(BATCH_SIZE).to_iter_dataset(options))) as batches:
        for _ in range(count // BATCH_SIZE):
            next(batches)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    folder, count = Path(flags.FLAGS.folder), flags.FLAGS.pairs
    size = sum(array.nbytes for array in next(make_pairs(1)).values() if isinstance(array, np.ndarray))

    results: list[measuring.Result] = []

    def report(what: str, pairs: int, taken: float, by: str = "dspo_jax") -> float:
        """Returns pairs a second."""
        print(f"{what:<44}{pairs / taken:9.0f} pairs/s {pairs * size / taken / 1e6:9.0f} MB/s", flush=True)
        device = f"{os.cpu_count()} cores"
        results.append(measuring.make_result(what, by, pairs=pairs, seconds=[taken], device=device))
        return pairs / taken

    per_value = tfds.features.FeaturesDict(
        {
            **FEATURES,
            "moments": tfds.features.Tensor(shape=MOMENTS, dtype=np.float16),
        }
    )
    try:
        report("write", count, seconds(lambda: write(folder, count)))
        few = max(count // 100, 1)
        taken = seconds(lambda: serialise(per_value, few))
        report("serialise alone, TFDS's default encoding", few, taken, "TFDS")
        for threads in range(1, flags.FLAGS.threads + 1):
            taken = seconds(lambda: read(folder, count, threads))  # noqa: B023
            speed = report(f"read, {threads} thread(s)", count, taken)
            taken = seconds(lambda: read_with_tfds(folder, count, threads))  # noqa: B023
            report(f"read with TFDS and Grain, {threads} thread(s)", count, taken, "TFDS and Grain")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"on {os.cpu_count()} cores, reading with {flags.FLAGS.threads} threads keeps ahead of a step of "
        f"{flags.FLAGS.target:g} pairs/s by {speed / flags.FLAGS.target:.0f} x"
    )
    measuring.write(results, flags.FLAGS.json)


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "Where to write the pairs.", required=True)
    flags.DEFINE_integer("pairs", 4000, "How many: 128 KiB each.")
    flags.DEFINE_integer("threads", 4, "Read with 1 to so many threads.", lower_bound=1)
    flags.DEFINE_float("target", 61.0, "Pairs a second of the step that is to be fed.")
    flags.DEFINE_string("json", None, "File for the results.")
    cli.run(main)
