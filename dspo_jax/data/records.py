"""Examples to the bytes of ArrayRecord files and, as batches, back.

The bytes are those that TFDS makes of an example, and TFDS reads them too. But its layers of Python take
longer, both ways (benchmarks/input_pipeline.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from dspo_jax.data import shards
from dspo_jax.data.caption_states import read_states
from dspo_jax.data.datasets import Dataset, bucket_size
from dspo_jax.monitoring.progress import Progress
from dspo_jax.pipelines.stored import T5_STATES

Example = dict[str, Any]
"""An example with the arrays that `shards.feature_spec` lists, a caption and a key."""

HostBatch = dict[str, Any]
"""`moments` [B, P, h, w, 2C] float16, what the model is conditioned on (`Pipeline.conditioning_shapes`, each
array with an axis B before), `preference` [B] float32, `loser_won` [B] bool, `caption` and `key` lists of B
strings; `scores` [B, P] float32 where all datasets have it, and `t5_states` [B, L, F] float16 where T5's
states are stored; and from shards `row` [B] int64, the number of each example among those of its image
size."""


# Where the shape of moments is not that of the whole dataset, TFDS stores it beside them.
_MOMENTS, _SIZED_MOMENTS, _SIZE = "moments", "moments/value", "moments/shape"
# Examples that are read in parallel, and held in memory, where all of a dataset are gone through.
_READ_AT_ONCE = 1024


def to_record(example: Example, *, sized: bool) -> bytes:
    """Returns the bytes of an example, the same at every call.

    Args:
      example: as `shards.feature_spec` says, arrays in its dtypes.
      sized: whether the dataset has images of several sizes.
    """
    record = tf_example_pb2.Example()
    feature = record.features.feature
    moments = example["moments"]
    feature[_SIZED_MOMENTS if sized else _MOMENTS].bytes_list.value.append(moments.tobytes())
    if sized:
        feature[_SIZE].int64_list.value.extend(moments.shape)
    for name in example.keys() - shards.COMMON_FEATURES:
        feature[name].bytes_list.value.append(example[name].tobytes())
    feature["preference"].float_list.value.append(example["preference"])
    feature["loser_won"].int64_list.value.append(int(example["loser_won"]))
    for name in ("caption", "key"):
        feature[name].bytes_list.value.append(example[name].encode())
    # Protobuf orders the features, which are a map, by a hash otherwise.
    return record.SerializeToString(deterministic=True)


class Records:
    """The examples of one image size in a split of some datasets, numbered on from one to the next."""

    def __init__(self, datasets: Sequence[Dataset], split: str, bucket: str):
        """Reads the schema of the examples, and opens no shard yet.

        Args:
          datasets: what is read; they fit one another (`read_datasets`).
          split: of each that has it.
          bucket: the images' size, "HEIGHTxWIDTH" in pixels.

        Raises:
          FileNotFoundError, UserError: there is no schema, or it is damaged (`shards.read_features`).
        """
        files = [file for dataset in datasets for file in dataset.files(split, bucket)]
        self._source = array_record_data_source.ArrayRecordDataSource(files)
        manifest = datasets[0].manifest
        model = manifest["model"]
        height, width = (side // model["vae_scale_factor"] for side in bucket_size(bucket))
        features = [shards.read_features(dataset.folder) for dataset in datasets]
        # Of datasets with and without scores none are read.
        names = set.intersection(*(set(each) for each in features)) - shards.COMMON_FEATURES
        self._arrays = {name: features[0][name] for name in names}
        self._tables = [table for dataset in datasets if (table := dataset.caption_table) is not None]
        self._moments_shape = (manifest["images_per_example"], height, width, 2 * model["latent_channels"])

    def __len__(self) -> int:
        return len(self._source)

    def read_gaps(self, *, quiet: bool = False) -> np.ndarray:
        """Returns by how much the first image of each example scores more than the last: [n] float32.

        It reads through all files, with a progress bar unless `quiet`.

        Raises:
          KeyError: the datasets do not all have scores.
          OSError, RuntimeError, ValueError: a file cannot be read, or not understood.
        """
        scores = np.empty((len(self), *self._arrays[shards.SCORES].shape), np.float32)
        with Progress("read scores", len(self), active=not quiet) as progress:
            for start in range(0, len(self), _READ_AT_ONCE):
                numbers = range(start, min(start + _READ_AT_ONCE, len(self)))
                for number, record in zip(numbers, self._source.__getitems__(numbers), strict=True):
                    feature = tf_example_pb2.Example.FromString(record).features.feature
                    _fill(scores[number], feature[shards.SCORES].bytes_list.value[0])
                progress.update(numbers.stop)
        return scores[:, 0] - scores[:, -1]

    def read(self, numbers: Sequence[int]) -> HostBatch:
        """Returns the examples of these numbers as a batch, in this order.

        Raises:
          OSError, RuntimeError, ValueError: a file cannot be read, or not understood.
        """
        moments = np.empty((len(numbers), *self._moments_shape), np.float16)
        others = {
            name: np.empty((len(numbers), *feature.shape), feature.np_dtype)
            for name, feature in self._arrays.items()
        }
        preference, loser_won, captions, keys = [], [], [], []
        # All at once: array_record reads and decompresses them in parallel.
        for i, record in enumerate(self._source.__getitems__(numbers)):
            if not record:  # array_record's answer to a file that ends too early
                raise OSError(f"example {numbers[i]} is empty")
            feature = tf_example_pb2.Example.FromString(record).features.feature
            name = _MOMENTS if _MOMENTS in feature else _SIZED_MOMENTS
            _fill(moments[i], feature[name].bytes_list.value[0])
            for name, arrays in others.items():
                _fill(arrays[i], feature[name].bytes_list.value[0])
            preference.append(feature["preference"].float_list.value[0])
            loser_won.append(feature["loser_won"].int64_list.value[0])
            captions.append(feature["caption"].bytes_list.value[0].decode())
            keys.append(feature["key"].bytes_list.value[0].decode())
        return {
            "moments": moments,
            **others,
            **({T5_STATES: read_states(self._tables, captions)} if self._tables else {}),
            "preference": np.asarray(preference, np.float32),
            "loser_won": np.asarray(loser_won, np.bool_),
            "caption": captions,
            "key": keys,
            "row": np.asarray(numbers, np.int64),
        }


def _fill(array: np.ndarray, stored: bytes) -> None:
    array[...] = np.frombuffer(stored, array.dtype).reshape(array.shape)
