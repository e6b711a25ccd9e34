"""Batches of encoded shards for the training loop."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dspo_jax.data import loader
from dspo_jax.data.datasets import Dataset
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_share, shard_batch
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Batch


class ShardStream:
    """Batches of encoded shards on the devices; a `Stream`.

    With several processes each reads its share of a batch.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        settings: Settings,
        mesh: Mesh,
        inputs: Sequence[str],
    ):
        """Opens the training split.

        Args:
          datasets: from `read_datasets`.
          settings: batch size, seed and what `config.data` says are read.
          mesh: the devices.
          inputs: the arrays that the loss reads; captions and keys stay on the host.
        """
        share, shares = batch_share(mesh)
        groups = settings.data.curriculum_groups
        self._batches = loader.train_batches(
            datasets,
            batch_size=settings.batch_size,
            seed=settings.seed,
            weights=settings.data.weights,
            curriculum=None if groups == 1 else loader.Curriculum(groups, settings.data.curriculum_every),
            split=settings.data.split,
            process_index=share,
            process_count=shares,
        )
        self._mesh, self._inputs = mesh, inputs

    def next(self, params: Params) -> Batch:
        """Returns the next batch; `params` are not read."""
        del params
        batch = next(self._batches)
        arrays = {name: batch[name] for name in self._inputs}
        arrays["index"] = arrays["index"].astype(np.uint32)
        return shard_batch(arrays, self._mesh)

    def get_state(self) -> str:
        """Returns the position behind the last batch."""
        return self._batches.get_state()

    def set_state(self, state: str) -> None:
        """Continues behind the batch after which `get_state` was called."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._batches.close()
