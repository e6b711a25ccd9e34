"""Batches of examples in memory for the training loop."""

import json
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_share, shard_batch
from dspo_jax.training.prompt_stream import EndlessOrder
from dspo_jax.training.task import Batch


class MemoryStream:
    """Endless shuffled batches of examples in memory, on the devices; a `Stream`.

    Batch k of B examples holds positions k * B to k * B + B - 1 of one endless stream, in which every example
    comes once an epoch, as with shards. Several processes must hold the same examples.
    """

    def __init__(self, examples: Mapping[str, np.ndarray], mesh: Mesh, *, batch_size: int, seed: int = 0):
        """Starts at the first batch.

        Args:
          examples: N examples, from `encode_pairs`.
          mesh: the devices.
          batch_size: examples in a batch, over all processes; it may be larger than N.
          seed: of the order.
        """
        self._arrays = dict(examples)
        self._order = EndlessOrder(len(self._arrays["moments"]), seed)
        self._mesh, self._batch_size = mesh, batch_size
        self._next_batch = 0

    def next(self, params: Params) -> Batch:
        """Returns the next batch, with positions of its examples as `index` [B] uint32; ignores `params`."""
        del params
        share, shares = batch_share(self._mesh)
        size = self._batch_size // shares
        positions = self._next_batch * self._batch_size + share * size + np.arange(size)
        self._next_batch += 1
        rows = self._order.at(positions)
        batch = {name: array[rows] for name, array in self._arrays.items()}
        return shard_batch({**batch, "index": positions.astype(np.uint32)}, self._mesh)

    def get_state(self) -> str:
        """Returns the position behind the last batch, as a JSON string."""
        return json.dumps({"next_batch": self._next_batch})

    def set_state(self, state: str) -> None:
        """Continues behind the batch after which `get_state` was called."""
        self._next_batch = json.loads(state)["next_batch"]

    def close(self) -> None:
        """Holds nothing that would have to be released."""
